"""Batches are a pure function of (seed, step), equal to a slow per-sample twin."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from draws import draws_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resdiag.data.augment import PAD, Augmenter, crop, seeded_generator
from resdiag.data.dataset import ImageData, Source, open_data, to_tensors


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return open_data("digits")


def make_data(count: int, flip: bool = True) -> ImageData:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(count, dtype=np.int64)
    return to_tensors(
        Source(
            name="noise",
            train_images=images,
            train_labels=labels,
            test_images=images[:2],
            test_labels=labels[:2],
            classes=tuple(map(str, range(count))),
            note="",
        ),
        flip=flip,
    )


NOISE = make_data(29)
STILL = make_data(29, flip=False)

GOLDEN_ORDER = [1, 8, 22, 23, 18, 12, 6, 10]
GOLDEN_DRAW = [[7, 8, 8, 4, 4, 1, 3, 5], [8, 6, 3, 1, 7, 5, 5, 7], [0, 1, 0, 0, 0, 0, 1, 1]]


def twin(data: ImageData, index: int, down: int, right: int, mirror: bool) -> Tensor:
    """One image: normalise, mirror, pad with zeros, crop; pixel by pixel."""
    image = data.train_images[index].float()
    for channel in range(3):
        mean = (data.mean[channel].double() * 255).float()
        std = (data.std[channel].double() * 255).float()
        image[channel] = (image[channel] - mean) / std
    result = torch.zeros(3, 32, 32)
    for row in range(32):
        for column in range(32):
            y, x = row + down - PAD, column + right - PAD
            if 0 <= y < 32 and 0 <= x < 32:
                result[:, row, column] = image[:, y, 31 - x if mirror else x]
    return result


def test_a_batch_equals_the_slow_twin_bit_for_bit():
    for data in (NOISE, STILL):
        augmenter = Augmenter(data, 8, seed=3, augment=True)
        images, labels = augmenter.batch(1)
        drawn = draws_of(data, 8, seed=3, step=1)
        for place, (down, right, mirror) in enumerate(drawn.T.tolist()):
            expected = twin(data, int(labels[place]), down, right, bool(mirror))
            assert torch.equal(images[place], expected)


@given(down=st.integers(0, 8), right=st.integers(0, 8), mirror=st.booleans())
@settings(max_examples=60, deadline=None)
def test_crop_equals_flip_pad_slice(down, right, mirror):
    image = NOISE.train_images[:1].float()
    flipped = image.flip(3) if mirror else image
    padded = torch.nn.functional.pad(flipped, (PAD, PAD, PAD, PAD))
    expected = padded[:, :, down : down + 32, right : right + 32]
    got = crop(image, torch.tensor([down]), torch.tensor([right]), torch.tensor([mirror]))
    assert torch.equal(got, expected)


def test_padding_has_the_mean_colour():
    ones = torch.ones(1, 3, 32, 32)
    corner = crop(ones, torch.tensor([0]), torch.tensor([8]), torch.tensor([False]))[0]
    assert corner[:, :PAD].eq(0).all()
    assert corner[:, :, 32 - PAD :].eq(0).all()
    assert corner.sum() == 3 * 28 * 28


@given(
    before=st.lists(st.integers(0, 40), max_size=4),
    step=st.integers(0, 40),
    batch_size=st.sampled_from([1, 7, 29, 64]),
    seed=st.integers(0, 2**63),
)
@settings(max_examples=60, deadline=None)
def test_a_batch_depends_on_seed_and_step_only(before, step, batch_size, seed):
    used = Augmenter(NOISE, batch_size, seed, augment=True)
    for other in before:
        used.batch(other)
    fresh = Augmenter(NOISE, batch_size, seed, augment=True)
    for got, expected in zip(used.batch(step), fresh.batch(step), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("batch_size", [1, 7, 10, 29, 100])
@pytest.mark.parametrize("augment", [True, False])
def test_every_epoch_shows_every_image_once_and_keeps_the_last_partial_batch(batch_size, augment):
    augmenter = Augmenter(NOISE, batch_size, seed=1, augment=augment)
    orders = []
    for epoch in range(3):
        first = epoch * augmenter.steps_per_epoch
        steps = range(first, first + augmenter.steps_per_epoch)
        assert {augmenter.epoch(step) for step in steps} == {epoch}
        sizes = [len(augmenter.batch(step)[1]) for step in steps]
        assert sizes[:-1] == [batch_size] * (len(steps) - 1)
        orders.append(torch.cat([augmenter.batch(step)[1] for step in steps]).tolist())
        assert sorted(orders[-1]) == list(range(29))
    assert orders[0] != orders[1] != orders[2]


def test_the_cifar_epoch_has_391_steps_of_128():
    assert -(-50_000 // 128) == 391
    augmenter = Augmenter(make_data(80 + 128), 128, seed=0, augment=False)
    assert [len(augmenter.batch(step)[1]) for step in range(2)] == [128, 80]


def test_seeds_and_steps_give_unrelated_draws():
    def first(*key: object) -> int:
        return int(torch.randint(2**62, (), generator=seeded_generator(*key)))

    values = {
        first(seed, purpose, number)
        for seed in range(20)
        for purpose in ("order", "augment")
        for number in range(20)
    }
    assert len(values) == 20 * 2 * 20
    assert first(0, "order", 1) != first(1, "order", 0)


def test_the_draws_of_a_step_are_what_they_were():
    """Golden: a change here changes every training run and needs a line in the changelog."""
    augmenter = Augmenter(NOISE, 8, seed=0, augment=True)
    assert augmenter.batch(0)[1].tolist() == GOLDEN_ORDER
    assert draws_of(NOISE, 8, seed=0, step=0).tolist() == GOLDEN_DRAW


def test_offsets_and_mirrors_are_uniform():
    draws = torch.cat([draws_of(NOISE, 128, seed=0, step=step) for step in range(200)], 1)
    count = draws.shape[1]
    for row, values in zip(draws, (9, 9, 2), strict=True):
        share = torch.bincount(row, minlength=values) / count
        sigma = (1 / values * (1 - 1 / values) / count) ** 0.5
        assert (share - 1 / values).abs().max() < 5 * sigma


def test_digits_are_never_mirrored(digits):
    assert not digits.flip
    few = replace(digits, train_labels=digits.train_labels[:64])
    assert all(draws_of(few, 64, seed=0, step=step)[2].eq(0).all() for step in range(50))


def test_without_augmentation_a_batch_is_the_normalised_images(digits):
    images, _ = Augmenter(digits, 2000, seed=0, augment=False).batch(0)
    assert images.dtype == torch.float32
    assert images.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert (images.std(dim=(0, 2, 3), correction=0) - 1).abs().max() < 1e-4


def test_no_global_random_generator_is_drawn_from(digits):
    torch.manual_seed(5)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    augmenter = Augmenter(digits, 32, seed=0, augment=True)
    augmenter.batch(0)
    list(augmenter.test_batches(100))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_evaluation_goes_through_all_images_in_order(digits):
    augmenter = Augmenter(digits, 32, seed=0, augment=True)
    batches = augmenter.test_batches(100)
    assert torch.equal(torch.cat([own for _, own in batches]), digits.test_labels)
    whole = next(augmenter.test_batches(360))[0]
    parts = torch.cat([images for images, _ in augmenter.test_batches(7)])
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("augment", [True, False])
def test_channels_last_changes_the_layout_and_no_value(augment):
    plain = Augmenter(NOISE, 8, 0, augment)
    last = Augmenter(NOISE, 8, 0, augment, channels_last=True)
    images = last.batch(2)[0]
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert plain.batch(2)[0].is_contiguous()
    assert torch.equal(images, plain.batch(2)[0])
    assert next(last.test_batches(2))[0].is_contiguous(memory_format=torch.channels_last)


def test_images_of_the_set_are_not_changed(digits):
    before = digits.train_images.clone()
    augmenter = Augmenter(digits, 64, seed=0, augment=True)
    augmenter.batch(0)[0].zero_()
    assert torch.equal(digits.train_images, before)


def test_wrong_sizes_and_steps_are_refused():
    with pytest.raises(ValueError, match="batch_size 0 is not positive"):
        Augmenter(NOISE, 0, 0, augment=True)
    with pytest.raises(ValueError, match="step -1 is negative"):
        Augmenter(NOISE, 8, 0, augment=True).batch(-1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_sees_the_same_batches():
    on_cpu, on_cuda = (Augmenter(NOISE, 8, 0, True, device) for device in ("cpu", "cuda"))
    for got, expected in zip(on_cuda.batch(3), on_cpu.batch(3), strict=True):
        assert torch.equal(got.cpu(), expected)
