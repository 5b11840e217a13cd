"""The tools that `peers.py` compares: one small class each, in the form its own documentation uses.

Each records at every step, with what it records by default unless the class says otherwise.
Imports stand in `begin`: a tool that is not installed is an ImportError of that tool alone.
"""

import contextlib
import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

Values = dict[tuple[str, str], float]
"""What a tool reports of a step: (quantity, module or parameter) -> number."""


class Tool:
    """A tool in a training loop. A method that a tool does not need does nothing.

    Attributes:
        package: Name of its distribution; empty for what is written by hand.
        label: What the table calls it.
        records: What it records here, in words.
        speaks: Whether it writes findings in words, so that silence means something.
    """

    package = ""
    label = ""
    records = ""
    speaks = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, model: nn.Module, optimizer: Optimizer) -> nn.Module:
        """Attach; returns the model to train."""
        return model

    def loss(self) -> nn.Module:
        return nn.CrossEntropyLoss()

    def before(self, step: int, model: nn.Module, images: torch.Tensor) -> None:
        """Before the forward pass."""

    def backward(self, step: int, loss: torch.Tensor, logits: torch.Tensor) -> None:
        loss.backward()

    def gradients(self, step: int, model: nn.Module) -> None:
        """After backward, before the optimizer's step."""

    def after(self, step: int, loss: torch.Tensor) -> None:
        """After the optimizer's step."""

    def close(self) -> None:
        """Detach."""

    def values(self) -> Values:
        """Numbers of the one step that was done; called after `close`."""
        return {}

    def says(self) -> list[str]:
        """Findings in words; called after `close`."""
        return []


class Nothing(Tool):
    """No tool: the control."""

    label = "no tool"


class Naive(Tool):
    """What people write by hand: `.item()` in forward hooks of the blocks, a loop over `.grad`."""

    label = "by hand: forward hooks, `.item()`"
    records = "mean and std of each block's output, gradient norm of each parameter"

    def begin(self, model: nn.Module, optimizer: Optimizer) -> nn.Module:
        self._seen: Values = {}
        self._handles = [
            module.register_forward_hook(self._hook(name))
            for name, module in model.named_modules()
            if type(module).__name__ == "BasicBlock" or re.fullmatch(r"units\.\d+", name)
        ]
        return model

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: torch.Tensor) -> None:
            self._seen["activation mean", name] = output.mean().item()
            self._seen["activation std", name] = output.std(correction=0).item()

        return hook

    def gradients(self, step: int, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self._seen["parameter gradient norm", name] = parameter.grad.norm().item()

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def values(self) -> Values:
        return self._seen


class References(Tool):
    """Keeps references to all outputs and reads them after the forward pass."""

    label = "by hand: keep outputs, read later"
    records = "mean and std of each module's output, read before backward"

    def begin(self, model: nn.Module, optimizer: Optimizer) -> nn.Module:
        self._kept: dict[str, torch.Tensor] = {}
        self._seen: Values = {}
        self._handles = [
            module.register_forward_hook(self._hook(name)) for name, module in model.named_modules()
        ]
        return model

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: torch.Tensor) -> None:
            self._kept[name] = output

        return hook

    def backward(self, step: int, loss: torch.Tensor, logits: torch.Tensor) -> None:
        for name, output in self._kept.items():
            self._seen["activation mean", name] = output.detach().mean().item()
            self._seen["activation std", name] = output.detach().std(correction=0).item()
        self._kept.clear()
        loss.backward()

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def values(self) -> Values:
        return self._seen


class BackwardHooks(Tool):
    """`register_full_backward_hook` on every module."""

    label = "by hand: `register_full_backward_hook`"
    records = "norm of the gradient at each module's output"

    def begin(self, model: nn.Module, optimizer: Optimizer) -> nn.Module:
        self._seen: Values = {}
        self._handles = [
            module.register_full_backward_hook(self._hook(name))
            for name, module in model.named_modules()
        ]
        return model

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, before: object, after: tuple[torch.Tensor, ...]) -> None:
            self._seen["gradient norm", name] = after[0].norm().item()

        return hook

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def values(self) -> Values:
        return self._seen


