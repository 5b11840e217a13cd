"""Run by test_fused.py in a process of its own: Triton's interpreter is chosen at the import."""

import itertools
import sys

import torch

from resdiag.watch.measure import kernels
from resdiag.watch.record import graph_taps

SHAPES = [  # shape and dimension of the channels
    ((5, 7, 6, 6), 1),
    ((3, 70, 5, 4), 1),
    ((2, 3, 2, 3, 4), 1),
    ((9, 33), 1),
    ((4, 6, 20), 2),
    ((140, 3, 8, 8), 1),  # more than one program reads it
]
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: (
        x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    ),
    "a transposed view": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "a slice": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
}
MANY = 32
"""Channels. Where they do not lie next to each other, each has a program of its own: more of them
run no other line, and a program takes the interpreter a tenth of a second."""
VALUES = {"finite": [], "nan and inf": [float("nan"), float("inf")]}


def rehearse():
    """Compare with the plain operations, float64 on both sides."""
    torch.manual_seed(0)
    for ((shape, channel), layout), (name, bad) in itertools.product(
        itertools.product(SHAPES, LAYOUTS), VALUES.items()
    ):
        x = torch.randn(shape) * 3 + 1
        for place, value in enumerate(bad):
            x.view(-1)[7 * place + 2] = value
        x = LAYOUTS[layout](x)
        if x.shape[channel] > MANY and x.stride(channel) > 1:
            continue
        say = f"{shape} {layout} {name}"
        same(kernels.moments(x, channel), graph_taps.moments_of(x, channel)[:-1], say)
        same(kernels.gradient(x), graph_taps.gradient_of(x, None)[:-1], say)
    for dtype in (torch.float16, torch.float64):
        x = torch.randn(4, 5, 3, 3).to(dtype)
        same(kernels.moments(x, 1), graph_taps.moments_of(x, 1)[:-1], str(dtype))


def same(found, expected, say):
    torch.testing.assert_close(
        found, expected, rtol=1e-12, atol=1e-13, equal_nan=True, msg=lambda text: f"{say}: {text}"
    )


if __name__ == "__main__":
    rehearse()
    sys.stdout.write("the same\n")
