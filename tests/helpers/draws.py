"""Which crop and which mirroring a batch was drawn with, read off its images."""

from dataclasses import replace

import torch

from resdiag.data.augment import PAD, Augmenter

_ROWS, _COLUMNS = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
# a pixel says where it was: its row in the first channel, its column in the second
_PLACES = torch.stack([4 * _ROWS, 4 * _COLUMNS, torch.zeros(32, 32)]).to(torch.uint8)


def draws_of(data, batch_size, seed, step):
    """Offsets down and right (0 .. 8) and mirror (0 or 1) of the batch of a step, int64 (3, B).

    Args:
        data: Whose training images are replaced; nothing that is drawn depends on them.
        batch_size: Images per step.
        seed: The seed of the augmenter.
        step: The step.
    """
    images = _PLACES.expand(max(batch_size, len(data.train_labels)), -1, -1, -1)
    labels = torch.arange(len(images)) % len(data.train_labels)
    told = replace(data, train_images=images, train_labels=labels)
    batch, _ = Augmenter(told, batch_size, seed, augment=True).batch(step)
    pixels = (batch * told.std.view(3, 1, 1) + told.mean.view(3, 1, 1)) * 255 / 4
    rows, columns = pixels[:, 0, 16, 16].round(), pixels[:, 1, 16, 16].round()
    mirror = pixels[:, 1, 16, 17] < pixels[:, 1, 16, 16]
    columns = torch.where(mirror, 31 - columns, columns)
    return torch.stack([rows - 16 + PAD, columns - 16 + PAD, mirror]).to(torch.int64)
