import pytest
import torch
from reference import error, frequencies, rotated

from spectrumkv_kernels import CODECS, Rotary, decode, encode, fit_frame, query_power
from spectrumkv_kernels.codec.frame import fitted_by, key_mean, split_frame

CODEC = CODECS["spectrum2"]
PAIRING = pytest.mark.parametrize("interleaved", [False, True], ids=["half_split", "interleaved"])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def keys_of(spread, rotary, tokens=300, batch=2, heads=3, seed=0):
    """Keys whose channels have these deviations before RoPE, and their positions."""
    positions = torch.arange(tokens)
    flat = spread * randn(batch, heads, tokens, len(spread), seed=seed) + 5 * randn(
        heads, 1, len(spread), seed=seed + 1
    )
    return rotated(rotary, flat, positions).float(), positions


def fitted(keys, values, positions, rotary, **options):
    frame = fit_frame(keys, values, int(positions[0]), rotary, True, **options)
    return split_frame(frame, keys.shape[-1])


@PAIRING
@pytest.mark.parametrize("pairs", [0, 5, 8])
def test_scales_are_those_of_least_error(pairs, interleaved):
    """`(E[q^2] / Var[k])^(1/4)`, alike for the two channels of a pair, against float64."""
    rotary = Rotary(frequencies(pairs) if pairs else (), interleaved)
    spread = torch.rand(16, generator=torch.Generator().manual_seed(3)) + 0.05
    power = torch.rand(2, 3, 16, generator=torch.Generator().manual_seed(4)) + 0.01
    keys, positions = keys_of(spread, rotary, tokens=2000)
    frame = fitted(keys, randn(2, 3, 2000, 8), positions, rotary, query_power=power.unsqueeze(2))

    residual = keys.double() - rotated(rotary, frame.mean.double().unsqueeze(-2).expand(keys.shape), positions)
    shape = residual.square() / residual.square().mean(-1, keepdim=True)
    balance = (rotary.paired(power.double()) / rotary.paired(shape.mean(2))) ** 0.25
    size = (residual * balance.unsqueeze(2)).square().mean(-1).log().mean(-1).exp().sqrt()
    expected = size.unsqueeze(-1) / balance
    assert error(frame.key_scale, expected) < 1e-2  # `CREDIT` of 2000 tokens
    assert torch.equal(rotary.paired(frame.key_scale), frame.key_scale)


@PAIRING
def test_what_is_coded_has_a_power_of_one(interleaved):
    rotary = Rotary(frequencies(8), interleaved)
    keys, positions = keys_of(torch.linspace(0.01, 9, 16), rotary)
    values = 7 * randn(2, 3, 300, 24) + 100 * randn(3, 1, 24)
    frame = fitted(keys, values, positions, rotary)
    coded_keys = (keys - rotary.rotate(frame.mean.unsqueeze(-2), positions)) / frame.key_scale.unsqueeze(-2)
    coded_values = (values - frame.value_mean.unsqueeze(-2)) / frame.value_scale.unsqueeze(-2)
    for coded in (coded_keys, coded_values):
        assert bool((coded.square().mean(-1).log().mean(-1).abs() < 1e-3).all())  # the geometric mean over tokens
    assert error(frame.value_mean, values.mean(2)) < 1e-5


def test_balanced_keys_give_better_logits():
    """Where queries are large in channels of small keys: a third of the error at least."""
    rotary = Rotary(frequencies(32))
    spread = torch.cat([torch.logspace(-2, 1, 32)] * 2)
    keys, positions = keys_of(spread, rotary, batch=1, heads=1)
    values, index = randn(1, 1, 300, 64), torch.arange(300, dtype=torch.int32).expand(1, 1, -1).contiguous()
    query = randn(1, 1, 50, 64, seed=5) / spread
    power = query_power(query, 1)

    def wrong(power):
        frame = fit_frame(keys, values, 0, rotary, True, query_power=power)
        restored, _ = decode(*encode(keys, values, index, 4, CODEC, frame, rotary), index, 4, CODEC, frame, rotary)
        return error(query @ (restored - keys).mT + query @ keys.mT, query @ keys.mT)

    assert wrong(power) < wrong(None) / 3


def test_few_huge_tokens_leave_the_scales_as_they_are():
    """And zeros do. The means move, by what such tokens add."""
    rotary = Rotary()
    keys, positions = keys_of(torch.rand(16) + 0.1, rotary)
    values, power = randn(2, 3, 300, 8), torch.rand(2, 3, 1, 16) + 0.1
    before = fitted(keys, values, positions, rotary, query_power=power)
    keys[:, :, 77] = 1000 * randn(2, 3, 16, seed=8) / 300
    values[:, :, [50, 99]] = 1000 * randn(2, 3, 2, 8, seed=9) / 300
    keys[:, :, 5], values[:, :, 5] = before.mean, before.value_mean
    after = fitted(keys, values, positions, rotary, query_power=power)
    assert error(after.key_scale, before.key_scale) < 0.03
    assert error(after.value_scale, before.value_scale) < 0.03


