"""The probe: one forward and backward pass of any model, without training, and what it says."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resdiag.diagnose.verdict import judge
from resdiag.errors import ResdiagError, UsageError
from resdiag.models.inspection import check_memory, count_parameters, free_memory, words_of
from resdiag.models.source import Built, build_source
from resdiag.probe.batch import Batch, Loss, load_weights, open_batch
from resdiag.probe.critical_rate import Curvature, largest_curvature
from resdiag.probe.result import ProbeResult
from resdiag.runs.environment import environment
from resdiag.runs.folder import read_run
from resdiag.runs.watched import as_run, write_run
from resdiag.runs.watched_config import WatchedConfig
from resdiag.watch.base.safety import WatchWarning
from resdiag.watch.loop.attach import attach
from resdiag.watch.loop.monitor import Monitor

_COPIES = 8.0  # weights, gradients, a graph of gradients, vectors of the Lanczos iteration


def probe_model(
    name: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    shape: Sequence[int] | None = None,
    batch_size: int = 8,
    data: str = "",
    data_root: Path | None = None,
    weights: Path | None = None,
    loss: str = "auto",
    seed: int = 0,
    out: Path | None = None,
    root: Path = Path("runs"),
    curvature: bool = True,
    blocks: Sequence[str] | None = None,
) -> ProbeResult:
    """Run one forward and backward pass of a model and write what was measured as a run.

    Args:
        name: See `resdiag.models.source`.
        arguments: Of its factory or configuration.
        shape: Shape of one sample of the generated batch.
        batch_size: Samples.
        data: Instead of a generated batch images, as `resdiag run --data`, or "text:FILE" for a
            model that takes token ids.
        data_root: Folder of downloaded data sets.
        weights: A state_dict, of torch.save or safetensors; None probes the initialisation.
        loss: One of `LOSSES`.
        seed: Of weights, batch and labels.
        out: The run's folder; None names one in `root`.
        root: Folder of runs.
        curvature: Whether to measure the critical learning rate.
        blocks: Patterns of modules to take as the blocks instead of found additions.

    Raises:
        UsageError: The model, data or weights cannot be read or do not fit together.
    """
    built, notes = _build(name, dict(arguments or {}), seed)
    if weights is not None:
        load_weights(built.model, weights)
        notes.append(f"weights of {weights}")
    batch = open_batch(built, data, data_root, batch_size, shape, seed)
    settings = {"weights": str(weights or ""), "loss": loss}
    settings |= {"blocks": ", ".join(blocks)} if blocks else {}
    settings |= {key: repr(value) for key, value in (arguments or {}).items()}
    config = WatchedConfig(
        model=name, kind="probe", variant="" if weights else built.variant,
        depth=0 if weights else built.depth, data=batch.source, batch_size=batch_size, steps=1,
        seed=seed, settings=settings,
    )  # fmt: skip
    folder = out or root / config.name
    _check_folder(folder)
    monitor, taken = _record(built.model, blocks, batch, loss, seed)
    value = float(taken.value.detach())
    run = as_run(
        monitor, config=config, data=batch.source, classes=taken.classes or None,
        curve={"loss": [value]},
    )  # fmt: skip
    built.model.zero_grad()
    curve = (
        _curvature(built.model, batch, loss, seed)
        if curvature
        else Curvature(value=math.nan, steps=0, converged=False, reason="not asked for")
    )
    about = environment("cpu", "float32")
    write_run(run, folder, environment=about, verdict=judge(run).to_dict(), overwrite=True)
    written = read_run(folder)
    if not run.blocks:
        notes.append("no residual addition, and no module with weights: nothing to record")
    return ProbeResult(
        run=written,
        verdict=judge(written),  # its commands name the folder
        loss=(taken.name, value),
        classes=taken.classes,
        batch=batch.example.describe(),
        curvature=curve,
        notes=(*notes, *built.notes, *run.notes),
    )


def _build(name: str, arguments: dict[str, Any], seed: int) -> tuple[Built, list[str]]:
    """The model; a transformers configuration beyond the memory is made narrower, not shallower."""
    notes = list[str]()
    if name.partition(":")[0] in ("torchvision", "timm", "transformers"):
        try:
            sketch = build_source(name, arguments, meta=True)
        except ResdiagError:  # cannot be built on the meta device: the next line says why
            return build_source(name, arguments, seed=seed), notes
        if 4 * _COPIES * count_parameters(sketch.model) > 0.5 * free_memory():
            narrow = _narrow(getattr(sketch.model, "config", None))
            if narrow is None:
                check_memory(sketch, copies=_COPIES)
            else:
                was = words_of(count_parameters(sketch.model))
                arguments = {**arguments, **{k: v for k, v in narrow.items() if k not in arguments}}
                words = ", ".join(f"{key}={value}" for key, value in narrow.items())
                notes.append(f"too large for this machine ({was} parameters): narrowed to {words}; "
                             "the depth is kept")  # fmt: skip
                check_memory(build_source(name, arguments, meta=True), copies=_COPIES)
    return build_source(name, arguments, seed=seed), notes


def _narrow(config: Any) -> dict[str, int] | None:  # noqa: ANN401
    """Arguments that make a language model's configuration narrow at its depth; None if unknown."""
    if not all(isinstance(getattr(config, k, None), int) for k in ("hidden_size", "vocab_size")):
        return None
    width, heads = 256, 4
    ratio = width / config.hidden_size
    sizes = {"hidden_size": width, "vocab_size": min(config.vocab_size, 1000)}
    for key, value in (("num_attention_heads", heads), ("num_key_value_heads", heads),
                       ("head_dim", width // heads)):  # fmt: skip
        if isinstance(getattr(config, key, None), int):
            sizes[key] = value
    if isinstance(getattr(config, "intermediate_size", None), int):
        sizes["intermediate_size"] = max(64, round(config.intermediate_size * ratio))
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        token = getattr(config, key, None)
        if isinstance(token, int) and token >= sizes["vocab_size"]:
            sizes[key] = 0
    return sizes


def _check_folder(folder: Path) -> None:
    """Refuse to replace a run that is not a probe."""
    if (folder / "run.json").exists():
        config = read_run(folder).config
        if not isinstance(config, WatchedConfig) or config.kind != "probe":
            raise UsageError(f"{folder} holds a run that is not a probe", "--out another folder")


def _record(
    model: nn.Module, blocks: Sequence[str] | None, batch: Batch, loss: str, seed: int
) -> tuple[Monitor, Loss]:
    """One forward and one backward pass under a monitor."""
    try:
        monitor = attach(model, blocks=blocks)
    except ValueError as error:
        raise UsageError(str(error), "a pattern such as layer1.* names modules") from error
    with monitor, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", WatchWarning)  # they are among the run's notes
        torch.manual_seed(seed)
        taken = batch.loss(model, loss, seed)
        taken.value.backward()
        monitor.step()
    return monitor, taken


def _curvature(model: nn.Module, batch: Batch, loss: str, seed: int) -> Curvature:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # fused attention has no second derivative
    with torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(seed)
        value = batch.loss(model, loss, seed).value
        return largest_curvature(value, [p for p in model.parameters() if p.requires_grad])