class Resdiag(Tool):
    """This project: every metric, at every step."""

    package = "resdiag"
    label = "**resdiag**"
    records = "every metric of the catalogue, per residual block"
    speaks = True
    metrics = "full"

    def begin(self, model: nn.Module, optimizer: Optimizer) -> nn.Module:
        import resdiag

        self._monitor = resdiag.attach(model, optimizer=optimizer, metrics=self.metrics)
        return model

    def after(self, step: int, loss: torch.Tensor) -> None:
        self._monitor.step()

    def close(self) -> None:
        self._monitor.close()

    def values(self) -> Values:
        seen: Values = {}
        frame = self._monitor.to_frame()
        for row in frame[frame.step == 0].to_dict("records"):
            name = self._monitor.blocks[row["block"]].name
            seen["activation mean", name] = row["output_mean"]
            seen["activation rms", name] = row["output_second_moment"] ** 0.5
            seen["gradient norm times root batch", name] = row["grad_output"]
            seen["block gradient norm", name] = row["grad_param"]
        return seen

    def says(self) -> list[str]:
        import resdiag

        said = []
        for finding in resdiag.judge(self._monitor).findings:
            where = "" if finding.block is None else self._monitor.blocks[finding.block].name
            said.append(f"{finding.name} {where}: {finding.summary}")
        return said


class ResdiagCore(Resdiag):
    """This project's small set of metrics."""

    label = "**resdiag**, core set"
    records = "moments, gradient norms, branch ratio and P1, per residual block"
    metrics = "core"


class Wandb(Tool):
    """Histograms of the parameters' gradients, offline."""

    package = "wandb"
    label = "wandb.watch"
    records = "histogram of each parameter's gradient (`log_freq=1`, offline)"

    def begin(self, model: nn.Module, optimizer: Optimizer) -> nn.Module:
        import wandb

        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
        self._run = wandb.init(mode="offline", dir=self.folder, project="peers", settings=settings)
        self._run.watch(model, log="gradients", log_freq=1)
        self._model = model
        return model

    def after(self, step: int, loss: torch.Tensor) -> None:
        self._run.log({"loss": loss.item()})

    def close(self) -> None:
        self._run.unwatch(self._model)
        self._run.finish()


class Torchmortem(Tool):
    """Drop-in diagnosis with findings in words."""

    package = "torchmortem"
    label = "torchmortem"
    records = "output gradients, activations, weights; findings"
    speaks = True

    def begin(self, model: nn.Module, optimizer: Optimizer) -> nn.Module:
        from torchmortem import Autopsy

        self._autopsy = Autopsy(model, optimizer=optimizer, sampling="thorough")
        self._autopsy.attach()
        return model

    def after(self, step: int, loss: torch.Tensor) -> None:
        self._autopsy.step(loss=loss.item())

    def close(self) -> None:
        self._autopsy.detach()

    def values(self) -> Values:
        seen: Values = {}
        for collector in self._autopsy._collectors:
            state = collector.state()
            if state.name == "gradient" and len(state.steps):
                for column, name in enumerate(state.layers):
                    seen["gradient norm", name] = state.series["grad_norm"][0, column]
                    seen["gradient mean", name] = state.series["grad_mean"][0, column]
        return seen

    def says(self) -> list[str]:
        report = self._autopsy.get_report()
        assert report is not None
        return [
            f"{f.severity.name}: {f.title}. {f.summary} {f.detail} {f.affected_layers}"
            for f in report.findings
            if f.severity.name in ("WARNING", "CRITICAL")
        ]


