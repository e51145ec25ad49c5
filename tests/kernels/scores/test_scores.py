import itertools
from typing import NamedTuple

import pytest
import torch
from reference import error

from spectrumkv_kernels import real_tokens
from spectrumkv_kernels.scores.reference import attention_scores, probe_rows

CPU = torch.device("cpu")
SCALE = 0.4


class Inputs(NamedTuple):
    query: torch.Tensor
    keys: torch.Tensor


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(queries, tokens=None, *, batch=1, heads=4, kv_heads=2, head_dim=8):
    return Inputs(
        randn(batch, heads, queries, head_dim), 1.5 * randn(batch, kv_heads, tokens or queries, head_dim, seed=1)
    )


def causal(queries, tokens, batch=1, pads=()):
    """bool `[batch, 1, queries, tokens]`; padding queries see nothing."""
    mask = torch.ones(batch, 1, queries, tokens, dtype=torch.bool).tril(tokens - queries)
    for row, count in enumerate(pads):
        mask[row, ..., :count] = False
    return mask


def additive(mask, dtype=torch.float32):
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def chosen_probes(real, recent, strided):
    """The last `recent` of the real queries, and `strided` that are spread over those before."""
    last, earlier = real[-recent:], real[:-recent]
    if len(earlier) > strided:
        earlier = [earlier[i * len(earlier) // strided] for i in range(strided)]
    return earlier + last


def expected_scores(query, keys, *, mask=None, window=None, softcap=None, sinks=None, recent=64, strided=64, pads=None):
    batch, heads, queries, _ = query.shape
    kv_heads, tokens = keys.shape[1:3]
    group = heads // kv_heads
    mass, seen_by = torch.zeros(batch, kv_heads, tokens).double(), torch.zeros(batch, 1, tokens).double()
    for row in range(batch):
        padding = max((pads[row] if pads else 0) - (tokens - queries), 0)
        for i in chosen_probes(list(range(padding, queries)), recent, strided):
            at = tokens - queries + i
            columns = torch.arange(tokens)
            visible = torch.zeros(tokens, dtype=torch.bool)
            for head in range(heads):
                scores = keys[row, head // group].double() @ query[row, head, i].double() * SCALE
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if mask is None:
                    seen = (columns <= at) & (columns > at - (window or tokens + 1))
                else:
                    entries = mask[row % len(mask), head % mask.shape[1], i]
                    seen = entries if mask.dtype == torch.bool else entries > torch.finfo(mask.dtype).min / 2
                    scores = scores if mask.dtype == torch.bool else scores + entries.double()
                logits = scores[seen]
                if sinks is not None:
                    logits = torch.cat((logits, sinks[head].double()[None]))
                mass[row, head // group, seen] += torch.softmax(logits, dim=0)[: int(seen.sum())] / group
                visible |= seen
            seen_by[row, 0, visible] += 1
    return mass / seen_by.clamp(min=1)


def check(given, **options):
    pads = options.pop("pads", None)
    scores = attention_scores(*given, scale=SCALE, **options)
    expected = expected_scores(*given, pads=pads, **options)
    assert scores.dtype == torch.float32
    assert error(scores, expected) < 1e-5
    assert bool((scores[expected == 0] == 0).all())
    return scores


@pytest.mark.parametrize("queries", [1, 2, 17, 63, 64, 65, 127, 128, 129, 203])
def test_default_probes(queries):
    check(inputs(queries))


@pytest.mark.parametrize(("recent", "strided"), [(1, 1), (5, 0), (5, 7), (16, 16), (30, 40)])
def test_number_of_probes(recent, strided):
    check(inputs(45, batch=2), recent=recent, strided=strided)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (7, 1)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_shapes(batch, heads):
    check(inputs(33, batch=batch, heads=heads[0], kv_heads=heads[1], head_dim=20), recent=9, strided=5)


@pytest.mark.parametrize("queries", [1, 5, 20])
@pytest.mark.parametrize("masked", [False, True], ids=["no_mask", "mask"])
def test_second_chunk(masked, queries):
    mask = causal(queries, 41, 2, pads=(0, 6)) if masked else None
    check(inputs(queries, 41, batch=2), mask=mask, recent=8, strided=4)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_masks_mean_what_causal_means(kind):
    given = inputs(39, batch=2)
    mask = causal(39, 39)
    scores = check(given, mask=mask if kind is torch.bool else additive(mask, kind), recent=8, strided=8)
    assert error(scores, attention_scores(*given, scale=SCALE, recent=8, strided=8)) < 1e-6


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("rows", [1, 2])
def test_mask_of_each_head(rows, kind):
    mask = torch.rand(rows, 4, 30, 30, generator=torch.Generator().manual_seed(2)) < 0.6
    mask = (mask | torch.eye(30, dtype=torch.bool)) & causal(30, 30)
    check(inputs(30, batch=2), mask=mask if kind == "bool" else additive(mask), recent=8, strided=8)


def test_finite_bias_is_added():
    bias = 2 * randn(1, 4, 30, 30, seed=3).masked_fill(~causal(30, 30), torch.finfo().min / 2)
    check(inputs(30, batch=2), mask=bias, recent=8, strided=8)


def test_hidden_entries_with_a_bias_stay_hidden():
    """Half of a dtype's minimum is the border, not the minimum itself."""
    bias = 64 * torch.rand(1, 4, 30, 30, generator=torch.Generator().manual_seed(3)).half()
    mask = additive(causal(30, 30), torch.float16) + bias
    assert bool((mask[0, 0, 0, 1:] > torch.finfo(torch.float16).min).any())
    check(inputs(30), mask=mask, recent=8, strided=8)
    assert bool(real_tokens(mask, 30).all())


@pytest.mark.parametrize("window", [1, 2, 10, 29, 100])
@pytest.mark.parametrize("tokens", [30, 44])
def test_window(tokens, window):
    scores = check(inputs(30, tokens, batch=2), window=window, recent=6, strided=0)
    assert bool((scores[..., : max(tokens - 6 - window + 1, 0)] == 0).all())


@pytest.mark.parametrize("masked", [False, True], ids=["no_mask", "mask"])
def test_softcap_and_sinks(masked):
    given, sinks = inputs(30, batch=2), 2 * randn(4, seed=3)
    mask = additive(causal(30, 30, 2, pads=(0, 6))) if masked else None
    options = {"mask": mask, "recent": 8, "strided": 8, "pads": (0, 6) if masked else None}
    plain = check(given, **options)
    for extra in ({"softcap": 1.5}, {"sinks": sinks}, {"softcap": 1.5, "sinks": sinks}):
        assert error(check(given, **options, **extra), plain) > 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_model_dtypes_are_computed_in_float32(dtype):
    query, keys = inputs(30, batch=2)
    check(Inputs(query.to(dtype), keys.to(dtype)), recent=8, strided=8)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "pads", "recent", "strided"),
    [
        pytest.param(40, 7, 8, 8, id="more_queries_than_probes"),
        pytest.param(40, 24, 8, 8, id="as_many_queries_as_probes"),
        pytest.param(40, 28, 8, 8, id="fewer_queries_than_probes"),
        pytest.param(40, 35, 8, 8, id="fewer_queries_than_recent_ones"),
        pytest.param(150, 23, 64, 64, id="127_queries_of_default_probes"),
    ],
)
def test_left_padded_row_equals_the_row_alone(tokens, pads, recent, strided, kind):
    given = inputs(tokens, batch=3)
    mask = causal(tokens, tokens, 3, pads=(0, pads, 3))
    mask = mask if kind is torch.bool else additive(mask, kind)
    scores = attention_scores(*given, scale=SCALE, mask=mask, recent=recent, strided=strided)
    alone = attention_scores(*(t[1:2, :, pads:] for t in given), scale=SCALE, recent=recent, strided=strided)
    assert bool((scores[1, :, :pads] == 0).all())
    assert error(scores[1:2, :, pads:], alone) < 1e-5
    first = attention_scores(*(t[:1] for t in given), scale=SCALE, recent=recent, strided=strided)
    assert error(scores[:1], first) < 1e-5


def test_left_padding_in_second_chunk():
    given = inputs(20, 50, batch=2)
    mask = causal(20, 50, 2, pads=(0, 13))
    scores = check(given, mask=mask, recent=6, strided=6, pads=(0, 13))
    alone = attention_scores(given.query[1:], given.keys[1:, :, 13:], scale=SCALE, recent=6, strided=6)
    assert error(scores[1:, :, 13:], alone) < 1e-5


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_row_of_padding_only_gets_zero(kind):
    mask = causal(12, 12, 2, pads=(0, 12))
    scores = attention_scores(*inputs(12, batch=2), scale=SCALE, mask=mask if kind == "bool" else additive(mask))
    assert bool((scores[1] == 0).all())
    assert bool(scores[0].isfinite().all())


def test_uniform_attention_has_no_bias_towards_early_keys():
    """With equal scores a key's mean is that of 1 / (i + 1) over the queries i that see it."""
    keys = randn(1, 1, 50, 8)
    scores = attention_scores(torch.zeros(1, 1, 50, 8), keys, scale=1.0)
    shares = 1 / torch.arange(1, 51).double()
    expected = torch.stack([shares[i:].mean() for i in range(50)])
    assert error(scores[0, 0], expected) < 1e-6


REAL = {
    "all": torch.ones(1, 90, dtype=torch.bool),
    "left_padding": torch.arange(90) >= torch.tensor([[0], [7], [60]]),
    "right_padding": torch.arange(90) < torch.tensor([[90], [50]]),
    "holes": torch.rand(3, 90, generator=torch.Generator().manual_seed(4)) < 0.6,
}


@pytest.mark.parametrize("kind", REAL)
@pytest.mark.parametrize(("recent", "strided"), [(8, 16), (1, 5), (20, 0), (64, 64)])
def test_probe_rows(kind, recent, strided):
    real = REAL[kind]
    rows = probe_rows(real, 90, recent, strided, CPU)
    assert rows.dtype == torch.int64
    assert rows.shape == (len(real), recent + min(strided, 90 - recent))
    for row, picked in zip(real, rows, strict=True):
        candidates = row.nonzero().flatten()
        picked = picked[picked >= 0]
        assert bool(row[picked].all()), "padding was chosen"
        assert bool((picked.diff() > 0).all()), "not ascending, or some twice"
        assert set(candidates[-recent:].tolist()) <= set(picked.tolist())
        if len(candidates) <= recent + strided:
            assert torch.equal(picked, candidates)
        else:
            places = torch.searchsorted(candidates, picked[:strided])  # evenly over what comes before the last ones
            edges = torch.cat((places, torch.tensor([len(candidates) - recent])))
            step = (len(candidates) - recent) / max(strided, 1)
            assert not strided or (int(places[0]) == 0 and bool(((edges.diff() - step).abs() < 1).all()))


def test_probe_rows_without_padding():
    expected = probe_rows(torch.ones(1, 90, dtype=torch.bool), 90, 8, 16, CPU)
    assert torch.equal(probe_rows(None, 90, 8, 16, CPU), expected)
    assert probe_rows(None, 24, 8, 16, CPU).tolist() == [list(range(24))]
    assert probe_rows(None, 5, 8, 16, CPU).tolist() == [list(range(5))]


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("queries", "tokens"), [(9, 9), (4, 9), (1, 9)])
@pytest.mark.parametrize("heads", [1, 3])
def test_real_tokens(heads, queries, tokens, kind):
    mask = causal(queries, tokens, 3, pads=(0, 2, 7)).expand(-1, heads, -1, -1)
    expected = (torch.arange(tokens) >= torch.tensor([[0], [2], [7]]))[:, tokens - queries :]
    assert torch.equal(real_tokens(mask if kind is torch.bool else additive(mask, kind), queries), expected)


def test_real_tokens_of_an_infinite_mask():
    mask = torch.zeros(1, 1, 4, 4).masked_fill(~causal(4, 4, 1, pads=(2,)), -torch.inf)
    assert real_tokens(mask, 4).tolist() == [[False, False, True, True]]


def test_real_tokens_without_mask():
    assert real_tokens(None, 5) is None


def test_arguments_are_left_as_they_were():
    query, keys = inputs(30, batch=2)
    mask, sinks = additive(causal(30, 30, 2, pads=(0, 6))), randn(4)
    given = (query, keys, mask, sinks)
    before = [t.clone() for t in given]
    attention_scores(query, keys, scale=SCALE, mask=mask, sinks=sinks, softcap=2.0)
    assert all(itertools.starmap(torch.equal, zip(given, before, strict=True)))
