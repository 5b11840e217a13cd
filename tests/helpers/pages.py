"""Reading the pages of the documentation."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


DOCS = ROOT / "docs"


def _load_generator():
    sys.path.insert(0, str(DOCS))  # as of a script that is run: it has a module beside it
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = _load_generator()
tables = sys.modules["measuredtables"]  # the generator's