class Monitorch(Tool):
    """Lenses for outputs, their gradients and the parameters' gradients."""

    package = "monitorch"
    label = "monitorch"
    records = "norms of outputs, of their gradients and of the parameters' gradients"
    with_output_gradients = True

    def begin(self, model: nn.Module, optimizer: Optimizer) -> nn.Module:
        from monitorch.inspector import PyTorchInspector
        from monitorch.lens import OutputGradientGeometry, OutputNorm, ParameterGradientGeometry
        from monitorch.visualizer import AbstractVisualizer

        class Notes(AbstractVisualizer):
            """Takes what the other visualizers would draw."""

            def __init__(self) -> None:
                self.taken: dict[tuple[str, str], dict[str, float]] = {}

            def register_tags(self, main_tag: str, tag_attr: object) -> None:
                pass

            def plot_numerical_values(
                self,
                epoch: int,
                main_tag: str,
                values_dict: dict[str, dict[str, float]],
                ranges_dict: object = None,
            ) -> None:
                for name, lines in values_dict.items():
                    self.taken[main_tag, name] = dict(lines)

            def plot_probabilities(self, epoch: int, main_tag: str, values_dict: object) -> None:
                pass

            def plot_relations(self, epoch: int, main_tag: str, values_dict: object) -> None:
                pass

        layers = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
        lenses: list[Any] = [
            OutputNorm(include=layers),
            ParameterGradientGeometry(compute_correlation=False),
        ]
        if self.with_output_gradients:
            lenses.append(OutputGradientGeometry(compute_correlation=False))
        self._notes = Notes()
        self._inspector = PyTorchInspector(lenses, module=model, visualizer=self._notes)
        return model

    def after(self, step: int, loss: torch.Tensor) -> None:
        self._inspector.tick_epoch()

    def close(self) -> None:
        self._inspector.detach()

    def values(self) -> Values:
        quantities = {
            "Output Norm": "activation norm per sample",
            "Output Gradient Norm": "gradient norm",
        }
        seen: Values = {}
        for (tag, name), lines in self._notes.taken.items():
            number = float(next(iter(lines.values()), math.nan))
            if tag in quantities:
                seen[quantities[tag], name] = number
            elif tag in ("Weight Gradient Norm", "Bias Gradient Norm"):
                parameter = f"{name}.{tag.split()[0].lower()}"
                seen["parameter gradient norm", parameter] = number
        return seen


class MonitorchForward(Monitorch):
    """The same without the lens that sets backward hooks."""

    label = "monitorch, no output gradients"
    records = "norms of outputs and of the parameters' gradients"
    with_output_gradients = False


class Torchinstruments(Tool):
    """Every module's outputs and their gradients, and its report files."""

    package = "torchinstruments"
    label = "torchinstruments"
    records = "moments, quantiles and histograms of each module's output and its gradient"

    def begin(self, model: nn.Module, optimizer: Optimizer) -> nn.Module:
        from torchinstruments import AlwaysSampler, inject_observer

        class Notes:
            """A sink beside the files: keeps the last sample."""

            def initialize(self, run: object, modules: object) -> None:
                self.sample: Any = None

            def observe(self, sample: object) -> None:
                self.sample = sample

            def close(self) -> None:
                pass

        self._notes, self._model = Notes(), model
        inject_observer(
            model,
            output_dir=self.folder / "stats",
            sampler=AlwaysSampler(),
            sink=self._notes,
            error_policy="raise",
        )
        return model

    def close(self) -> None:
        from torchinstruments import remove_observer

        remove_observer(self._model)

    def values(self) -> Values:
        seen: Values = {}
        for name, calls in self._notes.sample.modules.items():
            if len(calls) != 1:
                continue
            for kind, records in (
                ("activation", calls[0].outputs),
                ("gradient", calls[0].output_gradients),
            ):
                for record in records.values():
                    for statistic in ("mean", "std"):
                        if statistic in record.stats:
                            seen[f"{kind} {statistic}", name] = record.stats[statistic]
        return seen


class ModuleMonitor(Tool):
    """Any function of activations and gradients by regular expression; here four of them."""

    package = "torch-module-monitor"
    label = "torch-module-monitor"
    records = "mean and std of each module's output, gradient norm of each parameter"

    def begin(self, model: nn.Module, optimizer: Optimizer) -> nn.Module:
        from torch_module_monitor import ModuleMonitor as Monitor

        self._monitor = Monitor(monitor_step_fn=lambda step: True)
        self._monitor.set_module(model)
        self._monitor.add_activation_metric("mean", lambda x: x.mean())
        self._monitor.add_activation_metric("std", lambda x: x.std(correction=0))
        self._monitor.add_gradient_metric("norm", lambda g: g.norm())
        return model

    def before(self, step: int, model: nn.Module, images: torch.Tensor) -> None:
        self._monitor.begin_step(step)

    def gradients(self, step: int, model: nn.Module) -> None:
        self._monitor.monitor_parameters()
        self._monitor.monitor_gradients()
        self._monitor.end_step()

    def values(self) -> Values:
        seen: Values = {}
        for key, value in self._monitor.get_all_metrics()[0].items():
            kind, name, statistic = key.split("/")
            if isinstance(value, list):
                continue
            quantity = "parameter gradient norm" if kind == "gradient" else f"{kind} {statistic}"
            seen[quantity, name] = value
        return seen


