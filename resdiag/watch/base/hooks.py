"""Hooks on modules that a pickle or a deep copy of the model does without."""

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    _Partial = functools.partial[Any]
else:
    _Partial = functools.partial


class Hook(_Partial):
    """A hook that lasts between steps, when a loop may save the whole model or copy it.

    `torch.save(model)` pickles the hooks of its modules, and cannot do so with functions that were
    made inside others, or with a recorder behind them. What is saved or copied gets a hook that
    does nothing: nobody watches the copy. It is a `partial` because torch.compile traces those.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, (unwatched,)


def unwatched(*_: object, **__: object) -> None:
    """What is left of a hook in a saved or copied model."""
