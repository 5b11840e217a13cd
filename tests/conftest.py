"""Options and fixtures that every test file shares."""

import pytest
from hypothesis import HealthCheck, settings

# workers share the cores: how long an example takes says nothing about the code
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device of the tests that take one, e.g. cuda")
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="minutes long; run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def device(request):
    """The device that was asked for; the test is skipped where it is not there."""
    import torch

    name = request.config.getoption("--device")
    if name.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(name)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """One thread per worker: workers share the cores, and sums come out in one order."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same random state, whatever ran before it."""
    import random

    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global generator is what a training loop may use
    torch.manual_seed(0)


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    """A function after whose call the numbers of no tensor lie in host memory."""

    def pretend():
        import sys

        for name, module in list(sys.modules.items()):
            if name.startswith("resdiag.watch.") and hasattr(module, "on_host"):
                monkeypatch.setattr(module, "on_host", lambda device: False)

    return pretend


@pytest.fixture
def call(capsys):
    """Run one command line in this process: exit code, stdout, stderr."""

    from resdiag.cli.main import app

    def run(*args):
        capsys.readouterr()
        code = app.run([str(arg) for arg in args])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def pictures(request, tmp_path):
    """Where a test writes pictures: a folder of the test file in `$RESDIAG_SCREENSHOTS`."""
    import os
    from pathlib import Path

    root = os.environ.get("RESDIAG_SCREENSHOTS")
    folder = Path(root) / request.path.stem.removeprefix("test_") if root else tmp_path / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def driver():
    """A browser without a window."""
    from browser import open_browser

    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def axe():
    """The script of axe, which looks for what some people cannot read or reach."""
    from browser import read_axe

    return read_axe()
