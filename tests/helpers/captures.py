"""A tape of operations that stands for a CUDA graph."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resdiag.watch.loop import forward_passes as passes

ASKED = {"steps": 12, "record_first": 3, "every": 3, "commit_every": 5, "batch_size": 36}


class Tape(TorchDispatchMode):
    """Notes down every operation; replays them on the same memory, and no Python beside them."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{func} looks at a value: a CUDA graph refuses that")
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def replay(self):
        """A graph's kernels leave the version counters alone."""
        touched = [x for _, args, _, _ in self.operations for x in tensors(args)]
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tuple(touched)):
            for func, args, kwargs, before in self.operations:
                again = func(*args, **kwargs)
                for old, new in zip(tensors(before), tensors(again), strict=True):
                    if old.data_ptr() != new.data_ptr():  # else a view, or changed in place
                        old.copy_(new)


def tensors(result):
    return [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]


class TapeCapture:
    """What `CudaCapture` is on a GPU. A graph captures without computing: values are put back."""

    def __init__(self, monkeypatch):
        self.tapes, self._patch = [], monkeypatch

    def warm_up(self, work):
        work()

    def capture(self, work):
        tape = Tape()
        self.tapes.append(tape)
        with self._patch.context() as patch, tape:
            patch.setattr(passes, "is_capturing", lambda: True)
            work()
        return tape.replay
