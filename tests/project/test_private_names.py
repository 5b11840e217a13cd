"""Tests ask through public names: how often they reach for a private one of ours, file by file."""

import ast
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
LIMIT = 20
THEIRS = {
    # of PyTorch, matplotlib, IPython, pytest and the standard library
    "_C", "_dynamo", "_exit", "_forward_hooks", "_forward_pre_hooks", "_left_title",
    "_len_torch_function_stack", "_local_scalar_dense", "_optimizer_step_post_hooks",
    "_optimizer_step_pre_hooks", "_post_accumulate_grad_hooks", "_repr_html_", "_repr_png_",
    "_unsafe_preserve_version_counter", "_version",
}  # fmt: skip
REPLACING = ("setattr", "delattr", "getattr", "hasattr")
KNOWN = {
    "benchmarks/test_performance_page.py": [
        "_backends_table",
        "_deep_peers_table",
        "_slices_table",
    ],
    "data/test_data.py": ["_rows"],
    "probe/test_probe.py": ["_build", "_build"],
    "runs/test_reading.py": ["_read_for", "_spread", "_spread"],
    "runs/test_store.py": ["_GRACE", "_GRACE"],
    "study/test_study_spec.py": ["_name"],
    "theory/test_theory.py": ["_back_post", "_back_pre", "_through", "_uncorrected"],
    "training/test_graphs.py": ["_REPORT_EVERY_S"],
    "watch/test_refusals.py": ["_headers", "_save"],
}


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name not in THEIRS


def private_names(tree):
    """What a file reads, replaces or imports of ours that is private."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("resdiag"):
            yield from (alias.name for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in REPLACING:
            names = [a.value for a in node.args if isinstance(a, ast.Constant)]
            yield from (name for name in names if isinstance(name, str) and is_private(name))


def count_by_file():
    found = {}
    for path in sorted(TESTS.rglob("*.py")):
        names = sorted(private_names(ast.parse(path.read_text("utf-8"))))
        if names:
            found[path.relative_to(TESTS).as_posix()] = names
    return found


def test_the_uses_of_private_names_are_these_and_fewer_than_the_limit():
    found = count_by_file()
    assert found == KNOWN
    assert sum(map(len, found.values())) < LIMIT


def test_every_way_of_reaching_for_a_private_name_is_seen():
    source = (
        "from resdiag.plots.heat import _a\nfrom torch import _d\n"
        "run._b\nself._e\nrun.__dict__\nnet._version\nmonkeypatch.setattr(run, '_c', 1)"
    )
    assert sorted(private_names(ast.parse(source))) == ["_a", "_b", "_c"]