def test_first_tokens_and_padding_do_not_count():
    rotary = Rotary(frequencies(8))
    keys, positions = keys_of(torch.ones(16), rotary, tokens=60)
    values, pads = randn(2, 3, 60, 8), torch.tensor([7, 0])
    spoilt_keys, spoilt_values = keys.clone(), values.clone()
    for t in (spoilt_keys, spoilt_values):
        t[0, :, :10], t[1, :, :3] = 1e4, -1e4
    before = fitted(keys, values, positions, rotary, least=3, pads=pads)
    for a, b in zip(before, fitted(spoilt_keys, spoilt_values, positions, rotary, least=3, pads=pads), strict=True):
        assert torch.equal(a, b)
    alone = fit_frame(keys[:1, :, 10:], values[:1, :, 10:], 10, rotary, True)
    for a, b in zip(before, split_frame(alone, 16), strict=True):
        assert error(a[:1], b) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_that_float16_does_not_hold_do_not_count_in_their_head(dtype):
    keys, values = randn(2, 3, 75, 16).to(dtype), randn(2, 3, 75, 8, seed=1).to(dtype)
    keys[0, 1, 20, 3], keys[1, 2, 40, -1], values[1, 0, 50, 2] = torch.nan, -torch.inf, torch.inf
    if dtype != torch.float16:
        keys[0, 0, 33, 0] = 65536.0  # what float16 does not hold
        keys[0, 0, 34, 0] = 65280.0  # of which bfloat16 has no nearer one
    expected = torch.ones(2, 3, 75, dtype=torch.bool)
    expected[0, 1, 20] = expected[1, 2, 40] = expected[1, 0, 50] = False
    if dtype != torch.float16:
        expected[0, 0, 33] = False
    assert torch.equal(fitted_by(keys, values, 6, 0), expected)
    assert bool(fitted_by(keys, None, 6, 0)[1, 0].all())
    rotary = Rotary(frequencies(8))
    frame = fit_frame(keys, values, 6, rotary, True)
    assert bool(frame.isfinite().all())
    kept = [t for t in range(75) if t != 20]
    mean = key_mean(keys[:1, 1:2, kept], torch.tensor(kept) + 6, rotary)
    assert error(split_frame(frame, 16).mean[:1, 1:2], mean) < 1e-6


@pytest.mark.parametrize("queries", [1, 70, 2100])
def test_power_of_queries(queries):
    query, pads = randn(2, 6, queries, 10).half(), torch.tensor([queries // 3, -5])
    every = -(-queries // 1024)
    taken = query.double()[:, :, ::every]
    real = torch.arange(0, queries, every) >= pads[:, None]
    expected = (taken.square() * real[:, None, :, None]).sum(2).unflatten(1, (3, 2)).sum(2)
    assert error(query_power(query, 3, pads).sum(2), expected) < 1e-6
    assert error(query_power(query, 3).sum(2), taken.square().sum(2).unflatten(1, (3, 2)).sum(2)) < 1e-6


@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize("power", [None, torch.zeros(2, 3, 1, 16)], ids=["alike", "zero"])
def test_few_or_constant_tokens_give_sound_scales(tokens, power):
    rotary = Rotary(frequencies(8))
    keys, positions = keys_of(torch.ones(16), rotary, tokens=tokens)
    for k, v in ((keys, randn(2, 3, tokens, 8)), (torch.zeros_like(keys), torch.ones(2, 3, tokens, 8))):
        frame = fitted(k, v, positions, rotary, query_power=power)
        assert all(bool(part.isfinite().all()) for part in frame)
        assert bool((frame.key_scale > 0).all()) and bool((frame.value_scale > 0).all())
        assert float(frame.key_scale.amax() / frame.key_scale.amin()) < 30  # few tokens tell little of the channels


def test_a_row_of_padding():
    rotary = Rotary(frequencies(8))
    keys, positions = keys_of(torch.ones(16), rotary, tokens=20)
    frame = fitted(keys, randn(2, 3, 20, 8), positions, rotary, pads=torch.tensor([0, 20]))
    assert bool((frame.mean[1] == 0).all()) and bool((frame.key_scale[1] == 1).all())
    assert bool((frame.value_mean[1] == 0).all()) and bool((frame.value_scale[1] == 1).all())
