"""What the networks of the suite learn: batches that are a function of a seed, and their losses.

Images are the embedded digits; everything else follows a fixed rule, so that it can be learned in
a few dozen steps. Letters in shapes: N batch, T tokens, C channels.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resdiag.data.dataset import open_data

Batch = tuple[Tensor, Tensor]
"""Inputs and targets."""

TOKENS = 32
"""Words of the vocabulary."""
LENGTH = 16
"""Tokens of a sequence."""
FEATURES = 24
"""Features of a vector."""
CLASSES = 10
"""Classes of a classification."""
IGNORED = -100
"""The label that a cross-entropy leaves out."""
_MASKED = 0.85


@dataclass(frozen=True)
class Task:
    """One thing to learn.

    Attributes:
        name: What it is called.
        draw: Takes a generator and a number of samples; returns a batch.
        loss: Takes the model's output and the targets; returns the mean loss.
        classes: Classes of its cross-entropy; 0 for another loss.
        is_image: Whether inputs are images, (N, 3, H, W).
        is_tokens: Whether inputs are words, (N, T).
    """

    name: str
    draw: Callable[[torch.Generator, int], Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    classes: int = 0
    is_image: bool = False
    is_tokens: bool = False

    def batch(self, seed: int, step: int, samples: int) -> Batch:
        """The batch of a step: a function of seed and step only."""
        return self.draw(torch.Generator().manual_seed(1000 * seed + step), samples)


def logits_of(output: object) -> Tensor:
    """The tensor of a model's output, whatever it is wrapped in."""
    found = getattr(output, "logits", output)
    assert isinstance(found, Tensor)
    return found


def cross_entropy(output: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of (N, classes), or of (N, T, classes) over samples and tokens."""
    return F.cross_entropy(output.float().reshape(-1, output.shape[-1]), targets.reshape(-1))


def square_error(output: Tensor, targets: Tensor) -> Tensor:
    """Mean square error over every element."""
    return (output.float() - targets.float()).square().mean()


def pair_loss(output: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of finding the other view of each sample among all (NT-Xent, 1 : N).

    The first half of `output`, (2N, C), are first views, the second half their other views.
    """
    first, second = F.normalize(output.float(), dim=1).chunk(2)
    return F.cross_entropy(first @ second.T / 0.2, targets[: len(first)])


def loss_of(model: nn.Module, batch: Batch, task: Task) -> Tensor:
    """The loss of a batch as the task defines it."""
    return task.loss(logits_of(model(batch[0])), batch[1])


@functools.cache
def _digits(size: int) -> Batch:
    """All digits at `size` x `size` pixels, standardised."""
    data = open_data("digits")
    images = data.train_images.float()
    images = F.avg_pool2d(images, images.shape[-1] // size)
    return (images - images.mean()) / images.std(), data.train_labels.long()


def _draw_images(size: int) -> Callable[[torch.Generator, int], Batch]:
    def draw(generator: torch.Generator, samples: int) -> Batch:
        images, labels = _digits(size)
        chosen = torch.randint(0, len(labels), (samples,), generator=generator)
        return images[chosen], labels[chosen]

    return draw


def _draw_noisy_images(generator: torch.Generator, samples: int) -> Batch:
    """Images with noise; the targets are the images without."""
    clean = _draw_images(16)(generator, samples)[0]
    return clean + 0.5 * torch.randn(clean.shape, generator=generator), clean


def _draw_pairs(generator: torch.Generator, samples: int) -> Batch:
    """Two noisy views of each image, the second ones after all first ones."""
    clean = _draw_images(16)(generator, samples // 2)[0]
    views = [clean + 0.3 * torch.randn(clean.shape, generator=generator) for _ in range(2)]
    return torch.cat(views), torch.arange(samples // 2).repeat(2)


def _sentences(generator: torch.Generator, samples: int, length: int) -> Tensor:
    """Words that follow a fixed rule of the word before, from a random first one."""
    first = torch.randint(0, TOKENS, (samples, 1), generator=generator)
    steps = torch.arange(length)
    return (first * 5 ** (steps % 2) + 3 * steps) % TOKENS


def _draw_next_words(generator: torch.Generator, samples: int) -> Batch:
    words = _sentences(generator, samples, LENGTH + 1)
    return words[:, :-1], words[:, 1:]


def _draw_masked_words(generator: torch.Generator, samples: int) -> Batch:
    """15 % of the words are replaced by word 0 and are to be found; the others are ignored."""
    words = _sentences(generator, samples, LENGTH)
    asked = torch.rand(words.shape, generator=generator) > _MASKED
    asked[:, 3] = True  # never a batch without any
    return words.masked_fill(asked, 0), words.masked_fill(~asked, IGNORED)


def _draw_sequences(generator: torch.Generator, samples: int) -> Batch:
    """Words, and the class that the first of them belongs to."""
    words = _sentences(generator, samples, LENGTH)
    return words, words[:, 0] % CLASSES


@functools.cache
def _planes() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(FEATURES, CLASSES, generator=generator)


def _draw_vectors(generator: torch.Generator, samples: int) -> Batch:
    """Standard normal vectors, and the one of ten fixed directions that they lie nearest to."""
    x = torch.randn(samples, FEATURES, generator=generator)
    return x, (x @ _planes()).argmax(1)


def _draw_regression(generator: torch.Generator, samples: int) -> Batch:
    """Standard normal vectors, and two smooth functions of them plus a little noise."""
    x = torch.randn(samples, FEATURES, generator=generator)
    y = torch.sin(x @ _planes()[:, :2] / 3) + x[:, :2]
    return x, y + 0.05 * torch.randn(y.shape, generator=generator)


TASKS = {
    task.name: task
    for task in (
        Task("images 16", _draw_images(16), cross_entropy, CLASSES, is_image=True),
        Task("images 32", _draw_images(32), cross_entropy, CLASSES, is_image=True),
        Task("denoising", _draw_noisy_images, square_error, is_image=True),
        Task("pairs", _draw_pairs, pair_loss, is_image=True),
        Task("next word", _draw_next_words, cross_entropy, TOKENS, is_tokens=True),
        Task("masked words", _draw_masked_words, cross_entropy, TOKENS, is_tokens=True),
        Task("sequences", _draw_sequences, cross_entropy, CLASSES, is_tokens=True),
        Task("vectors", _draw_vectors, cross_entropy, CLASSES),
        Task("regression", _draw_regression, square_error),
    )
}
"""Every task by its name."""
