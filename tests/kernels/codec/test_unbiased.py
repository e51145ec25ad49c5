"""Unbiased codes with one-byte scales, and codes of 3 bits."""

import pytest
import torch
from reference import error

from spectrumkv_kernels import Quantized, dequantize, pack, saturated, unpack
from spectrumkv_kernels.codec.quantize import (
    ONE,
    SATURATED,
    STEPS,
    divisor,
    quantize,
    quantize_unbiased,
    scales,
    unit,
)

BITS = (1, 2, 3, 4, 8)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heavy(*shape, seed=0):
    """With a few large channels, as keys have."""
    x = randn(*shape, seed=seed)
    return x * (1 + 3 * (randn(*shape, seed=seed + 1) > 1.5))


def levels(bits):
    return torch.arange(2**bits).double() + 0.5 - 2.0 ** (bits - 1)


def codes_of(quantized, bits):
    return torch.cat(unpack(quantized.codes, bits), dim=-1).long()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("channels", [8, 24, 64, 80, 128, 200])
def test_products_with_what_was_coded_are_right(channels, bits):
    """`<x, x'> = <x, x>`, up to the rounding of the scale; at 8 bits codes alone see to that."""
    x = heavy(50, channels)
    restored = dequantize(quantize_unbiased(x, bits), bits).double()
    ratio = (x.double() * restored).sum(-1) / x.double().square().sum(-1)
    assert bool(((ratio - 1).abs() < (2.0 ** (0.5 / 32) - 1 if bits < 8 else 0.01) + 1e-5).all())


EXPECTED = {1: 0.573, 2: 0.131, 3: 0.036, 4: 0.0095, 8: 3.8e-5}


@pytest.mark.parametrize("bits", BITS)
def test_squared_error_of_normal_vectors(bits):
    x = randn(4000, 64)
    assert error(dequantize(quantize_unbiased(x, bits), bits), x) ** 2 < EXPECTED[bits]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_no_step_near_the_one_taken_is_better_by_much(bits):
    """Of 40 steps in the range, the best is at most 9 % better in squared error, on the mean."""
    x = randn(200, 64).double()
    taken = (dequantize(quantize_unbiased(x.float(), bits), bits).double() - x).square().sum(-1)
    best = torch.full_like(taken, torch.inf)
    for step in torch.linspace(0.6, 1.4, 40).tolist():
        width = (step * STEPS[bits] * x.square().mean(-1).sqrt()).unsqueeze(-1)
        coded = levels(bits)[((x / width).floor() + 2 ** (bits - 1)).clamp(0, 2**bits - 1).long()]
        scale = x.square().sum(-1) / (x * coded).sum(-1)
        best = torch.minimum(best, (coded * scale.unsqueeze(-1) - x).square().sum(-1))
    assert taken.mean() < 1.09 * best.mean()


@pytest.mark.parametrize("bits", BITS)
def test_codes_and_scales_say_what_comes_back(bits):
    stored = quantize_unbiased(heavy(7, 40), bits)
    assert (stored.affine.dtype, stored.affine.shape) == (torch.uint8, (7, 1))
    scale = unit(bits) * torch.exp2((stored.affine[:, 0].double() - ONE) / 32)
    assert error(stored.step(bits), scale) < 1e-6
    expected = levels(bits)[codes_of(stored, bits)] * scale.unsqueeze(-1)
    assert error(dequantize(stored, bits), expected) < 1e-6
    assert torch.equal(scales(bits, torch.device("cpu"))[stored.affine[:, 0].int()], stored.step(bits))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [1 / 8, 0.25, 1.0, 7.0])
def test_vectors_of_any_size_in_range_lose_as_little(size, bits):
    x = randn(500, 64)
    whole, scaled = (error(dequantize(quantize_unbiased(f * x, bits), bits), f * x) for f in (1.0, size))
    assert scaled == pytest.approx(whole, rel=0.03)


@pytest.mark.parametrize("bits", BITS)
def test_what_is_not_represented(bits):
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e6, 1e30])
    x = torch.cat((randn(1, 16), randn(5, 16).index_put((torch.arange(5), torch.tensor(3)), bad)))
    stored = quantize_unbiased(x, bits)
    assert saturated(stored).tolist() == [False, True, True, True, True, True]
    assert bool((stored.affine[1:, 0] == SATURATED).all())
    assert bool(dequantize(stored, bits).isfinite().all())


@pytest.mark.parametrize("bits", BITS)
def test_small_vectors_and_zeros_stay_small(bits):
    x = torch.stack((torch.zeros(16), 1e-6 * randn(16), 1e-30 * randn(16)))
    stored = quantize_unbiased(x, bits)
    assert not saturated(stored).any() and bool((stored.affine == 0).all())
    least = float(scales(bits, x.device)[0])
    assert bool((dequantize(stored, bits).abs() <= 2.0 ** (bits - 1) * least).all())
    assert bool((dequantize(stored, bits)[0].abs() <= least / 2 + 1e-9).all())


@pytest.mark.parametrize("bits", BITS)
def test_row_is_bit_equal_in_any_company(bits):
    x = heavy(3, 2, 37, 72)
    together, alone = quantize_unbiased(x, bits), quantize_unbiased(x[1:2, :, 5:6], bits)
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b[1:2, :, 5:6])
    part = Quantized(*(t[1:2, :, 5:6] for t in together))
    assert torch.equal(dequantize(part, bits), dequantize(together, bits)[1:2, :, 5:6])


# -- 3 bits -----------------------------------------------------------------------------------------------------------


def test_layout_of_three_bits():
    codes = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 7, 6, 5, 4, 3, 2, 1, 0], dtype=torch.uint8)
    upper, lowest = codes >> 1, codes & 1
    packed = pack(codes, 3)
    assert packed.tolist() == [*pack(upper, 2).tolist(), *pack(lowest, 1).tolist()]
    assert packed[4] == sum(int(lowest[2 * i]) << i for i in range(8))
    assert torch.equal(torch.cat(unpack(packed, 3)), codes)
    assert [len(part) for part in unpack(packed, 3)] == [2] * 8


@pytest.mark.parametrize("shape", [(8,), (5, 24), (2, 3, 7, 80), (2, 0, 64)], ids=str)
@pytest.mark.parametrize("bits", [1, 3])
def test_round_trip(shape, bits):
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(4)).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (*shape[:-1], shape[-1] * bits // 8)
    assert torch.equal(torch.cat(unpack(packed, bits), dim=-1), codes)


def test_channels_that_codes_take():
    assert [divisor(bits) for bits in (1, 2, 3, 4, 8)] == [8, 4, 8, 2, 1]
    with pytest.raises(ValueError, match="3-bit codes need a head_dim divisible by 8, got 12"):
        quantize_unbiased(torch.ones(2, 12), 3)


def test_symmetric_codes_have_a_level_on_either_side():
    with pytest.raises(ValueError, match="symmetric codes have 2 bits or more, got 1"):
        quantize(torch.ones(2, 8), 1, symmetric=True)


@pytest.mark.parametrize("bits", [-4, 0, 5, 16])
def test_wrong_bits(bits):
    for function in (quantize, quantize_unbiased):
        with pytest.raises(ValueError, match=rf"1, 2, 3, 4 or 8 bits can be packed, got {bits}"):
            function(torch.ones(2, 8), bits)
