"""`resdiag probe`: the diagnosis of any model at its weights as they are, without training."""

import json
import sys
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resdiag.cli.options import (
    Argument,
    Blocks,
    DataRoot,
    InputShape,
    Json,
    Model,
    RunsRoot,
    parse_shape,
)
from resdiag.cli.output import say, say_loading
from resdiag.errors import UsageError, unknown
from resdiag.terminal import LABEL, beside, has_colour, width_of_text, wrap

if TYPE_CHECKING:
    from resdiag.probe.result import ProbeResult

_MOST_VALUES = 32


def probe(
    model: Model,
    arg: Argument = None,
    data: Annotated[
        str,
        typer.Option(
            help="As for `resdiag run`, or text:FILE for tokens; default: generated inputs."
        ),
    ] = "",
    weights: Annotated[
        Path | None, typer.Option(help="state_dict file: .safetensors, or from torch.save.")
    ] = None,
    input_shape: InputShape = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Batch size.")] = 8,
    loss: Annotated[str, typer.Option(help="auto, cross-entropy or mean-square.")] = "auto",
    blocks: Blocks = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights, batch and labels.")] = 0,
    curvature: Annotated[
        bool, typer.Option(help="Measure the critical learning rate (slow).")
    ] = True,
    sweep: Annotated[
        str,
        typer.Option(
            help="NAME=V,V,...: instead, measure the model at these values of an argument of its "
            "factory, such as n_layer=2,4,8,16, and fit the law of depth or width."
        ),
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, help="--sweep: models per value.")] = 2,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write the run to.")
    ] = None,
    runs: RunsRoot = Path("runs"),
    data_root: DataRoot = None,
    as_json: Json = False,
) -> None:
    """Diagnose a model from one batch, without training it.

    That is one forward and one backward pass, and a few more for the critical learning rate.
    """
    shape = parse_shape(input_shape)
    if loss not in ("auto", "cross-entropy", "mean-square"):
        raise unknown("loss", loss, ["auto", "cross-entropy", "mean-square"])
    if data.startswith("text:"):
        from resdiag.probe.batch import check_text

        check_text(data)
    elif data:
        from resdiag.data.registry import check_data

        check_data(data)
    if sweep and (weights or blocks):
        raise UsageError("--sweep builds models anew: it takes neither --weights nor --blocks")
    swept = _parse_sweep(sweep) if sweep else None
    say_loading()
    from resdiag.models.source import parse_arguments

    options: dict[str, Any] = {
        "arguments": parse_arguments(arg or []), "shape": shape, "batch_size": batch_size,
        "data": data, "data_root": data_root, "loss": loss,
    }  # fmt: skip
    if swept:
        _sweep(model, *swept, out, runs, {**options, "seeds": seeds}, as_json=as_json)
        return
    from resdiag.probe.probe import probe_model

    found = probe_model(
        model,
        **options,
        weights=weights,
        seed=seed,
        out=out,
        root=runs,
        curvature=curvature,
        blocks=blocks,
    )
    files = found.draw()
    if as_json:
        print(json.dumps({**found.to_dict(), "files": [str(file) for file in files]}))
        return
    for note in found.notes:
        say(f"note: {note}")
    print(_describe(found))
    from resdiag.diagnose.text import render
    from resdiag.probe.result import PLOTS

    print(render(found.verdict, colour=has_colour(sys.stdout)))
    for file in files:
        print(file)
    others = [kind for kind in PLOTS if kind not in {file.stem for file in files}]
    if files and others:
        print(f"other plots: resdiag plot {'|'.join(others)} {found.run.path}")


def _parse_sweep(text: str) -> tuple[str, list[int | float]]:
    """The argument and its values.

    >>> _parse_sweep("n_layer=2,4,8")
    ('n_layer', [2, 4, 8])
    """
    argument, _, listed = text.partition("=")
    try:
        values = [float(word) for word in listed.split(",")]
    except ValueError:
        values = []
    good = argument.isidentifier() and len(set(values)) > 1 and all(0 < v < 1e9 for v in values)
    if not good or len(values) > _MOST_VALUES:
        raise UsageError(
            f"--sweep '{text}' is not NAME=V,V,... with 2 to {_MOST_VALUES} different positive "
            "numbers",
            "for example --sweep n_layer=2,4,8,16",
        )
    return argument, [int(v) if v == int(v) else v for v in values]


