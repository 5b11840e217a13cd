"""The moment between unscaling and clipping, in everything that trains by Accelerate."""

import functools
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator

_TOLD: dict[int, tuple[Any, Callable[[], object]]] = {}
_ORIGINAL = "_resdiag_original"


def tell_unscaled(optimizer: Any, listener: Callable[[], object]) -> Callable[[], None]:  # noqa: ANN401
    """Call `listener` whenever gradients of `optimizer` have been unscaled, right before clipping.

    `Accelerator.clip_grad_norm_` and `clip_grad_value_` first call `unscale_gradients`, whatever
    the precision. The Hugging Face Trainer does not show its accelerator to callbacks, hence the
    method of the class is wrapped, for as long as anybody listens.

    Args:
        optimizer: As `Accelerator.prepare` returned it.
        listener: Called without arguments.

    Returns:
        A function that ends the listening; calling it twice is fine.
    """
    if not _TOLD:
        _wrap()
    key = id(optimizer)
    _TOLD[key] = optimizer, listener

    def stop() -> None:
        if _TOLD.get(key, (None, None))[1] is listener:
            del _TOLD[key]
            if not _TOLD:
                _unwrap()

    return stop


def _wrap() -> None:
    original = Accelerator.unscale_gradients

    @functools.wraps(original)
    def unscale_gradients(self: Accelerator, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        result = original(self, *args, **kwargs)
        for optimizer, listener in list(_TOLD.values()):
            if any(own is optimizer for own in self._optimizers):
                listener()
        return result

    setattr(unscale_gradients, _ORIGINAL, original)
    Accelerator.unscale_gradients = unscale_gradients


def _unwrap() -> None:
    original = getattr(Accelerator.unscale_gradients, _ORIGINAL, None)
    if original is not None:
        Accelerator.unscale_gradients = original
