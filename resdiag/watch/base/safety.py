"""What hooks must know about torch.compile: whether it runs, and how to stay out of its sight.

torch.compile traces the hooks of submodules into the graph of the forward they belong to; the hooks
of the compiled module itself run beside that graph and, if nothing is said, are compiled as graphs
of their own. Nothing here imports `torch._dynamo`, which takes longer than all of resdiag.
"""

import functools
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import nn
from torch._C._dynamo import eval_frame

F = TypeVar("F", bound=Callable[..., object])

_LIBRARIES = {"resdiag", "torch", "contextlib", "lightning", "transformers", "accelerate"}


def never_alone(function: F) -> F:
    """Let a hook be traced into a graph around it, but never become a graph itself."""
    return _skip(function, eval_frame._FrameAction.DEFAULT)


def plain(function: F) -> F:
    """Run a function and all that it calls as plain Python; only for calls outside of a trace."""
    return _skip(function, eval_frame._FrameAction.SKIP)


def _skip(function: F, inside: eval_frame._FrameAction) -> F:
    strategy = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, inside)
    eval_frame.set_code_exec_strategy(function.__code__, strategy)
    return function


@never_alone
def is_running_compiled() -> bool:
    """Whether the Python that runs now was called by a compiled module or function."""
    return eval_frame.get_eval_frame_callback() not in (None, False)


def compiled_parts(model: nn.Module) -> list[str]:
    """Names of the modules inside a model, or the model itself (""), that are compiled."""
    # names cost more, and every pass asks
    if "torch._dynamo" not in sys.modules or not any(map(_is_compiled, _modules(model))):
        return []
    return [name for name, module in model.named_modules() if _is_compiled(module)]


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    """A model and its modules, each once."""
    waiting: list[nn.Module | None] = [model]
    seen = set[int]()
    while waiting:
        module = waiting.pop()
        if module is not None and id(module) not in seen:
            seen.add(id(module))
            yield module
            waiting.extend(module._modules.values())


def _is_compiled(module: nn.Module) -> bool:
    return (
        module.__dict__.get("_compiled_call_impl") is not None
        or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        or isinstance(module, sys.modules["torch._dynamo"].OptimizedModule)
    )


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured: kernels are noted down, Python runs only now."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


P = ParamSpec("P")


class Guard:
    """The state of one monitor's recorder."""

    def __init__(self) -> None:
        self.failure = ""  # the error of ours after which nothing is watched any more
        # per column, why it is NaN and for which blocks; none for what is not about a block
        self.reasons: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))

    def miss(self, row: int, columns: Iterable[str], reason: str) -> None:
        """Note why columns are NaN for a block."""
        for column in columns:
            self.reasons[column][reason].add(row)

    def fail(self, error: Exception) -> None:
        """A mistake of ours must not end somebody's training: note it, and watch no more."""
        self.failure = f"{type(error).__name__}: {error}"


_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
"""What the messages of PyTorch's allocators say: the one of the CPU raises a RuntimeError."""


def is_shortage(error: Exception) -> bool:
    """Whether an error says that memory is short.

    >>> is_shortage(MemoryError()), is_shortage(RuntimeError("not enough memory: you tried ..."))
    (True, True)
    >>> is_shortage(ValueError("out of memory of the past"))
    False
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


@contextmanager
def outlasting_shortage(guard: Guard) -> Iterator[None]:
    """Let a shortage of memory inside end the recording, and not somebody's training."""
    try:
        yield
    except Exception as error:
        if not is_shortage(error):
            raise
        guard.fail(error)


class _Guarded(Protocol):
    guard: Guard


def guarded(method: Callable[Concatenate[Any, P], None]) -> Callable[..., None]:
    """Let a method note its errors in place of raising them, and do nothing after the first."""

    @functools.wraps(method)
    def call(self: _Guarded, *args: P.args, **kwargs: P.kwargs) -> None:
        if self.guard.failure:
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self.guard.fail(error)

    return call


class WatchWarning(UserWarning):
    """Something could not be watched; the run goes on."""


class Warnings:
    """Texts without repetition; each is a Python warning as well."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def say(self, text: str) -> None:
        """Say once what could not be watched."""
        if text not in self.texts:
            self.texts.append(text)
            warn(text)


def warn(text: str) -> None:
    """Warn at the line of the loop that is running: the first that is not resdiag's or PyTorch's.

    `skip_file_prefixes` of `warnings.warn` would do it, and needs Python 3.12.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_library(frame):
        frame = frame.f_back
    place, known = frame.f_globals, frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(
        f"resdiag: {text}", WatchWarning, frame.f_code.co_filename, frame.f_lineno,
        module=place.get("__name__"), registry=known,
    )  # fmt: skip


def _is_library(frame: FrameType) -> bool:
    name = str(frame.f_globals.get("__name__", ""))
    return name.partition(".")[0] in _LIBRARIES
