"""The cell: one run with its verdict, started by one idempotent and resumable command."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from resdiag.data.dataset import ImageData, open_data
from resdiag.diagnose.verdict import Verdict, judge
from resdiag.runs.config import RunConfig
from resdiag.runs.environment import environment
from resdiag.runs.folder import Run, read_run
from resdiag.runs.lock import Heartbeat
from resdiag.runs.store import RunWriter
from resdiag.trackers.feed import open_feed
from resdiag.trackers.tracker import RunInfo
from resdiag.training.device import warn_of_dtype
from resdiag.training.display import Display, open_display
from resdiag.training.fair_lock import UNSHARED, LockHandle
from resdiag.training.interrupt import Interrupt
from resdiag.training.loop import Training
from resdiag.training.recipe import Request, resolve


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a cell ended with.

    Attributes:
        run: The run as it lies on disk.
        verdict: The conclusion.
        resumed_at: Step it continued from; 0 for a new run.
        signal: Signal that stopped it, 0 for none.
        notes: What could not be watched, in words.
    """

    run: Run
    verdict: Verdict
    resumed_at: int
    signal: int
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to run a cell, apart from what it computes.

    Attributes:
        root: Folder of runs.
        data_root: Folder of downloaded data sets.
        force: Start over even if the run exists.
        allow_drift: Continue in a changed environment.
        quiet: Show no progress.
        trackers: Trackers to tell what is recorded, each as `name:place`.
        patience: Seconds without a beat after which another owner of the run is taken for gone;
            None never does.
        display: Makes what is shown of the progress, from title, steps and steps done.
        thread_lock: Held while data are read and while it trains, where cells share a process.
    """

    root: Path = Path("runs")
    data_root: Path | None = None
    force: bool = False
    allow_drift: bool = False
    quiet: bool = False
    trackers: tuple[str, ...] = ()
    patience: float | None = None
    display: Callable[[str, int, int], Display] | None = None
    thread_lock: LockHandle = UNSHARED


def run_cell(request: Request, options: Options, say: Callable[[str], None]) -> Outcome:
    """Train what is missing of a run, judge it, and write the verdict into its folder.

    Args:
        request: What to run.
        options: Where and how.
        say: Told one line about the data, and one about resuming.

    Raises:
        UsageError: See `resolve`, `open_data` and `RunWriter.open`.
        BusyError: Another process is at this run.
        StorageError: The folder cannot be written.
    """
    request.check()
    with options.thread_lock:  # one reads new data, the others take them from the cache
        data = open_data(request.data, options.data_root)
    say(f"data: {data.note}")
    config = resolve(request, data_name=data.name, train_size=len(data.train_labels))
    if slow := warn_of_dtype(config.device, config.dtype):
        say(f"note: {slow}")
    # entered before there are threads, left after the verdict
    with options.thread_lock.interrupt() as interrupt:
        writer = RunWriter.open(
            options.root,
            config,
            environment=environment(config.device, config.dtype),
            data={**data.identity},
            force=options.force,
            allow_drift=options.allow_drift,
            patience=options.patience,
        )
        with writer, Heartbeat(writer.beat):
            begun, status = writer.committed_step, writer.status
            notes: tuple[str, ...] = ()
            if status in ("done", "diverged"):
                say(f"{writer.folder} is {status} already; --force starts over")
            else:
                say(f"{writer.folder}" + (f" continues at step {begun}" if begun else ""))
                status, notes = _train(writer, config, data, options, interrupt)
            run = read_run(writer.folder)
            verdict = judge(run)
            if run.written_verdict is None or run.status != status:
                writer.finish(status, verdict.to_dict())
                run = read_run(writer.folder)
    return Outcome(run=run, verdict=verdict, resumed_at=begun, signal=interrupt.signal, notes=notes)


def _train(
    writer: RunWriter, config: RunConfig, data: ImageData, options: Options, interrupt: Interrupt
) -> tuple[str, tuple[str, ...]]:
    title = f"{config.variant} d{config.depth}"
    feed = open_feed(options.trackers, RunInfo(name=config.name, config=config.to_dict()))
    open_ = options.display or partial(open_display, quiet=options.quiet)
    display = open_(title, config.steps, writer.committed_step)
    status = "stopped"
    try:
        with options.thread_lock as lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the monitor's warnings are returned instead
            training = Training(config, data, writer, feed.write, thread_lock=lock)
            status = training.run(display, interrupt)
    finally:
        display.close()
        feed.close(status)
    return status, (*training.monitor.warnings, *feed.notes)
