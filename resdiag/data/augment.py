"""Batches as a pure function of (seed, step): whole set on the device, no loader, no state."""

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from resdiag.data.dataset import ImageData

PAD = 4
"""Pixels of zeros on every side before the random crop (He et al. 2015, section 4.2)."""

Batch = tuple[Tensor, Tensor]


class Augmenter:
    """Draws batches from images that lie on the device as one uint8 tensor.

    Training images are normalised, mirrored with probability 1/2 (where `data.flip` allows it),
    padded with 4 zeros and cropped back, in this order: the padding has the mean colour, as in
    fb.resnet.torch. The order of an epoch depends on (seed, epoch) only, mirror and crop of a batch
    on (seed, step) only, both drawn on the CPU: every device sees the same batches, a resumed run
    needs nothing but its step, and the global random generators are not touched.

    Args:
        data: The images.
        batch_size: Images per step; the last batch of an epoch has what is left.
        seed: Seed of order, mirror and crop.
        augment: Whether training batches are mirrored and cropped.
        device: Where the images lie and the batches are made.
        channels_last: Whether batches have the channels-last memory format.

    Raises:
        ValueError: `batch_size` is not positive.
    """

    def __init__(
        self,
        data: ImageData,
        batch_size: int,
        seed: int,
        augment: bool,
        device: str | torch.device = "cpu",
        *,
        channels_last: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} is not positive")
        self.batch_size = batch_size
        self.seed = seed
        self.augment = augment
        self.flip = data.flip
        self.device = torch.device(device)
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._train = data.train_images.to(self.device), data.train_labels.to(self.device)
        self._test = data.test_images.to(self.device), data.test_labels.to(self.device)
        self._mean = (data.mean.double() * 255).float().view(1, 3, 1, 1).to(self.device)
        self._std = (data.std.double() * 255).float().view(1, 3, 1, 1).to(self.device)
        self._order = -1, torch.empty(0, dtype=torch.int64)

    @property
    def steps_per_epoch(self) -> int:
        """Batches that show every training image once."""
        return math.ceil(len(self._train[0]) / self.batch_size)

    def epoch(self, step: int) -> int:
        """The epoch, from 0, that the batch of `step` belongs to."""
        return step // self.steps_per_epoch

    def batch(self, step: int) -> Batch:
        """The training batch of `step`, counted from 0; independent of earlier calls.

        Returns:
            Images, float32 (B, 3, H, W), normalised; labels, int64 (B,).

        Raises:
            ValueError: `step` is negative.
        """
        if step < 0:
            raise ValueError(f"step {step} is negative")
        start = step % self.steps_per_epoch * self.batch_size
        index = self._epoch_order(self.epoch(step))[start : start + self.batch_size]
        # one small copy to the device for everything that was drawn
        drawn = torch.cat([index[None], self._draw(step, len(index))]).to(self.device)
        images, labels = self._train[0][drawn[0]], self._train[1][drawn[0]]
        images = self._normalise(images)
        if self.augment:
            images = crop(images, drawn[1], drawn[2], drawn[3].bool())
        return images.contiguous(memory_format=self._format), labels

    def test_batches(self, size: int) -> Iterator[Batch]:
        """The test images in order, normalised only, `size` at a time."""
        for images, labels in zip(*(part.split(size) for part in self._test), strict=True):
            yield self._normalise(images).contiguous(memory_format=self._format), labels

    def _normalise(self, images: Tensor) -> Tensor:
        return images.float().sub_(self._mean).div_(self._std)

    def _epoch_order(self, epoch: int) -> Tensor:
        """The permutation of `epoch`; the last one is cached because every step needs it."""
        if self._order[0] != epoch:
            generator = seeded_generator(self.seed, "order", epoch)
            self._order = epoch, torch.randperm(len(self._train[0]), generator=generator)
        return self._order[1]

    def _draw(self, step: int, count: int) -> Tensor:
        """Rows of crop offsets down and right (0 .. 8) and mirror (0 or 1), int64 (3, count)."""
        generator = seeded_generator(self.seed, "augment", step)
        offsets = torch.randint(0, 2 * PAD + 1, (2, count), generator=generator)
        mirror = torch.randint(0, 1 + self.flip, (1, count), generator=generator)
        return torch.cat([offsets, mirror])


def seeded_generator(seed: int, purpose: str, number: int) -> torch.Generator:
    """A CPU generator that depends on all of (seed, purpose, number) and on nothing else.

    The three are hashed: neighbouring seeds and steps must not give related streams, as
    `seed + step` would (seed 0, step 1 is not seed 1, step 0).
    """
    digest = hashlib.sha256(f"{seed}/{purpose}/{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def crop(images: Tensor, down: Tensor, right: Tensor, mirror: Tensor) -> Tensor:
    """Mirror, pad with 4 zeros and crop every image of a batch by its own offsets.

    Args:
        images: (B, C, H, W).
        down: Offset of the crop's first row in the padded image, int64 (B,), 0 .. 8.
        right: Offset of its first column, int64 (B,), 0 .. 8.
        mirror: Whether to mirror left-right first, bool (B,).

    Returns:
        (B, C, H, W), bit for bit the pixels of `images` or zeros.
    """
    batch, channels, height, width = images.shape
    padded = torch.nn.functional.pad(images, (PAD, PAD, PAD, PAD))
    rows = down[:, None] + torch.arange(height, device=images.device)
    columns = right[:, None] + torch.arange(width, device=images.device)
    # the padding is symmetric: cropping the mirror image is reading the columns from the far end
    columns = torch.where(mirror[:, None], width + 2 * PAD - 1 - columns, columns)
    place = rows[:, :, None] * (width + 2 * PAD) + columns[:, None, :]
    place = place.view(batch, 1, -1).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, place).view_as(images)
