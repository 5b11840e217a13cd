"""`resdiag data`: data sets on this disk, and how to get more."""

from typing import Annotated

import typer

from resdiag.cli.app import group
from resdiag.cli.options import DataRoot, Json
from resdiag.cli.output import print_table
from resdiag.data.registry import DATASETS, list_sets

data_app = group("List and download data sets.")


@data_app.command("list")
def data_list(data_root: DataRoot = None, as_json: Json = False) -> None:
    """List the data sets that `--data` accepts, and which are on this disk."""
    print_table(("data", "state", "place"), list_sets(data_root), as_json)


@data_app.command("get")
def data_get(
    name: Annotated[
        str,
        typer.Argument(help=f"{', '.join(row.name for row in DATASETS.values() if row.download)}."),
    ],
    data_root: DataRoot = None,
) -> None:
    """Download a data set and check its published checksum."""
    from resdiag.data.download import download

    print(download(name, data_root))
