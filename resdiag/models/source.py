"""MODEL on the command line: from a string to a module with fresh weights; nothing is downloaded.

`torchvision:NAME`, `timm:NAME`, `transformers:NAME`, `resdiag:VARIANT-DEPTH`, and
`package.module:factory` for any importable callable that returns a module.
"""

import ast
import contextlib
import difflib
import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resdiag.errors import ResdiagError, UsageError, unknown

LIBRARIES = ("torchvision", "timm", "transformers", "resdiag")
"""What may stand before the colon, apart from an importable module."""

_FORMS = (
    "torchvision:NAME, timm:NAME, transformers:NAME, resdiag:VARIANT-DEPTH, package.module:factory"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Built:
    """A model with fresh weights, and where it came from.

    Attributes:
        name: The string that names it, e.g. "timm:vit_tiny_patch16_224".
        library: One of `LIBRARIES`, or "" for a factory of the user's.
        model: The module, in training mode.
        variant: Id of the variant if it is one of ours, else "".
        depth: 6n+2 if it is one of ours, else 0.
        notes: What was changed about it, in words.
    """

    name: str
    library: str
    model: nn.Module
    variant: str = ""
    depth: int = 0
    notes: tuple[str, ...] = ()


def build_source(
    name: str, arguments: Mapping[str, Any] | None = None, *, seed: int = 0, meta: bool = False
) -> Built:
    """Build the model that a string names.

    Args:
        name: See the module.
        arguments: Keyword arguments of the factory, or of the configuration (transformers).
        seed: Seed of the weights; the global random state is put back.
        meta: Build on PyTorch's meta device: shapes, but neither memory nor numbers.

    Raises:
        UsageError: No such model, its library is not installed, or its factory raises;
            one line, with the nearest match where there is one.

    >>> build_source("resdiag:b-20").variant
    'elu_pre'
    """
    library, what = _split(name)
    build = {
        "torchvision": _build_torchvision,
        "timm": _build_timm,
        "transformers": _build_transformers,
        "resdiag": _build_ours,
    }.get(library)
    with torch.random.fork_rng(devices=[]), torch.device("meta" if meta else "cpu"):
        torch.manual_seed(seed)
        if build is not None:
            built = build(name, what, dict(arguments or {}))
        else:
            built = _build_imported(name, library, what, dict(arguments or {}))
    built.model.train()
    return built


def parse_arguments(words: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments from `key=value` words; a value that is no Python literal is a text.

    Raises:
        UsageError: An argument without `=`, or with a key that is not an identifier.

    >>> parse_arguments(["depth=20", "norm=None", "act=gelu", "sizes=(1, 2)", "bias=false"])
    {'depth': 20, 'norm': None, 'act': 'gelu', 'sizes': (1, 2), 'bias': False}
    """
    arguments = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"--arg '{word}' is not key=value", "for example --arg num_classes=10")
        arguments[key] = _parse_value(text)
    return arguments


def _parse_value(text: str) -> object:
    words = {"true": True, "false": False, "null": None, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _split(name: str) -> tuple[str, str]:
    """What stands before and after the colon."""
    library, colon, what = name.partition(":")
    if colon and library and what:
        return library, what
    hint = f"for example torchvision:{name.strip(':') or 'resnet50'}"
    raise UsageError(f"model '{name}' is not one of {_FORMS}", hint)


# -- libraries -----------------------------------------------------------------------------------


def _build_torchvision(name: str, what: str, arguments: dict[str, Any]) -> Built:
    from torchvision.models import get_model_builder, list_models

    names = list_models()
    if what not in names:
        raise _no_model("torchvision model", what, names)
    if what.startswith("quantized_"):
        raise UsageError(
            f"{name} is quantised: its weights are integers without gradients",
            f"torchvision:{what.removeprefix('quantized_')} is the same network in float32",
        )
    builder = get_model_builder(what)
    # detection and segmentation would download a backbone
    weights = {"weights", "weights_backbone"} & set(inspect.signature(builder).parameters)
    bare: dict[str, Any] = dict.fromkeys(weights)
    if what in ("googlenet", "inception_v3"):
        bare["init_weights"] = True  # what they do anyway, with a warning
    return Built(
        name=name, library="torchvision", model=_call(name, builder, {**bare, **arguments})
    )


def _build_timm(name: str, what: str, arguments: dict[str, Any]) -> Built:
    timm = _import_extra("timm")
    if not timm.is_model(what):
        raise _no_model("timm model", what, timm.list_models())

    def make(**kwargs: object) -> object:
        return timm.create_model(what, pretrained=False, **kwargs)

    return Built(name=name, library="timm", model=_call(name, make, arguments))


def _build_transformers(name: str, what: str, arguments: dict[str, Any]) -> Built:
    transformers = _import_extra("transformers")
    with _quiet(transformers):
        kind, config = _transformers_config(transformers, what, arguments)
        model = _call(name, kind, {"config": config})
        return Built(name=name, library="transformers", model=model)


def _transformers_config(
    transformers: Any,  # noqa: ANN401 - a module without types
    what: str,
    arguments: dict[str, Any],
) -> tuple[Any, Any]:
    """The class to build and its configuration: a model type such as gpt2, or a class's name."""
    types = transformers.CONFIG_MAPPING
    if what in types:
        config = _call_any(f"transformers:{what}", types[what], arguments)
        return _head_of(transformers, what), config
    kind: Any = getattr(transformers, what, None) if what.isidentifier() else None
    if getattr(kind, "config_class", None) is not None:
        return kind, _call_any(f"transformers:{what}", kind.config_class, arguments)
    known = [*types, *(n for n in dir(transformers) if n.endswith(_HEADS))]
    raise _no_model("transformers model", what, known, "a model type (gpt2) or a class's name")


_HEADS = ("Model", "LMHeadModel", "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration",
          "ForImageClassification", "ForSequenceClassification")  # fmt: skip
_TASKS = (
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
)
"""The head that a model type is trained with, the first that it has."""


def _head_of(transformers: Any, kind: str) -> Any:  # noqa: ANN401
    """The class that puts the usual head on a model type."""
    from transformers.models.auto import modeling_auto

    for table in (*_TASKS, "MODEL_MAPPING_NAMES"):
        names = getattr(modeling_auto, table, {}).get(kind)
        if names:
            return getattr(transformers, names if isinstance(names, str) else names[0])
    raise UsageError(f"transformers has a configuration '{kind}' but no model of it alone")


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:  # noqa: ANN401
    """Without its notices on stderr, which are about checkpoints and generation."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _build_ours(name: str, what: str, arguments: dict[str, Any]) -> Built:
    from resdiag.models.resnet import build_model
    from resdiag.models.variants import count_blocks, find_variant

    variant, _, depth = what.rpartition("-")
    if not variant or not depth.isdigit():
        raise UsageError(f"model '{name}' is not resdiag:VARIANT-DEPTH", "resdiag:elu_pre-110")
    row = find_variant(variant)
    number = arguments.pop("depth", int(depth))
    if not isinstance(number, int):
        raise UsageError(f"{name}: depth {number!r} is not a whole number", "depth=20")
    count_blocks(number)
    model = _call(name, partial(build_model, row.id, number), arguments)
    # theory is about the table's widths, stems and initialisation
    known = not set(arguments) & {"width", "stem_bn", "in_channels", "branch_scale"}
    return Built(
        name=name,
        library="resdiag",
        model=model,
        variant=row.id if known else "",
        depth=number if known else 0,
    )


def _build_imported(name: str, module: str, what: str, arguments: dict[str, Any]) -> Built:
    found: object = _import_module(module, name)
    for part in what.split("."):
        if not hasattr(found, part):
            names = [n for n in dir(found) if not n.startswith("_") and callable(getattr(found, n))]
            raise _no_model(f"callable in {module}", part, names)
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        if arguments:
            raise UsageError(f"{name} is a module already: it takes no --arg")
        return Built(name=name, library="", model=found)
    if not callable(found):
        raise UsageError(f"{name} is a {type(found).__name__}, not a callable or a module")
    return Built(name=name, library="", model=_call(name, found, arguments))


def _import_module(module: str, name: str) -> Any:  # noqa: ANN401
    """Import a module of the user's; the current directory is importable."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module)
    except Exception as error:
        missing = isinstance(error, ImportError) and error.name
        if missing and (module == missing or module.startswith(f"{missing}.")):
            raise unknown("library or module", module, LIBRARIES) from error
        raise UsageError(f"{name}: {module} cannot be imported: {error_words(error)}") from error


def _import_extra(library: str) -> Any:  # noqa: ANN401
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise UsageError(
            f"{library} is not installed: {error_words(error)}", f"pip install 'resdiag[{library}]'"
        ) from error


# -- calling what is not ours ----------------------------------------------------------------------


def _call(name: str, factory: Any, arguments: Mapping[str, Any]) -> nn.Module:  # noqa: ANN401
    model = _call_any(name, factory, arguments)
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name} returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def _call_any(name: str, factory: Any, arguments: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Call a factory; what it raises is the user's to read, in one line."""
    try:
        return factory(**arguments)
    except ResdiagError:
        raise
    except Exception as error:
        words = f"{name} cannot be built: {error_words(error)}"
        raise UsageError(words, "--arg key=value") from error


def error_words(error: BaseException, most: int = 400) -> str:
    """An exception in one line of at most so many letters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:most] if text else type(error).__name__


def _no_model(kind: str, name: str, names: Sequence[str], hint: str = "") -> UsageError:
    """As `errors.unknown`, but a library has more names than fit a line."""
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    guess = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    listed = "" if near and len(names) > 20 else f"; known: {', '.join(sorted(names)[:20])}"
    more = ", ..." if listed and len(names) > 20 else ""
    return UsageError(f"unknown {kind} '{name}'{guess}{listed}{more}", hint)
