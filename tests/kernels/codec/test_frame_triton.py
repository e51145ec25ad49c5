"""The frame's Triton kernels against their twin: on a GPU, else in Triton's interpreter."""

import pytest
import torch
from reference import error, frequencies, rotated

from spectrumkv_kernels import Rotary
from spectrumkv_kernels.codec import frame as twin

triton_frame = pytest.importorskip("spectrumkv_kernels.codec.triton_frame")

CASES = [  # keys' and values' head_dim, pairs, interleaved, dtype, tokens, some do not count, power of queries
    (64, 64, 32, False, torch.float32, 300, False, True),
    (128, 64, 16, True, torch.bfloat16, 270, True, True),
    (80, 96, 40, False, torch.float16, 61, True, False),
    (10, 6, 4, True, torch.float32, 700, True, True),
    (256, 192, 128, False, torch.float32, 65, True, True),
    (24, 40, 0, False, torch.bfloat16, 259, True, True),
    (2, 1, 1, False, torch.float32, 5, False, False),
    (3, 1, 1, True, torch.float32, 1300, False, False),
]


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(key_dim, value_dim, pairs, interleaved, dtype, tokens, spoilt, powered, device, batch=2, heads=3):
    """Keys, values and the other arguments of `fit_frame`; tokens that do not count are NaN, as is what follows."""
    rotary, start = Rotary(frequencies(pairs) if pairs else (), interleaved), 7
    spread = torch.logspace(-2, 1, key_dim)
    flat = 3 * randn(batch, heads, 1, key_dim) + spread * randn(batch, heads, tokens, key_dim, seed=1)
    keys = rotated(rotary, flat, torch.arange(start, start + tokens)) if pairs else flat
    values = randn(1, heads, 1, value_dim, seed=2) + 0.5 * randn(batch, heads, tokens, value_dim, seed=3)
    buffers = []
    for i, side in enumerate((keys, values)):
        buffer = torch.full((batch, heads, tokens + 3, side.shape[-1]), torch.nan).to(dtype)
        buffer[:, :, :tokens] = side
        if spoilt:
            buffer[0, :, : 4 + start], buffer[0, i % heads, tokens // 2] = torch.nan, torch.inf
            buffer[-1, -1, 30::7] = 7e4
        buffers.append(buffer.to(device)[:, :, :tokens])
    more = {"start": start, "rotary": rotary}
    if spoilt:
        more |= {"least": 4, "pads": torch.tensor([start + 7, 0][:batch], device=device)}
    if powered:
        parts = torch.rand(batch, heads, 19, 1, generator=torch.Generator().manual_seed(5))
        more["query_power"] = (torch.logspace(1, -2, key_dim) * parts).to(device)
    return buffers, more


def both(case, device, balanced=True, **options):
    (keys, values), more = inputs(*case, device, **options)
    more["balanced"] = balanced
    return *(module.fit_frame(keys, values, **more) for module in (triton_frame, twin)), keys, values, more


def parts_agree(ours, theirs, key_dim, tolerance):
    assert (ours.dtype, ours.shape) == (torch.float32, theirs.shape)
    for mine, expected in zip(twin.split_frame(ours, key_dim), twin.split_frame(theirs, key_dim), strict=True):
        assert error(mine, expected) < tolerance
        small = expected.abs().amin() > 0  # each number by itself, too
        assert not small or bool(((mine / expected - 1).abs() < 100 * tolerance).all())


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)).replace("torch.", ""))
def test_as_the_twin(case, device):
    ours, theirs, *_ = both(case, device, heads=3 if case[0] < 64 else 1)
    assert bool(theirs.isfinite().all())
    parts_agree(ours, theirs, case[0], 2e-6)


@pytest.mark.parametrize("case", CASES[::2], ids=lambda case: "-".join(map(str, case)).replace("torch.", ""))
def test_means_alone(case, device):
    """Of keys, against float64 and the twin."""
    ours, theirs, keys, _, more = both(case, device, balanced=False, heads=2)
    assert (ours.dtype, ours.shape) == (torch.float32, (*keys.shape[:2], keys.shape[3]))
    start, rotary = more["start"], more["rotary"]
    back = Rotary(tuple(-f for f in rotary.inv_freq), rotary.interleaved)
    counted = twin.fitted_by(keys, None, start, more.get("least", 0), more.get("pads")).cpu()
    flat = keys.cpu().double().masked_fill(~counted.unsqueeze(-1), 0.0)
    if rotary.inv_freq:
        flat = rotated(back, flat, torch.arange(start, start + keys.shape[2]))
    expected = flat.sum(2) / counted.sum(2).unsqueeze(-1)
    assert error(ours.cpu(), expected) < 2e-6
    assert error(ours, theirs) < 4e-6


