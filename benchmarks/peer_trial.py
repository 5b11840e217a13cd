"""One tool's part of `peers.py`, in a process of its own: prints one JSON document.

python benchmarks/peer_trial.py TOOL checks|time|deep REPETITIONS BATCH_SIZE
"""

import copy
import itertools
import json
import math
import random
import re
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peer_tools import TOOLS, DebugOverflow, Nothing, Tool, Values
from torch import nn
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock

from resdiag.training.cpu import disable_malloc_trim

TOLERANCE = 1e-3
"""Relative error above which a reported number counts as wrong."""
MOVED = 100.0
"""Factor against the healthy network above which a number has moved; 1000 is planted."""
PLANTED = "layer2.1"
"""The block of resnet18 that is made to explode."""
DEEP = ("original", 110, 128, 2)
"""Variant, depth, batch and threads of the measurement in depth, as of `overhead.py`."""
_SCALES = ("std", "rms", "norm", "norm per sample")
_BREAKS = re.compile(r"explod|explos|very large|non-?finite|overflow|inf/nan|nan=", re.IGNORECASE)

Make = Callable[[], nn.Module]


# -- the networks ----------------------------------------------------------------------------------


def stock() -> nn.Module:
    """The resnet18 of torchvision as it comes: in-place ReLU and `out += identity`."""
    torch.manual_seed(2)
    return resnet18(num_classes=10)


def without_inplace(model: nn.Module) -> nn.Module:
    """The same network, but nothing overwrites anything: plain autograd on it is the truth."""

    def forward(block: BasicBlock, x: torch.Tensor) -> torch.Tensor:
        out = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x)))))
        return block.relu(out + (x if block.downsample is None else block.downsample(x)))

    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
        if isinstance(module, BasicBlock):
            module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]
    return twin


def untouched() -> nn.Module:
    """`stock` without in-place operations, for the tools that need that."""
    return without_inplace(stock())


def planted(healthy: Make, factor: float) -> Make:
    """A resnet18 with one block's branch made `factor` times as large."""

    def make() -> nn.Module:
        model = healthy()
        with torch.no_grad():
            model.get_submodule(PLANTED).bn2.weight.mul_(factor)
        return model

    return make


def deep(variant: str, depth: int = 56) -> Make:
    """A network of this project; `elu_pre` explodes in depth, `original` does not."""

    def make() -> nn.Module:
        from resdiag.models.resnet import build_model

        return build_model(variant, depth, seed=0)

    return make


