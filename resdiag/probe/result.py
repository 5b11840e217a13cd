"""What a probe found, in numbers and plots."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from resdiag.diagnose.finding import plain
from resdiag.diagnose.registry import FINDINGS
from resdiag.diagnose.verdict import Verdict
from resdiag.probe.critical_rate import Curvature
from resdiag.runs.folder import Run
from resdiag.theory.depthlaw import DepthLaw, depth_law
from resdiag.theory.prediction import critical_lr

ALWAYS_DRAWN = ("signal", "gradnorms")
PLOTS = (*ALWAYS_DRAWN, "growth", "biasshift", "skip")
"""Plots that one recorded step fills; those not always drawn are drawn where a finding names them,
as each costs half a second."""

_BY_BLOCK = (
    "output_second_moment", "forward_growth", "output_mean", "output_bias", "grad_param",
    "grad_output", "grad_growth", "skip_gain", "branch_ratio",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeResult:
    """What a probe found.

    Attributes:
        run: The run folder that it wrote.
        verdict: The conclusion.
        loss: Name and value of the loss.
        classes: Classes of a cross-entropy, else 0.
        batch: The batch in words.
        curvature: Of the loss at these weights.
        notes: What was changed about the model, and what could not be measured.
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

    def draw(self) -> list[Path]:
        """Draw the plots of both directions, and those that findings name; none without blocks."""
        from resdiag.plots.drawing import draw
        from resdiag.plots.figurefile import save

        named = {kind for finding in self.verdict.findings for kind in FINDINGS[finding.name].plots}
        kinds = [kind for kind in PLOTS if kind in (*ALWAYS_DRAWN, *named)]
        folder = self.run.path / "figures"
        return [
            file
            for kind in (kinds if self.run.blocks else [])
            for file in save(draw(kind, self.run), folder / kind, ["png"])
        ]

    @property
    def is_plain(self) -> bool:
        """Whether no block has a shortcut."""
        return all(block.get("shortcut") == "none" for block in self.run.blocks)

    def _death(self) -> float:
        """0.6 / ||g_0||, a rule of thumb for a and b, see `critical_lr`; NaN for other networks."""
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
            known = name in frame and len(frame)
            return frame[name].to_numpy(float) if known else np.array([math.nan])

        moment, bias, gain = (
            column(name) for name in ("output_second_moment", "output_bias", "skip_gain")
        )
        back = column("grad_output")
        # the first unit of a plain network takes the data, which have no gradient
        first = back[0] if self.is_plain else column("grad_input")[0]
        with np.errstate(all="ignore"):
            ratio = float(first / back[-1])
        finite = bias[np.isfinite(bias)]
        return {
            "signal": {
                "first": float(moment[0]), "last": float(moment[-1]),
                "growth_per_block": _geometric_mean(column("forward_growth")),
            },
            "gradient": {
                "ratio_first_to_last": ratio,
                "growth_per_block": _geometric_mean(column("grad_growth")),
            },
            "bias_shift": {
                "first": float(bias[0]), "last": float(bias[-1]),
                "largest": float(finite.max()) if len(finite) else math.nan,
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


def _geometric_mean(values: "np.ndarray[Any, np.dtype[np.float64]]") -> float:
    """Geometric mean of the finite and positive values."""
    kept = values[np.isfinite(values) & (values > 0)]
    return float(np.exp(np.log(kept).mean())) if len(kept) else math.nan
