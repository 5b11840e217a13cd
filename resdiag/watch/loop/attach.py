"""`attach`: watch the residual blocks of a model while it trains."""

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from resdiag.catalog.set_metrics import cadences
from resdiag.catalog.table import POINTS
from resdiag.errors import unknown
from resdiag.watch.base.safety import WatchWarning as WatchWarning
from resdiag.watch.base.safety import compiled_parts
from resdiag.watch.base.tensors import mesh_of, placements_of
from resdiag.watch.find.blocks import match_modules
from resdiag.watch.loop.monitor import Monitor
from resdiag.watch.loop.parameters import is_sharded, is_sharding
from resdiag.watch.loop.ranks import find_ranks, is_reduced
from resdiag.watch.loop.state import LossScale
from resdiag.watch.plan.ports import example
from resdiag.watch.record.sets import Schedule

_WRAPPERS = {
    "DataParallel": (
        "DataParallel runs copies of the model in threads, which no hook of ours follows: use "
        "DistributedDataParallel, or attach before wrapping and run on one device"
    ),
    "FullyShardedDataParallel": (
        "FullyShardedDataParallel (FSDP1) flattens parameters, so that none belongs to a block: "
        "use torch.distributed.fsdp.fully_shard (FSDP2)"
    ),
    "_RemoteModule": (
        "a RemoteModule runs on another RPC worker: attach on the worker that holds the module"
    ),
}


