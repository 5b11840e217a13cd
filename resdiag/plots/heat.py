"""Heat maps of block against recorded step; non-finite cells are hatched, missing ones grey."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm, Normalize
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from resdiag.plots.blockaxis import block_words, most_labels
from resdiag.plots.scale import name_decades, number_label
from resdiag.plots.style import FAINT, MAGNITUDES, NONFINITE
from resdiag.plots.view import Bools, Floats, Record

_HATCH, _MISSING = "////", "0.85"
_COLUMNS = 700  # a figure 7 inches wide has about 900 pixels for them


def draw_heat(
    axes: Axes, record: Record, values: Floats, broken: Bools, label: str, *,
    log: bool = True, limits: tuple[float, float] | None = None, palette: str = MAGNITUDES,
) -> list[Patch]:  # fmt: skip
    """Draw `values` (block, step): block 0 at the bottom, one column per recorded step.

    Of more steps than there are pixels every n-th is drawn, and every non-finite cell.

    Args:
        axes: Where.
        record: The run.
        values: One row per block.
        broken: Non-finite cells, hatched.
        label: Of the colour bar.
        log: Whether colours are logarithmic; zeros then take the darkest colour.
        limits: Values of the first and last colour; None takes them from `values`.
        palette: Name of the colour map.

    Returns:
        Entries of the legend for what is not a colour.
    """
    keys = _keys(broken, np.isnan(values) & ~broken)
    finite = np.isfinite(values) & ~broken
    whole = finite & ~broken.any(axis=0)  # the colours follow the steps that are finite everywhere
    low, high = limits or _limits(values[whole if whole.any() else finite], log=log)
    stride = -(-values.shape[1] // _COLUMNS)
    # what broke once must be seen: whether any of the columns that one stands for did
    columns = np.arange(0, values.shape[1], stride)
    values, broken = values[:, columns], np.logical_or.reduceat(broken, columns, axis=1)
    finite = np.isfinite(values) & ~broken
    shown = np.where(finite, np.clip(values, low, high), np.nan)
    norm = LogNorm(low, high) if log else Normalize(low, high)
    # a mesh cannot be hatched cell by cell: the background is, and holes show it
    axes.patch.set(facecolor="white", edgecolor=FAINT, hatch=_HATCH, linewidth=0)
    missing = ~finite & ~broken
    if missing.any():
        axes.pcolormesh(
            np.ma.masked_array(missing.astype(float), ~missing), cmap="Greys", vmin=0, vmax=5,
            rasterized=True,
        )  # fmt: skip
    cells = axes.pcolormesh(
        np.ma.masked_array(shown, ~finite), norm=norm, cmap=palette, rasterized=True
    )
    axes.set(xlim=(0, shown.shape[1]), ylim=(0, len(shown)))  # block 0 at the bottom
    axes.spines[:].set_visible(False)
    scale = axes.figure.colorbar(cells, ax=axes, label=label, pad=0.015, aspect=18, fraction=0.06)
    scale.outline.set_linewidth(0)
    if scale.solids is not None:
        scale.solids.set_rasterized(True)
    _label_colours(scale, log=log)
    _label_cells(axes, record, stride)
    return keys


def _label_colours(scale: Colorbar, *, log: bool) -> None:
    """Ticks of a colour bar in the notation of the axes."""
    if log:
        name_decades(scale.ax)
    else:
        scale.ax.yaxis.set_major_formatter(FuncFormatter(number_label))


def _limits(values: Floats, *, log: bool) -> tuple[float, float]:
    """Limits of the colour scale that differ even if all values are equal."""
    known = values[values > 0] if log else values
    if not known.size:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = float(known.min()), float(known.max())
    if low == high:
        return (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
    return low, high


def _label_cells(axes: Axes, record: Record, stride: int) -> None:
    """Ticks at the middle of cells, stage boundaries as white lines."""
    steps = record.steps[::stride]
    places = np.arange(0, len(steps), -(-len(steps) // 14))
    axes.set_xticks(places + 0.5, [str(steps[place]) for place in places], rotation=0)
    shared, names = record.names
    most = most_labels(axes, along_y=True)
    blocks = np.arange(
        0, record.n_blocks, max(1, -(-record.n_blocks // min(most, 8 + 24 * bool(names))))
    )
    axes.set_yticks(blocks + 0.5, [names[b] if names else str(b) for b in blocks], rotation=0)
    often = f" (one in {stride} drawn; a non-finite one always)" if stride > 1 else ""
    axes.set(xlabel=f"recorded step{often}", ylabel=block_words(shared))
    axes.grid(False)
    axes.tick_params(labelsize=7, length=2)
    for edge in record.boundaries:
        axes.axhline(edge, color="white", lw=1.2)
        axes.axhline(edge, color="0.3", lw=0.5)
    for spine in axes.spines.values():
        spine.set_visible(True)


def _keys(broken: Bools, missing: Bools) -> list[Patch]:
    keys = []
    if broken.any():
        keys.append(
            Patch(facecolor="white", edgecolor=FAINT, hatch=_HATCH, lw=0, label=f"{NONFINITE} cell")
        )
    if missing.any():
        keys.append(Patch(facecolor=_MISSING, lw=0, label="not available"))
    return keys
