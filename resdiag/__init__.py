"""resdiag: gradient and activation diagnostics for residual networks.

The public names, resolved on first use: `import resdiag` costs neither torch nor pandas.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from resdiag.agreement.diff import diff as diff
    from resdiag.agreement.result import Agreement as Agreement
    from resdiag.catalog.custom import custom_metrics as custom_metrics
    from resdiag.catalog.custom import metric as metric
    from resdiag.catalog.custom import unregister_metric as unregister_metric
    from resdiag.catalog.table import METRICS as METRICS
    from resdiag.diagnose.finding import Evidence as Evidence
    from resdiag.diagnose.finding import Finding as Finding
    from resdiag.diagnose.finding import NotJudged as NotJudged
    from resdiag.diagnose.finding import Rule as Rule
    from resdiag.diagnose.finding import Threshold as Threshold
    from resdiag.diagnose.registry import FINDINGS as FINDINGS
    from resdiag.diagnose.registry import register_finding as register_finding
    from resdiag.diagnose.registry import unregister_finding as unregister_finding
    from resdiag.diagnose.rundata import RunData as RunData
    from resdiag.diagnose.saving import save as save
    from resdiag.diagnose.verdict import Verdict as Verdict
    from resdiag.diagnose.verdict import judge as judge
    from resdiag.errors import StopTraining as StopTraining
    from resdiag.interventions.additions import lesion as lesion
    from resdiag.models.inspection import inspect as inspect
    from resdiag.models.resnet import build_model as build_model
    from resdiag.models.variants import VARIANTS as VARIANTS
    from resdiag.models.variants import Variant as Variant
    from resdiag.models.variants import register_variant as register_variant
    from resdiag.models.variants import unregister_variant as unregister_variant
    from resdiag.plots.drawing import draw as draw
    from resdiag.plots.kinds import register_plot as register_plot
    from resdiag.plots.kinds import unregister_plot as unregister_plot
    from resdiag.plots.plotkind import PlotKind as PlotKind
    from resdiag.probe.examination import Examination as Examination
    from resdiag.probe.examine import examine as examine
    from resdiag.runs.folder import load_frame as load_frame
    from resdiag.runs.watched import load_run as load_run
    from resdiag.theory.laws import Law as Law
    from resdiag.theory.laws import register_law as register_law
    from resdiag.theory.laws import unregister_law as unregister_law
    from resdiag.watch.find.blocks import Block as Block
    from resdiag.watch.find.blocks import find_blocks as find_blocks
    from resdiag.watch.loop.attach import attach as attach
    from resdiag.watch.loop.monitor import Monitor as Monitor

__version__ = "0.1.0"

_HOMES = {
    # watching any model
    "attach": "resdiag.watch.loop.attach",
    "Monitor": "resdiag.watch.loop.monitor",
    "StopTraining": "resdiag.errors",
    "find_blocks": "resdiag.watch.find.blocks",
    "Block": "resdiag.watch.find.blocks",
    "inspect": "resdiag.models.inspection",
    "METRICS": "resdiag.catalog.table",
    "metric": "resdiag.catalog.custom",
    "custom_metrics": "resdiag.catalog.custom",
    "unregister_metric": "resdiag.catalog.custom",
    # the paper's networks
    "build_model": "resdiag.models.resnet",
    "Variant": "resdiag.models.variants",
    "VARIANTS": "resdiag.models.variants",
    "register_variant": "resdiag.models.variants",
    "unregister_variant": "resdiag.models.variants",
    "Law": "resdiag.theory.laws",
    "register_law": "resdiag.theory.laws",
    "unregister_law": "resdiag.theory.laws",
    # changing one thing
    "lesion": "resdiag.interventions.additions",
    # experiments on one batch
    "examine": "resdiag.probe.examine",
    "Examination": "resdiag.probe.examination",
    # runs on disk, and what they mean
    "load_frame": "resdiag.runs.folder",
    "load_run": "resdiag.runs.watched",
    "save": "resdiag.diagnose.saving",
    "draw": "resdiag.plots.drawing",
    "PlotKind": "resdiag.plots.plotkind",
    "register_plot": "resdiag.plots.kinds",
    "unregister_plot": "resdiag.plots.kinds",
    "judge": "resdiag.diagnose.verdict",
    "Verdict": "resdiag.diagnose.verdict",
    # two runs that should agree
    "diff": "resdiag.agreement.diff",
    "Agreement": "resdiag.agreement.result",
    # what a verdict looks for
    "FINDINGS": "resdiag.diagnose.registry",
    "register_finding": "resdiag.diagnose.registry",
    "unregister_finding": "resdiag.diagnose.registry",
    "Rule": "resdiag.diagnose.finding",
    "Threshold": "resdiag.diagnose.finding",
    "RunData": "resdiag.diagnose.rundata",
    "Finding": "resdiag.diagnose.finding",
    "NotJudged": "resdiag.diagnose.finding",
    "Evidence": "resdiag.diagnose.finding",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> object:
    """Import the public name `name` from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module 'resdiag' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