def attach(
    model: nn.Module,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    *,
    blocks: Sequence[str] | None = None,
    every: int = 1,
    record_first: int = 0,
    samples: int | None = 4,
    grad_read_point: str | None = None,
    reduce: bool = True,
    scaler: Any = None,  # noqa: ANN401
    forward_pass: str = "first",
    metrics: str | Mapping[str, int] = "full",
    moment_samples: int | None = None,
    example_inputs: object = None,
    trace: str = "first",
    live: bool | str = False,
    on_finding: Callable[[Any], object] | str | None = None,
) -> Monitor:
    """Record the residual blocks of a model while it trains. The training is the same bit for bit.

    The blocks are found in the first forward pass in training mode, which is recorded too.

    Args:
        model: The module whose `__call__` the training loop uses.
        optimizer: One optimizer or several, to record the update ratio; the weights are then copied
            at recorded steps. Parameter gradients are read right before the step of the optimizer
            that owns the parameters, passed here or not; without an optimizer, at `step()`.
        blocks: Names or shell patterns of modules to record instead of residual blocks.
        every: Record every `every`-th step.
        record_first: Number of first steps that are all recorded, in addition to `every`.
        samples: Number of first samples of the batch for metrics per unit (P1 to P4, slopes,
            saturation) and the shares of the gradient; None for the whole batch.
        grad_read_point: Point of the loop where parameter gradients are read, one of
            `catalog.POINTS`; stored with the data. Default: "local", "unscaled" with a scaler,
            "post_clip" once the loop changes gradients itself; see `Monitor.read_gradients`.
        metrics: "full" for all of `catalog.RECORDED`, and every 50th step attention and experts if
            the model has them; "core" for `catalog.CORE` alone, which costs half or less. Or sets
            with the number of steps between two records of each: `{"core": 1, "attention": 10,
            "experts": 10, "optimizer": 10, "extremes": 50}`; "full" is added where no "core" is.
        moment_samples: Number of first samples of the batch from which moments, gradient norms of
            activations and their non-finite fractions are estimated; None for the whole batch. The
            relative standard error of a second moment from k samples is s / sqrt(k), where s is the
            standard deviation of the samples' second moments divided by their mean: a few per cent
            for 16 images (docs/explanation/performance.md). Outputs of BatchNorm and parameter
            gradients always use the whole batch.
        reduce: If several processes train the model together (DDP, `fully_shard`), record the
            global batch, with the same record on each rank; call `attach`, `step` and `close` on
            every rank; "local" becomes "reduced". False: each rank records its own samples;
            parameter gradients under a DDP wrapper are still those of all ranks.
        scaler: The loop's `torch.amp.GradScaler`: gradients are recorded without its scale, and
            skipped steps are marked.
        forward_pass: Which forward pass of a step to record if there are several (gradient
            accumulation, two views of a batch): "first" or "last".
        example_inputs: Inputs of one forward pass on the model's device, a tuple or a mapping of
            keywords, needed to record passes under torch.compile. The blocks are then found at
            once. Attach before compiling.
        trace: "first" traces the first recorded pass operation by operation, and reads later ones
            by hooks as long as they do the same operations; "always" traces every recorded pass,
            which costs more and loses no values if passes differ.
        live: True shows a panel below the loop's output (in a notebook, below the cell): step,
            loss, the gradient by block, findings as they come; without a terminal, lines. "http"
            serves a page with growing plots on 127.0.0.1 and prints its address. Steps that are
            not recorded cost nothing.
        on_finding: Called with each `resdiag.Finding` once, as it arises, at the end of a recorded
            step; what it raises, `Monitor.step` raises. "warn" gives a Python warning, "stop"
            raises `resdiag.StopTraining` on the first finding that is a fault and not only a
            condition. The first 32 recorded steps are all judged, later ones each time that the
            record has grown by a sixteenth.

    Returns:
        A `Monitor`: a context manager whose `step()` ends each training step.

    Raises:
        ValueError: A schedule that never records, an unknown read point, pass, block, set of
            metrics, display or action, a compiled model, or an unsupported kind of parallel
            training.
        TypeError: The model, the optimizer or the scaler has the wrong type.

    Example:
        >>> import torch
        >>> from resdiag.models.resnet import build_model
        >>> model = build_model("elu", 8, seed=0)
        >>> with attach(model) as monitor:
        ...     model(torch.ones(4, 3, 32, 32)).square().mean().backward()
        ...     monitor.step()
        >>> monitor
        Monitor(blocks=3, steps=1, closed)
        >>> monitor.to_frame()[["step", "block", "skip_gain"]].values.tolist()
        [[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [0.0, 2.0, 1.0]]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"attach(model, ...) takes a torch.nn.Module, not {_describe(model)}")
    if every < 1 or record_first < 0:
        raise ValueError(f"every={every} must be at least 1 and record_first={record_first} >= 0")
    if moment_samples is not None and moment_samples < 1:
        raise ValueError(f"moment_samples={moment_samples} must be at least 1, or None for all")
    for what, given, known in (
        ("grad_read_point", grad_read_point, (None, *POINTS)),
        ("forward_pass", forward_pass, ("first", "last")),
        ("trace", trace, ("first", "always")),
    ):
        if given not in known:
            raise ValueError(unknown(what, str(given), [one for one in known if one]).message)
    sets = cadences(metrics)
    asked = not isinstance(metrics, str)
    schedule = Schedule(every=every, first=record_first, cadences=sets, asked=asked)
    following = None
    if live or on_finding is not None:
        # by its name: this room is below the one that judges and draws, and does without them
        following = importlib.import_module("resdiag.live.follow")
        following.check(live, on_finding)
    inner = unwrap(model)
    if hasattr(model, "_orig_mod") or compiled_parts(model):
        raise ValueError(
            "the model is already compiled and its hooks would silently not fire: "
            "attach to the module before torch.compile, with example_inputs=(...)"
        )
    units = match_modules(inner, blocks)
    if not reduce and is_sharded(inner):
        raise ValueError("reduce=False: the parameters are shards, no rank has a whole gradient")
    ranks = find_ranks(model) if reduce else None
    reduced = ranks is not None or is_reduced(model)
    monitor = Monitor(
        inner,
        _optimizers(optimizer),
        units,
        schedule,
        samples,
        "reduced" if reduced and grad_read_point in (None, "local") else grad_read_point,
        ranks,
        LossScale(scaler),
        take_last=forward_pass == "last",
        core="core" in sets,
        moments=moment_samples,
        always=trace == "always",
    )
    if example_inputs is not None:
        monitor.prepare(*example(example_inputs))
    if following is not None:
        following.follow(monitor, live=live, on_finding=on_finding)
    return monitor


def _describe(given: object) -> str:
    return f"the string {given!r}" if isinstance(given, str) else type(given).__name__


def _optimizers(given: Optimizer | Iterable[Optimizer] | None) -> list[Optimizer]:
    optimizers = [] if given is None else list(given) if isinstance(given, Iterable) else [given]
    for optimizer in optimizers:
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(f"not an optimizer: {type(optimizer).__name__}")
    return optimizers


def unwrap(model: nn.Module) -> nn.Module:
    """The module to watch inside a wrapper; a ValueError where its numbers would be wrong."""
    refusal = next(_refusals(model), None)
    if refusal is not None:
        raise ValueError(refusal)
    return model.module if isinstance(model, DistributedDataParallel) else model


def _refusals(model: nn.Module) -> Iterator[str]:
    """Why a model cannot be watched, and what to do instead."""
    if type(model).__module__.split(".")[0] == "deepspeed":
        yield (
            "DeepSpeed reduces gradients in buffers of its own, where they cannot be read: "
            "train with DistributedDataParallel or fully_shard to watch"
        )
    for module in _modules(model):
        for kind in type(module).__mro__:
            if kind.__name__ in _WRAPPERS and kind.__module__.startswith("torch."):
                yield _WRAPPERS[kind.__name__]
    for parameter in model.parameters():
        if hasattr(parameter, "ds_id"):
            yield (
                "DeepSpeed ZeRO-3 leaves parameters empty between uses: shard with "
                "torch.distributed.fsdp.fully_shard instead"
            )
        if mesh_of(parameter) is not None and not _is_data_parallel(model, parameter):
            yield (
                "tensor parallel: activations are spread over ranks by feature, and no rank has "
                "a whole channel mean: watch a run with DDP or fully_shard alone"
            )


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    yield model  # first: a RemoteModule answers modules() with an error of its own
    yield from model.modules()


def _is_data_parallel(model: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether a DTensor is what fully_shard makes: whole copies, and shards of them at most."""
    *outer, inner = placements_of(parameter)
    ours = any(is_sharding(module) for module in model.modules())
    return ours and inner.is_shard() and all(place.is_replicate() for place in outer)
