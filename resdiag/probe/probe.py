"""The probe: one forward and backward pass of any model, without training, and what it says."""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resdiag.diagnose.finding import plain
from resdiag.diagnose.verdict import Verdict, judge
from resdiag.errors import ResdiagError, UsageError
from resdiag.models.example import Example
from resdiag.models.inspection import check_memory, count_parameters, free_memory, words_of
from resdiag.models.source import Built, build_source
from resdiag.probe.batch import open_batch
from resdiag.probe.curvature import Curvature, largest_curvature
from resdiag.runs.environment import environment
from resdiag.runs.folder import Run, load_run
from resdiag.runs.watched import WatchedConfig, as_run, write_run
from resdiag.theory.depthlaw import DepthLaw, depth_law
from resdiag.theory.prediction import critical_lr
from resdiag.watch.base.safety import WatchWarning
from resdiag.watch.loop.attach import attach
from resdiag.watch.loop.monitor import Monitor

PLOTS = ("signal", "gradnorms", "growth", "biasshift", "skip")
"""Plots that a probe draws into its folder."""

_BY_BLOCK = (
    "output_second_moment", "forward_growth", "output_mean", "output_bias", "grad_param",
    "grad_output", "grad_growth", "skip_gain", "branch_ratio",
)  # fmt: skip

LOSSES = ("auto", "cross-entropy", "mean-square")
"""What `--loss` accepts."""

_COPIES = 8.0  # weights, gradients, a graph of gradients, vectors of the Lanczos iteration


