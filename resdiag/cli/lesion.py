"""`resdiag lesion`: change one thing about a model's residual blocks and train a few steps."""

import json
from pathlib import Path
from typing import Annotated

import typer

from resdiag.cli.options import Argument, InputShape, Json, Model, parse_shape
from resdiag.cli.output import print_entry, say_loading
from resdiag.interventions.table import models_interventions


def lesion(
    model: Model,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[LESION]...",
            help=f"{', '.join(models_interventions())}; default: all that apply to the model.",
        ),
    ] = None,
    arg: Argument = None,
    block: Annotated[
        list[str] | None,
        typer.Option(help="Index or name of a block to change; repeatable; default: all blocks."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="state_dict file to start from; default: new weights.")
    ] = None,
    claim: Annotated[
        str, typer.Option(help="Finding that the lesion should remove, e.g. grows_at_init.")
    ] = "",
    input_shape: InputShape = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Batch size.")] = 8,
    lr: Annotated[float, typer.Option(help="Learning rate of SGD with momentum 0.9.")] = 0.01,
    seeds: Annotated[
        int, typer.Option(min=1, max=100, help="Number of seeds (weights and batches).")
    ] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Training steps per arm.")] = 5,
    as_json: Json = False,
) -> None:
    """Change one thing about a model's blocks and see what it does.

    A few training steps are compared with and without the change.
    """
    say_loading()
    from resdiag.diagnose.finding import plain
    from resdiag.interventions.compare import try_on_model
    from resdiag.models.source import parse_arguments

    keys = [int(key) if key.isdigit() else key for key in block or []]
    effects = try_on_model(
        model,
        names or [],
        parse_arguments(arg or []),
        blocks=keys or None,
        shape=parse_shape(input_shape),
        batch_size=batch_size,
        weights=weights,
        lr=lr,
        claim=claim,
        seeds=seeds,
        steps=steps,
    )
    if as_json:
        found = [plain(effect.to_dict()) for effect in effects]
        print(json.dumps({"schema": 1, "model": model, "lesions": found}))
        return
    print_entry("Lesion", [effect.describe(lr) for effect in effects])
