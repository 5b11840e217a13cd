"""The cases of a set, drawn by a seed: fault kind x place x time x strength x architecture x ..."""

import itertools
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from resdiag.errors import unknown
from resdiag.pathologies.architectures import SETS as ARCHITECTURES
from resdiag.pathologies.architectures import Architecture, Traits, traits_of
from resdiag.pathologies.block_faults import BLOCK_FAULTS
from resdiag.pathologies.data_faults import DATA_FAULTS
from resdiag.pathologies.kinds import Kind
from resdiag.pathologies.recipes import RECIPES, Recipe
from resdiag.pathologies.transformer_faults import TRANSFORMER_FAULTS
from resdiag.pathologies.update_faults import UPDATE_FAULTS

_FAULTS = (*BLOCK_FAULTS, *UPDATE_FAULTS, *DATA_FAULTS, *TRANSFORMER_FAULTS)
KINDS = {kind.name: kind for kind in _FAULTS}
"""Every kind of fault by its name."""
WAYS = {recipe.name: recipe for recipe in RECIPES}
"""Every healthy way to train by its name."""
SETS = ("development", "locked", "quick")
"""Sets that can be drawn; "quick" is a small part of "development"."""

FORMS = 4
"""Most forms of a kind in one set: places, times, strengths."""
REPEATS = 3
"""Architectures that a fault is planted in, of different families, and seeds of each."""
PER_RECIPE = 4
"""Architectures that are trained by each healthy recipe."""
_USUAL = ("sgd", "adamw", "adam")
_CHEAP = frozenset({"residual-mlp", "residual-mlp-dropout", "plain-mlp", "plain-mlp-bn",
                    "bare-residual", "gpt-tied", "original-8"})  # fmt: skip
