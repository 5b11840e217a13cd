"""What is made once for a whole run of the tests, whatever number of workers run them."""

import fcntl
import os


def once(tmp_path_factory, name, make):
    """A folder that `make(folder)` filled; the worker that comes first makes it, others wait.

    Args:
        tmp_path_factory: pytest's fixture.
        name: Tells it from other folders.
        make: Called with the folder, which is there and empty.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the folder of a worker is in that of the run
        base = base.parent
    folder = base / name
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            (folder / "made").touch()
    return folder
