"""`resdiag data get NAME`: fetch a published set through torchvision, checked by its MD5."""

import errno
import http.client
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from resdiag.data.places import data_roots
from resdiag.errors import ResdiagError, StorageError, unknown

DOWNLOADS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion": "FashionMNIST"}
"""What can be downloaded, and torchvision's class for it."""

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}
_SILENCE = 60.0  # seconds without a byte before a download is given up


def download(name: str, root: Path | None = None) -> Path:
    """Download and unpack a data set where `open_data` finds it, with torchvision's progress bar.

    Nothing is downloaded again if it is already there and complete.

    Args:
        name: cifar10, cifar100 or fashion.
        root: The folder; None: the first of the places of `data_roots`.

    Returns:
        The folder.

    Raises:
        UsageError: The name is unknown.
        StorageError: The folder cannot be written.
        ResdiagError: The network or the server failed, or the file is not the published one.
    """
    if name not in DOWNLOADS:
        raise unknown("download", name, DOWNLOADS)
    folder = data_roots(root)[0]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"{folder}: {error.strerror}", hint="choose another --data-root"
        ) from error
    try:
        with _timeout():
            _fetch(DOWNLOADS[name], folder)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise _explain(name, folder, error) from error
    return folder


def _fetch(dataset: str, folder: Path) -> None:
    from torchvision import datasets

    getattr(datasets, dataset)(folder, train=True, download=True)


@contextmanager
def _timeout() -> Iterator[None]:
    """A dead server must not hang the command for ever; torchvision sets no timeout itself."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SILENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _explain(name: str, folder: Path, error: Exception) -> ResdiagError:
    if isinstance(error, OSError) and error.errno in _DISK:
        return StorageError(f"{folder}: {error.strerror}", hint="choose another --data-root")
    reason = " ".join(str(error).split()) or type(error).__name__
    return ResdiagError(
        f"cannot download {name}: {reason}",
        hint=f"try again, or copy the set into {folder} from another computer; "
        "`--data digits` needs no download",
    )
