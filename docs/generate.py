"""Writes the reference pages from the code; `--check` only says which ones are out of date.

The pages are committed, so that they can be read without building anything; a test compares them.
"""

import dataclasses
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, get_args

from claimspage import claims_page
from findingpages import findings_page
from gallery import gallery_page
from measuredtables import HEAD, peers_table, performance_page, table
from predictionpage import prediction_page
from readmetable import readme_page
from sizespage import silent_page
from suitepage import calibration_page
from typer.main import get_command

import resdiag
from resdiag.catalog.set_metrics import ON_CADENCE
from resdiag.catalog.table import METRICS, POINTS, SITES, Metric
from resdiag.cli.main import app
from resdiag.data.registry import DATASETS
from resdiag.models.variants import VARIANTS
from resdiag.plots.kinds import KINDS
from resdiag.report import committed
from resdiag.runs.config import RunConfig, row_of
from resdiag.theory.laws import LAWS
from resdiag.training.recipe import RECIPES, Request
from resdiag.watch.measure.attention import MASKED, QUERIES, SAMPLES

HERE = Path(__file__).resolve().parent / "reference"
ROOT = HERE.parent.parent
Parser: TypeAlias = Any
"""A command or one of its parameters: a class of Click's or of Typer's own, by its release."""


def commands() -> Iterator[tuple[tuple[str, ...], Parser]]:
    """Every command of the command line as its words and its parser, groups before members."""

    def walk(words: tuple[str, ...], command: Parser) -> Iterator[tuple[tuple[str, ...], Parser]]:
        yield words, command
        for name, member in getattr(command, "commands", {}).items():
            yield from walk((*words, name), member)

    return walk(("resdiag",), get_command(app))


def cli_page() -> str:
    """The command line: what `--help` says of every command, in tables.

    Made from the parsers and not from the text they print, which differs between releases of Typer.
    """
    parts = [
        _head("Command line", "resdiag/cli/"),
        "Results are printed to stdout, progress and notices to stderr. With `--json` a command "
        'prints one JSON document on stdout, also for an error: `{"error": ..., "hint": ...}`.\n',
    ]
    for words, command in commands():
        parts.append(f"## `{' '.join(words)}`\n\n{command.help}\n")
        arguments = [p for p in command.params if not p.opts[0].startswith("-")]
        names = [_metavar(p) for p in arguments]
        members = getattr(command, "commands", {})
        tail = ["COMMAND"] if members else [*names, "[OPTIONS]"]
        parts.append(f"```text\n{' '.join([*words, *tail])}\n```\n")
        if members:
            rows = [
                (f"[`{' '.join([*words[1:], n])}`](#{'-'.join([*words, n])})", _first_line(m.help))
                for n, m in members.items()
            ]
            parts.append(table(("command", "what it does"), rows))
        elif command.params:
            given = inspect.signature(command.callback, eval_str=True).parameters
            hints = {name: parameter.annotation for name, parameter in given.items()}
            rows = [_parameter(parameter, hints) for parameter in command.params]
            parts.append(table(("option", "value", "default", "meaning"), rows))
        if command.epilog:
            parts.append(command.epilog + "\n")
    return "\n".join(parts)


def _first_line(help: str) -> str:
    """The first paragraph of a help text: a cell of a table has no paragraphs."""
    return help.partition("\n\n")[0]


def _parameter(parameter: Parser, hints: Mapping[str, object]) -> tuple[str, str, str, str]:
    """A row of the table of options."""
    names = [*parameter.opts, *parameter.secondary_opts]
    if not names[0].startswith("-"):
        names = [_metavar(parameter)]
    flag = getattr(parameter, "is_flag", False)
    default = "" if flag and not parameter.secondary_opts else parameter.default
    if parameter.secondary_opts:
        default = names[not default]
    shown = "**required**" if parameter.required else f"`{default}`" if default else ""
    if default == 0 and not flag:
        shown = "`0`"
    variable = f"; or set `{parameter.envvar}`." if parameter.envvar else ""
    kind = "" if flag else _kind(hints[parameter.name])
    meaning = parameter.help if variable == "" else parameter.help.removesuffix(".") + variable
    return ", ".join(f"`{name}`" for name in names), kind, shown, meaning


def _kind(hint: object) -> str:
    """The name of an option's type: int of `int | None`, Path of `list[Path] | None`."""
    for inner in get_args(hint):
        if inner is not type(None):
            return _kind(inner)
    name = getattr(hint, "__name__", "")
    return {"str": "text", "int": "integer", "float": "number"}.get(name, name.lower())


def _metavar(parameter: Parser) -> str:
    name = parameter.metavar or parameter.name.upper()
    return name if parameter.required or name.startswith("[") else f"[{name}]"


