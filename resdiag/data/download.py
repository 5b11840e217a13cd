"""`resdiag data get NAME`: download a published set; a failure is reported in one line."""

import errno
import http.client
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from resdiag.data.places import data_roots
from resdiag.data.registry import DATASETS
from resdiag.errors import ResdiagError, StorageError, unknown

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}
_SILENCE = 60.0  # seconds without a byte before a download is given up


def download(name: str, root: Path | None = None) -> Path:
    """Download and unpack a data set where `open_data` finds it, with a progress bar.

    Nothing is downloaded again if it is already there and complete.

    Args:
        name: A row of `registry.DATASETS` that has a download.
        root: The folder; None: the first of the places of `data_roots`.

    Returns:
        The folder.

    Raises:
        UsageError: The name is unknown.
        StorageError: The folder cannot be written.
        ResdiagError: The network or the server failed, or the file is not the published one.
    """
    known = {row.name: row.download for row in DATASETS.values() if row.download}
    if name not in known:
        raise unknown("download", name, known)
    folder = data_roots(root)[0]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        with _timeout():
            known[name](folder)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        if isinstance(error, OSError) and error.errno in _DISK:
            raise _unwritable(folder, error) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ResdiagError(
            f"cannot download {name}: {reason}",
            hint=f"try again, or copy the set into {folder} from another computer; "
            "`--data digits` needs no download",
        ) from error
    return folder


@contextmanager
def _timeout() -> Iterator[None]:
    """A dead server must not hang the command for ever; torchvision sets no timeout itself."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SILENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _unwritable(folder: Path, error: OSError) -> StorageError:
    return StorageError(f"{folder}: {error.strerror}", hint="choose another --data-root")