@pytest.mark.parametrize("tokens", [2 * twin.FITTED + 5, 20_000])
def test_many_tokens(tokens, device):
    """One of every few of which is taken for the scales."""
    case = (8, 4, 4, False, torch.float32, tokens, tokens < 10_000, True)
    ours, theirs, keys, values, more = both(case, device, batch=1, heads=1)
    parts_agree(ours, theirs, 8, 4e-6)
    assert torch.equal(triton_frame.fit_frame(keys, values, **more), ours)


@pytest.mark.parametrize("number", [0.0, 3.0])
def test_vectors_without_power(number, device):
    """Vectors that are their own mean, zeros among them, have the scale 1 and not one of 0."""
    keys, values = torch.full((1, 2, 70, 16), number, device=device), torch.zeros(1, 2, 70, 8, device=device)
    frame = triton_frame.fit_frame(keys, values, 0, Rotary(), True)
    assert torch.equal(frame, twin.fit_frame(keys, values, 0, Rotary(), True))
    assert bool((frame[..., 16:32] == 1).all()) and bool((frame[..., -1] == 1).all())


def test_a_row_of_padding_and_queries_that_are_not_finite(device):
    (keys, values), more = inputs(16, 8, 8, False, torch.float32, 90, True, True, device)
    power = more["query_power"]
    power[0, 0, 2, 3], power[0, 1] = torch.nan, 0
    more |= {"balanced": True, "pads": torch.tensor([14, 97], device=device)}
    ours = triton_frame.fit_frame(keys, values, **more)
    parts_agree(ours, twin.fit_frame(keys, values, **more), 16, 2e-6)
    parts = twin.split_frame(ours[1], 16)
    assert bool((parts.mean == 0).all() & (parts.key_scale == 1).all() & (parts.value_scale == 1).all())


def test_keys_and_values_whose_heads_lie_side_by_side(device):
    """As a model's projections leave them."""
    keys, values = (randn(2, 90, 3, dim).to(device).transpose(1, 2) for dim in (16, 8))
    arguments = 5, Rotary(frequencies(8)), True
    ours = triton_frame.fit_frame(keys, values, *arguments)
    assert torch.equal(ours, triton_frame.fit_frame(keys.contiguous(), values.contiguous(), *arguments))


@pytest.mark.parametrize(
    ("shape", "kv_heads", "dtype"),
    [((2, 6, 70, 16), 3, torch.float32), ((1, 4, 2100, 10), 1, torch.bfloat16), ((2, 2, 1, 128), 2, torch.float16)],
)
@pytest.mark.parametrize("padded", [False, True])
def test_power_of_queries(shape, kv_heads, dtype, padded, device):
    batch, heads, queries, dim = shape
    buffer = torch.full((batch, queries + 1, heads, dim), torch.nan, dtype=dtype, device=device)
    query = buffer[:, :queries].transpose(1, 2)
    query.copy_(randn(*shape))
    pads = None
    if padded:
        pads = torch.tensor([queries // 3, -5][:batch], device=device)
        query[0, :, : queries // 3] = torch.nan
    ours = triton_frame.query_power(query, kv_heads, pads)
    assert (ours.shape[:2], ours.shape[3]) == ((batch, kv_heads), dim)
    assert error(ours.sum(2), twin.query_power(query, kv_heads, pads).sum(2)) < 1e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiles")
def test_lengths_compile_nothing_anew(device):
    def run(tokens, start):
        keys = torch.randn(1, 2, tokens, 64, device=device).bfloat16()
        power = triton_frame.query_power(keys, 1)
        triton_frame.fit_frame(keys[:, :1], keys[:, :1], start, Rotary(frequencies(32)), True, 4, None, power)

    def compiled():
        kernels = [getattr(triton_frame, f"{name}_kernel") for name in ("sums", "power", "size", "query")]
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    run(33, 0)
    before = compiled()
    assert before >= 4
    for tokens, start in ((64, 16), (65, 1), (128, 0), (700, 5)):
        run(tokens, start)
    assert compiled() == before
