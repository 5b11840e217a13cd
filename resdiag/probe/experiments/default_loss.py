"""The loss of a model's output where none was given, and what guessing would come to."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from resdiag.errors import UsageError

_GIVE = "pass loss=, a function of (output, target)"


def own_loss(output: object) -> Tensor | None:
    """The loss that a model returns itself: named `loss`, or the only number in its output."""
    named = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(named, Tensor):
        return named
    values = output if isinstance(output, tuple | list) else (output,)
    scalars = [x for x in values if isinstance(x, Tensor) and x.dim() == 0]
    return next((x for x in scalars if x.is_floating_point()), None)


def default_loss(output: Tensor | None, target: object) -> tuple[Tensor, str]:
    """Cross-entropy for integer targets, mean square error for floating ones.

    Args:
        output: Logits (N, K), (N, K, ...) or (N, ..., K); or values in the number of the target.
        target: Integer (N,) or (N, ...); or floating.

    Returns:
        The loss and its name.

    Raises:
        UsageError: There is no target, or the two do not fit together.
    """
    if output is None:
        raise UsageError("the model returned no floating-point tensor to compute a loss from")
    if not isinstance(target, Tensor):
        raise UsageError("the batch has no target, and the model returns no loss itself", _GIVE)
    output = _at_least_single(output)
    sizes = f"output {tuple(output.shape)}, target {tuple(target.shape)}"
    if target.is_floating_point():
        if output.numel() != target.numel():
            raise UsageError(f"no mean square error: {sizes}", _GIVE)
        value = F.mse_loss(output.reshape(target.shape), target.to(output.dtype))
        return value, "mean square error"
    pair = _logits_and_labels(output, target)
    if pair is None and output.numel() == target.numel() and _is_binary(target):
        value = F.binary_cross_entropy_with_logits(
            output.reshape(target.shape), target.to(output.dtype)
        )
        return value, "binary cross-entropy of one logit"
    if pair is None:
        raise UsageError(f"no cross-entropy: {sizes}", _GIVE)
    classes = pair[0].shape[1]
    if int(pair[1].max()) >= classes:
        raise UsageError(f"the target has label {int(pair[1].max())}, the output {classes} classes")
    return F.cross_entropy(*pair), f"cross-entropy of {classes} classes"


def cross_entropy_classes(output: Tensor, target: Tensor, loss: float) -> int:
    """K where `loss` is the cross-entropy of K classes with the target or, shifted, tokens."""
    pair = None if target.is_floating_point() else _logits_and_labels(output.detach(), target)
    if pair is None or not math.isfinite(loss):
        return 0
    logits, labels = _at_least_single(pair[0]), pair[1]
    if not int(labels.max()) < logits.shape[1]:
        return 0
    forms = [(logits, labels)]
    if output.dim() == 3 and output.shape[:2] == target.shape and target.shape[1] > 1:
        shifted = _at_least_single(output.detach())[:, :-1]
        forms.append((shifted.reshape(-1, output.shape[-1]), target[:, 1:].reshape(-1)))
    tolerance = 1e-4 if output.dtype in (torch.float32, torch.float64) else 1e-2
    for form in forms:
        found = float(F.cross_entropy(form[0], form[1].long()))
        if abs(found - loss) <= tolerance * max(abs(loss), 1e-6):
            return int(form[0].shape[1])
    return 0


def best_constant(target: object, classes: int, name: str) -> float:
    """The least loss of an output that is the same for every sample; NaN if it is not known.

    Args:
        target: Of the batch.
        classes: Of a cross-entropy: it is the entropy of the labels. 0 for another loss.
        name: Of the loss: that of a mean square error is the variance of the target.
    """
    if not isinstance(target, Tensor):
        return math.nan
    if classes:
        labels = target[(target >= 0) & (target < classes)].reshape(-1)
        shares = torch.bincount(labels.long(), minlength=classes).double() / max(len(labels), 1)
        return float(-(shares * shares.clamp_min(1e-300).log()).sum())
    if target.is_floating_point() and name in ("mean square error", "MSELoss", "mse_loss"):
        return float(target.double().var(0, correction=0).mean())
    return math.nan


def _logits_and_labels(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor] | None:
    """Logits and labels as cross_entropy takes them; None where the sizes do not fit."""
    if output.dim() < 2 or target.dim() < 1 or target.dtype == torch.bool:
        return None
    labels = target.squeeze(-1) if target.dim() == output.dim() else target
    if output.shape[:-1] == labels.shape and output.shape[-1] > 1:
        return output.reshape(-1, output.shape[-1]), labels.reshape(-1).long()
    if output.shape[:1] + output.shape[2:] == labels.shape and output.shape[1] > 1:
        return output, labels.long()
    return None


def _is_binary(target: Tensor) -> bool:
    return bool(((target == 0) | (target == 1)).all())


def _at_least_single(x: Tensor) -> Tensor:
    """Half precision as float32, as losses are computed; others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
