"""The command line: parse, call, print. Data on stdout, everything else on stderr."""

import json
import os
import re
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resdiag.errors import ResdiagError, UsageError, unknown

if TYPE_CHECKING:
    from resdiag.runs.folder import Run
    from resdiag.study.cell import Outcome

_EPILOG = (
    "Exit codes: 0 done, also if the network exploded; 1 failed; 2 wrong usage; 74 the disk is "
    "full or failing; 75 busy, or stopped by SIGTERM after a commit; 130 stopped by Ctrl-C. The "
    "same command continues a stopped run."
)
_STOPPED = {int(signal.SIGINT): 130, int(signal.SIGTERM): 75}
"""Exit codes by the signal that stopped a run."""


class App(typer.Typer):
    """A Typer app whose mistakes are one line on stderr, or one JSON object on stdout."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Run the command line and exit with its code."""
        sys.exit(_deliver(self.run(kwargs.pop("args", None))))

    def run(self, args: Sequence[str] | None = None) -> int:
        """Run one command line.

        Args:
            args: Arguments; None takes those of the process.

        Returns:
            The exit code.
        """
        words = list(sys.argv[1:] if args is None else args)
        as_json = "--json" in words
        command = typer.main.get_command(self)
        try:
            code = command.main(args=words, prog_name="resdiag", standalone_mode=False)
        except ResdiagError as error:
            return _fail(error.message, error.hint, error.exit_code, as_json)
        except OSError as error:
            return _fail(str(error), "", 74, as_json)
        except Exception as error:
            # Typer's own errors: wrong options, missing arguments
            if not hasattr(error, "format_message"):
                raise
            message = " ".join(str(error.format_message()).split())
            return _fail(message, "resdiag --help", getattr(error, "exit_code", 2), as_json)
        return code if isinstance(code, int) else 0


def _deliver(code: int) -> int:
    """Flush what was printed; the exit code says if that did not arrive."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # what is left in the buffer would fail once more when Python exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader has seen enough
            return code or 1
        return code or _fail(f"cannot write to standard output: {error}", "", 74, as_json=False)
    return code


def _fail(message: str, hint: str, code: int, as_json: bool) -> int:
    """Report an error and pass its exit code on."""
    if as_json:
        print(json.dumps({"error": message, "hint": hint}))
    else:
        line = f"resdiag: {message}" + (f" ({hint})" if hint else "")
        print(" ".join(line.splitlines()), file=sys.stderr)
    return code


app = App(
    name="resdiag",
    help="Gradient and activation diagnostics for residual networks.",
    epilog=_EPILOG,
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=True,
)
data_app = typer.Typer(
    help="Data sets: what is there, and how to get more.",
    invoke_without_command=True,
    rich_markup_mode=None,
)
app.add_typer(data_app, name="data")


@app.callback()
@data_app.callback()
def _help(context: typer.Context) -> None:
    """Without a command the help is printed, which is not what a script wanted: exit code 2."""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
RunsRoot = Annotated[
    Path, typer.Option("--runs", envvar="RESDIAG_RUNS", help="Folder that holds the runs.")
]
DataRoot = Annotated[
    Path | None,
    typer.Option("--data-root", envvar="RESDIAG_DATA", help="Folder of downloaded data sets."),
]


@app.command()
def run(
    variant: Annotated[
        str, typer.Option(help="Variant id or the paper's letter; see `resdiag variants`.")
    ],
    depth: Annotated[int, typer.Option(help="Weighted layers, 6n+2: 20, 32, 44, 56, 110, ...")],
    recipe: Annotated[
        str, typer.Option(help="probe: the first 60 steps; paper: 164 epochs.")
    ] = "probe",
    data: Annotated[
        str,
        typer.Option(help="auto, cifar10, cifar100, digits, fashion, folder:PATH or parquet:PATH."),
    ] = "auto",
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Epochs; the recipe's milestones scale with them.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step.")] = None,
    warmup: Annotated[int, typer.Option(help="Steps at learning rate 0.01 before the first.")] = 0,
    weight_decay: Annotated[float, typer.Option(help="L2 coefficient on all parameters.")] = 1e-4,
    momentum: Annotated[float, typer.Option(help="Momentum of SGD.")] = 0.9,
    nesterov: Annotated[bool, typer.Option(help="Nesterov's momentum.")] = True,
    augment: Annotated[bool, typer.Option(help="Random crops, and flips where allowed.")] = True,
    width: Annotated[float, typer.Option(help="Multiple of the 16/32/64 channels.")] = 1.0,
    stem_bn: Annotated[bool, typer.Option("--stem-bn", help="BatchNorm in the stem.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and augmentation.")] = 0,
    every: Annotated[int | None, typer.Option(help="Record each EVERY-th step.")] = None,
    record_first: Annotated[
        int | None, typer.Option(help="Record each of the first steps.")
    ] = None,
    commit_every: Annotated[int | None, typer.Option(help="Steps between commits.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 by autocast.")] = "float32",
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="CPU threads of PyTorch.")
    ] = None,
    runs: RunsRoot = Path("runs"),
    data_root: DataRoot = None,
    force: Annotated[bool, typer.Option("--force", help="Start over if the run exists.")] = False,
    allow_drift: Annotated[
        bool,
        typer.Option("--allow-drift", help="Continue although versions or machine changed."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Json = False,
) -> int:
    """Train one variant, or just start to train it, while recording; ends with the verdict."""
    from resdiag.training.recipe import Request
    from resdiag.training.spec import check_data

    asked = locals()
    request = Request(**{name: asked[name] for name in Request.__dataclass_fields__})
    request.check()
    check_data(data)
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device):
        raise unknown("device", device, ["auto", "cpu", "cuda", "cuda:N"])
    # every mistake that can be seen without torch has been answered by now
    from resdiag.study.cell import Options, run_cell

    request = replace(request, device=_find_device(device, threads))
    options = Options(
        root=runs,
        data_root=data_root,
        force=force,
        allow_drift=allow_drift,
        quiet=quiet or as_json,
    )
    outcome = run_cell(request, options, _keep_quiet if quiet else _say)
    _print_outcome(outcome, as_json)
    return _STOPPED[outcome.signal] if outcome.run.status == "stopped" else 0


def _find_device(name: str, threads: int | None) -> str:
    """The device that `--device` means on this machine; sets the number of CPU threads."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind == "cuda" and not int(index or 0) < torch.cuda.device_count():
        raise UsageError(f"device '{name}' is not here", f"{torch.cuda.device_count()} GPUs found")
    return name


