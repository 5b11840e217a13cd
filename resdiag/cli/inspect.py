"""`resdiag inspect`: the blocks of any model."""

import json
import sys
from typing import Annotated

import typer

from resdiag.cli.options import Argument, Blocks, InputShape, Json, Model, parse_shape
from resdiag.cli.output import say_loading
from resdiag.terminal import open_console


def inspect(
    model: Model,
    arg: Argument = None,
    input_shape: InputShape = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Size of the example batch.")] = 1,
    blocks: Blocks = None,
    show_all: Annotated[
        bool, typer.Option("--all", help="Print every block, also repeated ones.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print a model's residual blocks.

    Each with its stage, name, shortcut, what follows the addition, and number of parameters.
    """
    shape = parse_shape(input_shape)
    say_loading()
    from resdiag.models.inspection import inspect as inspect_model
    from resdiag.models.source import parse_arguments

    found = inspect_model(
        model, parse_arguments(arg or []), shape=shape, batch_size=batch_size, blocks=blocks
    )
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    from resdiag.plots.anatomy import draw_tree

    open_console(sys.stdout).print(draw_tree(found, fold=not show_all), markup=False)
