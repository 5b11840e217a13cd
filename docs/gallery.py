"""Trains the runs of the gallery and draws its pictures: `make gallery` (some minutes).

Runs go to build/gallery, and one that is there is not trained again; pictures go to
docs/_static/gallery. The page itself is text that `docs/generate.py` makes without a run.
"""

import contextlib
import io
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from measuredtables import HEAD

from resdiag.plots.kinds import KINDS

HERE = Path(__file__).resolve().parent
PICTURES = HERE / "_static" / "gallery"
RUNS = Path("build") / "gallery"
_WIDE = 600  # pixels of one plot, 86 per inch
_COLOURS = 128  # of a picture: enough for the colour maps, and a third of the bytes


@dataclass(frozen=True)
class Chapter:
    """One subject of the gallery, in all the kinds of plots that it can be drawn in.

    Attributes:
        name: Of its folder of runs and of its pictures.
        title: Heading.
        text: What was trained, and what is to be seen.
        commands: That train it; none if `gallerynets` does.
        left_out: Kinds that cannot be drawn of it, with the reason.
    """

    name: str
    title: str
    text: str
    commands: tuple[str, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def kinds(self) -> list[str]:
        """The kinds of plots drawn, in the order of the reference."""
        missing = dict(self.left_out)
        return [name for name in KINDS if name not in missing]

    @property
    def pairs(self) -> list[list[str]]:
        """The kinds, two in a picture."""
        return [self.kinds[place : place + 2] for place in range(0, len(self.kinds), 2)]

    def picture(self, number: int) -> str:
        """The name of a picture's file, from 1."""
        return f"{self.name}-{number}.png"

    def drawn_by(self, kind: str) -> str:
        """The command that draws one of its plots."""
        runs = f"{RUNS.as_posix()}/{self.name}"
        return (
            f"resdiag plot {kind} {runs}/*"
            if self.commands[1:]
            else (f"resdiag plot {kind} --runs {runs}")
        )


_ONE_RUN = (("depth", "it compares runs of several depths"),)
_NO_ERROR = (("depth", "no error was evaluated, and it compares runs of several depths"),)
_SHORT = "--data digits --recipe short"


def _trains(name: str, *settings: str) -> tuple[str, ...]:
    runs = f"{RUNS.as_posix()}/{name}"
    return tuple(f"resdiag run {setting} {_SHORT} --runs {runs}" for setting in settings)


CHAPTERS = (
    Chapter(
        "exploding", "A run that explodes",
        "Variant b of the paper at depth 56: no normalisation, and the branch as large as the "
        "shortcut. The gradient grows towards block 0 before the first update; after one update, "
        "nothing is finite. The axes follow step 0, the last one that is finite everywhere.",
        _trains("exploding", "--variant elu_pre --depth 56"), _ONE_RUN,
    ),
    Chapter(
        "healthy", "A run that learns",
        "Variant d of the paper at depth 20 for 60 steps: nothing follows the additions, so the "
        "panels of the skip path that would be constant are one sentence.",
        _trains("healthy", "--variant elu --depth 20"), _ONE_RUN,
    ),
    Chapter(
        "transformer", "A transformer",
        "A GPT-like language model of four layers, 60 steps of AdamW: two additions per layer. "
        "Attention has filled markers and MLPs have hollow ones, and the ticks name the modules.",
        (), _NO_ERROR,
    ),
    Chapter(
        "unet", "A U-Net",
        "A U-Net of residual blocks, as in diffusion models, that learns to take noise out of "
        "pictures: each block has a shape of its own, and is a stage.",
        (), _NO_ERROR,
    ),
    Chapter(
        "seeds", "Five seeds at two depths",
        "The original ResNet at depths 8 and 14, five seeds each: lines are medians, bands and "
        "bars reach from the least to the most.",
        _trains("seeds", *(
            f"--variant original --depth {depth} --seed {seed} --steps 20"
            for depth in (8, 14) for seed in range(5)
        )),
    ),
)  # fmt: skip


def gallery_page() -> str:
    """The page: chapters with their pictures and the commands that made them."""
    parts = [
        HEAD.format(source="docs/gallery.py"),
        "# Gallery\n",
        "Every kind of plot, of five trainings. [](reference/plots.md) says how to read each; "
        "a plot that would have nothing to show is refused with the reason. `make gallery` trains "
        "the runs and draws the pictures again, in some minutes on one core.\n",
    ]
    for chapter in CHAPTERS:
        parts.append(f"## {chapter.title}\n\n{chapter.text}\n")
        if chapter.commands:
            parts.append("```sh\n" + "\n".join(_listed(chapter.commands)) + "\n```\n")
        else:
            parts.append(f"Trained by `train_{chapter.name}` in `docs/gallerynets.py`.\n")
        for number, kinds in enumerate(chapter.pairs, start=1):
            questions = " ".join(KINDS[kind].question for kind in kinds)
            parts.append(f"![{questions}](_static/gallery/{chapter.picture(number)})\n")
            commands = "\n".join(chapter.drawn_by(kind) for kind in kinds)
            parts.append(f"```sh\n{commands}\n```\n")
        for kind, why in chapter.left_out:
            parts.append(f"`{kind}` is left out: {why}.\n")
    return "\n".join(parts)


def _listed(commands: tuple[str, ...]) -> Iterator[str]:
    """The commands that train, or the first and the last of many."""
    if len(commands) <= 2:
        yield from commands
    else:
        yield commands[0]
        yield f"# ... and {len(commands) - 2} more, down to"
        yield commands[-1]


def train(chapter: Chapter, root: Path) -> list[Path]:
    """The runs of a chapter, trained where they are not there yet."""
    import gallerynets

    from resdiag.cli.main import app
    from resdiag.runs.folder import find_runs

    folder = root / chapter.name
    for command in chapter.commands:
        words = shlex.split(command)[1:]
        with contextlib.redirect_stdout(io.StringIO()):  # the verdicts
            app.run([*words[: words.index("--runs")], "--runs", str(folder), "--quiet"])
    if not chapter.commands and not find_runs(folder):
        getattr(gallerynets, f"train_{chapter.name}")(folder / chapter.name)
    return find_runs(folder)


def draw_pictures(chapter: Chapter, runs: list[Path]) -> None:
    """Write the pictures of a chapter, two plots beside each other in each."""
    from PIL import Image

    import resdiag
    from resdiag.plots.figurefile import render

    PICTURES.mkdir(parents=True, exist_ok=True)
    for number, kinds in enumerate(chapter.pairs, start=1):
        drawn = [render(resdiag.draw(kind, runs), "png") for kind in kinds]
        plots = [Image.open(io.BytesIO(data)).convert("RGB") for data in drawn]
        heights = [round(plot.height * _WIDE / plot.width) for plot in plots]
        page = Image.new("RGB", (_WIDE * len(plots), max(heights)), "white")
        for place, (plot, height) in enumerate(zip(plots, heights, strict=True)):
            small = plot.resize((_WIDE, height), Image.Resampling.LANCZOS)
            page.paste(small, (place * _WIDE, 0))
        path = PICTURES / chapter.picture(number)
        kept = page.quantize(_COLOURS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        kept.save(path, optimize=True)
        print(f"{path.relative_to(HERE)}: {path.stat().st_size // 1024} KB, {', '.join(kinds)}")


def main(names: list[str]) -> int:
    """Train and draw the chapters of these names, or all."""
    for chapter in CHAPTERS:
        if not names or chapter.name in names:
            draw_pictures(chapter, train(chapter, HERE.parent / RUNS))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
