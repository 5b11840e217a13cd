"""`resdiag predict`: what will happen to a variant, before training."""

import json
import math
from typing import TYPE_CHECKING, Annotated

import typer

from resdiag.cli.options import DataRoot, Json
from resdiag.cli.output import say, say_loading
from resdiag.terminal import beside, width_of_text, wrap

if TYPE_CHECKING:
    from resdiag.probe.forecast import Forecast


def predict(
    variant: Annotated[
        str, typer.Option(help="Variant id or the paper's letter; see `resdiag variants`.")
    ],
    depth: Annotated[int, typer.Option(help="Weighted layers, 6n+2: 20, 32, 44, 56, 110, ...")],
    lr: Annotated[float, typer.Option(help="Learning rate of the first step.")] = 0.1,
    data: Annotated[
        str, typer.Option(help="Data set of the batch, as for `resdiag run`.")
    ] = "auto",
    batch_size: Annotated[int, typer.Option(help="Batch size.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights and the batch.")] = 0,
    seeds: Annotated[
        int, typer.Option(min=1, max=100, help="Number of seeds from there on, for the scatter.")
    ] = 1,
    width: Annotated[float, typer.Option(help="Factor on the 16/32/64 channels.")] = 1.0,
    stem_bn: Annotated[bool, typer.Option("--stem-bn", help="BatchNorm in the stem.")] = False,
    branch_scale: Annotated[
        float,
        typer.Option(help="Factor on the last weights of each branch at initialisation."),
    ] = 1.0,
    data_root: DataRoot = None,
    as_json: Json = False,
) -> None:
    """Predict a run before training, by theory and on one batch."""
    from resdiag.data.registry import check_data
    from resdiag.models.variants import count_blocks, find_variant

    find_variant(variant)
    count_blocks(depth)
    check_data(data)
    say_loading()
    from resdiag.probe.forecast import forecast

    found = forecast(
        variant, depth, lr=lr, data=data, data_root=data_root, batch_size=batch_size, seed=seed,
        seeds=seeds, width=width, stem_bn=stem_bn, branch_scale=branch_scale,
    )  # fmt: skip
    if as_json:
        for name, pair in found.pairs().items():
            if math.isnan(pair.theory):
                say(f"note: {name}: {pair.note}")
        print(json.dumps(found.to_dict()))
        return
    print(_describe(found))


def _describe(found: "Forecast") -> str:
    lines, width = [f"{'':18}{'theory':>10}{'measured':>11}"], width_of_text()
    for name, pair in found.pairs().items():
        numbers = [("-" if math.isnan(x) else f"{x:.3g}") for x in (pair.theory, pair.measured)]
        label = f"{name:18}{numbers[0]:>10}{numbers[1]:>11}"
        known = [x for x in pair.seeds if math.isfinite(x)]
        spread = f"{min(known):.3g} to {max(known):.3g} over seeds; " if known else ""
        lines += beside(label, wrap(spread + pair.note, width - len(label) - 2), len(label) + 2)
    outcome = (f"outcome: {found.fate}; {found.why}", f"law: {found.basis}")
    return "\n".join([*lines, *(line for text in outcome for line in wrap(text, width, "  "))])
