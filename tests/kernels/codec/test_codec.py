import pytest
import torch
from reference import error, frame_for, frequencies, rotated, rounding_bound, sylvester

from spectrumkv_kernels import CODECS, Quantized, Rotary, dequantize
from spectrumkv_kernels.codec.frame import key_mean, split_frame
from spectrumkv_kernels.codec.quantize import quantize_unbiased
from spectrumkv_kernels.codec.reference import decode, encode

BITS = (2, 4, 8)
PAIRING = pytest.mark.parametrize("interleaved", [False, True], ids=["half_split", "interleaved"])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scattered(batch, heads, tokens, seed=0):
    """Ascending positions, others for every row and head."""
    noise = torch.rand(batch, heads, 3 * tokens, generator=torch.Generator().manual_seed(seed))
    return noise.argsort(-1)[..., :tokens].sort(-1).values.to(torch.int32)


def keys_with_offset(offset, rotary, positions, noise=1.0, seed=0):
    """Keys whose frame before RoPE has its mean at `offset`."""
    flat = offset.unsqueeze(-2) + noise * randn(*positions.shape, offset.shape[-1], seed=seed)
    return rotated(rotary, flat, positions).float()


def assert_bounded(keys, values, positions, bits, codec, mean, rotary):
    """Round trip within what rounding allows, channel by channel in the frame where it happens."""
    frame = frame_for(codec, mean, values.shape[-1])
    encoded = encode(keys, values, positions, bits, codec, frame, rotary)
    restored = decode(*encoded, positions, bits, codec, frame, rotary)
    shift = rotated(rotary, mean.unsqueeze(-2).expand(keys.shape), positions) if codec.center else 0
    sides = [(keys, shift, 1.0), (values, 0, 1.0)]
    if codec.balanced:
        parts = [part.double().unsqueeze(-2) for part in split_frame(frame, keys.shape[-1])]
        sides = [(keys, shift, parts[1]), (values, parts[2], parts[3])]
    for (original, center, scale), result, stored in zip(sides, restored, encoded, strict=True):
        assert result.dtype == torch.float32
        turn = sylvester(original.shape[-1]) if codec.hadamard else torch.eye(original.shape[-1]).double()
        coded, back = (((x.double() - center) / scale) @ turn for x in (original, result))
        if codec.balanced:
            expected = quantize_unbiased(coded.float(), bits)
            same = (expected.codes == stored.codes).all(-1) & (expected.affine == stored.affine).all(-1)
            assert same.float().mean() > 0.97  # others have a channel on an edge between two codes
            assert error(back[same], dequantize(expected, bits)[same]) < 1e-5
            assert error(back, coded) < {2: 0.4, 3: 0.2, 4: 0.11, 8: 0.01}[bits]
        else:
            bound = rounding_bound(coded, bits, codec.symmetric) + 1e-6 * original.double().norm(dim=-1)
            assert bool(((back - coded).abs() <= bound.unsqueeze(-1)).all())


