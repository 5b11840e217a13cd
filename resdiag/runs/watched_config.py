"""The configuration of a run that resdiag did not train, and reading either kind."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeAlias

from resdiag.errors import UsageError, unknown
from resdiag.runs.config import RunConfig
from resdiag.runs.files import hash_json


@dataclass(frozen=True, kw_only=True)
class WatchedConfig:
    """What is known of a run that resdiag did not train.

    Attributes:
        model: The model's name.
        kind: "training", or "probe" for one pass without an update.
        variant: Id of the variant where the model is one of ours, else "".
        depth: 6n+2 where the model is one of ours, else 0.
        data: Name of the data, or "".
        batch_size: Samples per step; 0 if it is not known.
        optimizer: Name of the optimizer's class, or "".
        lr: Learning rate of the first step; None if it is not known.
        steps: Steps that were planned; 0 if that is not known.
        seed: The random seed.
        settings: Anything else that tells it from another run.
    """

    model: str
    kind: str = "training"
    variant: str = ""
    depth: int = 0
    data: str = ""
    batch_size: int = 0
    optimizer: str = ""
    lr: float | None = None
    steps: int = 0
    seed: int = 0
    settings: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kinds = {"model": str, "kind": str, "variant": str, "data": str, "optimizer": str,
                 "depth": int, "batch_size": int, "steps": int, "seed": int, "settings": dict,
                 "lr": int | float | None}  # fmt: skip
        for name, kind in kinds.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise UsageError(f"config key '{name}' cannot be {value!r:.60}")
        if not self.model:
            raise UsageError("a run needs the name of its model")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "WatchedConfig":
        """Build a config from plain data.

        Raises:
            UsageError: A key is unknown, missing or mistyped.
        """
        names = [entry.name for entry in fields(cls)]
        for key in document:
            if key not in names:
                raise unknown("config key", str(key)[:80], names)
        if "model" not in document:
            raise UsageError("config key 'model' is missing")
        return cls(**document)

    def digest(self) -> str:
        """SHA-256 of what decides it: equal configs have equal digests."""
        return hash_json(self.to_dict())

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        model = re.sub(r"[^A-Za-z0-9_.]+", "-", self.model).strip("-.")[:64] or "model"
        return f"{self.kind}-{model}-s{self.seed}-{self.digest()[:8]}"


Config: TypeAlias = RunConfig | WatchedConfig
"""What a run was asked to do: one of ours, or any other."""


def read_config(document: object) -> Config:
    """The config of a `run.json`, of either kind.

    Raises:
        UsageError: It is not an object, or a key is unknown, missing or mistyped.
    """
    if isinstance(document, Mapping) and "model" in document:
        return WatchedConfig.from_dict(document)
    return RunConfig.from_dict(document)
