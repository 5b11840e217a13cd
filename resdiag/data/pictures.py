"""Encoded image files to arrays: bounded, in threads, with every unreadable file counted."""

import io
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from resdiag.data.dataset import SIDE
from resdiag.errors import UsageError

SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"]
)
"""What counts as an image file, by its name."""

MAX_BYTES = 64 * 2**20
"""Largest image file that is read."""

MAX_PIXELS = 50_000_000
"""Largest image that is decoded; a few bytes of PNG can claim any size."""

MAX_COUNT = 1_000_000
"""Most images of one set: they are all kept in memory, 3 kB each."""

_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")  # never EPS: it runs a program
_CHUNK = 512  # encoded files in memory at a time
_PATIENCE = 1.0  # seconds before a progress bar appears
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Picture:
    """An encoded image and its place: `key` sorts it, `content` is its bytes or its file."""

    key: tuple[str | int, ...]
    content: bytes | Path


@dataclass(frozen=True)
class Decoded:
    """Images of (3, 32, 32) by key, and how many of them had another size."""

    images: dict[tuple[str | int, ...], NDArray[np.uint8]]
    resized: int


def decode(content: bytes | Path) -> tuple[NDArray[np.uint8], bool]:
    """One image as RGB (3, 32, 32), and whether it had to be resized.

    Raises:
        Exception: Whatever Pillow's decoders meet in a damaged file.
    """
    if isinstance(content, Path):
        if content.stat().st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES:,} bytes")
        content = content.read_bytes()
    with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} is more than {MAX_PIXELS:,} pixels")
        resize = image.size != (SIDE, SIDE)
        rgb = image.convert("RGB")
    if resize:
        rgb = rgb.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1)), resize


def decode_all(pictures: Iterable[Picture], where: Path, total: int | None = None) -> Decoded:
    """Decode in threads (Pillow releases the interpreter lock); a repeated key: the last counts.

    Args:
        pictures: What to decode; read lazily, a few hundred at a time.
        where: What to call them in errors.
        total: How many there are, where known.

    Raises:
        UsageError: A file cannot be decoded (naming the first, and how many), or there are more
            than `MAX_COUNT`.
    """
    images: dict[tuple[str | int, ...], NDArray[np.uint8]] = {}
    resized, broken = 0, []
    for picture, result in _track(_decode_in_threads(pictures), "decoding images", total):
        if isinstance(result, str):
            broken.append(f"{'/'.join(map(str, picture.key))} ({result})")
        else:
            images[picture.key], again = result
            resized += again
        if len(images) > MAX_COUNT:
            raise UsageError(f"{where}: more than {MAX_COUNT:,} images")
    if broken:
        number = f"{len(broken):,} of {len(broken) + len(images):,}"
        raise UsageError(
            f"{where}: {number} image files cannot be read; the first is {broken[0]}",
            hint="repair or delete them: leaving them out silently would change the data",
        )
    return Decoded(images, resized)


_Result = tuple[NDArray[np.uint8], bool] | str


def _decode_in_threads(pictures: Iterable[Picture]) -> Iterator[tuple[Picture, _Result]]:
    rest = iter(pictures)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        while chunk := list(islice(rest, _CHUNK)):
            yield from zip(chunk, pool.map(_attempt, chunk), strict=True)


def _attempt(picture: Picture) -> _Result:
    """The decoded image, or one line that says why it cannot be decoded."""
    try:
        return decode(picture.content)
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        reason = str(error).splitlines() or [type(error).__name__]
        return "not an image" if isinstance(error, UnidentifiedImageError) else reason[0]


def _track(items: Iterable[_Item], what: str, total: int | None = None) -> Iterator[_Item]:
    """Yield the items; draw a bar on a terminal once this has taken a second."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = TextColumn(what), BarColumn(), MofNCompleteColumn()
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(what, total=total)
    begin, started = time.monotonic(), False
    try:
        for item in items:
            yield item
            bar.advance(task)
            if not started and time.monotonic() - begin > _PATIENCE:
                bar.start()
                started = True
    finally:
        bar.stop()