def _sweep(
    model: str,
    argument: str,
    values: "list[int | float]",
    out: Path | None,
    runs: Path,
    options: dict[str, Any],
    *,
    as_json: bool,
) -> None:
    """Measure, write the numbers and the plot, and say by which laws the model grows."""
    from resdiag.plots.figurefile import save
    from resdiag.probe.sweep import sweep_model
    from resdiag.runs.files import make_folder, write_file
    from resdiag.runs.watched_config import WatchedConfig

    def tell(value: float, seed: int) -> None:
        say(f"{argument}={value:g}, seed {seed} ...")

    found = sweep_model(model, argument, values, tell=tell, **options)
    settings = {argument: ",".join(map(str, values))}
    folder = out or runs / WatchedConfig(model=model, kind="sweep", settings=settings).name
    make_folder(folder)
    document = found.to_dict()
    write_file(folder / "sweep.json", json.dumps(document, indent=1).encode())
    files = [folder / "sweep.json", *save(found.draw(), folder / "sweep", ["png"])]
    if as_json:
        print(json.dumps({**document, "files": [str(file) for file in files]}))
        return
    names = list(found.trends)
    print(f"{argument:>12} {'blocks':>7} {'seed':>5} " + " ".join(f"{name:>10}" for name in names))
    for point in found.points:
        numbers = " ".join(f"{point.numbers[name]:>10.3g}" for name in names)
        print(f"{point.value:>12g} {point.blocks:>7} {point.seed:>5} {numbers}")
    print()
    for sentence in found.findings():
        print("\n".join(wrap(sentence, width_of_text())))
    for file in files:
        print(file)


def _describe(found: "ProbeResult") -> str:
    numbers, curve = found.summary(), found.curvature
    signal, gradient = numbers["signal"], numbers["gradient"]
    entries = [
        ("signal", f"E[H^2] {signal['first']:.3g} at the first block, {signal['last']:.3g} at the "
         f"last: x{signal['growth_per_block']:.3g} per block"),
        ("depth", _depth_law(numbers["depth_law"])),
        ("gradient", f"first block over last {gradient['ratio_first_to_last']:.3g}: squared "
         f"x{gradient['growth_per_block']:.3g} per block"),
        ("bias", f"B2 {numbers['bias_shift']['first']:.3g} at the first block, "
         f"{numbers['bias_shift']['last']:.3g} at the last"),
        ("skip", f"gain {numbers['skip_gain']['last']:.3g} at the last block"),
    ]  # fmt: skip
    if found.is_plain:
        del entries[-1:]
    if not found.run.blocks:
        del entries[:]
    if curve.reason:
        critical = f"critical learning rate: not measured, {curve.reason}"
    else:
        far = "" if curve.converged else ", not converged: an upper bound"
        critical = (
            f"critical learning rate of plain SGD {curve.critical_lr:.3g} = 2 / {curve.value:.3g}, "
            f"the loss's largest curvature on this batch ({curve.steps} products{far})"
        )
    width = width_of_text()
    head = f"{found.run.path}: {found.batch}, loss {found.loss[1]:.4g} ({found.loss[0]})"
    told = [beside(label, wrap(text, width - LABEL)) for label, text in entries]
    return "\n".join([*wrap(head, width), *chain(*told), *wrap(critical, width)]) + "\n"


def _depth_law(law: "dict[str, Any]") -> str:
    """What the longest stage would do if it were deeper."""
    if law["kind"] == "unknown":
        return f"no law of growth: {law['reason']}"
    twice = f"; with twice the blocks its E[H^2] would grow by x{law['growth_at_twice']:.3g}"
    return (
        f"the longest stage grows by {_WORDS[law['kind']]} (E[F^2] follows E[h^2] to the "
        f"power {law['elasticity']:.2f}){twice if law['kind'] != 'between' else ''}"
    )


_WORDS = {
    "geometric": "a factor per block",
    "additive": "an amount per block",
    "between": "neither a factor nor an amount per block",
}