def batch(size: int, pixels: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(size, 3, pixels, pixels, generator=generator)
    return images, torch.randint(10, (size,), generator=generator)


# -- training --------------------------------------------------------------------------------------


class Loop:
    """A training loop with a tool in it, as its documentation says."""

    def __init__(self, tool: Tool, make: Make, lr: float = 1e-3) -> None:
        model = make()
        self.tool, self.done = tool, 0
        self.optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        self.model = tool.begin(model, self.optimizer)
        self.loss = tool.loss()

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        tool, step = self.tool, self.done
        self.optimizer.zero_grad()
        tool.before(step, self.model, images)
        logits = self.model(images)
        loss = self.loss(logits, labels)
        tool.backward(step, loss, logits)
        tool.gradients(step, self.model)
        self.optimizer.step()
        tool.after(step, loss)
        self.done += 1


def train(kind: type[Tool], make: Make, steps: int, lr: float = 1e-3, size: int = 8) -> Loop:
    """Some steps with a new instance of the tool, then `close`."""
    torch.manual_seed(5)
    loop = Loop(kind(Path(tempfile.mkdtemp())), make, lr)
    images, labels = batch(size, 64)
    for _ in range(steps):
        try:
            loop.step(images, labels)
        except Exception:
            # this tool's finding is an exception that ends the training
            if not isinstance(loop.tool, DebugOverflow):
                raise
            loop.tool.overflowed()
            break
    loop.tool.close()
    return loop


# -- the questions ---------------------------------------------------------------------------------


def compare_values(kind: type[Tool], make: Make) -> dict[str, Any]:
    """How many of the tool's numbers differ from plain autograd on the twin."""
    told = train(kind, make, 1).tool.values()
    truth = true_values(stock())
    both = sorted(key for key in told if key in truth)
    # a mean may be 0 but for rounding: differences are measured against the tensor's scale
    errors = {key: abs(told[key] - truth[key]) / _scale(key, truth) for key in both}
    wrong = [key for key in both if not errors[key] <= TOLERANCE]
    worst = max(both, key=lambda key: errors[key], default=None)
    return {
        "reported": len(told),
        "compared": len(both),
        "wrong": len(wrong),
        "quantities": sorted({quantity for quantity, _ in both}),
        "wrong_quantities": sorted({quantity for quantity, _ in wrong}),
        "wrong_modules": len({name for _, name in wrong}),
        "worst": None if worst is None else {"what": list(worst), "error": errors[worst]},
    }


def _scale(key: tuple[str, str], truth: Values) -> float:
    quantity, name = key
    if quantity.endswith(" mean"):
        return truth[quantity.replace(" mean", " rms"), name]
    return truth[key]


def true_values(model: nn.Module) -> Values:
    """Statistics of one step by plain autograd on the network without in-place operations."""
    twin = without_inplace(model)
    kept: dict[str, list[torch.Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: object, output: torch.Tensor) -> None:
            output.retain_grad()
            kept.setdefault(name, []).append(output)

        return keep

    for name, module in twin.named_modules():
        module.register_forward_hook(hook(name))
    images, labels = batch(8, 64)
    nn.functional.cross_entropy(twin(images), labels).backward()
    truth: Values = {}
    for name, outputs in kept.items():
        if len(outputs) == 1:  # a shared ReLU has no one output
            output = outputs[0]
            assert output.grad is not None
            truth |= _moments("activation", name, output.detach())
            truth |= _moments("gradient", name, output.grad)
            each = output.detach().flatten(1).norm(dim=1)
            truth["activation norm per sample", name] = each.mean().item()
            norm = output.grad.double().norm().item()
            truth["gradient norm times root batch", name] = norm * math.sqrt(len(images))
    for name, parameter in twin.named_parameters():
        assert parameter.grad is not None
        truth["parameter gradient norm", name] = parameter.grad.double().norm().item()
    for name, module in twin.named_modules():
        if isinstance(module, BasicBlock):
            squares = (p.grad.double().norm().item() ** 2 for p in module.parameters())
            truth["block gradient norm", name] = math.sqrt(sum(squares))
    return truth


def _moments(kind: str, name: str, tensor: torch.Tensor) -> Values:
    x = tensor.double()
    return {
        (f"{kind} mean", name): x.mean().item(),
        (f"{kind} std", name): x.std(correction=0).item(),
        (f"{kind} rms", name): x.square().mean().sqrt().item(),
        (f"{kind} norm", name): x.norm().item(),
    }


def find_changes(kind: type[Tool], make: Make) -> list[str]:
    """Which of weights, buffers and random state differ after 4 steps from those without it."""
    ends = []
    for each in (Nothing, kind):
        model = train(each, make, 4, lr=0.05).model
        state = {"weights": list(model.parameters()), "buffers": list(model.buffers())}
        ends.append(state | {"random state": [torch.get_rng_state()]})
    plain, watched = ends
    return [part for part in plain if not _equal(plain[part], watched[part])]


def _equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def find_planted(kind: type[Tool], make: Make, factor: float) -> dict[str, Any]:
    """Which block its numbers and its words point to, with one block planted."""
    healthy, sick = train(kind, make, 1).tool, train(kind, planted(make, factor), 1).tool
    return {
        "points_to": first_moved(healthy.values(), sick.values()),
        "names": None if not kind.speaks else names(healthy.says(), sick.says()),
        "said": [shortened(text) for text in sick.says()][:3],
    }


def first_moved(healthy: Values, sick: Values) -> str | None:
    """The first block, in the order of the network, whose scale moved; None without such numbers.

    A number moved if it is not finite, is gone, or differs from the healthy network's by more than
    a factor of `MOVED`. Activations are asked first: after an overflow every gradient is NaN.
    """
    order = [name for name, _ in stock().named_modules()]
    scales = [key for key in healthy if key[0].endswith(_SCALES)]
    scales = [key for key in scales if key[0].startswith("activation")] or scales
    moved = set()
    for quantity, name in scales:
        before, now = healthy[quantity, name], sick.get((quantity, name), math.nan)
        ratio = abs(now / before) if before and math.isfinite(now) else math.inf
        if not 1 / MOVED < ratio < MOVED:
            moved.add(name if name in order else name.rpartition(".")[0])
    found = sorted(moved & set(order), key=order.index)
    # the root and the stages contain the block: only names that are as deep as a block count
    blocks = [match.group() for name in found if (match := re.match(r"layer\d\.\d", name))]
    if not scales:
        return None
    return blocks[0] if blocks else ""


def names(healthy: list[str], sick: list[str]) -> bool:
    """Whether the first finding that the healthy network did not get names the planted block.

    The first, because a list of all layers names every block.
    """
    news = [text for text in sick if text not in healthy]
    return bool(news) and re.search(re.escape(PLANTED) + r"\b", news[0]) is not None


def judge_depth(kind: type[Tool]) -> dict[str, Any]:
    """What it says of three steps of a 56-layer network that explodes, and of one that does not."""
    sick = train(kind, deep("elu_pre"), 3, lr=0.1).tool.says()
    sound = train(kind, deep("original"), 3, lr=0.1).tool.says()
    alarms = [text for text in sick if _BREAKS.search(text)]
    return {
        "says": bool(alarms),
        "said": [shortened(text) for text in alarms][:3],
        "healthy_findings": len(sound),
        "healthy_said": [shortened(text) for text in sound][:3],
    }


def count_alarms(kind: type[Tool], make: Make) -> dict[str, Any]:
    """Findings in words on resnet18, which has nothing wrong: 8 steps on one batch."""
    said = train(kind, make, 8, lr=0.01, size=16).tool.says()
    return {"count": len(said), "said": [shortened(text) for text in said][:3]}


def checks(kind: type[Tool]) -> dict[str, Any]:
    """Every question but the one about time; each may fail alone.

    A tool that does not run on the stock network is asked on the one without in-place operations.
    """
    runs = _ask(lambda: train(kind, stock, 2).done == 2)
    answers: dict[str, Any] = {"runs": runs}
    make = stock
    if runs is not True:
        make = untouched
        answers["runs_without_inplace"] = _ask(lambda: train(kind, make, 2).done == 2)
        if answers["runs_without_inplace"] is not True:
            return answers
    answers["values"] = _ask(lambda: compare_values(kind, make))
    answers["changes"] = _ask(lambda: find_changes(kind, make))
    answers["large"] = _ask(lambda: find_planted(kind, make, 1e3))
    answers["overflow"] = _ask(lambda: find_planted(kind, make, 1e38))
    if kind.speaks:
        answers["depth"] = _ask(lambda: judge_depth(kind))
        answers["alarms"] = _ask(lambda: count_alarms(kind, make))
    return answers


def _ask(question: Callable[[], Any]) -> object:
    """The answer, or what went wrong in one line; a tool that is not there goes through."""
    try:
        return question()
    except ImportError:
        raise
    except Exception as error:
        return {"error": shortened(f"{type(error).__name__}: {error}")}


def time_it(kind: type[Tool], repetitions: int, size: int) -> dict[str, Any]:
    """Step time with the tool over step time without, interleaved; `null` is a second plain one."""
    make = stock if _ask(lambda: train(kind, stock, 1).done == 1) is True else untouched
    arms = {"plain": Nothing, "null": Nothing, "tool": kind}
    loops = {name: Loop(each(Path(tempfile.mkdtemp())), make) for name, each in arms.items()}
    images, labels = batch(size, 32)
    for loop in loops.values():
        loop.step(images, labels)
        loop.step(images, labels)
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repetitions):
        for name in random.sample(list(arms), len(arms)):
            start = time.perf_counter()
            loops[name].step(images, labels)
            times[name].append(time.perf_counter() - start)
    for loop in loops.values():
        loop.tool.close()
    return {
        "plain_s": statistics.median(times["plain"]),
        "null": quartiles(times["null"], times["plain"]),
        "ratio": quartiles(times["tool"], times["plain"]),
        "n": repetitions,
        "batch": size,
    }


def time_deep(kind: type[Tool], repetitions: int) -> dict[str, Any]:
    """Step time with the tool on `DEEP` over the mean of plain steps before and after it."""
    variant, depth, size, threads = DEEP
    torch.set_num_threads(threads)
    loops = [Loop(each(Path(tempfile.mkdtemp())), deep(variant, depth)) for each in (Nothing, kind)]
    images, labels = batch(size, 32)

    def seconds(loop: Loop) -> float:
        start = time.perf_counter()
        loop.step(images, labels)
        return time.perf_counter() - start

    for _ in range(2):
        for loop in loops:
            loop.step(images, labels)
    plain = [seconds(loops[0])]
    watched: list[float] = []
    for _ in range(repetitions):
        watched.append(seconds(loops[1]))
        plain.append(seconds(loops[0]))
    loops[1].tool.close()
    beside = [(one + other) / 2 for one, other in itertools.pairwise(plain)]
    answers = {"plain_s": statistics.median(plain), "ratio": quartiles(watched, beside)}
    return {**answers, "n": repetitions, "network": list(DEEP)}


def quartiles(arm: list[float], plain: list[float]) -> list[float]:
    """First quartile, median and third quartile of the ratios of the same repetition."""
    ratios = [a / b for a, b in zip(arm, plain, strict=True)]
    return [round(value, 4) for value in statistics.quantiles(ratios, n=4)]


def shortened(text: str) -> str:
    """One line without a path of this machine."""
    line = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"(?<![\w.~])/(?:[\w.+-]+/)+", "", line)[:200]


def main() -> None:
    name, part, repetitions, size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    disable_malloc_trim()
    kind = TOOLS[name]
    answers: dict[str, Any]
    try:
        if part == "deep":
            answers = {"deep": time_deep(kind, repetitions)}
        elif part == "time":
            answers = {"time": time_it(kind, repetitions, size)}
        else:
            answers = checks(kind)
        answers["version"] = version(kind.package) if kind.package else None
    except ImportError as error:
        answers = {"missing": shortened(str(error))}
    answers["torch"] = torch.__version__
    print("\n" + json.dumps(answers))


if __name__ == "__main__":
    main()