@PAIRING
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [64, 80, 96])
@pytest.mark.parametrize("name", CODECS)
def test_round_trip(name, head_dim, bits, interleaved):
    codec, rotary = CODECS[name], Rotary(frequencies(head_dim // 4), interleaved)
    positions = scattered(2, 3, 37)
    mean = 3 * randn(2, 3, head_dim)
    keys = keys_with_offset(mean, rotary, positions)
    values = randn(2, 3, 37, 48, seed=1)
    assert_bounded(keys, values, positions, bits, codec, mean, rotary)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("wrong", ["mean", "rotary", "both"])
def test_wrong_mean_or_rotary_still_round_trips(wrong, bits):
    rotary = Rotary(frequencies(16))
    positions, offset = scattered(2, 3, 37), 3 * randn(2, 3, 40)
    keys, values = keys_with_offset(offset, rotary, positions), randn(2, 3, 37, 40, seed=1)
    if wrong != "rotary":
        offset = 5 * randn(2, 3, 40, seed=2)
    if wrong != "mean":
        rotary = Rotary(frequencies(11, theta=50.0), interleaved=True)
    assert_bounded(keys, values, positions, bits, CODECS["spectrum"], offset, rotary)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_model_dtypes(dtype, name, bits):
    """Keys of a model's dtype are coded as their float32 values are."""
    codec, rotary, positions = CODECS[name], Rotary(frequencies(8)), scattered(2, 3, 9)
    frame = frame_for(codec, randn(2, 3, 16), 16)
    keys, values = randn(2, 3, 9, 16).to(dtype), randn(2, 3, 9, 16, seed=1).to(dtype)
    low = encode(keys, values, positions, bits, codec, frame, rotary)
    full = encode(keys.float(), values.float(), positions, bits, codec, frame, rotary)
    for a, b in zip((*low[0], *low[1]), (*full[0], *full[1]), strict=True):
        assert (a is b is None) or torch.equal(a, b)


@PAIRING
def test_spectrum_keeps_keys_with_huge_offset(interleaved):
    """Qwen2.5 has channels whose keys sit near 200 before RoPE; what matters is what differs between tokens."""
    rotary, positions = Rotary(frequencies(32, theta=1e6), interleaved), scattered(2, 3, 65)
    offset = torch.zeros(2, 3, 64)
    offset[..., [3, 35, 50]] = torch.tensor([200.0, -180.0, 150.0])
    keys, values = keys_with_offset(offset, rotary, positions), randn(2, 3, 65, 64, seed=1)
    noise = keys - rotated(rotary, offset.unsqueeze(-2).expand(keys.shape), positions)

    def residual(name):
        codec, mean = CODECS[name], offset if CODECS[name].center else None
        restored = decode(*encode(keys, values, positions, 4, codec, mean, rotary), positions, 4, codec, mean, rotary)
        return error(noise + (restored[0] - keys), noise)

    assert residual("spectrum") < 0.12
    assert residual("absmax") > 8 * residual("spectrum")


@PAIRING
@pytest.mark.parametrize("pairs", [0, 5, 12])
def test_key_mean_recovers_offset(pairs, interleaved):
    rotary, positions = Rotary(frequencies(pairs), interleaved), torch.arange(40, 113)
    offset = 50 * randn(2, 3, 24)
    wide = positions.expand(2, 3, -1)
    exact = keys_with_offset(offset, rotary, wide, noise=0)
    mean = key_mean(exact, positions, rotary)
    assert (mean.dtype, mean.shape) == (torch.float32, (2, 3, 24))
    assert error(mean, offset) < 1e-6
    noisy = keys_with_offset(offset, rotary, wide, seed=1)
    assert error(key_mean(noisy, positions, rotary), offset + randn(2, 3, 73, 24, seed=1).mean(-2)) < 1e-6


def weighted(weights, seed=0):
    """Computed and expected mean of random keys, positions 7 to 19."""
    rotary, positions = Rotary(frequencies(4)), torch.arange(7, 20)
    flat = randn(*weights.shape[:1], 2, 13, 10, seed=seed)
    keys = rotated(rotary, flat, positions).float()
    w = weights.double()[:, None, :, None]
    return key_mean(keys, positions, rotary, weights.unsqueeze(1)), (flat * w).sum(-2) / w.sum(-2)


def test_key_mean_leaves_out_tokens_without_weight():
    weights = torch.ones(3, 13, dtype=torch.bool)
    weights[0, :5] = weights[1, 3:] = False
    mean, expected = weighted(weights)
    assert error(mean, expected) < 1e-6


@pytest.mark.parametrize("total", [0.5, 1.0, 300.0])
def test_key_mean_is_a_weighted_mean(total):
    weights = torch.rand(2, 13, generator=torch.Generator().manual_seed(6))
    mean, expected = weighted(weights / weights.sum(-1, keepdim=True) * total)
    assert error(mean, expected) < 1e-6


def test_key_mean_of_row_without_weight_is_zero():
    weights = torch.ones(3, 13)
    weights[1] = 0
    mean, expected = weighted(weights)
    assert bool((mean[1] == 0).all())
    assert error(mean[::2], expected[::2]) < 1e-6


def test_key_mean_in_bfloat16_keys_is_float32():
    keys, positions = randn(2, 3, 13, 10).bfloat16(), torch.arange(13)
    mean = key_mean(keys, positions, Rotary(frequencies(5)))
    assert torch.equal(mean, key_mean(keys.float(), positions, Rotary(frequencies(5))))


def gathered(stored, index):
    if isinstance(stored, Quantized):
        return Quantized(*(gathered(t, index) for t in stored))
    return stored.gather(2, index.unsqueeze(-1).expand(*index.shape, stored.shape[-1]) if stored.dim() == 4 else index)


def assert_subsets_bit_equal(bits, codec, rotary):
    positions = scattered(2, 3, 53)
    frame = frame_for(codec, 10 * randn(2, 3, 40), 40)
    keys, values = encode(randn(2, 3, 53, 40), randn(2, 3, 53, 40, seed=1), positions, bits, codec, frame, rotary)
    whole = decode(keys, values, positions, bits, codec, frame, rotary)
    for size in (1, 2, 3, 7, 8, 31):
        index = torch.rand(2, 3, 53, generator=torch.Generator().manual_seed(size)).argsort(-1)[..., :size]
        k, v, where = (gathered(stored, index) for stored in (keys, values, positions))
        part = decode(k, v, where, bits, codec, frame, rotary)
        assert torch.equal(part[0], gathered(whole[0], index)), f"keys of {size} tokens"
        assert torch.equal(part[1], gathered(whole[1], index)), f"values of {size} tokens"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", CODECS)
def test_decode_of_a_subset_is_bit_equal(name, bits):
    assert_subsets_bit_equal(bits, CODECS[name], Rotary(frequencies(16)))


@PAIRING
@pytest.mark.parametrize("pairs", [0, 1, 7, 8, 10, 12, 20])
def test_decode_of_a_subset_is_bit_equal_for_any_rotary(pairs, interleaved):
    """10 pairs, for example: Pythia 2.8B rotates a quarter of head_dim 80."""
    assert_subsets_bit_equal(4, CODECS["spectrum"], Rotary(frequencies(pairs), interleaved))


@pytest.mark.parametrize("bits", BITS)
def test_decode_of_one_row_or_head_is_bit_equal(bits):
    codec, rotary, positions = CODECS["spectrum"], Rotary(frequencies(8)), scattered(3, 2, 29)
    mean = 10 * randn(3, 2, 24)
    keys, values = encode(randn(3, 2, 29, 24), randn(3, 2, 29, 24, seed=1), positions, bits, codec, mean, rotary)
    whole = decode(keys, values, positions, bits, codec, mean, rotary)
    for part in ((slice(1, 2),), (slice(None), slice(1, 2)), (slice(2, 3), slice(0, 1), slice(4, 17))):
        k, v = (Quantized(*(t[part] for t in stored)) for stored in (keys, values))
        alone = decode(k, v, positions[part], bits, codec, mean[part[:2]], rotary)
        assert torch.equal(alone[0], whole[0][part])
        assert torch.equal(alone[1], whole[1][part])


def test_codecs():
    assert set(CODECS) >= {"spectrum", "absmax"}
    assert all(name == codec.name for name, codec in CODECS.items())