@dataclass(frozen=True, kw_only=True, eq=False)
class Loss:
    """The scalar that is differentiated.

    Attributes:
        name: In words.
        value: The scalar, with its graph.
        classes: Classes of a cross-entropy, 0 of another loss.
    """

    name: str
    value: Tensor
    classes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Probed:
    """What a probe found.

    Attributes:
        run: The run folder that it wrote.
        verdict: The conclusion.
        loss: Name and value of the loss.
        classes: Classes of a cross-entropy, else 0.
        batch: The batch in words.
        curvature: Of the loss at these weights.
        notes: What was changed, or could not be had.
    """

    run: Run
    verdict: Verdict
    loss: tuple[str, float]
    classes: int
    batch: str
    curvature: Curvature
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The document of `resdiag probe --json`, without NaN."""
        frame, curve = self.run.metrics(), self.run.curve()
        names = [name for name in _BY_BLOCK if name in frame]
        rows = [
            {"index": int(row["block"]), **{name: float(row[name]) for name in names}}
            for _, row in frame.iterrows()
        ]
        for row, block in zip(rows, self.run.blocks, strict=False):
            row |= {"name": block["name"], "stage": block["stage"]}
        document = {
            "schema": 1,
            "model": self.run.config.model,
            "run": str(self.run.path),
            "batch": self.batch,
            "loss": {"name": self.loss[0], "value": self.loss[1], "classes": self.classes or None},
            "grad_norm": float(curve["grad_norm"].iloc[0]),
            **self.summary(),
            "blocks": rows,
            "verdict": self.verdict.to_dict(),
            "unavailable": self.run.unavailable,
            "notes": list(self.notes),
        }
        plainly = plain(document)
        assert isinstance(plainly, dict)
        return plainly

    @property
    def is_plain(self) -> bool:
        """Whether no block has a shortcut."""
        return all(block.get("shortcut") == "none" for block in self.run.blocks)

    def _death(self) -> float:
        """0.6 / ||g_0||, above which no run of a and b survived; NaN for any other network."""
        norm = float(self.run.curve()["grad_norm"].iloc[0])
        known = self.run.config.variant in ("elu_nobn", "elu_pre")
        return critical_lr(norm) if known and math.isfinite(norm) else math.nan

    def depth_law(self) -> DepthLaw:
        """How the longest stage grows: by a factor per block or by an amount."""
        stages: dict[int, list[int]] = {}
        for block in self.run.blocks:
            stages.setdefault(block["stage"], []).append(block["index"])
        longest = max(stages.values(), key=len, default=[])
        frame = self.run.metrics().set_index("block")
        names = ("output_second_moment", "branch_ratio")
        if not longest or not {*names} <= {*frame.columns}:
            return depth_law((), ())
        return depth_law(*(frame[name].reindex(longest).tolist() for name in names))

    def summary(self) -> dict[str, Any]:
        """Signal, gradient, bias shift, skip path and critical learning rate in numbers."""
        frame = self.run.metrics()

        def column(name: str) -> "np.ndarray[Any, np.dtype[np.float64]]":
            return (
                frame[name].to_numpy(float)
                if name in frame and len(frame)
                else np.array([math.nan])
            )

        moment, bias, gain = (
            column(name) for name in ("output_second_moment", "output_bias", "skip_gain")
        )
        back = column("grad_output")
        # the first unit of a plain network takes the data, which have no gradient
        first = back[0] if self.is_plain else column("grad_input")[0]
        with np.errstate(all="ignore"):
            ratio = float(first / back[-1])
        return {
            "signal": {
                "first": float(moment[0]), "last": float(moment[-1]),
                "growth_per_block": _mean(column("forward_growth")),
            },
            "gradient": {
                "ratio_first_to_last": ratio, "growth_per_block": _mean(column("grad_growth")),
            },
            "bias_shift": {
                "first": float(bias[0]), "last": float(bias[-1]), "largest": _largest(bias),
            },
            "depth_law": asdict(self.depth_law()),
            "skip_gain": {"last": float(gain[-1])},
            "critical_lr": {
                "value": self.curvature.critical_lr,
                "definition": "2 / lambda_max of the loss's Hessian on this batch, plain SGD",
                "lambda_max": self.curvature.value,
                "products": self.curvature.steps,
                "converged": self.curvature.converged,
                "reason": self.curvature.reason,
                "death": self._death(),
            },
        }  # fmt: skip


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
) -> Probed:
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
        UsageError: The model, data or weights cannot be had or do not fit together; one line.
    """
    built, notes = _build(name, dict(arguments or {}), seed)
    if weights is not None:
        load_weights(built.model, weights)
        notes.append(f"weights of {weights}")
    example, labels, source = open_batch(built, data, data_root, batch_size, shape, seed)
    config = WatchedConfig(
        model=name, kind="probe", variant="" if weights else built.variant,
        depth=0 if weights else built.depth, data=source, batch_size=batch_size, steps=1, seed=seed,
        settings={"weights": str(weights or ""), "loss": loss,
                  **({"blocks": ", ".join(blocks)} if blocks else {}),
                  **{key: repr(value) for key, value in (arguments or {}).items()}},
    )  # fmt: skip
    folder = out or root / config.name
    _check_folder(folder)
    try:
        monitor = attach(built.model, blocks=blocks)
    except ValueError as error:
        raise UsageError(str(error), "a pattern such as layer1.* names modules") from error
    run, taken = _record(monitor, built.model, example, labels, loss, seed, config, source)
    curve = Curvature(value=math.nan, steps=0, converged=False, reason="not asked for")
    if curvature:
        curve = _curvature(built.model, example, labels, loss, seed)
    verdict = judge(run)
    about = environment("cpu", "float32")
    write_run(run, folder, environment=about, verdict=verdict.to_dict(), overwrite=True)
    if not run.blocks:
        notes.append("no residual addition, and no module with weights: nothing to record")
    return Probed(
        run=load_run(folder),
        verdict=judge(load_run(folder)),
        loss=(taken.name, float(taken.value.detach())),
        classes=taken.classes,
        batch=example.describe(),
        curvature=curve,
        notes=(*notes, *built.notes, *run.notes),
    )


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state_dict without executing anything that the file holds.

    Raises:
        UsageError: It cannot be read, or belongs to another model; names what differs.
    """
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            # weights_only refuses everything but tensors and plain containers: no code can run
            state = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    except Exception as error:
        text = " ".join(str(error).split())[:160]
        hint = "a state_dict of torch.save(model.state_dict(), ...) or safetensors"
        raise UsageError(
            f"{path} holds no weights: {type(error).__name__}: {text}", hint
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    tensors = isinstance(state, dict) and all(isinstance(v, Tensor) for v in state.values())
    if not tensors or not state:
        raise UsageError(f"{path} holds no state_dict of tensors")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        text = " ".join(str(error).split())
        raise UsageError(f"{path} does not fit the model: {text[:300]}", "--arg?") from error


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
    """Refuse to write over a run that is no probe."""
    if (folder / "run.json").exists():
        config = load_run(folder).config
        if not isinstance(config, WatchedConfig) or config.kind != "probe":
            raise UsageError(f"{folder} holds a run that is no probe", "--out another folder")


def _record(
    monitor: Monitor,
    model: nn.Module, example: Example, labels: Tensor | None, loss: str, seed: int,
    config: WatchedConfig, source: str,
) -> tuple[Run, Loss]:  # fmt: skip
    with monitor, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", WatchWarning)  # the monitor's list says it
        torch.manual_seed(seed)
        taken = _forward(model, example, labels, loss, seed)
        taken.value.backward()
        monitor.step()
    value = float(taken.value.detach())
    run = as_run(
        monitor, config=config, data=source, classes=taken.classes or None, curve={"loss": [value]}
    )
    model.zero_grad()
    return run, taken


def _curvature(
    model: nn.Module, example: Example, labels: Tensor | None, loss: str, seed: int
) -> Curvature:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # fused attention has no second derivative
    with torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(seed)
        value = _forward(model, example, labels, loss, seed).value
        return largest_curvature(value, [p for p in model.parameters() if p.requires_grad])


def _forward(
    model: nn.Module, example: Example, labels: Tensor | None, loss: str, seed: int
) -> Loss:
    try:
        output = model(*example.args, **example.kwargs)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UsageError(f"the model does not run on {example.describe()}: {text}") from error
    found = choose_loss(output, example, labels, loss, seed)
    if not found.value.requires_grad:
        raise UsageError("the loss has no gradient: every parameter is frozen")
    return found


def choose_loss(
    output: object, example: Example, labels: Tensor | None, loss: str = "auto", seed: int = 0
) -> Loss:
    """The loss of a model's output.

    Cross-entropy where the output is (N, K) logits, with `labels` or uniformly random ones; of
    tokens (N, T, K) where the model was given token ids: the next token of a decoder, a random one
    of anything else. The mean square of the output otherwise.

    Raises:
        UsageError: There is no floating output, or no logits where cross-entropy was asked for.
    """
    logits = _main_output(output)
    if logits is None:
        raise UsageError("the model returned no floating tensor to take a loss of")
    named = hasattr(output, "logits")
    ids = example.kwargs.get("decoder_input_ids", example.kwargs.get("input_ids"))
    classes = logits.shape[-1]
    flat = logits.dim() == 2 and classes > 1
    tokens = logits.dim() == 3 and named and isinstance(ids, Tensor)
    if loss == "mean-square" or (loss == "auto" and not flat and not tokens):
        return Loss(
            name="mean square of the output", value=logits.float().square().mean(), classes=0
        )
    if classes < 2 or logits.dim() < 2:
        raise UsageError(f"cross-entropy needs logits; the output is {tuple(logits.shape)}")
    if tokens and isinstance(ids, Tensor) and ids.shape[1] == logits.shape[1] and ids.shape[1] > 1:
        name = f"next-token cross-entropy of {example.tokens}"
        pairs = logits[:, :-1].reshape(-1, classes), ids[:, 1:].reshape(-1)
    else:
        generator = torch.Generator().manual_seed(seed)
        shape = logits.shape[:-1]
        drawn = torch.randint(classes, shape, generator=generator) if labels is None else labels
        if int(drawn.max()) >= classes:
            raise UsageError(f"the data have more classes than the model's {classes} outputs")
        name = "cross-entropy with " + (
            "random labels" if labels is None else "the labels of the data"
        )
        pairs = logits.reshape(-1, classes), drawn.reshape(-1)
    return Loss(name=name, value=F.cross_entropy(pairs[0].float(), pairs[1]), classes=classes)


def _main_output(output: object) -> Tensor | None:
    """Logits if the output names them, else its first floating tensor."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    named = getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    values = list(output.values()) if isinstance(output, Mapping) else output
    if not isinstance(values, list | tuple):
        return None
    return next((found for found in map(_main_output, values) if found is not None), None)


def _mean(values: "np.ndarray[Any, np.dtype[np.float64]]") -> float:
    """Geometric mean of what is finite and positive."""
    kept = values[np.isfinite(values) & (values > 0)]
    return float(np.exp(np.log(kept).mean())) if len(kept) else math.nan


def _largest(values: "np.ndarray[Any, np.dtype[np.float64]]") -> float:
    kept = values[np.isfinite(values)]
    return float(kept.max()) if len(kept) else math.nan


def draw_probe(run: Run) -> list[Path]:
    """Draw `PLOTS` into the run's folder; none where there are no blocks."""
    from resdiag.plots.drawing import draw, save

    if not run.blocks:
        return []
    plain_network = all(block.get("shortcut") == "none" for block in run.blocks)
    return [
        file
        for kind in PLOTS
        if not (plain_network and kind == "skip")
        for file in save(draw(kind, run), run.path / "figures" / kind, ["png"])
    ]


def to_json(probed: Probed, files: Sequence[Path]) -> str:
    """The document as one line."""
    return json.dumps({**probed.to_dict(), "files": [str(file) for file in files]})
