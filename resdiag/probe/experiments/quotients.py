"""Directional derivatives by central differences, in float64 where the model computes in it."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from resdiag.probe.experiments.copies import kept_buffers, seed_everything
from resdiag.probe.experiments.task import Task
from resdiag.probe.experiments.trial import backward

_LEAST_SIZE = 1e-2  # of the steps of a parameter that is all zeros
_JITTER = 1e-3


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What differences can tell where a model computes in one type.

    Attributes:
        dtype: The least precise floating type in a pass.
        steps: Lengths of the differences, relative to the parameters' RMS.
        tolerance: Relative error beyond which a gradient is wrong.
        rounding: Relative rounding error of a loss.
    """

    dtype: torch.dtype
    steps: tuple[float, ...]
    tolerance: float
    rounding: float


DOUBLE = Precision(dtype=torch.float64, steps=(1e-6, 1e-7, 1e-8), tolerance=1e-2, rounding=1e-14)
SINGLE = Precision(dtype=torch.float32, steps=(3e-2, 1e-2, 3e-3), tolerance=5e-2, rounding=3e-7)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A derivative along one direction, by differences and by autograd.

    Attributes:
        quotients: One for each length of the difference.
        noises: What rounding alone can make of each.
        autograd: Inner product of the gradient and the direction.
        usual: Its standard deviation over random directions: along one, it can be small by chance.
    """

    quotients: tuple[float, ...]
    noises: tuple[float, ...]
    autograd: float
    usual: float

    @property
    def numeric(self) -> float:
        """Median of the difference quotients."""
        return statistics.median(self.quotients)

    @property
    def depends(self) -> bool:
        """Whether the loss changes along the direction by more than rounding, in every quotient."""
        pairs = zip(self.quotients, self.noises, strict=True)
        return all(abs(quotient) > noise for quotient, noise in pairs)

    @property
    def error(self) -> float:
        """Distance of the two over their size; 0 where both are no more than rounding."""
        gap = abs(self.numeric - self.autograd)
        return 0.0 if self._size <= statistics.median(self.noises) else gap / self._size

    @property
    def _size(self) -> float:
        return max(abs(self.numeric), abs(self.autograd), self.usual)

    def is_wrong(self, tolerance: float) -> bool:
        """Whether every quotient differs from autograd by more than tolerance and rounding.

        Where the loss has kinks nearby, long differences are wrong and short ones are not.
        """
        pairs = zip(self.quotients, self.noises, strict=True)
        return all(abs(q - self.autograd) > tolerance * self._size + noise for q, noise in pairs)


class LossOfParameters:
    """The loss as a function of the parameters: every call has the same random numbers and buffers.

    Args:
        model: A copy; its buffers are put back after every pass.
        task: Batch and loss.
        seed: Of the random numbers.
        advance: Called after every pass.
    """

    def __init__(
        self, model: nn.Module, task: Task, seed: int, advance: Callable[[], None]
    ) -> None:
        self._model, self._task, self._seed, self._advance = model, task, seed, advance

    def value(self) -> float:
        """The loss at the parameters as they are."""
        with torch.no_grad(), kept_buffers(self._model):
            return float(self._pass())

    def gradient(self) -> dict[str, Tensor]:
        """The gradient by name; parameters that autograd does not reach are left out."""
        for parameter in self._model.parameters():
            parameter.grad = None
        with kept_buffers(self._model):  # until after the backward pass, which may need them
            loss = self._pass()
            if loss.requires_grad:
                backward(loss)
        found = {k: p.grad for k, p in self._model.named_parameters() if p.grad is not None}
        return {name: g.to_dense() if g.is_sparse else g for name, g in found.items()}

    def precision(self, parameters: Mapping[str, Tensor]) -> Precision | None:
        """What a pass computes in; None for half precision.

        A single constant in float32 does not matter: small steps are resolved all the same.
        """
        with _LeastPrecise() as seen:
            self.value()
        if seen.bits < 32:
            return None
        if seen.bits == 64:
            return DOUBLE
        direction = random_direction(parameters, torch.Generator().manual_seed(self._seed))
        a, b = (
            (self.moved(parameters, direction, h) - self.moved(parameters, direction, -h)) / h
            for h in (1e-6, 1e-7)
        )
        return DOUBLE if 0 < abs(a - b) <= 1e-3 * abs(a) else SINGLE

    def is_repeatable(self) -> bool:
        """Whether two passes have the same loss to rounding."""
        first, second = self.value(), self.value()
        return abs(first - second) <= 1e-12 * max(abs(first), 1e-12)

    def compare(
        self,
        parameters: Mapping[str, Tensor],
        gradient: Mapping[str, Tensor],
        precision: Precision,
        generator: torch.Generator,
    ) -> Difference:
        """Compare along one random direction in the space of these parameters."""
        direction = random_direction(parameters, generator)
        expected = sum(
            float((gradient[name] * d).sum()) for name, d in direction.items() if name in gradient
        )
        quotients, noises = list[float](), list[float]()
        for step in precision.steps:
            up, down = (self.moved(parameters, direction, sign * step) for sign in (1, -1))
            quotients.append((up - down) / (2 * step))
            noises.append(precision.rounding * max(abs(up), abs(down)) / step)
        return Difference(
            quotients=tuple(quotients), noises=tuple(noises), autograd=float(expected),
            usual=math.sqrt(sum(
                (float(gradient[name].norm()) * size) ** 2
                for name, size in usual_sizes(parameters).items() if name in gradient
            )),
        )  # fmt: skip

    @torch.no_grad()
    def moved(
        self, parameters: Mapping[str, Tensor], direction: Mapping[str, Tensor], size: float
    ) -> float:
        """The loss at parameters moved along a direction; they are put back."""
        before = {name: p.detach().clone() for name, p in parameters.items()}
        try:
            for name, p in parameters.items():
                p.add_(direction[name], alpha=size)
            return self.value()
        finally:
            for name, p in parameters.items():
                p.copy_(before[name])

    def _pass(self) -> Tensor:
        seed_everything(self._seed)
        with torch.autocast(_device(self._model), enabled=False):
            loss = self._task.run(self._model).loss
        self._advance()
        return loss


@torch.no_grad()
def jitter(parameters: Mapping[str, Tensor], generator: torch.Generator) -> None:
    """Move parameters by a thousandth of their size: zeros are special, ReLU(0) has a kink."""
    for name, d in random_direction(parameters, generator).items():
        parameters[name].add_(d, alpha=_JITTER)


def random_direction(
    parameters: Mapping[str, Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    """Normal numbers, times the size of each parameter."""
    sizes = usual_sizes(parameters)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) * sizes[name]
        for name, p in parameters.items()
    }


def usual_sizes(parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """The RMS of each parameter; of one that is 0 the median of the others."""
    sizes = {name: _rms(parameter) for name, parameter in parameters.items()}
    usual = statistics.median([size for size in sizes.values() if size] or [_LEAST_SIZE])
    return {name: size or usual for name, size in sizes.items()}


def _rms(x: Tensor) -> float:
    return float(x.detach().square().mean().sqrt()) if x.numel() else 0.0


class _LeastPrecise(TorchDispatchMode):
    """Notes the least precise floating type of the results of a pass."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bits = 64

    def __torch_dispatch__(
        self, function: Callable[..., object], types: object, args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:  # fmt: skip
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor) and x.is_floating_point() and x.numel() > 1:
                self.bits = min(self.bits, torch.finfo(x.dtype).bits)
        return result


def _device(model: nn.Module) -> str:
    return next((p.device.type for p in model.parameters()), "cpu")
