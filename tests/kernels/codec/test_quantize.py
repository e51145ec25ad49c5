import pytest
import torch
from reference import error, rounding_bound

from spectrumkv_kernels import Quantized, dequantize, pack, unpack
from spectrumkv_kernels.codec.quantize import quantize

BITS = (2, 4, 8)
KINDS = {
    "normal": lambda x: x,
    "offset": lambda x: 100 + x,
    "negative": lambda x: -1 - x.abs(),
    "tiny": lambda x: 1e-4 * x,
    "subnormal": lambda x: 1e-6 * x,
    "large": lambda x: 1e4 * x.clamp(-3, 3),
    "outlier": lambda x: torch.cat((x[..., :-1], 1000 * x[..., -1:]), dim=-1),
}
SYMMETRIC = pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])


def vectors(kind, channels=72):
    return KINDS[kind](torch.randn(3, 2, 37, channels, generator=torch.Generator().manual_seed(3)))


def codes_of(quantized, bits):
    return torch.cat(unpack(quantized.codes, bits), dim=-1).long()


def half_ulp(x):
    """Of float16, and a little: float32 arithmetic may cross a tie."""
    return torch.maximum(x.double() * 2.0**-11, torch.tensor(2.0**-25, dtype=torch.float64)) * (1 + 1e-3)


def nearest(codes, x, scale, lowest, highest):
    scale = scale.double().unsqueeze(-1)
    places = torch.where(scale > 0, x / scale, 0.0).clamp(lowest, highest)
    return bool(((codes - places).abs() <= 0.5 + 1e-4).all())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(8,), (5, 24), (2, 3, 7, 80), (2, 0, 64)], ids=str)
def test_pack_round_trip(bits, shape):
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(4)).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape[:-1], shape[-1] * bits // 8)
    parts = unpack(packed, bits)
    assert len(parts) == 8 // bits
    assert torch.equal(torch.cat(parts, dim=-1), codes)


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (4, [1, 2, 3, 4, 5, 6, 7, 8], [0x51, 0x62, 0x73, 0x84]),
        (4, [15, 0, 0, 15], [0x0F, 0xF0]),
        (2, [0, 1, 2, 3, 3, 2, 1, 0], [0b01_11_10_00, 0b00_10_11_01]),
        (2, [3, 0, 0, 1], [0b01_00_00_11]),
        (1, [1, 0, 0, 1, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1], [0b0001_1001, 0b1000_1110]),
        (8, [0, 7, 128, 255], [0, 7, 128, 255]),
    ],
)
def test_byte_layout(bits, codes, packed):
    codes, packed = torch.tensor(codes, dtype=torch.uint8), torch.tensor(packed, dtype=torch.uint8)
    assert torch.equal(pack(codes, bits), packed)
    assert torch.equal(torch.cat(unpack(packed, bits)), codes)


def test_quantize_stores_int4_in_that_layout():
    channels = torch.tensor([0.0, 15, 2, 3, 4, 5, 6, 7])  # scale 1, zero 0: the values are the codes
    assert quantize(channels, 4).codes.tolist() == [0x40, 0x5F, 0x62, 0x73]


@SYMMETRIC
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_error_bound(kind, bits, symmetric):
    x = vectors(kind)
    restored = dequantize(quantize(x, bits, symmetric), bits)
    assert restored.dtype == torch.float32
    assert bool(((restored.double() - x.double()).abs() <= rounding_bound(x, bits, symmetric).unsqueeze(-1)).all())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_asymmetric_rounds_to_nearest_with_stored_scale_and_zero(kind, bits):
    x = vectors(kind)
    stored = quantize(x, bits)
    assert (stored.scale.dtype, stored.zero.dtype) == (torch.float16, torch.float16)
    assert stored.scale.shape == stored.zero.shape == x.shape[:-1]
    low, high, top = x.amin(-1), x.amax(-1), 2**bits - 1
    assert torch.equal(stored.zero, low.half())
    assert bool(((stored.scale.double() - (high.double() - low.double()) / top).abs() <= half_ulp(stored.scale)).all())
    assert nearest(codes_of(stored, bits), x.double() - stored.zero.double().unsqueeze(-1), stored.scale, 0, top)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_symmetric_rounds_to_nearest_with_stored_scale(kind, bits):
    x = vectors(kind)
    stored = quantize(x, bits, symmetric=True)
    assert (stored.scale.dtype, stored.zero) == (torch.float16, None)
    middle, most = 2 ** (bits - 1), 2 ** (bits - 1) - 1
    assert bool(((stored.scale.double() - x.double().abs().amax(-1) / most).abs() <= half_ulp(stored.scale)).all())
    assert nearest(codes_of(stored, bits) - middle, x.double(), stored.scale, -most, most)