def _print_outcome(outcome: "Outcome", as_json: bool) -> None:
    from resdiag.explain.verdict import render
    from resdiag.study.cell import summarise

    summary = summarise(outcome)
    if as_json:
        print(json.dumps(summary))
        return
    for note in outcome.notes:
        _say(f"note: {note}")
    print(_describe(summary))
    print(render(outcome.verdict))


def _describe(summary: dict[str, Any]) -> str:
    """One paragraph of facts before the verdict."""
    test = summary["test_error"]
    words = {"final": "at the end", "best": "at best"}
    measured = [f"{test[key]:.2%} {words[key]}" for key in words if test[key] is not None]
    errors = f", test error {', '.join(measured)}" if measured else ""
    if summary["train_error"] is not None:
        errors += f", training error {summary['train_error']:.2%} over the last epoch"
    return f"{summary['run']}: {summary['status']} after {summary['steps']} steps{errors}\n"


@app.command()
def plot(
    kind: Annotated[str, typer.Argument(help="What to draw; `resdiag plot --list` says all.")] = "",
    paths: Annotated[
        list[Path] | None, typer.Argument(metavar="[RUN]...", help="Runs; the latest if none.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File without ending, or with one.")
    ] = None,
    formats: Annotated[
        str, typer.Option("--format", "-f", help="svg, png, pdf, or several with commas.")
    ] = "svg,png",
    step: Annotated[int | None, typer.Option(help="Recorded step to show by block.")] = None,
    theory: Annotated[bool, typer.Option(help="Overlay what theory predicts.")] = True,
    list_kinds: Annotated[bool, typer.Option("--list", help="List the kinds of plots.")] = False,
    runs: RunsRoot = Path("runs"),
    as_json: Json = False,
) -> None:
    """Draw a plot of one run, or of several on one axis."""
    from resdiag.show.kinds import KINDS, find_kind

    if list_kinds or not kind:
        rows = [(entry.name, entry.question, entry.reading) for entry in KINDS.values()]
        _print_table(("kind", "question", "read"), rows, as_json)
        return
    entry = find_kind(kind)
    stem, endings = _plan_files(out, formats)
    opened = _open_runs(paths, runs)
    from resdiag.show.plots import draw, save

    figure = draw(entry.name, opened, step=step, theory=theory)
    files = save(figure, stem or _default_stem(entry.name, opened), endings)
    if as_json:
        print(json.dumps({"schema": 1, "kind": entry.name, "files": [str(f) for f in files]}))
        return
    for file in files:
        print(file)


