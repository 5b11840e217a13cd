"""`resdiag compare`: runs side by side."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resdiag.cli.opening import open_runs
from resdiag.cli.options import Json
from resdiag.cli.output import print_table
from resdiag.errors import UsageError
from resdiag.terminal import width_of_text, wrap

if TYPE_CHECKING:
    from resdiag.diagnose.outcomes import Outcome

_WORDS = {
    "loss": "last loss",
    "test_error": "test error, last",
    "best_test_error": "test error, best",
    "train_error": "training error",
    "growth": "growth of E[H^2] per block",
    "gradient_ratio": "worst gradient ratio",
}


def compare(
    paths: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Two run folders or more.")],
    as_json: Json = False,
) -> None:
    """Show runs side by side: settings that differ, and outcomes.

    The outcome is the verdict, the last loss and errors, the growth of the signal per block at the
    first recorded step, the worst ratio of the first block's gradient to the last block's, and the
    first step from which on the losses differ.
    """
    opened = open_runs(paths, Path())
    if not 2 <= len(opened) <= len(ascii_uppercase):
        raise UsageError(
            f"{len(opened)} runs: two are needed at least, and {len(ascii_uppercase)} at most",
            "resdiag runs lists what there is",
        )
    from resdiag.diagnose.outcomes import PARTED, find_differences, find_outcome, find_parting

    outcomes = [find_outcome(run) for run in opened]
    differ, parting = find_differences(opened), find_parting(opened)
    if as_json:
        print(json.dumps(_document(outcomes, differ, parting)))
        return
    letters = ascii_uppercase[: len(opened)]
    for letter, run in zip(letters, opened, strict=True):
        print(f"{letter}  {run.path}")
    print()
    if differ:
        rows = [(name, *map(_word, values)) for name, values in differ.items()]
        print_table(("setting", *letters), rows, False)
    else:
        print("No setting differs.")
    print()
    print_table(("outcome", *letters), _list_outcomes(outcomes), False)
    print()
    for line in wrap(_describe_parting(parting, letters, PARTED), width_of_text()):
        print(line)


def _document(
    outcomes: "Sequence[Outcome]",
    differ: dict[str, list[Any]],
    parting: tuple[int, list[float]] | None,
) -> dict[str, object]:
    from resdiag.diagnose.finding import plain

    step, losses = parting or (None, None)
    return {
        "schema": 1,
        "runs": [outcome.to_dict() for outcome in outcomes],
        "settings": plain(differ),
        "losses_part": {"step": step, "losses": plain(losses)},
    }


def _list_outcomes(outcomes: "Sequence[Outcome]") -> list[tuple[str, ...]]:
    rows = [
        ("verdict", *(_describe_verdict(one) for one in outcomes)),
        ("status", *(f"{one.run.status} after {one.run.steps} steps" for one in outcomes)),
    ]
    for name, words in _WORDS.items():
        cells = [_number(name, one) for one in outcomes]
        if any(cells):
            rows.append((words, *cells))
    return rows


def _describe_verdict(one: "Outcome") -> str:
    """The name, with step and block if it has them."""
    found = one.verdict
    where = [f"step {found.step}"] * (found.step is not None)
    where += [f"block {found.block}"] * (found.block is not None)
    return found.name + (f" ({', '.join(where)})" if where else "")


def _number(name: str, one: "Outcome") -> str:
    value = one.numbers()[name]
    if math.isnan(value) and (name != "loss" or one.run.status != "diverged"):
        return ""
    if name.endswith("error"):
        return f"{value:.2%}"
    at = f" at step {one.gradient_step}" if name == "gradient_ratio" else ""
    return f"{'x' if name == 'growth' else ''}{value:.3g}{at}"


def _word(value: object) -> str:
    """A setting in a table; of a checksum the first digits."""
    if value is None or value == "":
        return "-"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text[:12] if len(text) in (40, 64) and text.isalnum() else text


def _describe_parting(parting: tuple[int, list[float]] | None, letters: str, share: float) -> str:
    if parting is None:
        return f"No loss differs by more than {share:.0%} in a step that the runs have in common."
    step, losses = parting
    each = ", ".join(f"{letter} {loss:.4g}" for letter, loss in zip(letters, losses, strict=True))
    return f"The losses differ by more than {share:.0%} for the first time at step {step}: {each}."