_QUICK_HEALTHY = 6


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training of the suite, by everything that makes it.

    Attributes:
        set: The set it was drawn for.
        drawn: Seed that the set was drawn by.
        kind: Name of the kind of fault; "" for a healthy training.
        recipe: Name of the healthy way to train; "" where a fault is planted.
        architecture: Name of the architecture.
        optimizer: Name of the optimizer.
        seed: Of weights and batches.
        told: Whether the loop tells the monitor its loss.
        extent: "one" block, the "stage" that it lies in, or "all"; "" for the whole network.
        at: Indices of the ill blocks.
        onset: Step at which the fault begins.
        strength: The fault's magnitude.
    """

    set: str
    drawn: int
    kind: str = ""
    recipe: str = ""
    architecture: str
    optimizer: str
    seed: int
    told: bool = True
    extent: str = ""
    at: tuple[int, ...] = ()
    onset: int = 0
    strength: float = 1.0

    @property
    def fault(self) -> str:
        """The fault without the network that it is planted in."""
        if not self.kind:
            return ""
        where = {"one": " in a block", "stage": " in a stage", "all": " everywhere"}
        return (
            f"{self.kind}{where.get(self.extent, '')}, step {self.onset}, strength "
            f"{self.strength:g}"
        )

    @property
    def name(self) -> str:
        """What it is called in tables; unique within a set."""
        what = self.fault or f"healthy, {self.recipe}"
        return f"{what} | {self.architecture} | {self.optimizer} | seed {self.seed}"


def draw(which: str, seed: int) -> list[Case]:
    """The cases of a set, in an order of which every beginning has some of each kind.

    The whole set is `REPEATS` architectures of different families times as many seeds for every
    form of every kind that fits `REPEATS` families, fewer where fewer fit, and `PER_RECIPE`
    healthy trainings for every recipe.

    Args:
        which: One of `SETS`.
        seed: Chooses forms, architectures, places, optimizers and the seeds of the trainings.

    Raises:
        UsageError: There is no such set.
    """
    if which not in SETS:
        raise unknown("set", which, SETS)
    if which == "quick":
        return _quick(draw("development", seed))
    architectures = ARCHITECTURES[which]
    rounds: list[list[Case]] = [[] for _ in range(REPEATS * REPEATS)]
    for kind in KINDS.values():
        # of its own: a new kind of fault does not change what is drawn of the others
        rng = random.Random(f"{which} {seed} {kind.name}")
        for form in _forms(kind, rng):
            chosen = _families(_fitting(kind, form[0], architectures), rng)
            for i, architecture in enumerate(chosen):
                for j in range(REPEATS):
                    case = _planted(which, seed, kind, form, architecture, rng)
                    rounds[i + REPEATS * ((i + j) % REPEATS)].append(case)
    rng = random.Random(f"{which} {seed}")
    healthy = _healthy(which, seed, architectures, rng)
    for index, ill in enumerate(rounds):
        ill += healthy[index :: len(rounds)]
        rng.shuffle(ill)
    return _distinct(itertools.chain.from_iterable(rounds))


def _quick(cases: Sequence[Case]) -> list[Case]:
    """One case of each finding in a cheap network, and a few healthy ones."""
    found: dict[str, Case] = {}
    for case in sorted(cases, key=lambda case: list(KINDS).index(case.kind) if case.kind else -1):
        if case.architecture in _CHEAP:
            what = KINDS[case.kind].finding if case.kind else f"healthy {case.recipe}"
            found.setdefault(what, case)
    ill = [case for case in found.values() if case.kind]
    healthy = [case for case in found.values() if not case.kind][:_QUICK_HEALTHY]
    return [replace(case, set="quick") for case in (*ill, *healthy)]


def _forms(kind: Kind, rng: random.Random) -> list[tuple[str, int, float]]:
    """Some of its extents, onsets and strengths."""
    extents = kind.extents if kind.place else ("",)
    every = list(itertools.product(extents, kind.onsets, kind.strengths))
    return every if len(every) <= FORMS else rng.sample(every, FORMS)


def _fitting(kind: Kind, extent: str, architectures: Iterable[Architecture]) -> list[Architecture]:
    """The architectures that a kind of fault can be planted in."""
    found = []
    for architecture in architectures:
        traits = traits_of(architecture)
        places = traits.spots.get(kind.place, ())
        room = not kind.place or (bool(places) and (extent != "all" or len(places) > 1))
        if extent == "stage":
            room = room and traits.has("stages")
        optimizers = _optimizers(architecture, kind.optimizers)
        if room and traits.has(*kind.needs) and optimizers:
            found.append(architecture)
    return found


def _families(fitting: Sequence[Architecture], rng: random.Random) -> list[Architecture]:
    """Architectures of different families; of the same ones where there are not enough."""
    mixed = rng.sample(list(fitting), len(fitting))
    first = list({architecture.family: architecture for architecture in mixed}.values())
    rest = [architecture for architecture in mixed if architecture not in first]
    return [*first, *rest][:REPEATS]


def _optimizers(architecture: Architecture, wanted: Sequence[str]) -> list[str]:
    """Those of the wanted ones, or else of the usual ones, that the architecture learns by."""
    return [name for name in wanted or _USUAL if architecture.sgd or not name.startswith("sgd")]


def _planted(
    which: str,
    drawn: int,
    kind: Kind,
    form: tuple[str, int, float],
    architecture: Architecture,
    rng: random.Random,
) -> Case:
    extent, onset, strength = form
    return Case(
        set=which,
        drawn=drawn,
        kind=kind.name,
        architecture=architecture.name,
        optimizer=rng.choice(_optimizers(architecture, kind.optimizers)),
        seed=rng.randrange(10_000),
        told=kind.told or rng.random() < 0.75,
        extent=extent,
        at=_place(traits_of(architecture), kind, extent, rng),
        onset=onset,
        strength=strength,
    )


def _place(traits: Traits, kind: Kind, extent: str, rng: random.Random) -> tuple[int, ...]:
    """The ill blocks."""
    if not kind.place:
        return ()
    spots = traits.spots[kind.place]
    one = rng.choice(spots)
    if extent == "all":
        return spots
    if extent == "stage":
        stage = {block.index: block.stage for block in traits.blocks}
        return tuple(index for index in spots if stage[index] == stage[one])
    return (one,)


def _healthy(
    which: str, drawn: int, architectures: Sequence[Architecture], rng: random.Random
) -> list[Case]:
    """`PER_RECIPE` trainings by every recipe, the least used architectures first."""
    used: Counter[str] = Counter()
    found = []
    for recipe in WAYS.values():
        fitting = [a for a in architectures if _fits(recipe, a)]
        for _ in range(min(PER_RECIPE, len(fitting))):
            mixed = rng.sample(fitting, len(fitting))
            architecture = min(mixed, key=lambda a: used[a.name])
            used[architecture.name] += 1
            fitting.remove(architecture)
            wanted = (recipe.optimizer,) if recipe.optimizer else ()
            found.append(
                Case(
                    set=which,
                    drawn=drawn,
                    recipe=recipe.name,
                    architecture=architecture.name,
                    optimizer=rng.choice(_optimizers(architecture, wanted)),
                    seed=rng.randrange(10_000),
                    told=recipe.told or rng.random() < 0.75,
                )
            )
    return rng.sample(found, len(found))


def _fits(recipe: Recipe, architecture: Architecture) -> bool:
    wanted = (recipe.optimizer,) if recipe.optimizer else ()
    return traits_of(architecture).has(*recipe.needs) and bool(_optimizers(architecture, wanted))


def _distinct(cases: Iterable[Case]) -> list[Case]:
    """Every name once; a seed that was drawn twice is counted up."""
    found: dict[str, Case] = {}
    for case in cases:
        while case.name in found:
            case = replace(case, seed=case.seed + 1)
        found[case.name] = case
    return list(found.values())