class Traintools(Tool):
    """Health of the parameters' gradients, with warnings in words."""

    package = "traintools"
    label = "traintools GradientHealthMonitor"
    records = "norm, largest, zero share and update ratio of each parameter's gradient; warnings"
    speaks = True

    def begin(self, model: nn.Module, optimizer: Optimizer) -> nn.Module:
        from traintools import GradientHealthMonitor

        self._monitor, self._optimizer = GradientHealthMonitor(), optimizer
        self._reports: list[Any] = []
        return model

    def gradients(self, step: int, model: nn.Module) -> None:
        lr = self._optimizer.param_groups[0]["lr"]
        self._reports.append(self._monitor.inspect(model, step=step, lr=lr))

    def values(self) -> Values:
        layers = self._reports[0].layers
        return {("parameter gradient norm", layer.name): layer.grad_norm for layer in layers}

    def says(self) -> list[str]:
        return [text for report in self._reports for text in report.warnings]


class DebugOverflow(Tool):
    """Stops at the first module whose forward pass is not finite, and prints the last frames."""

    package = "transformers"
    label = "transformers DebugUnderflowOverflow"
    records = "smallest and largest absolute value of each weight, input and output, last 21 kept"
    speaks = True

    def begin(self, model: nn.Module, optimizer: Optimizer) -> nn.Module:
        from transformers.debug_utils import DebugUnderflowOverflow

        self._debug, self._model = DebugUnderflowOverflow(model), model
        self._said: list[str] = []
        return model

    def loss(self) -> nn.Module:
        return _Listening(self)

    def before(self, step: int, model: nn.Module, images: torch.Tensor) -> None:
        self._printed = io.StringIO()
        self._redirected = contextlib.redirect_stdout(self._printed)
        self._redirected.__enter__()

    def heard(self) -> None:
        self._redirected.__exit__(None, None, None)

    def close(self) -> None:
        for module in self._model.modules():
            module._forward_hooks.clear()

    def overflowed(self) -> None:
        """The exception came: keep what was printed before it."""
        self.heard()
        frames = self._printed.getvalue().rstrip().split("\n" + " " * 17)
        self._said.append("Detected inf/nan, last frame: " + frames[-1].split("\n")[0])

    def says(self) -> list[str]:
        return self._said


class _Listening(nn.Module):
    """The loss, after the tool's printing has been collected."""

    def __init__(self, tool: DebugOverflow) -> None:
        super().__init__()
        self._tool = tool

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self._tool.heard()
        return nn.functional.cross_entropy(logits, labels)


class Torchlens(Tool):
    """A trace of the whole forward pass, taken beside each step; non-finite values are searched."""

    package = "torchlens"
    label = "torchlens, a trace per step"
    records = "every tensor of one extra forward pass; the first non-finite operation"
    speaks = True

    def begin(self, model: nn.Module, optimizer: Optimizer) -> nn.Module:
        import torchlens

        self._lens, self._said = torchlens, []
        return model

    def before(self, step: int, model: nn.Module, images: torch.Tensor) -> None:
        from torchlens.debug import bisect_nan

        trace = self._lens.trace(model, images)
        found = bisect_nan(trace)
        if getattr(found, "found", None) or "first" in str(found).lower():
            self._said.append(str(found))

    def says(self) -> list[str]:
        return self._said


class UnitScaling(Tool):
    """Scale of every tensor, forward and backward, through a compiled transform."""

    package = "unit-scaling"
    label = "unit-scaling track_scales"
    records = "mean, std, extremes of every tensor of the graph, forward and backward"

    def begin(self, model: nn.Module, optimizer: Optimizer) -> nn.Module:
        from unit_scaling.transforms import track_scales

        self._tracked = track_scales(model)
        optimizer.param_groups[0]["params"] = list(self._tracked.parameters())
        return self._tracked


class Delve(Tool):
    """Share of a layer's covariance eigenvalues that carry its variance."""

    package = "delve"
    label = "delve"
    records = "saturation of each convolution's output covariance"

    def begin(self, model: nn.Module, optimizer: Optimizer) -> nn.Module:
        from delve import SaturationTracker

        self._tracker = SaturationTracker(
            str(self.folder / "delve"), save_to="csv", modules=model, device="cpu", nosave=True
        )
        return model

    def after(self, step: int, loss: torch.Tensor) -> None:
        self._tracker.add_saturations()

    def close(self) -> None:
        self._tracker.close()