def metrics_page() -> str:
    """Every metric with its formula, unit, site, source and reading."""
    recorded = sum(metric.derive is None for metric in METRICS.values())
    parts = [
        _head("Metrics", "resdiag/catalog/table.py"),
        f"{len(METRICS)} metrics: {recorded} are recorded, {len(METRICS) - recorded} are derived "
        "from them when a run is read. A value that cannot be recorded is NaN, and the reason "
        "is in the run's `unavailable` list.\n",
        "`resdiag metrics NAME` prints an entry in the terminal. In Python, the entries are in "
        "`resdiag.METRICS`.\n",
        _SYMBOLS,
        "P1 to P4, slopes, saturation and the shares of the gradient are estimates from the first "
        "4 samples of a batch, some per cent off; `attach(samples=None)` takes all of them.\n",
        f"Gradients are read at one of {_code(POINTS)}; the recorded column `point` says which.\n",
    ]
    for title, text, members in _sections():
        parts.append(f"## {title}\n\n{text}\n")
        rows = [
            (f"`{m.id}`<br>{m.label}", f"`{m.formula}`<br>unit {m.unit}", m.reading, _origin(m))
            for m in members
        ]
        parts.append(table(("metric", "formula", "how to read it", "source"), rows))
    return "\n".join(parts)


def variants_page() -> str:
    """The table of variants, and the recipes that train them."""
    rows = [
        (
            f"`{v.id}`",
            v.alias,
            v.branch,
            v.after_add,
            v.stem,
            v.head or "-",
            "option A" if v.shortcut else "none",
            f"`{v.law}`",
            v.source,
        )
        for v in VARIANTS.values()
    ]
    header = ("id", "alias", "branch F", "after-add f", "stem", "head", "shortcut", "law", "source")
    laws = [(f"`{law.name}`", law.unit, law.basis) for law in LAWS.values()]
    recipes = [
        (
            f"`{name}`",
            f"{r.steps} steps" if r.steps else f"{r.epochs} epochs",
            str(r.batch_size),
            f"{r.lr:g}",
            ", ".join(f"{m:.3f}" for m in r.milestones) or "none",
            f"first {r.record_first}, then each {r.every}th",
            r.source,
        )
        for name, r in RECIPES.items()
    ]
    return "\n".join(
        [
            _head("Variants and recipes", "resdiag/models/variants.py and training/recipe.py"),
            "The variants differ in the branch F and in the function f after the addition: "
            "`y = h(x) + F(x)`, `x' = f(y)`. Name a variant by its id or by the paper's letter. "
            "The depth can be any 6n+2, e.g. 20, 32, 44, 56 or 110. The stages have 16, 32 and 64 "
            "channels.\n",
            table(header, rows),
            "Option A is the parameter-free shortcut of the CIFAR networks: at a transition it "
            "subsamples every second pixel and pads the new channels with zeros. Convolutions have "
            "no bias, and are initialised with He's fan-out rule.\n",
            "## Laws\n\nA law predicts the statistics of a variant at initialisation. Each variant "
            "names its law in the table above ([](../howto/extend-variant.md)).\n",
            table(("law", "residual unit", "prediction and source"), laws),
            "## Recipes\n\nBoth use SGD with Nesterov momentum 0.9, and weight decay 1e-4 on all "
            "parameters. Milestones are the fractions of the training after which the learning "
            "rate is divided by 10.\n",
            table(
                ("recipe", "length", "batch", "lr", "milestones", "recorded steps", "source"),
                recipes,
            ),
        ]
    )


def settings_page() -> str:
    """The settings of a run, what its configuration holds, and the data sets."""
    asked = [
        (
            f"`--{entry.name.replace('_', '-')}`",
            f"`{entry.name}`" if row_of(entry).in_studies else "",
            *_value_words(entry),
            row_of(entry).help,
        )
        for entry in dataclasses.fields(Request)
    ]
    stored = [
        (f"`{entry.name}`", *_value_words(entry), row_of(entry).help)
        for entry in dataclasses.fields(RunConfig)
    ]
    data = [
        (
            f"`{row.spec}`",
            row.description.replace("<", "&lt;").replace("*", "\\*"),
            f"{row.train:,} + {row.test:,}" if row.train else "",
            str(row.classes or ""),
            "yes" if row.flip else "no",
            "yes" if row.download else "",
            row.licence or "yours",
        )
        for row in DATASETS.values()
    ]
    header = ("type", "default", "valid", "meaning")
    return "\n".join(
        [
            _head("Run settings and data sets", "resdiag/runs/config.py and data/registry.py"),
            "Options of `resdiag run`, and keys of `[fixed]`, `[grid]`, `[[include]]` and "
            "`[[exclude]]` in study files. If there is no default, the recipe sets the value.\n",
            table(("option", "in a study file", *header), asked),
            "## Configuration of a run\n\nThe configuration in `run.json`: the settings, completed "
            "by the recipe. The name of the run's folder ends in a hash of it. Older files use "
            "`engine` for `backend`, and the recipe `probe` for `short`; they can still be read.\n",
            table(("key", *header), stored),
            "## Data sets\n\n`--data auto` uses CIFAR-10 if it is on disk, else the digits. "
            "See [](../howto/images.md) for their use, and [](../howto/extend-dataset.md) for "
            "adding one.\n",
            table(
                ("`--data`", "description", "images", "classes", "mirrored", "download", "licence"),
                data,
            ),
        ]
    )


