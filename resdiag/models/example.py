"""A generated batch of the form that a model takes: images, token ids, audio; seeded."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resdiag.errors import UsageError
from resdiag.models.source import Built, error_words

_TOKENS = 32
_IMAGE = 224
_SAMPLES_OF_AUDIO = 16_000
_FRAMES = 128


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One batch, as a model's `forward` takes it.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        tokens: What its token ids are, in words.
    """

    args: tuple[object, ...] = ()
    kwargs: dict[str, object]
    tokens: str = "random tokens"

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name; positional ones are "x0", "x1", ..., those of a list "x0.0", ..."""
        named = {f"x{i}": value for i, value in enumerate(self.args)} | self.kwargs
        for name, value in list(named.items()):
            if isinstance(value, list | tuple):
                named |= {f"{name}.{i}": item for i, item in enumerate(value)}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def describe(self) -> str:
        """Words such as "float32 8x3x224x224"."""
        words = []
        for name, x in self.tensors.items():
            kind = str(x.dtype).removeprefix("torch.")
            size = "x".join(map(str, x.shape)) or "scalar"
            words.append(f"{kind} {size}" if name == "x0" else f"{name} {kind} {size}")
        return ", ".join(words) or "no tensor"


def example_batch(
    built: Built,
    *,
    batch_size: int,
    shape: Sequence[int] | None = None,
    seed: int = 0,
) -> Example:
    """Make a batch for a model: standard normal images and features, uniform token ids.

    The form is taken from what the model says of itself (a transformers configuration, timm's
    `default_cfg`, the torchvision family); for a module of the user's, from its first layer with
    weights, by trying.

    Args:
        built: The model.
        batch_size: Samples.
        shape: Shape of one sample of the main input, instead of what the model says.
        seed: Seed of the numbers; the global random state is put back.

    Raises:
        UsageError: The form of the input cannot be guessed.
    """
    device = next((p.device for p in built.model.parameters()), torch.device("cpu"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _Maker(batch_size, tuple(shape) if shape else None, device).make(built)


class _Maker:
    """Makes tensors of one batch."""

    def __init__(self, batch: int, shape: tuple[int, ...] | None, device: torch.device) -> None:
        self._batch, self._shape, self._device = batch, shape, device

    def make(self, built: Built) -> Example:
        model: Any = built.model
        config = getattr(model, "config", None)
        if hasattr(model, "main_input_name") and config is not None:
            return Example(kwargs=self._transformers(model, config))
        cfg = getattr(model, "default_cfg", None)
        if isinstance(cfg, dict) and "input_size" in cfg:
            return self._one(self._normal(tuple(cfg["input_size"])))
        family = type(model).__module__
        if family.startswith("torchvision.models"):
            return self._torchvision(model, family)
        if built.library == "resdiag":
            return self._one(self._normal((_first_channels(model), 32, 32)))
        return self._guess(built)

    def _one(self, x: object) -> Example:
        return Example(args=(x,), kwargs={})

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(self._batch, *(self._shape or shape), device=self._device)

    def _ids(self, shape: tuple[int, ...], vocabulary: int) -> Tensor:
        size = (self._batch, *(self._shape or shape))
        return torch.randint(vocabulary, size, device=self._device)

    def _torchvision(self, model: nn.Module, family: str) -> Example:
        if ".detection" in family:  # a list of images of any size
            size = self._shape or (3, _IMAGE, _IMAGE)
            return self._one([torch.rand(*size, device=self._device) for _ in range(self._batch)])
        if ".optical_flow" in family:
            pair = [torch.rand(self._batch, 3, 128, 128, device=self._device) for _ in range(2)]
            return Example(args=tuple(pair), kwargs={})
        if ".video" in family:
            width = 112 if family.endswith("resnet") else _IMAGE
            return self._one(self._normal((3, 16, width, width)))
        width = getattr(model, "image_size", None) or _IMAGE
        return self._one(
            self._normal((3, 299, 299) if "inception" in family else (3, width, width))
        )

    def _transformers(self, model: Any, config: Any) -> dict[str, object]:  # noqa: ANN401
        """What a transformers model needs: its main input, a decoder's ids, an image."""
        main = str(model.main_input_name)
        inputs: dict[str, object] = {main: self._hugging(main, config)}
        accepted = set(inspect.signature(model.forward).parameters)
        if main == "input_ids" and "pixel_values" in accepted and hasattr(config, "vision_config"):
            self._shape = None  # it was the text's
            inputs["pixel_values"] = self._hugging("pixel_values", config)
        if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
            if main != "input_ids":
                self._shape = None
            inputs["decoder_input_ids"] = self._hugging("input_ids", config)
        return inputs

    def _hugging(self, name: str, config: Any) -> Tensor:  # noqa: ANN401
        """One input of a transformers model by its name."""
        if name == "pixel_values":
            vision = getattr(config, "vision_config", config)
            size: Any = getattr(vision, "image_size", None) or _IMAGE
            height, width = size if isinstance(size, list | tuple) else [size] * 2
            channels: Any = getattr(vision, "num_channels", 3)
            frames = getattr(vision, "num_frames", None)
            before = (frames,) if isinstance(frames, int) else ()
            return self._normal((*before, channels, int(height), int(width)))
        if name == "input_features":
            for said in ("feature_projection_input_dim", "input_feat_per_channel"):
                if isinstance(features := getattr(config, said, None), int):  # time comes first
                    return self._normal((_FRAMES, features))
            bins: Any = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", 80)
            length = 2 * int(getattr(config, "max_source_positions", 50))
            return self._normal((int(bins), length))
        if name == "input_values":
            sizes: list[Any] = [getattr(config, n, None) for n in ("max_length", "num_mel_bins")]
            channels = getattr(config, "audio_channels", None)
            if all(isinstance(size, int) for size in sizes):  # a spectrogram
                return self._normal(tuple(sizes))
            return self._normal((*([channels] if channels else []), _SAMPLES_OF_AUDIO))
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        vocabulary = getattr(text, "vocab_size", None)
        if name != "input_ids" or not isinstance(vocabulary, int):
            raise UsageError(
                f"{type(config).__name__}: no batch can be generated for its input '{name}'",
                "give a factory package.module:factory whose model takes one tensor",
            )
        return self._ids((_TOKENS,), vocabulary)

    def _guess(self, built: Built) -> Example:
        """Try what the first layer with weights suggests; the first that runs is taken."""
        model, tried, last = built.model, list[str](), ""
        for x in self._candidates(model):
            tried.append("x".join(map(str, x.shape[1:])))
            error = _runs(model, x)
            if not error:
                return self._one(x)
            last = error
        given = "--input-shape does not fit" if self._shape else "its input cannot be guessed"
        raise UsageError(
            f"{built.name}: {given}: tried {', '.join(tried) or 'nothing'}"
            + (f"; {last}" if last else ""),
            "give --input-shape, e.g. 3,32,32",
        )

    def _candidates(self, model: nn.Module) -> Iterator[Tensor]:
        first = _first_layer(model)
        if isinstance(first, nn.Embedding):
            yield self._ids((_TOKENS,), first.num_embeddings)
        elif self._shape:
            yield self._normal(())
        elif isinstance(first, nn.Linear):
            yield from map(self._normal, [(first.in_features,), (16, first.in_features)])
        elif isinstance(first, nn.modules.conv._ConvNd):
            dimensions = len(first.kernel_size)
            for size in {1: (256,), 2: (32, 64, _IMAGE), 3: (16, 32)}.get(dimensions, ()):
                yield self._normal((first.in_channels, *[size] * dimensions))
        elif isinstance(first, nn.RNNBase | nn.RNNCellBase):
            yield self._normal((16, first.input_size))


def _first_layer(model: nn.Module) -> nn.Module | None:
    """The first module that holds a weight of its own and says its sizes."""
    kinds = (nn.Embedding, nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase)
    return next((module for module in model.modules() if isinstance(module, kinds)), None)


def _first_channels(model: nn.Module) -> int:
    first = _first_layer(model)
    return first.in_channels if isinstance(first, nn.Conv2d) else 3


def _runs(model: nn.Module, x: Tensor) -> str:
    """Why the model does not run on `x`; "" if it does. Modes and random state are put back."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.eval()
            model(x)
    except Exception as error:
        return error_words(error, 200)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return ""
