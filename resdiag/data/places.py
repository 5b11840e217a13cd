"""Where downloaded data sets and the cache lie on this computer."""

import os
from collections.abc import Iterable
from pathlib import Path


def data_roots(root: Path | None = None) -> list[Path]:
    """Folders to search for downloaded sets: `root` alone, or $RESDIAG_DATA, ./data, ~/data."""
    if root is not None:
        return [root.expanduser()]
    named = os.environ.get("RESDIAG_DATA")
    first = [Path(named).expanduser()] if named else []
    return [*first, Path("data"), _home() / "data"]


def find_folder(names: Iterable[str], root: Path | None) -> Path | None:
    """The first existing folder of these names, roots before names, or None."""
    names = list(names)
    candidates = (place / name for place in data_roots(root) for name in names)
    return next((path for path in candidates if path.is_dir()), None)


def cache_root() -> Path:
    """$RESDIAG_CACHE, or `resdiag` in the user's cache folder ($XDG_CACHE_HOME or ~/.cache)."""
    named = os.environ.get("RESDIAG_CACHE")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else _home() / ".cache") / "resdiag"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # a container's user may have none
        return Path("/nonexistent")