def _value_words(entry: "dataclasses.Field[Any]") -> tuple[str, str, str]:
    """Type, default and valid values of a setting."""
    kind = "list of integers" if get_args(entry.type) == (int, ...) else _kind(entry.type)
    none = entry.default in (None, dataclasses.MISSING)
    default = "" if none else f"`{json.dumps(entry.default)}`".replace('"', "")
    return {"bool": "true, false"}.get(kind, kind), default, row_of(entry).range


def plots_page() -> str:
    """Every kind of plot: its question, what to read in it, what it draws."""
    parts = [
        _head("Plots", "resdiag/plots"),
        "`resdiag plot KIND` plots the latest run, `resdiag plot KIND RUN RUN ...` plots several "
        "on the same axes. Values that are not finite have a marker of their own. The "
        "[gallery](../gallery.md) has each kind for several trainings.\n",
    ]
    for kind in KINDS.values():
        needs = _code(kind.needs)
        parts.append(
            f"## `{kind.name}`\n\n{kind.title}. {kind.question}\n\n"
            f"**Read:** {kind.reading}\n\n**Draws:** {needs}.\n"
        )
    return "\n".join(parts)


def api_page() -> str:
    """The public names, documented by their docstrings."""
    parts = [
        _head("Python", "resdiag/__init__.py"),
        "Import these names from `resdiag`. `import resdiag` itself imports neither PyTorch nor "
        "pandas.\n",
    ]
    for name in resdiag.__all__:
        if name == "__version__":
            continue
        value = getattr(resdiag, name)
        if isinstance(value, type):
            directive, options = "autoclass", "\n:members:"
        elif callable(value):
            directive, options = "autofunction", ""
        else:
            directive, options = "autodata", "\n:no-value:"
        target = f"{resdiag._HOMES[name]}.{name}"
        parts.append(
            f"## `resdiag.{name}`\n ```{{eval-rst}}\n.. {directive}:: {target}"
            + options.replace("\n", "\n   ")
            + "\n```\n"
        )
    return "\n".join(parts)


def other_tools_page() -> str:
    """The page about other tools with the table of the measurements in its place."""
    page = (HERE.parent / "explanation" / "other-tools.md").read_text("utf-8")
    results = json.loads((ROOT / "benchmarks" / "results" / "peers.json").read_text("utf-8"))
    before, rest = page.split(_MEASURED[0])
    return (
        before
        + _MEASURED[0]
        + "\n"
        + peers_table(results)
        + _MEASURED[1]
        + rest.split(_MEASURED[1])[1]
    )


_MEASURED = (
    "<!-- measured: written by docs/generate.py from benchmarks/results/peers.json -->",
    "<!-- end of measured -->",
)

RESULTS = ROOT / "studies" / "results"
_FIGURES = HERE.parent / "studies" / "figures"


def study_pages() -> dict[str, Callable[[], str]]:
    """Pages of the studies with committed results, and the digests of their figures' data."""
    pages: dict[str, Callable[[], str]] = {
        "../studies/index.md": lambda: _head_of(
            "studies/results", committed.index_page(RESULTS, more=("claims",))
        ),
        "../studies/claims.md": claims_page,
        "../explanation/paper-silent.md": silent_page,
        "../explanation/prediction.md": prediction_page,
    }
    for name in committed.committed_studies(RESULTS):
        source = f"studies/results/{name}"
        pages[f"../studies/{name}.md"] = lambda name=name, source=source: _head_of(
            source, committed.study_page(RESULTS, name)
        )
        pages[f"../studies/figures/{name}.json"] = lambda name=name: (
            json.dumps(committed.digests(RESULTS, name), indent=1) + "\n"
        )
    return pages


def _head_of(source: str, text: str) -> str:
    return f"{HEAD.format(source=source)}\n{text}"


