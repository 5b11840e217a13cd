"""Labels beside shuffled ones: what they cost to memorise, and whether neighbours share them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from resdiag.probe.experiments.experiment import Experiment, count
from resdiag.probe.experiments.one_batch import Training
from resdiag.probe.experiments.task import Task

PERMUTATIONS = 999
CHANCE = 0.01
"""Share of permutations that do as well, up to which labels are said to belong to the inputs."""


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """A permutation test: whether samples that are nearest to each other share their label.

    Attributes:
        agreement: Share of samples whose nearest other sample has the same label.
        expected: The same for shuffled labels, mean over permutations.
        p: Share of permutations with the same agreement or more, itself counted.
    """

    agreement: float
    expected: float
    p: float


def compare_neighbours(task: Task, seed: int) -> Neighbours | None:
    """Test whether labels and inputs of a batch have to do with each other.

    Distances are Euclidean, of inputs of mean 0 and standard deviation 1 in each number. Source of
    the test: Friedman and Rafsky 1983, Annals of Statistics 11(2), 377-391, with one neighbour.

    Args:
        task: Its batch.
        seed: Of the permutations.

    Returns:
        None where the first input is not floating, or the labels are not one integer a sample.
    """
    inputs, labels, n = task.first_input, task.target, task.samples
    if n is None or n < 4 or inputs is None or not inputs.is_floating_point():
        return None
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.numel() != n:
        return None
    x, y = inputs.detach().double().cpu().reshape(n, -1), labels.detach().cpu().reshape(-1)
    if len(y.unique()) < 2 or not bool(torch.isfinite(x).all()):
        return None
    x = (x - x.mean(0)) / x.std(0, correction=0).clamp_min(1e-12)
    nearest = torch.cdist(x, x).fill_diagonal_(torch.inf).argmin(1)
    generator = torch.Generator().manual_seed(seed)
    orders = torch.stack([torch.randperm(n, generator=generator) for _ in range(PERMUTATIONS)])
    shuffled = y[orders]
    agreements = (shuffled == shuffled[:, nearest]).double().mean(1)
    own = float((y == y[nearest]).double().mean())
    better = int((agreements >= own - 1e-12).sum())
    return Neighbours(
        agreement=own, expected=float(agreements.mean()), p=(better + 1) / (PERMUTATIONS + 1)
    )


def describe_labels(
    task: Task, own: Training | None, shuffled: Training | None, reason: str, seed: int
) -> Experiment:
    """The experiment of the labels.

    Args:
        task: Its batch.
        own: The training that learned the batch; None if there is none.
        shuffled: The same with shuffled labels; None if it was not done.
        reason: Why it was not done.
        seed: Of the permutations.
    """
    near, title = compare_neighbours(task, seed), "Shuffled"
    if shuffled is None and near is None:
        return Experiment(name="shuffled_labels", title=title, reason=reason)
    texts, numbers = list[str](), dict[str, object]()
    rules_out, remarks = list[tuple[str, str]](), list[tuple[str, str]]()
    if shuffled is not None and own is not None:
        texts.append(f"{shuffled.describe()}; with the batch's own labels {_outcome(own)}")
        numbers |= {"own": own.to_dict(), "shuffled": shuffled.to_dict()}
    elif reason:
        texts.append(f"not trained with shuffled labels: {reason}")
    if near is not None:
        numbers["neighbours"] = {
            "agreement": near.agreement, "expected": near.expected, "p": near.p
        }  # fmt: skip
        texts.append(
            f"{near.agreement:.0%} of the samples have the label of their nearest neighbour, "
            f"{near.expected:.0%} by chance (p = {near.p:.2g})"
        )
    if near is not None and near.p <= CHANCE:
        rules_out.append(("labels", "The labels belong to the inputs: "
                          f"{near.agreement:.0%} of the samples have that of their nearest "
                          f"neighbour, {near.expected:.0%} by chance."))  # fmt: skip
    elif own is not None and shuffled is not None and own.outcome == shuffled.outcome:
        words = "memorised as well" if own.outcome == "memorised" else "learned as well"
        remarks.append(("labels", f"Shuffled labels are {words}, in {_steps(shuffled)}, the "
                        f"batch's own in {own.done}: this batch does not tell whether its labels "
                        "fit."))  # fmt: skip
    return Experiment(
        name="shuffled_labels", title=title, text="; ".join(texts), numbers=numbers,
        rules_out=tuple(rules_out), open=tuple(remarks),
    )  # fmt: skip


def _steps(training: Training) -> str:
    return count(training.done, "step")


def _outcome(training: Training) -> str:
    if training.outcome == "memorised":
        return f"it took {_steps(training)}"
    return f"loss {training.losses[-1]:.3g} after {_steps(training)}"