def _plan_files(out: Path | None, formats: str) -> tuple[Path | None, list[str]]:
    """Where to draw and in which formats; an ending in `--out` is a format."""
    from resdiag.show.plots import FORMATS

    endings = [word.strip() for word in formats.split(",") if word.strip()]
    if out is not None and out.suffix[1:] in FORMATS:
        out, endings = out.with_suffix(""), [out.suffix[1:]]
    for ending in endings or [""]:
        if ending not in FORMATS:
            raise unknown("format", ending, FORMATS)
    return out, endings


def _default_stem(kind: str, opened: "Sequence[Run]") -> Path:
    """A plot of one run goes into the run's folder, of several into `figures`."""
    if len(opened) == 1:
        return opened[0].path / "figures" / kind
    return Path("figures") / f"{kind}-{len(opened)}-runs"


def _open_runs(paths: Sequence[Path] | None, root: Path) -> "list[Run]":
    """The runs named, or the latest; a missing one is refused before pandas is imported."""
    for path in paths or [root]:
        if next(path.rglob("run.json"), None) is None:
            raise _no_run(path)
    from resdiag.runs.folder import find_runs, latest_run, open_run

    if not paths:
        return [open_run(latest_run(root))]
    found = {path: find_runs(path) for path in paths}
    for path, folders in found.items():
        if not folders:  # what is there is hidden
            raise _no_run(path)
    return [open_run(run) for run in dict.fromkeys(chain(*found.values()))]


def _no_run(path: Path) -> UsageError:
    what = "no run at" if path.exists() else "no such folder:"
    return UsageError(f"{what} {path}", "resdiag run --variant elu_pre --depth 20 makes one")


@app.command()
def explain(
    path: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Latest if none.")] = None,
    runs: RunsRoot = Path("runs"),
    as_json: Json = False,
) -> None:
    """Say what happened in a run: verdict, why, evidence, and what to look at next."""
    opened = _open_runs([path] if path else None, runs)
    if len(opened) > 1:
        raise UsageError(f"{path} holds {len(opened)} runs", f"name one, e.g. {opened[0].path}")
    from resdiag.explain.verdict import judge, render

    verdict = judge(opened[0])
    if as_json:
        print(json.dumps({"schema": 1, "run": str(opened[0].path), "verdict": verdict.to_dict()}))
    else:
        print(render(verdict))


@app.command()
def variants(as_json: Json = False) -> None:
    """Print the table of variants with their sources."""
    from resdiag.models.variants import VARIANTS

    rows = [
        (v.id, v.alias, v.branch, v.after_add, v.stem, v.head or "-",
         "identity, option A" if v.shortcut else "none", v.source)
        for v in VARIANTS.values()
    ]  # fmt: skip
    header = ("id", "alias", "branch F", "after-add", "stem", "head", "shortcut", "source")
    _print_table(header, rows, as_json)


@app.command()
def metrics(
    name: Annotated[str, typer.Argument(help="One metric, or a part of a name.")] = "",
    as_json: Json = False,
) -> None:
    """Print what is recorded: name, formula, unit, site, source, and how to read it."""
    from resdiag.watch.catalog import METRICS

    kinds = {True: "derived", False: "recorded"}
    rows = [
        (m.id, m.formula, m.unit, m.site, kinds[m.derive is not None], m.source, m.reading)
        for m in METRICS.values()
        if name in m.id
    ]
    if not rows:
        raise unknown("metric", name, METRICS)
    header = ("name", "formula", "unit", "site", "kind", "source", "reading")
    _print_table(header, rows, as_json)


@data_app.command("list")
def data_list(data_root: DataRoot = None, as_json: Json = False) -> None:
    """List what `--data` accepts and what is on this disk."""
    from resdiag.training.inventory import list_sets

    _print_table(("data", "state", "place"), list_sets(data_root), as_json)


@data_app.command("get")
def data_get(
    name: Annotated[str, typer.Argument(help="cifar10, cifar100 or fashion.")],
    data_root: DataRoot = None,
) -> None:
    """Download a data set with a progress bar, checked against its published checksum."""
    from resdiag.training.download import download

    print(download(name, data_root))


@app.command()
def version() -> None:
    """Print the version."""
    from resdiag import __version__

    print(__version__)


def _print_table(header: Sequence[str], rows: Iterable[Sequence[str]], as_json: bool) -> None:
    """A table that fits the terminal; with `--json` a list of objects."""
    listed = [list(row) for row in rows]
    if as_json:
        print(json.dumps([dict(zip(header, row, strict=True)) for row in listed]))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(*header, box=SIMPLE_HEAD, expand=False)
    for row in listed:
        table.add_row(*row)
    if not console.is_terminal:
        console.width = 250
    console.print(table, markup=False)


def _say(line: str) -> None:
    """One line of progress or notice."""
    print(line, file=sys.stderr, flush=True)


def _keep_quiet(line: str) -> None:
    """No line at all."""
