"""`save`: a training that resdiag did not run, as a run folder with its verdict."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from resdiag.diagnose.verdict import judge
from resdiag.runs.environment import environment
from resdiag.runs.watched import as_run, write_run

if TYPE_CHECKING:
    import pandas as pd

    from resdiag.watch.loop.monitor import Monitor

_saved: "WeakKeyDictionary[Monitor, set[Path]]" = WeakKeyDictionary()


def save(
    monitor: "Monitor",
    path: str | os.PathLike[str],
    *,
    model: str = "",
    data: str = "",
    classes: int | None = None,
    curve: "Mapping[str, Sequence[float]] | pd.DataFrame | None" = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write what a monitor has recorded as a run folder, for any model.

    `resdiag.load_frame`, `resdiag.load_run`, `resdiag plot` and `resdiag explain` read it. The same
    monitor may save to the same folder again as the training continues; the run is written anew.

    Args:
        monitor: Open or closed; what was drained from it is not in the folder.
        path: The run's folder.
        model: The model's name in labels; default: the name of its class.
        data: Name of the data.
        classes: Number of classes of a cross-entropy: its logarithm is the loss of guessing.
        curve: Values per step that the monitor does not know, such as
            `{"loss": [...], "test_error": [...]}`, for every step or for those in a column "step".
        seed: Seed of the training, for labels.
        overwrite: Replace a run that something else wrote.

    Returns:
        The folder.

    Raises:
        UsageError: The folder holds another run, or `curve` does not fit.
        StorageError: It cannot be written.

    Example:
        >>> import tempfile, torch, resdiag
        >>> net = resdiag.build_model("elu", 8, seed=0)
        >>> with resdiag.attach(net) as monitor:
        ...     net(torch.ones(4, 3, 32, 32)).square().mean().backward()
        ...     monitor.step()
        >>> folder = resdiag.save(monitor, tempfile.mkdtemp() + "/mine", curve={"loss": [1.5]})
        >>> resdiag.load_run(folder).label, resdiag.load_frame(folder)["block"].tolist()
        ('ResNet', [0, 1, 2])
    """
    run = as_run(monitor, model=model, data=data, classes=classes, curve=curve, seed=seed)
    about, place = monitor.metadata, Path(path).resolve()
    before = _saved.setdefault(monitor, set())
    folder = write_run(
        run,
        path,
        environment=environment(about["device"], about["dtype"]),
        verdict=judge(run).to_dict(),
        overwrite=overwrite or place in before,
    )
    before.add(place)
    return folder
