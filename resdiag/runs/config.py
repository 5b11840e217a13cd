"""Run settings: one row each, and what a run is asked to do, checked and named by its digest.

A setting is a field of `Settings` with a row of facts. The options of `resdiag run`, the tables of
study files, `--set`, all checks, the digest and the reference page follow from it.
"""

import math
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from types import NoneType
from typing import Any, TypeVar, dataclass_transform, get_args

from resdiag.errors import UsageError, unknown
from resdiag.models.variants import count_blocks, find_variant
from resdiag.runs.files import hash_json

BACKENDS = ("auto", "eager", "fast", "compile", "graph")
"""How passes are executed.

`eager` is PyTorch as it is; `fast` is the same with an own ELU on the CPU, other bits in the last
places; `compile` is torch.compile, the recorder inside the graph; `graph` replays CUDA graphs of
the passes, with and without the recorder; `auto` is the fastest of the first two.
"""
DTYPES = ("float32", "bfloat16")

_Class = TypeVar("_Class")
_WORDS = {
    str: "a text",
    bool: "true or false",
    int: "a whole number below 2^63",
    float: "a finite number",
    tuple[int, ...]: "a list of whole numbers",
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is known of a run setting besides its name, type and default.

    Attributes:
        help: One line for `--help`, the reference page and readers of the code.
        least: Smallest value.
        above: What a value must be larger than.
        most: Largest value.
        choices: Valid words; empty: any.
        check: Refuses a value with a `UsageError` that names the valid ones.
        in_studies: Whether `[fixed]` and `[grid]` of a study file may set it.
        later: Whether there were runs before there was this setting. Its default is then left out
            of digests, so that those runs keep their folders.
    """

    help: str
    least: float | None = None
    above: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()
    check: Callable[[Any], object] | None = None
    in_studies: bool = True
    later: bool = False

    @property
    def range(self) -> str:
        """The valid values in words, "" for any."""
        ends = ((self.least, "at least"), (self.above, "more than"), (self.most, "at most"))
        bounds = [f"{words} {end:g}" for end, words in ends if end is not None]
        return ", ".join(bounds or self.choices)


def setting(help: str, *, default: Any = MISSING, **facts: Any) -> Any:  # noqa: ANN401
    """A field that is a run setting, in a class of `settings`.

    Args:
        help: See `Setting`.
        default: Its default; required if there is none.
        facts: What else `Setting` has.
    """
    return field(default=default, metadata={"setting": Setting(help=help, **facts)})


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(setting,))
def settings(cls: type[_Class]) -> type[_Class]:
    """A frozen dataclass of run settings."""
    return dataclass(frozen=True, kw_only=True)(cls)


def row_of(entry: "Field[Any]") -> Setting:
    """The row of a setting, from its field."""
    row: Setting = entry.metadata["setting"]
    return row


def value_type(entry: "Field[Any]") -> Any:  # noqa: ANN401
    """The type of a setting that is given: int of `int | None`."""
    return next(kind for kind in (*get_args(entry.type), entry.type) if kind is not NoneType)


def check_value(
    name: str,
    row: Setting,
    value: Any,  # noqa: ANN401
    *,
    as_option: bool = False,
) -> None:
    """Refuse a value that a setting cannot have.

    Args:
        name: Of the setting.
        row: Of the setting.
        value: A value of the setting's type.
        as_option: Whether the message about a number begins like "--lr -1 ".

    Raises:
        UsageError: With the valid values.
    """
    if row.choices and value not in row.choices:
        raise unknown(name, value, row.choices)
    if row.check:
        row.check(value)
    fault = _find_fault(row, value)
    if not fault and isinstance(value, int | float) and not value < 2**63:
        fault = "is too large"
    if fault:
        option = f"--{name.replace('_', '-')} {value} " if as_option else ""
        raise UsageError(option + fault)


def _find_fault(row: Setting, value: Any) -> str:  # noqa: ANN401
    """What of a setting's choices and bounds a value does not keep, or ""."""
    if row.choices and value not in row.choices:
        return f"must be one of {', '.join(row.choices)}"
    # "not ... >=": nan fails every comparison
    if row.least is not None and not value >= row.least:
        return f"must be at least {row.least:g}"
    if row.above is not None and not value > row.above:
        return f"must be more than {row.above:g}"
    if row.most is not None and not value <= row.most:
        return f"must be at most {row.most:g}"
    return ""


@settings
class Settings:
    """The settings of a run, one row each; None leaves a number to the recipe.

    To add one, add a field here and use it where it acts (`training/loop.py`), nothing else; a
    number that recipes decide also needs a field of `Recipe`, and one of `RunConfig` without None.
    """

    variant: str = setting(
        "Variant id or the paper's letter; see `resdiag variants`.", check=find_variant
    )
    depth: int = setting(
        "Weighted layers, 6n+2: 20, 32, 44, 56, 110, ...", check=count_blocks, least=1
    )
    recipe: str = setting("Default values for settings that are not given.")
    data: str = setting("Data set.")
    lr: float | None = setting("Learning rate.", default=None, least=0)
    # batch statistics of one sample have no variance
    batch_size: int | None = setting("Images per step.", default=None, least=2)
    warmup: int = setting("Number of first steps with learning rate 0.01.", default=0, least=0)
    weight_decay: float = setting("L2 coefficient on all parameters.", default=1e-4, least=0)
    momentum: float = setting("Momentum of SGD.", default=0.9, least=0)
    nesterov: bool = setting("Nesterov's momentum.", default=True)
    augment: bool = setting("Random crops, and flips if the data set allows.", default=True)
    width: float = setting("Factor on the 16/32/64 channels.", default=1.0, above=0, most=64)
    stem_bn: bool = setting("BatchNorm in the stem.", default=False)
    branch_scale: float = setting(
        "Factor on the last weights of each branch at initialisation.",
        default=1.0,
        above=0,
        most=1000,
        later=True,
    )
    seed: int = setting(
        "Seed of weights, data order and augmentation.", default=0, least=0, in_studies=False
    )
    dtype: str = setting("float32, or bfloat16 by autocast.", default="float32", choices=DTYPES)
    device: str = setting("auto, cpu, cuda or cuda:N.", default="cpu", in_studies=False)
    backend: str = setting(
        "eager, fast (faster ELU on the CPU), compile, graph (CUDA) or auto.",
        default="eager",
        choices=BACKENDS,
        later=True,
    )
    every: int | None = setting("Record every n-th step.", default=None, least=1)
    record_first: int | None = setting(
        "Number of first steps that are all recorded.", default=None, least=0
    )
    commit_every: int | None = setting("Steps between commits.", default=None, least=1)
    steps: int | None = setting("Number of optimizer steps.", default=None, least=1)


@settings
class RunConfig(Settings):
    """Everything that decides a run's numbers, apart from the machine it runs on.

    The settings with the recipe's numbers filled in, and what follows from them.

    Raises:
        UsageError: A value is not of its field's type, or not among its choices or in its bounds.
    """

    augment: bool = setting("Whether training images are flipped and shifted.")
    steps: int = setting("Total number of optimizer steps.", least=1)
    batch_size: int = setting(
        "Samples per step; the last batch of an epoch may be smaller.", least=1
    )
    lr: float = setting("Learning rate before the first milestone.", least=0)
    record_first: int = setting("Number of first steps that are all recorded.", least=0)
    every: int = setting("Distance between recorded steps after that; 0: none.", least=0)
    commit_every: int = setting("Steps between commits.", least=1)
    eval_every: int = setting("Steps between evaluations; 0: at the end only.", least=0)
    milestones: tuple[int, ...] = setting(
        "Steps at which the learning rate is multiplied by `gamma`."
    )
    gamma: float = setting("Factor on the learning rate at each milestone.", default=0.1, least=0)
    warmup_lr: float = setting("Learning rate of the `warmup` steps.", default=0.01, least=0)
    stop_after_explosion: int = setting(
        "Steps to continue after a loss that is not finite.", default=3, least=0
    )

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = _checked(entry, getattr(self, entry.name))
            object.__setattr__(self, entry.name, value)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: `RunConfig.from_dict(config.to_dict()) == config`."""
        return {**asdict(self), "milestones": list(self.milestones)}

    @classmethod
    def from_dict(cls, document: object) -> "RunConfig":
        """Build a config from plain data, as read from JSON.

        Raises:
            UsageError: It is not an object, or a key is unknown, missing or mistyped.
        """
        if not isinstance(document, Mapping):
            raise UsageError(f"a config is an object of keys, not {reprlib.repr(document)}")
        document = dict(from_stored(document))
        names = [entry.name for entry in fields(cls)]
        for key in document:
            if key not in names:
                raise unknown("config key", repr(str(key))[1:-1][:80], names)
        for entry in fields(cls):
            if entry.default is MISSING and entry.name not in document:
                raise UsageError(f"config key '{entry.name}' is missing")
        return cls(**document)

    def digest(self) -> str:
        """SHA-256 of what decides it: equal configs have equal digests."""
        return hash_json(to_stored(self.to_dict()))

    @property
    def model(self) -> str:
        """The model's name: its variant."""
        return self.variant

    @property
    def name(self) -> str:
        """Name of the run's folder, safe on any file system."""
        variant = re.sub(r"[^A-Za-z0-9_]", "_", self.variant)[:64]
        return f"{variant}-d{self.depth}-s{self.seed}-{self.digest()[:8]}"


# Run folders and cells are named by digests of these words, which settings had before they were
# renamed, and committed results hold them: they stay where digests are made, and are understood
# where files are read.
_OLD_NAMES = {"backend": "engine"}
_OLD_RECIPES = {"short": "probe"}
_LATER = {entry.name: entry.default for entry in fields(Settings) if row_of(entry).later}


def to_stored(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in the words that digests are made of, without what is `later` and not set."""
    plain = {
        _OLD_NAMES.get(name, name): value
        for name, value in settings.items()
        if not (name in _LATER and value == _LATER[name])
    }
    recipe = plain["recipe"]
    return {**plain, "recipe": _OLD_RECIPES.get(recipe, recipe)}


def from_stored(value: Any) -> Any:  # noqa: ANN401
    """A document, or a part of one, with the names that settings have now.

    >>> from_stored({"fixed": {"recipe": "probe"}, "grid": {"engine": ["eager", "fast"]}})
    {'fixed': {'recipe': 'short'}, 'grid': {'backend': ['eager', 'fast']}}
    """
    if not isinstance(value, Mapping):
        return [from_stored(item) for item in value] if isinstance(value, list) else value
    names = {old: new for new, old in _OLD_NAMES.items()}
    document = {names.get(key, key): from_stored(item) for key, item in value.items()}
    for new, old in _OLD_RECIPES.items():
        recipe = document.get("recipe")
        if recipe == old:
            document["recipe"] = new
        elif isinstance(recipe, list):
            document["recipe"] = [new if item == old else item for item in recipe]
    return document


def _checked(entry: "Field[Any]", value: object) -> object:
    """`value` in its field's type, or a UsageError that says what was expected."""
    result = _converted(entry.type, value)
    if result is None:
        fault = "must be " + next(words for kind, words in _WORDS.items() if kind == entry.type)
    else:
        fault = _find_fault(row_of(entry), result)
    if fault:
        raise UsageError(f"config key '{entry.name}' {fault}, not {reprlib.repr(value)}")
    return result


def _converted(kind: object, value: object) -> object:
    """`value` as `kind`, or None: no number is read out of a text, no whole one out of 0.5."""
    if kind is str or kind is bool:
        return value if isinstance(value, kind) else None
    if isinstance(value, list | tuple):
        numbers = tuple(_converted(int, item) for item in value)
        return numbers if kind == tuple[int, ...] and None not in numbers else None
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) >= 2**1000:
        return None
    if kind is float:
        return float(value) + 0.0 if math.isfinite(value) else None  # + 0.0: no negative zero
    return value if kind is int and isinstance(value, int) and abs(value) < 2**63 else None
