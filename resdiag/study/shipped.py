"""The studies that come with resdiag, and the template of a new one."""

from collections.abc import Mapping
from pathlib import Path

import resdiag

_PACKAGE = Path(resdiag.__file__).parent


def shipped_studies() -> Mapping[str, Path]:
    """The shipped study files by name: the checkout's, or those that the wheel carries."""
    for folder in (_PACKAGE / "study" / "shipped", _PACKAGE.parent / "studies"):
        found = {path.stem: path for path in sorted(folder.glob("*.toml"))}
        if found:
            return found
    return {}


def study_template(name: str) -> str:
    """A commented study file to begin with, for a file of that name, quoted for a shell."""
    return (_PACKAGE / "study" / "template.toml").read_text("utf-8").format(name=name)
