"""`resdiag variants`, `resdiag metrics` and `resdiag version`: what is built in or registered."""

from typing import Annotated

import typer

from resdiag.cli.options import Json
from resdiag.cli.output import print_table
from resdiag.errors import unknown


def variants(as_json: Json = False) -> None:
    """Print the table of variants with their sources."""
    from resdiag.models.variants import VARIANTS

    rows = [
        (v.id, v.alias, v.branch, v.after_add, v.stem, v.head or "-",
         "identity, option A" if v.shortcut else "none", v.source)
        for v in VARIANTS.values()
    ]  # fmt: skip
    header = ("id", "alias", "branch F", "after-add", "stem", "head", "shortcut", "source")
    print_table(header, rows, as_json)


def metrics(
    name: Annotated[str, typer.Argument(help="Name of a metric, or part of a name.")] = "",
    as_json: Json = False,
) -> None:
    """Print the metrics: formula, unit, source, how to read them."""
    from resdiag.catalog.custom import known_metrics

    known = known_metrics()
    kinds = {True: "derived", False: "recorded"}
    rows = [
        (m.id, m.formula, m.unit, m.site, kinds[m.derive is not None], m.source, m.reading)
        for m in known.values()
        if name in m.id
    ]
    if not rows:
        raise unknown("metric", name, known)
    header = ("name", "formula", "unit", "site", "kind", "source", "reading")
    print_table(header, rows, as_json)


def version() -> None:
    """Print the version."""
    from resdiag import __version__

    print(__version__)