@SYMMETRIC
@pytest.mark.parametrize("bits", BITS)
def test_dequantize_uses_stored_scale_and_zero(bits, symmetric):
    stored = quantize(vectors("offset"), bits, symmetric)
    scale = stored.scale.double().unsqueeze(-1)
    zero = -(2 ** (bits - 1)) * scale if symmetric else stored.zero.double().unsqueeze(-1)
    assert error(dequantize(stored, bits), codes_of(stored, bits) * scale + zero) < 1e-7
    assert torch.equal(stored.zero_point(bits).double(), zero.squeeze(-1))


@pytest.mark.parametrize("bits", BITS)
def test_extremes_hit_first_and_last_code(bits):
    codes = codes_of(quantize(vectors("normal"), bits), bits)
    assert bool((codes.amin(-1) == 0).all())
    assert bool((codes.amax(-1) == 2**bits - 1).all())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_symmetric_codes_stay_symmetric(kind, bits):
    x = vectors(kind)
    x = torch.cat((x, -x), dim=-1)
    codes = codes_of(quantize(x, bits, symmetric=True), bits) - 2 ** (bits - 1)
    most = 2 ** (bits - 1) - 1
    assert bool((codes.abs() <= most).all())
    if kind not in ("tiny", "subnormal"):  # there float16 may round the scale far up
        assert bool((codes.amin(-1) == -most).all() and (codes.amax(-1) == most).all())


def test_ties_round_to_even():
    stored = quantize(torch.tensor([0.0, 0.5, 1.5, 2.5, 3.5, 7.5, 14.5, 15.0]), 4)
    assert codes_of(stored, 4).tolist() == [0, 0, 2, 2, 4, 8, 14, 15]
    stored = quantize(torch.tensor([-7.0, -0.5, -1.5, 0.5, 1.5, 2.5, 6.5, 0.0]), 4, symmetric=True)
    assert (codes_of(stored, 4) - 8).tolist() == [-7, 0, -2, 0, 2, 2, 6, 0]


@SYMMETRIC
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 1e-3, 1234.56, -60000.0])
def test_constant_vector(value, bits, symmetric):
    x = torch.full((3, 8), value)
    restored = dequantize(quantize(x, bits, symmetric), bits)
    assert bool(((restored - x).double().abs() <= rounding_bound(x, bits, symmetric).unsqueeze(-1)).all())


@SYMMETRIC
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("low", [-1e6, 0.0, 1e6], ids=["both_signs", "positive", "constant"])
def test_huge_values_saturate(low, bits, symmetric):
    x = torch.linspace(low, 1e6, 16).expand(2, 16)
    stored = quantize(x, bits, symmetric)
    assert bool(stored.scale.isfinite().all())
    restored = dequantize(stored, bits)
    assert bool(restored.isfinite().all())
    assert bool((restored.abs() <= 1.01e6).all())
    assert bool((restored.diff(dim=-1) >= 0).all())
    assert restored[0, -1] >= 65504


@SYMMETRIC
def test_huge_values_within_float16_scale_keep_their_bound(symmetric):
    """The zero of symmetric codes lies beyond float16 here, their scale does not."""
    x = torch.linspace(-2e5 if symmetric else 0.0, 2e5, 64)
    restored = dequantize(quantize(x, 8, symmetric), 8)
    assert bool(((restored - x).double().abs() <= rounding_bound(x, 8, symmetric)).all())


@SYMMETRIC
@pytest.mark.parametrize("bits", BITS)
def test_row_is_bit_equal_in_any_company(bits, symmetric):
    x = vectors("normal")
    together = quantize(x, bits, symmetric)
    alone = quantize(x[1:2, :, 5:6], bits, symmetric)
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b[1:2, :, 5:6])
    part = Quantized(*(t[1:2, :, 5:6] for t in together))
    assert torch.equal(dequantize(part, bits), dequantize(together, bits)[1:2, :, 5:6])


@SYMMETRIC
@pytest.mark.parametrize("bits", [-4, 0, 5, 16])
def test_wrong_bits(bits, symmetric):
    with pytest.raises(ValueError, match=rf"\b{bits}$" if bits >= 0 else r"-4$"):
        quantize(torch.ones(2, 8), bits, symmetric)


@SYMMETRIC
@pytest.mark.parametrize(("bits", "channels"), [(4, 1), (4, 7), (4, 63), (2, 6), (2, 81)])
def test_channels_that_fill_no_byte(bits, channels, symmetric):
    with pytest.raises(ValueError, match=rf"\b{channels}$"):
        quantize(torch.ones(2, channels), bits, symmetric)
    with pytest.raises(ValueError, match=rf"\b{channels}$"):
        pack(torch.ones(2, channels, dtype=torch.uint8), bits)


def test_int8_takes_odd_channels():
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(5))
    assert bool(((dequantize(quantize(x, 8), 8) - x).abs() <= rounding_bound(x, 8, False).unsqueeze(-1)).all())