class Lightning(Tool):
    """The helper function that its users call in `on_before_optimizer_step`."""

    package = "lightning"
    label = "lightning `grad_norm`"
    records = "gradient norm of each parameter"

    def begin(self, model: nn.Module, optimizer: Optimizer) -> nn.Module:
        from lightning.pytorch.utilities import grad_norm

        self._norms, self._seen = grad_norm, {}
        return model

    def gradients(self, step: int, model: nn.Module) -> None:
        norms = self._norms(model, norm_type=2)
        self._seen = {key.partition("/")[2]: value.item() for key, value in norms.items()}

    def values(self) -> Values:
        return {("parameter gradient norm", name): v for name, v in self._seen.items() if name}


class Cockpit(Tool):
    """Gradient statistics from per-sample gradients, by BackPACK."""

    package = "cockpit-for-pytorch"
    label = "cockpit (economy)"
    records = "statistics of per-sample parameter gradients"

    def begin(self, model: nn.Module, optimizer: Optimizer) -> nn.Module:
        from backpack import extend
        from cockpit import Cockpit as Instruments
        from cockpit.utils.configuration import configuration

        model = extend(model)
        self._extend, self._optimizer = extend, optimizer
        self._cockpit = Instruments(model.parameters(), quantities=configuration("economy"))
        return model

    def loss(self) -> nn.Module:
        self._each = self._extend(nn.CrossEntropyLoss(reduction="none"))
        return _Remembering(self._extend(nn.CrossEntropyLoss()), self)

    def backward(self, step: int, loss: torch.Tensor, logits: torch.Tensor) -> None:
        info = {
            "batch_size": len(logits),
            "individual_losses": self._each(logits, self.labels),
            "loss": loss,
            "optimizer": self._optimizer,
        }
        with self._cockpit(step, info=info):
            loss.backward(create_graph=self._cockpit.create_graph(step))

    labels: torch.Tensor


class _Remembering(nn.Module):
    """The extended loss; tells its tool the labels, which the individual losses need."""

    def __init__(self, loss: nn.Module, tool: Cockpit) -> None:
        super().__init__()
        self._loss, self._tool = loss, tool

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self._tool.labels = labels
        return self._loss(logits, labels)


class Smdebug(Tool):
    """Reductions of every saved tensor, written to disk."""

    package = "smdebug"
    label = "smdebug"
    records = "mean, std and L2 norm of outputs, weights and their gradients"

    def begin(self, model: nn.Module, optimizer: Optimizer) -> nn.Module:
        import smdebug.pytorch as smd

        self._out = self.folder / "smdebug"
        self._hook = smd.Hook(
            out_dir=str(self._out),
            save_config=smd.SaveConfig(save_interval=1),
            reduction_config=smd.ReductionConfig(reductions=["mean", "std"], norms=["l2"]),
            include_regex=[".*output.*"],
            include_collections=["weights", "gradients", "losses"],
        )
        self._hook.register_module(model)
        return model

    def close(self) -> None:
        self._hook.close()

    def values(self) -> Values:
        from smdebug.trials import create_trial

        trial, seen = create_trial(str(self._out)), {}
        for name in trial.tensor_names():
            step = trial.tensor(name).steps()[0]
            if name.startswith("gradient/"):
                parameter = name.partition("_")[2]
                norm = trial.tensor(name).reduction_value(step, "l2")
                seen["parameter gradient norm", parameter] = float(norm)
            elif name.endswith("_output_0"):
                value = trial.tensor(name).reduction_value(step, "mean")
                seen["activation mean", name.removesuffix("_output_0")] = float(value)
        return seen


TOOLS: dict[str, type[Tool]] = {
    "nothing": Nothing,
    "resdiag": Resdiag,
    "resdiag-core": ResdiagCore,
    "naive": Naive,
    "references": References,
    "backward-hooks": BackwardHooks,
    "wandb": Wandb,
    "torchinstruments": Torchinstruments,
    "torchmortem": Torchmortem,
    "monitorch": Monitorch,
    "monitorch-forward": MonitorchForward,
    "torch-module-monitor": ModuleMonitor,
    "traintools": Traintools,
    "transformers": DebugOverflow,
    "lightning": Lightning,
    "torchlens": Torchlens,
    "unit-scaling": UnitScaling,
    "delve": Delve,
    "cockpit": Cockpit,
    "smdebug": Smdebug,
}
"""Every tool by the name that `--tools` takes, in the order of the table."""
