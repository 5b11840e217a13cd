"""What `--data` accepts and which of it is on this disk."""

from pathlib import Path

from resdiag.data.places import data_roots, find_folder

_FOLDERS = {
    "cifar10": ("cifar-10-batches-bin", "cifar-10-batches-py"),
    "cifar100": ("cifar-100-binary", "cifar-100-python"),
    "fashion": ("FashionMNIST/raw",),
}


def list_sets(root: Path | None) -> list[tuple[str, str, str]]:
    """Rows (data, state, place) for `resdiag data list`."""
    rows = [("digits", "built in", "1,797 handwritten digits; always available")]
    for name, folders in _FOLDERS.items():
        found = find_folder(folders, root)
        state = "on disk" if found else "missing"
        places = ", ".join(str(place) for place in data_roots(root))
        rows.append((name, state, str(found) if found else f"looked in {places}"))
    rows.append(("folder:PATH", "yours", "train/<class>/*, test/<class>/*, or a tar of it"))
    rows.append(("parquet:PATH", "yours", "train-*.parquet, test-*.parquet with img and label"))
    return rows
