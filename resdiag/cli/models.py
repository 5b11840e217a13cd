"""Options of the commands that take any model."""

from typing import Annotated

import typer

from resdiag.errors import UsageError

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="torchvision:NAME, timm:NAME, transformers:NAME, resdiag:VARIANT-DEPTH or "
        "package.module:factory.",
    ),
]
Argument = Annotated[
    list[str] | None,
    typer.Option("--arg", help="key=value argument of the factory or configuration; repeatable."),
]
InputShape = Annotated[
    str | None,
    typer.Option(help="Shape of one sample, e.g. 3,64,64, or number of tokens."),
]


def parse_shape(text: str | None) -> tuple[int, ...] | None:
    """The numbers of `--input-shape`; 3,64,64 or 3x64x64.

    Raises:
        UsageError: It is not a list of positive numbers.

    >>> parse_shape("3,64,64")
    (3, 64, 64)
    """
    if text is None:
        return None
    words = text.lower().replace("x", ",").strip("() ").split(",")
    if not all(word.strip().isdigit() and int(word) > 0 for word in words):
        raise UsageError(f"--input-shape '{text}' is not a list of positive numbers", "3,64,64")
    return tuple(int(word) for word in words)
