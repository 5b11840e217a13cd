"""The table of data sets: one row says everything that is known of one before it is read.

`--data` and its help, `resdiag data list` and `get`, study files, the estimate of a study's cost,
`auto` and the reference page follow from the rows. No torch here: a wrong name is answered at once.
"""

import os
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from resdiag.data.places import check_tree, data_roots, find_folder
from resdiag.errors import UsageError, unknown
from resdiag.registry import Registry

if TYPE_CHECKING:
    from resdiag.data.dataset import Source


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """One data set, or one form in which users bring their own (`takes_path`).

    Attributes:
        name: What `--data` calls it; with `takes_path` it is written `name:PATH`.
        description: One line for people.
        read: A function, or "module:function", which is imported only when the data are read. It is
            called with the folder that `find` returns, the user's path, or None for embedded data,
            returns a `Source`, and refuses damaged files with a `UsageError`.
        licence: Under which the data are published.
        flip: Whether a mirrored image keeps its class, so that training may mirror images.
        train: Training images if known before reading, else 0; likewise `test` and `classes`.
        test: See `train`.
        classes: See `train`.
        folders: Names of the set's folder below a data root, the preferred one first.
        elsewhere: One more place to look, for example that of a system package.
        download: Downloads and unpacks the set into the data root that it is given.
        other_source: Another way to get it, for the hint of an error.
        takes_path: Whether the user names a path.
        check: Is called with what was written after `--data` and with the path; refuses it with a
            `UsageError` if a quick look shows that it is wrong.
        auto: Priority when `--data auto` chooses among the sets on this disk; 0: never chosen.
    """

    name: str
    description: str
    read: "str | Callable[..., Source]"
    licence: str = ""
    flip: bool = True
    train: int = 0
    test: int = 0
    classes: int = 0
    folders: tuple[str, ...] = ()
    elsewhere: Path | None = None
    download: Callable[[Path], object] | None = None
    other_source: str = ""
    takes_path: bool = False
    check: Callable[[str, Path], None] | None = None
    auto: int = 0

    @property
    def spec(self) -> str:
        """What is written after `--data`."""
        return f"{self.name}:PATH" if self.takes_path else self.name

    def find(self, root: Path | None) -> Path | None:
        """The folder that holds the set on this disk, or None."""
        found = find_folder(self.folders, root) if self.folders else None
        at = self.elsewhere
        return found or (at if at is not None and at.is_dir() else None)

    def state(self, root: Path | None) -> str:
        """Either "yours", "built in", "on disk" or "missing"."""
        if self.takes_path:
            return "yours"
        if not self.folders and self.elsewhere is None:
            return "built in"
        return "on disk" if self.find(root) else "missing"

    def missing(self, root: Path | None) -> UsageError:
        """The error if the set is not on this disk: where it was looked for, how to get it."""
        get = f"`resdiag data get {self.name}` downloads it, or " if self.download else ""
        other = f"{self.other_source}, or " if self.other_source else ""
        put = f"put the folder {' or '.join(self.folders)} there (--data-root, $RESDIAG_DATA)"
        return UsageError(f"{self.name} is not on disk; {self.searched(root)}", get + other + put)

    def searched(self, root: Path | None) -> str:
        """The places in which `find` looks, in words."""
        places = [*data_roots(root), *([self.elsewhere] if self.elsewhere else [])]
        return f"searched {', '.join(map(str, places))}"

    def load(self, place: Path | None) -> "Source":
        """Read the set from a place on disk; None for embedded data."""
        read = pkgutil.resolve_name(self.read) if isinstance(self.read, str) else self.read
        source: Source = read(place)
        return source


def _from_torchvision(name: str) -> Callable[[Path], object]:
    """A download by a class of torchvision, which checks the published MD5."""

    def download(folder: Path) -> object:
        from torchvision import datasets

        return getattr(datasets, name)(folder, train=True, download=True)

    return download


