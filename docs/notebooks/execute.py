"""Run the notebooks of the documentation, and keep what they show: `make notebooks`."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent


def execute(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of running all its cells, in a folder."""
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in book.cells:
        cell.metadata.pop("execution", None)  # times of day
    return book


if __name__ == "__main__":
    for notebook in sorted(HERE.glob("*.ipynb")):
        nbformat.write(execute(notebook, HERE), notebook)
        print(notebook.relative_to(Path.cwd()))
