# mypy: ignore-errors
"""What `kernels` launches, in Triton's language; imported where they are launched."""

import triton
import triton.language as tl


@triton.jit
def read(
    x, parts, rows, channels, inner, by_sample, by_channel, by_position,
    TALL: tl.constexpr, WIDE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Sums, sums of squares and non-finite elements per channel over STEPS tiles of rows.

    A row is a sample and a position. Accumulated in float64, as the plain operations do.
    """
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    total = tl.zeros((WIDE,), tl.float64)
    square = tl.zeros((WIDE,), tl.float64)
    broken = tl.zeros((WIDE,), tl.float64)
    for step in range(STEPS):
        row = (tl.program_id(0) * STEPS + step) * TALL + tl.arange(0, TALL)
        place = row // inner * by_sample + row % inner * by_position
        there = (row < rows)[:, None] & (column < channels)[None, :]
        at = x + place[:, None] + (column * by_channel)[None, :]
        value = tl.load(at, mask=there, other=0.0).to(tl.float64)
        total += tl.sum(value, 0)
        square += tl.sum(value * value, 0)
        broken += tl.sum((value - value != 0).to(tl.float64), 0)
    cell = parts + (tl.program_id(0) * channels + column) * 3
    tl.store(cell, total, mask=column < channels)
    tl.store(cell + 1, square, mask=column < channels)
    tl.store(cell + 2, broken, mask=column < channels)


@triton.jit
def finish(parts, out, count, channels, rows, samples, WIDE: tl.constexpr, IS_NORM: tl.constexpr):
    """Add up the parts: means, second moment, broken share; or norm and broken share."""
    # whole numbers go in: Python's floats would come as float32
    height = tl.full((), rows, tl.float64)
    elements = height * channels
    column = tl.arange(0, WIDE)
    there = column < channels
    total = tl.zeros((WIDE,), tl.float64)
    square = tl.zeros((WIDE,), tl.float64)
    broken = tl.zeros((WIDE,), tl.float64)
    for part in range(count):
        cell = parts + (part * channels + column) * 3
        total += tl.load(cell, mask=there, other=0.0)
        square += tl.load(cell + 1, mask=there, other=0.0)
        broken += tl.load(cell + 2, mask=there, other=0.0)
    if IS_NORM:
        tl.store(out, tl.sqrt(tl.sum(square, 0) * tl.full((), samples, tl.float64)))
        tl.store(out + 1, tl.sum(broken, 0) / elements)
    else:
        tl.store(out + column, total / height, mask=there)
        tl.store(out + channels, tl.sum(square, 0) / elements)
        tl.store(out + channels + 1, tl.sum(broken, 0) / elements)
