"""Recipes: named defaults that become a complete `RunConfig` once the data set's size is known.

No torch here: a wrong option must be answered before anything slow is imported.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType

from resdiag.errors import UsageError, unknown
from resdiag.models.variants import count_blocks, find_variant
from resdiag.runs.config import RunConfig

DTYPES = ("float32", "bfloat16")
ENGINES = ("auto", "eager", "fast", "compile", "graph")
"""What `--engine` accepts.

`eager` is PyTorch as it is; `fast` is the same with an own ELU on the CPU, other bits in the last
places; `compile` is torch.compile, the recorder inside the graph; `graph` replays CUDA graphs of
the passes, with and without the recorder; `auto` is the fastest of the first two.
"""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train, apart from model and data.

    Attributes:
        steps: Optimizer steps, or 0 to count in epochs.
        epochs: Passes over the training images if `steps` is 0.
        batch_size: Samples per step; the last batch of an epoch has what is left.
        lr: Learning rate.
        milestones: Fractions of the training after which the learning rate is divided by 10.
        record_first: Steps at the start that are all recorded.
        every: Record each `every`-th step after that.
        evaluate: Whether the test error is measured after each epoch; always at the end.
        source: Where the numbers come from.
    """

    steps: int
    epochs: int
    batch_size: int
    lr: float
    milestones: tuple[float, ...]
    record_first: int
    every: int
    evaluate: bool
    source: str


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "probe": Recipe(
            steps=60,
            epochs=0,
            batch_size=64,
            lr=0.1,
            milestones=(),
            record_first=20,
            every=5,
            evaluate=False,
            source="the paper's start: an explosion or a collapsed skip path shows within it",
        ),
        "paper": Recipe(
            steps=0,
            epochs=164,
            batch_size=128,
            lr=0.1,
            milestones=(81 / 164, 122 / 164),
            record_first=50,
            every=50,
            evaluate=True,
            source="Shah et al. 2016, 4.1; epochs and Nesterov from fb.resnet.torch",
        ),
    }
)
"""What `--recipe` accepts."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a user asked for: None leaves a number to the recipe.

    The fields are those of `RunConfig` and of `Recipe`.
    """

    variant: str
    depth: int
    recipe: str = "probe"
    data: str = "auto"
    width: float = 1.0
    stem_bn: bool = False
    steps: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    warmup: int = 0
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 1e-4
    augment: bool = True
    seed: int = 0
    record_first: int | None = None
    every: int | None = None
    commit_every: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    engine: str = "eager"

    def check(self) -> None:
        """Refuse what can be refused without reading the data.

        Raises:
            UsageError: Unknown variant, recipe, dtype or engine, a depth other than 6n+2, a number
                out of range, or both steps and epochs.
        """
        find_variant(self.variant)
        count_blocks(self.depth)
        if self.recipe not in RECIPES:
            raise unknown("recipe", self.recipe, RECIPES)
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if self.engine not in ENGINES:
            raise unknown("engine", self.engine, ENGINES)
        if self.engine == "fast" and not self.device.startswith(("cpu", "auto")):
            raise UsageError(f"engine 'fast' is for the CPU, not {self.device}", "--engine eager")
        if self.engine == "graph" and self.device.startswith("cpu"):
            raise UsageError("engine 'graph' replays CUDA graphs, not on cpu", "--engine eager")
        if self.steps is not None and self.epochs is not None:
            raise UsageError("--steps and --epochs exclude each other")
        if not 0 < self.width <= _WIDEST:
            raise UsageError(f"--width {self.width} must be positive and at most {_WIDEST}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            option = "--" + name.replace("_", "-")
            if value is not None and not value >= least:
                raise UsageError(f"{option} {value} must be at least {least}")
            if value is not None and not value < 2**63:
                raise UsageError(f"{option} {value} is too large")


_WIDEST = 64
_LEAST = {
    "steps": 1,
    "epochs": 1,
    "batch_size": 2,  # batch statistics of one sample have no variance
    "lr": 0,
    "warmup": 0,
    "momentum": 0,
    "weight_decay": 0,
    "seed": 0,
    "record_first": 0,
    "every": 1,
    "commit_every": 1,
}


def resolve(request: Request, *, data_name: str, train_size: int) -> RunConfig:
    """Complete a request with its recipe's numbers, everything counted in optimizer steps.

    Args:
        request: What was asked for.
        data_name: Name of the data set that was opened.
        train_size: Its training images.

    Raises:
        UsageError: See `Request.check`.

    >>> config = resolve(
    ...     Request(variant="d", depth=20, recipe="paper", epochs=10),
    ...     data_name="cifar10", train_size=50_000,
    ... )
    >>> config.variant, config.steps, config.milestones
    ('elu', 3910, (1931, 2909))
    """
    request.check()
    recipe = RECIPES[request.recipe]
    batch_size = request.batch_size or recipe.batch_size
    per_epoch = -(-train_size // batch_size)
    steps = _count_steps(request, recipe, per_epoch)
    every = request.every if request.every is not None else recipe.every
    first = request.record_first if request.record_first is not None else recipe.record_first
    taken = ("width", "stem_bn", "warmup", "momentum", "nesterov", "weight_decay", "augment",
             "seed", "device", "dtype", "depth", "recipe")  # fmt: skip
    return RunConfig(
        variant=find_variant(request.variant).id,
        data=data_name,
        steps=steps,
        batch_size=batch_size,
        lr=recipe.lr if request.lr is None else request.lr,
        milestones=tuple(max(1, round(share * steps)) for share in recipe.milestones),
        record_first=first,
        every=every,
        eval_every=per_epoch if recipe.evaluate else 0,
        commit_every=request.commit_every or min(per_epoch, 100),
        engine=_engine(request),
        **{name: value for name, value in asdict(request).items() if name in taken},
    )


def _engine(request: Request) -> str:
    """The engine that `auto` means: what is measured to be faster and computes the same."""
    if request.engine != "auto":
        return request.engine
    row = find_variant(request.variant)
    has_elu = "elu" in f"{row.branch}-{row.after_add}-{row.stem}-{row.head}".split("-")
    return "fast" if has_elu and request.device == "cpu" else "eager"


def learning_rate(config: RunConfig, step: int) -> float:
    """Learning rate of update `step`: constant at first if warming up, then by milestones.

    The warm-up is He et al. 2015's (section 4.2): a small constant rate before the first one.
    """
    if step < config.warmup:
        return config.warmup_lr
    passed = sum(step >= milestone for milestone in config.milestones)
    return config.lr * config.gamma**passed


def _count_steps(request: Request, recipe: Recipe, per_epoch: int) -> int:
    if request.steps is not None:
        return request.steps
    if request.epochs is not None:
        return request.epochs * per_epoch
    return recipe.steps or recipe.epochs * per_epoch
