"""What a run is asked to do: plain data, checked at the door, named by its digest."""

import hashlib
import json
import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from resdiag.errors import UsageError, unknown

_AT_LEAST = {
    "depth": 1, "steps": 1, "batch_size": 1, "commit_every": 1,
    "lr": 0, "gamma": 0, "warmup": 0, "warmup_lr": 0, "momentum": 0, "weight_decay": 0, "seed": 0,
    "record_first": 0, "every": 0, "eval_every": 0, "stop_after_explosion": 0,
}  # fmt: skip
_WORDS = {
    str: "a text",
    bool: "true or false",
    int: "a whole number below 2^63",
    float: "a finite number",
    tuple[int, ...]: "a list of whole numbers",
}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run's numbers, apart from the machine it runs on.

    Attributes:
        variant: Id of the variant.
        depth: Weighted layers, 6n+2.
        width: Factor on the number of channels.
        stem_bn: Whether a batch norm stands behind the stem's convolution in every variant.
        data: What `--data` said, resolved.
        recipe: "probe" or "paper".
        steps: Optimizer steps in all.
        batch_size: Samples per step.
        lr: Learning rate before the first milestone.
        milestones: Steps at which the learning rate is multiplied by `gamma`.
        gamma: See `milestones`.
        warmup: Steps at `warmup_lr` before `lr` applies.
        warmup_lr: See `warmup`.
        momentum: Of SGD.
        nesterov: Whether the momentum is Nesterov's.
        weight_decay: L2 coefficient.
        augment: Whether training images are flipped and shifted.
        seed: Of weights, order and augmentation.
        record_first: Steps at the start that are all recorded.
        every: Recorded distance in steps after that; 0 records no more.
        eval_every: Steps between evaluations; 0 evaluates at the end only.
        commit_every: Steps between commits.
        dtype: Of the arithmetic, "float32".
        device: "cpu", "cuda", ...
        engine: How the passes are executed: "eager", "fast" or "compile".
        stop_after_explosion: Steps to go on after loss or gradients became non-finite.

    Raises:
        UsageError: A value is not of its field's type or out of range.
    """

    variant: str
    depth: int
    width: float = 1.0
    stem_bn: bool = False
    data: str
    recipe: str
    steps: int
    batch_size: int
    lr: float
    milestones: tuple[int, ...]
    gamma: float = 0.1
    warmup: int = 0
    warmup_lr: float = 0.01
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 1e-4
    augment: bool
    seed: int = 0
    record_first: int
    every: int
    eval_every: int
    commit_every: int
    dtype: str = "float32"
    device: str = "cpu"
    engine: str = "eager"
    stop_after_explosion: int = 3

    def __post_init__(self) -> None:
        for field in fields(self):
            value = _checked(field.name, field.type, getattr(self, field.name))
            object.__setattr__(self, field.name, value)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: `RunConfig.from_dict(config.to_dict()) == config`."""
        return {**asdict(self), "milestones": list(self.milestones)}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "RunConfig":
        """Build a config from plain data, as read from JSON.

        Raises:
            UsageError: A key is unknown (with the nearest match), missing, or mistyped.
        """
        if not isinstance(document, Mapping):
            raise UsageError(f"a config is an object of keys, not {reprlib.repr(document)}")
        names = [field.name for field in fields(cls)]
        for key in document:
            if key not in names:
                raise unknown("config key", repr(str(key))[1:-1][:80], names)
        for field in fields(cls):
            if field.default is MISSING and field.name not in document:
                raise UsageError(f"config key '{field.name}' is missing")
        return cls(**document)

    def digest(self) -> str:
        """SHA-256 of the canonical JSON: equal configs have equal digests.

        The eager engine is left out: it is what runs had before there were others.
        """
        plain = self.to_dict()
        if plain["engine"] == "eager":
            del plain["engine"]
        text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def model(self) -> str:
        """The model's name: its variant."""
        return self.variant

    @property
    def name(self) -> str:
        """Name of the run's folder, safe on any file system whatever the variant is called."""
        variant = re.sub(r"[^A-Za-z0-9_]", "_", self.variant)[:64]
        return f"{variant}-d{self.depth}-s{self.seed}-{self.digest()[:8]}"


def _checked(name: str, kind: object, value: object) -> object:
    """`value` in its field's type, or a UsageError that says what was expected."""
    result = _converted(kind, value)
    if result is None:
        expected = next(words for type_, words in _WORDS.items() if type_ == kind)
        raise UsageError(f"config key '{name}' must be {expected}, not {reprlib.repr(value)}")
    low = _AT_LEAST.get(name)
    if low is not None and isinstance(result, int | float) and result < low:
        raise UsageError(f"config key '{name}' must be at least {low}, not {result}")
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
