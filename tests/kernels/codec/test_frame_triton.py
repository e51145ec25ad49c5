"""The frame's Triton kernels against their twin: on a GPU, else in Triton's interpreter."""

import pytest
import torch
from reference import error, frequencies, rotated

from spectrumkv_kernels import Rotary
from spectrumkv_kernels.codec import frame as twin
from spectrumkv_kernels.codec.reference import key_mean

triton_frame = pytest.importorskip("spectrumkv_kernels.codec.triton_frame")

CASES = [  # keys' and values' head_dim, pairs, interleaved, dtype, tokens, weights, power of queries
    (64, 64, 32, False, torch.float32, 300, None, True),
    (128, 64, 16, True, torch.bfloat16, 270, "bool", True),
    (80, 96, 40, False, torch.float16, 61, "float", False),
    (10, 6, 4, True, torch.float32, 700, "bool", True),
    (256, 192, 128, False, torch.float32, 65, "bool", True),
    (24, 40, 0, False, torch.bfloat16, 259, "float", True),
    (2, 1, 1, False, torch.float32, 5, None, False),
]


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(key_dim, value_dim, pairs, interleaved, dtype, tokens, weighting, powered, device, batch=2, heads=3):
    """Arguments of `fit_frame`, whose tokens are followed by NaN, as are those that have no weight."""
    rotary = Rotary(frequencies(pairs) if pairs else (), interleaved)
    positions = torch.arange(7, 7 + tokens)
    spread = torch.logspace(-2, 1, key_dim)
    flat = 3 * randn(batch, heads, 1, key_dim) + spread * randn(batch, heads, tokens, key_dim, seed=1)
    keys = rotated(rotary, flat, positions) if pairs else flat
    values = randn(1, heads, 1, value_dim, seed=2) + 0.5 * randn(batch, heads, tokens, value_dim, seed=3)
    weights = None
    if weighting:
        weights = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(4))
        weights = weights > 0.3 if weighting == "bool" else weights
        weights[:, : tokens // 8] = 0
    buffers = []
    for side in (keys, values):
        buffer = torch.full((batch, heads, tokens + 3, side.shape[-1]), torch.nan).to(dtype)
        buffer[:, :, :tokens] = side
        if weights is not None:
            buffer[:, :, :tokens].masked_fill_((weights == 0)[:, None, :, None], torch.nan)
        buffers.append(buffer.to(device)[:, :, :tokens])
    weights = None if weights is None else weights.to(device)
    positions = positions.to(device)
    mean = key_mean(buffers[0], positions, rotary, weights)
    power = torch.logspace(1, -2, key_dim, device=device).expand(batch, heads, -1) if powered else None
    return *buffers, positions, rotary, mean, weights, power


def parts_agree(ours, theirs, key_dim, tolerance):
    assert (ours.dtype, ours.shape) == (torch.float32, theirs.shape)
    for mine, expected in zip(twin.split_frame(ours, key_dim), twin.split_frame(theirs, key_dim), strict=True):
        assert error(mine, expected) < tolerance
        small = expected.abs().amin() > 0  # each number by itself, too
        assert not small or bool(((mine / expected - 1).abs() < 100 * tolerance).all())


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)).replace("torch.", ""))
def test_as_the_twin(case, device):
    arguments = inputs(*case, device, heads=3 if case[0] < 64 else 1)
    ours, theirs = triton_frame.fit_frame(*arguments), twin.fit_frame(*arguments)
    assert bool(theirs.isfinite().all())
    parts_agree(ours, theirs, case[0], 2e-6)


def test_one_of_every_few_of_many_tokens(device):
    arguments = inputs(8, 4, 4, False, torch.float32, 2 * twin.FITTED + 5, "bool", True, device, 1, 1)
    ours = triton_frame.fit_frame(*arguments)
    parts_agree(ours, twin.fit_frame(*arguments), 8, 4e-6)
    assert torch.equal(triton_frame.fit_frame(*arguments), ours)


@pytest.mark.parametrize("number", [0.0, 3.0])
def test_vectors_without_power(number, device):
    """Vectors that are their own mean, zeros among them, have the scale 1 and not one of 0."""
    keys, positions = torch.full((1, 2, 70, 16), number, device=device), torch.arange(70, device=device)
    mean = keys[:, :, 0].contiguous()
    values = torch.zeros(1, 2, 70, 8, device=device)
    frame = triton_frame.fit_frame(keys, values, positions, Rotary(), mean)
    assert torch.equal(frame, twin.fit_frame(keys, values, positions, Rotary(), mean))
    assert bool((frame[..., 16:32] == 1).all()) and bool((frame[..., -1] == 1).all())


def test_a_row_without_weights_and_queries_that_are_not_finite(device):
    keys, values, positions, rotary, mean, weights, power = inputs(
        16, 8, 8, False, torch.float32, 90, "bool", True, device
    )
    weights[1] = False
    mean = key_mean(keys, positions, rotary, weights)
    power = power.clone()
    power[0, 0, 3], power[0, 1] = torch.nan, 0
    arguments = (keys, values, positions, rotary, mean, weights, power)
    ours = triton_frame.fit_frame(*arguments)
    parts_agree(ours, twin.fit_frame(*arguments), 16, 2e-6)
    parts = twin.split_frame(ours[1], 16)
    assert bool((parts.mean == 0).all() & (parts.key_scale == 1).all() & (parts.value_scale == 1).all())
