"""Trains the four arms of the transformers' story and writes what was recorded: results.json.

    python studies/transformers/measure.py    # about a quarter of an hour on one CPU core

An arm that is in the file already is not trained again.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from networks import GPT, draw_batch, read_text

import resdiag

RESULTS = Path(__file__).parent / "results.json"
STEPS, SEEDS, RATE = 150, (0, 1), 1e-3
SETS = {"core": 1, "attention": 5, "experts": 5}
FAST = 30.0
"""Factor on the learning rate of the queries and keys that are made to run away,"""
ILL = 2
"""and the index of their unit: the second layer's attention."""


@dataclass(frozen=True)
class Arm:
    """One training, ill or cured.

    Attributes:
        name: What it is called.
        factor: On the learning rate of queries and keys in unit `ILL`.
        qk_norm: Whether queries and keys are normalised.
        balance: Of the mixtures of experts; None for perceptrons.
    """

    name: str
    factor: float = 1.0
    qk_norm: bool = False
    balance: float | None = None


ARMS = (
    Arm("fast q and k", FAST),
    Arm("fast q and k, QK norm", FAST, qk_norm=True),
    Arm("experts, no balance", balance=0.0),
    Arm("experts, balanced", balance=0.003),
)


def train(arm: Arm, seed: int) -> dict[str, object]:
    """One training: what was found, and the curves of its blocks."""
    model, text = GPT(seed, qk_norm=arm.qk_norm, balance=arm.balance), read_text()
    attention = model.units[ILL].inner
    fast = [*attention.query.parameters(), *attention.key.parameters()]
    others = [p for p in model.parameters() if not any(p is one for one in fast)]
    groups = [{"params": others}, {"params": fast, "lr": arm.factor * RATE}]
    optimizer = torch.optim.AdamW(groups, RATE)
    losses = []
    with resdiag.attach(model, optimizer, metrics=SETS) as monitor:
        for step in range(STEPS):
            letters, next_ones = draw_batch(text, seed, step)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(letters).flatten(0, 1), next_ones.flatten())
            loss.backward()
            optimizer.step()
            monitor.step(loss)
            losses.append(round(loss.item(), 4))
    verdict = resdiag.judge(monitor)
    return {
        "arm": arm.name,
        "seed": seed,
        "verdict": verdict.name,
        "block": verdict.block,
        "step": verdict.step,
        "summary": verdict.summary,
        "findings": [[one.name, one.block, one.step] for one in verdict.findings],
        "losses": losses,
        "curves": dict(_curves(monitor)),
    }


def _curves(monitor: resdiag.Monitor) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """By column, the recorded numbers of each block and the steps that they belong to."""
    frame = monitor.to_frame()
    for column in ("attention_logit", "attention_entropy_share", "expert_dead", "expert_entropy"):
        if column in frame:
            table = frame.pivot(index="step", columns="block", values=column)
            table = table.dropna(how="all").dropna(axis=1, how="all").round(4)
            yield (
                column,
                {"step": table.index.tolist()}
                | {str(block): table[block].tolist() for block in table},
            )


def main() -> None:
    """Train what is not in the file yet, and write after each training."""
    torch.set_num_threads(1)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    known = {(one["arm"], one["seed"]) for one in found}
    for seed in SEEDS:
        for arm in ARMS:
            if (arm.name, seed) not in known:
                found.append(train(arm, seed))
                RESULTS.write_text(json.dumps(found) + "\n")
                print(found[-1]["arm"], seed, found[-1]["summary"])


if __name__ == "__main__":
    main()