_ROWS = (
    DataSet(
        name="digits",
        description="1,797 handwritten digits; always available",
        read="resdiag.data.builtin:read_digits",
        licence="CC BY 4.0; Alpaydin & Kaynak 1998",
        flip=False,
        train=1_437,
        test=360,
        classes=10,
        auto=1,
    ),
    DataSet(
        name="cifar10",
        description="60,000 photographs of 10 kinds of animals and vehicles",
        read="resdiag.data.builtin:read_cifar10",
        licence="none stated; Krizhevsky 2009",
        train=50_000,
        test=10_000,
        classes=10,
        folders=("cifar-10-batches-bin", "cifar-10-batches-py"),
        download=_from_torchvision("CIFAR10"),
        auto=2,
    ),
    DataSet(
        name="cifar100",
        description="60,000 photographs with 100 fine labels",
        read="resdiag.data.builtin:read_cifar100",
        licence="none stated; Krizhevsky 2009",
        train=50_000,
        test=10_000,
        classes=100,
        folders=("cifar-100-binary", "cifar-100-python"),
        download=_from_torchvision("CIFAR100"),
    ),
    DataSet(
        name="fashion",
        description="Fashion-MNIST: 70,000 photographs of clothes, padded from 28x28",
        read="resdiag.data.builtin:read_fashion",
        licence="MIT; Xiao, Rasul, Vollgraf 2017",
        train=60_000,
        test=10_000,
        classes=10,
        folders=("FashionMNIST/raw",),
        elsewhere=Path("/usr/share/datasets/fashion-mnist"),
        download=_from_torchvision("FashionMNIST"),
        other_source="`apt-get install dataset-fashion-mnist`",
    ),
    DataSet(
        name="folder",
        description="train/<class>/*, test/<class>/*, or a tar archive of that tree",
        read="resdiag.data.tree:read_tree",
        takes_path=True,
        check=check_tree,
    ),
    DataSet(
        name="parquet",
        description="train-*.parquet, test-*.parquet with img and label",
        read="resdiag.data.parquet:read_parquet",
        takes_path=True,
    ),
)
DATASETS = Registry("data set", _ROWS, letters="a-z0-9_-")
"""Every data set by its name: the built-in ones and those that were registered."""

_RESERVED = ("auto", "text")  # `--data auto`, and `text:FILE` of `resdiag probe`


def register_dataset(row: DataSet) -> None:
    """Add a data set, which `--data` and `open_data` accept from then on in this process.

    Raises:
        RegistrationError: The name is taken or not of lower-case letters, digits, `_` and `-`.
    """
    DATASETS.add(row, taken=_RESERVED)


def unregister_dataset(name: str) -> None:
    """Remove a data set that was registered.

    Raises:
        RegistrationError: No data set has this name, or it is built in.
    """
    DATASETS.remove(name)


def known_specs(*, auto: bool = True) -> tuple[str, ...]:
    """What `--data` accepts, `auto` first where it is wanted."""
    return (*(["auto"] if auto else []), *(row.spec for row in DATASETS.values()))


def find_dataset(spec: str, *, auto: bool = True) -> tuple[DataSet, str]:
    """The row that a `--data` other than `auto` names, and the user's path or "".

    Args:
        spec: What was written after `--data`.
        auto: Whether the error lists `auto` among what is accepted.

    Raises:
        UsageError: There is no such set, or a path is missing or not expected.
    """
    name, colon, path = spec.partition(":")
    row = DATASETS.get(name)
    if row is None or row.takes_path != bool(path) or (colon and not path):
        raise unknown("data", spec, known_specs(auto=auto))
    return row, path


def check_data(spec: str) -> None:
    """Refuse a `--data` that cannot be opened, as far as a quick look tells.

    Raises:
        UsageError: Unknown name, or a path that is missing, unreadable or empty.
    """
    if spec == "auto":
        return
    row, name = find_dataset(spec)
    if not row.takes_path:
        return
    try:
        path = Path(name).expanduser()
        if not path.exists():
            raise UsageError(f"{spec}: no such file or folder", f"expected {row.description}")
        if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
            raise UsageError(f"{spec}: not readable by this user")
        if row.check:
            row.check(spec, path)
    except (OSError, RuntimeError, ValueError) as error:  # no permission, no home, a name too long
        raise UsageError(f"{spec}: cannot be read: {error}") from error


def choose_auto(root: Path | None) -> tuple[DataSet, str]:
    """The set that `--data auto` takes on this disk, and its note, with {} for the set's own."""
    rows = sorted((row for row in DATASETS.values() if row.auto), key=lambda row: -row.auto)
    taken = next(i for i, row in enumerate(rows) if row.state(root) != "missing")
    if taken == 0:
        return rows[0], f"auto: {{}}; `--data {rows[-1].name}` is the small set"
    absent = ", ".join(
        f"{r.name} on disk (`resdiag data get {r.name}` downloads it)" for r in rows[:taken]
    )
    return rows[taken], f"auto: no {absent}, taking {{}}"


def list_sets(root: Path | None) -> list[tuple[str, str, str]]:
    """Rows (data, state, place) for `resdiag data list`."""
    return [
        (row.spec, state := row.state(root), _place(row, state, root)) for row in DATASETS.values()
    ]


def _place(row: DataSet, state: str, root: Path | None) -> str:
    if state == "on disk":
        return str(row.find(root))
    return row.searched(root) if state == "missing" else row.description


def known_sizes(spec: str) -> tuple[int, int] | None:
    """Training and test images of a set, if they are known without reading it."""
    row = DATASETS.get(spec)
    return (row.train, row.test) if row is not None and row.train else None
