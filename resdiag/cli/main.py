"""The command line, put together: one file a command in `resdiag/cli`."""

from resdiag.cli.app import App, NamesItsVariants, print_help_or_version
from resdiag.cli.bench import bench_app
from resdiag.cli.compare import compare
from resdiag.cli.data import data_app
from resdiag.cli.diff import diff
from resdiag.cli.explain import explain
from resdiag.cli.export import export
from resdiag.cli.inspect import inspect
from resdiag.cli.lesion import lesion
from resdiag.cli.plot import plot
from resdiag.cli.predict import predict
from resdiag.cli.probe import probe
from resdiag.cli.report import freeze_study, report, report_study
from resdiag.cli.run import run
from resdiag.cli.runs import runs
from resdiag.cli.study import study_app
from resdiag.cli.tables import metrics, variants, version
from resdiag.cli.watch import watch

_EPILOG = (
    "Exit codes: 0 done, also if the network exploded; 1 failed; 2 wrong usage; 3 a study ended "
    "with failed cells; 74 the disk is full or failing; 75 another process writes the run, or "
    "SIGTERM stopped the command after a commit; 130 stopped by Ctrl-C. To continue a stopped run, "
    "repeat the command."
)

app = App(
    name="resdiag",
    help="Gradient and activation diagnostics for residual networks.",
    epilog=_EPILOG,
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},  # its commands inherit them
)
app.callback()(print_help_or_version)
app.command(cls=NamesItsVariants)(run)
for command in (
    runs, watch, plot, explain, compare, diff, report, lesion, inspect, export, predict, probe,
    variants, metrics, version,
):  # fmt: skip
    app.command()(command)
study_app.command("report")(report_study)
study_app.command("freeze")(freeze_study)
app.add_typer(bench_app, name="bench")
app.add_typer(data_app, name="data")
app.add_typer(study_app, name="study")