def draw_studies() -> None:
    """Draw the figures whose data have changed since they were drawn."""
    for name in committed.committed_studies(RESULTS):
        known, page = _FIGURES / f"{name}.json", PAGES[f"../studies/figures/{name}.json"]()
        drawn = {path.stem for path in (_FIGURES / name).glob("*.svg")}
        old = known.read_text("utf-8") if known.exists() else ""
        if set(json.loads(page)) != drawn or old != page:
            for path in (_FIGURES / name).glob("*.svg"):
                path.unlink()
            committed.write_figures(RESULTS, name, _FIGURES / name)


PAGES: dict[str, Callable[[], str]] = {
    **study_pages(),
    "cli.md": cli_page,
    "metrics.md": metrics_page,
    "variants.md": variants_page,
    "settings.md": settings_page,
    "plots.md": plots_page,
    "api.md": api_page,
    "findings.md": findings_page,
    "../explanation/calibration.md": calibration_page,
    "../explanation/other-tools.md": other_tools_page,
    "../explanation/performance.md": performance_page,
    "../gallery.md": gallery_page,
    "../../README.md": readme_page,
}
"""The generated pages and what makes them."""

_SYMBOLS = """\
Symbols, in the order of the computation:

| symbol | meaning |
|---|---|
| `x` | input of the block |
| `h(x)` | shortcut |
| `F(x)` | branch |
| `u = h + F` | sum |
| `H = f(u)` | output, f the after-add |
| `L`, `B` | mean loss over a batch of B samples |
| `theta` | parameters of the block |
| `mu_c`, `sigma_c^2` | mean and variance of channel c over batch and positions |
"""


def _sections() -> Iterator[tuple[str, str, list[Metric]]]:
    """The catalogue in the chapters of the page; the moments of the sites share one table."""
    groups: dict[str, list[Metric]] = {"block": [], "moments": [], "run": []}
    apart = {metric.id for members in ON_CADENCE.values() for metric in members}
    for metric in METRICS.values():
        site = metric.site
        if metric.id in apart:
            continue
        if site == "run":
            groups["run"].append(metric)
        elif _is_moment(metric):
            groups["moments"].append(metric)
        else:
            groups["block"].append(metric)
    first = [m for m in groups["moments"] if m.site == SITES[0]]
    yield (
        "Per block",
        "One value per recorded step and block.",
        groups["block"],
    )
    yield (
        "Per site",
        f"The same moments are recorded at each of the sites {_code(SITES)}. The table shows them "
        f"for `{SITES[0]}`; at the other sites, the name begins with that of the site.",
        first,
    )
    yield "Per step", "One value per step: columns of the curve.", groups["run"]
    for name, members in ON_CADENCE.items():
        yield f"The set `{name}`", _SETS[name], list(members)


_SETS = {
    "attention": "Per block with attention, in every 50th step unless `metrics=` says otherwise; "
    f"of the first {SAMPLES} samples and up to {QUERIES} of their queries, evenly spaced from the "
    "first to the last. Queries that see one key only do not count. A key is masked if its logit "
    f"is at most {MASKED:,.0f}.",
    "experts": "Per block with a mixture of experts, in every 50th step unless `metrics=` says "
    "otherwise; of all tokens of the pass.",
    "optimizer": "Per block, if `metrics=` names the set.",
    "extremes": "Per block, and per step for the head, if `metrics=` names the set; of the first "
    f"{SAMPLES} samples.",
}
"""When each set is recorded, and of what; `docs/howto/sets.md` says more."""


def _is_moment(metric: Metric) -> bool:
    """Whether every site has this metric."""
    _, _, rest = metric.id.partition("_")
    return all(f"{site}_{rest}" in METRICS for site in SITES)


def _origin(metric: Metric) -> str:
    return metric.source + ("" if metric.derive is None else " (derived)")


def _head(title: str, source: str) -> str:
    return HEAD.format(source=source) + f"\n# {title}\n"


def _code(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def stale() -> list[str]:
    """Names of the pages that differ from what the code says."""
    return [
        name
        for name, page in PAGES.items()
        if not (HERE / name).exists() or (HERE / name).read_text("utf-8") != page()
    ]


def main() -> int:
    """Write the pages, or with `--check` fail if one is out of date."""
    if "--check" in sys.argv[1:]:
        old = stale()
        if old:
            print(f"out of date: {', '.join(old)}; run `make pages`", file=sys.stderr)
        return int(bool(old))
    draw_studies()
    for name, page in PAGES.items():
        (HERE / name).parent.mkdir(parents=True, exist_ok=True)
        (HERE / name).write_text(page(), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
