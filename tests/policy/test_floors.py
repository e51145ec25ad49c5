"""Floors: in layers that a policy names no stored token is less precise, everywhere a policy goes."""

import copy

import pytest
import torch
from families import config, left_padded, model, prompt
from wire_forge import forged, opened, split

from spectrumkv_hf import SpectrumCache, cache_argument, get_policy
from spectrumkv_hf.policy import DROPPED, FP16, INT4, INT8, Greedy, SinkProtect, lifted
from spectrumkv_hf.wire import Assembler, WireError

pytestmark = pytest.mark.filterwarnings("error:.past_key_values. is deprecated:FutureWarning")

OPTIONS = {"budget": 0.3, "recent_window": 8, "floors": {1: "int8"}}


def filled(ids, mask=None, **options):
    m = model("llama", "sdpa", num_hidden_layers=3)
    cache = SpectrumCache(m.config, **{**OPTIONS, **options})
    with torch.no_grad():
        m(ids, attention_mask=mask, **cache_argument(cache))
    return m, cache


def sizes(layer):
    return {tier: len(arena) for tier, arena in layer.store.arenas.items()}


def test_pairs_and_mappings_are_one_hashable_policy():
    policy = SinkProtect(floors={7: "fp16", 2: "int8"})
    assert policy.floors == ((2, "int8"), (7, "fp16"))
    assert policy == SinkProtect(floors=[[2, "int8"], [7, "fp16"]]) == get_policy("sink_protect", floors=policy.floors)
    assert hash(policy) != hash(SinkProtect()) and len({policy, copy.copy(policy)}) == 1
    assert [policy.floor(layer) for layer in (2, 3, 7)] == [INT8, None, FP16]


@pytest.mark.parametrize(
    "floors",
    [{-1: "int8"}, {0: "int4"}, {0: "dropped"}, {"0": "int8"}, {True: "int8"}, [(0, "int8"), (0, "fp16")], [(0,)], 5]
    + [None, "int8", [(0.0, "int8")], [(0, ["int8"])]],
    ids=str,
)
def test_bad_floors(floors):
    with pytest.raises(ValueError, match="floors are pairs of a layer"):
        SinkProtect(floors=floors)


def test_a_layer_that_the_model_does_not_have():
    with pytest.raises(ValueError, match="floors name layer 2, the model's layers are 0 to 1"):
        SpectrumCache(config("llama"), floors={0: "int8", 2: "int8"})


@pytest.mark.parametrize(
    ("counts", "floor", "expected"),
    [
        ({FP16: 4, INT8: 20, INT4: 80}, INT8, {FP16: 4, INT8: 100}),
        ({FP16: 4, INT8: 20, INT4: 80}, FP16, {FP16: 104}),
        ({INT4: 80}, INT8, {INT8: 80}),
        ({INT8: 60, DROPPED: 40}, INT8, {INT8: 60, DROPPED: 40}),
        ({INT8: 60, DROPPED: 40}, FP16, {FP16: 60, DROPPED: 40}),
        ({FP16: 9}, INT8, {FP16: 9, INT8: 0}),
        ({INT8: 20, INT4: 80}, None, {INT8: 20, INT4: 80}),
    ],
)
def test_counts_move_up(counts, floor, expected):
    assert lifted(counts, floor) == expected


@pytest.mark.parametrize("scope", ["head", "token"])
def test_only_the_named_layer_is_lifted(scope):
    _, cache = filled(prompt(300), scope=scope)
    counts = Greedy(budget=0.3).counts(288)
    for layer in cache.layers:
        lower = {INT8: 288} if layer.layer_idx == 1 else {INT8: counts[INT8], INT4: counts[INT4]}
        assert sizes(layer) == {FP16: 4, **lower}
    nominal = (292 - 4 + 2 * (counts[INT8] + counts[INT4] / 2)) / 2 / 3
    assert cache.memory().nominal_ratio == pytest.approx((nominal + 4 + 8) / 300)


def test_while_decoding_and_in_padded_rows():
    ids, mask = left_padded([300, 210])
    m, cache = filled(ids, mask)
    with torch.no_grad():
        for step in range(80):
            mask = torch.cat((mask, mask[:, :1] | 1), dim=1)
            m(prompt(1, 2, seed=step), attention_mask=mask, **cache_argument(cache))
    assert INT4 in sizes(cache.layers[0]) and INT4 in sizes(cache.layers[2])
    assert sizes(cache.layers[1]).keys() == {FP16, INT8}
    assert sum(sizes(cache.layers[1]).values()) == sum(sizes(cache.layers[0]).values()) == 292 + 64


def test_dropping_policies_still_drop():
    _, cache = filled(prompt(300), policy="two_tier")
    assert cache.layers[1].store.drops and sizes(cache.layers[1]) == sizes(cache.layers[0])
    _, cache = filled(prompt(300), policy="two_tier", floors={1: "fp16"})
    assert cache.layers[1].store.drops and sizes(cache.layers[1]) == {FP16: sizes(cache.layers[0])[INT8]}


def test_summary_says_so():
    summary = SpectrumCache(config("llama", num_hidden_layers=3), **OPTIONS).summary().splitlines()
    assert summary == [
        "2 x SpectrumLayer: tiered, sink_protect b=0.3",
        "1 x SpectrumLayer: tiered, sink_protect b=0.3, int8 or better",
    ]


def test_copies_and_bytes_keep_them():
    m, cache = filled(prompt(300))
    for other in (copy.deepcopy(cache), SpectrumCache.deserialize(cache.serialize(), m.config)):
        assert other.policy == cache.policy
        with torch.no_grad():
            for step in range(80):
                m(prompt(1, seed=step), **cache_argument(other))
        assert sizes(other.layers[1]).keys() == {FP16, INT8}
    with pytest.raises(WireError, match="floors name layer 1, the model's layers are 0 to 0"):
        header_for(cache, config("llama", num_hidden_layers=1))


def header_for(cache, other):
    """Read the header of a cache whose identity claims another model."""
    cache.identity = SpectrumCache(other).identity
    SpectrumCache.deserialize(cache.serialize(), other)


def test_bytes_without_floors_are_as_before():
    _, cache = filled(prompt(300), floors=())
    _, _, metadata, _ = opened(split(bytes(cache.serialize().numpy()))[0])
    assert "recent_window" in metadata["policy"] and "floors" not in metadata["policy"]


@pytest.mark.parametrize(
    "floors", [[[1, "int4"]], [[1, "int8"], [1, "int8"]], [1], [[-1, "int8"]], {"1": "int8"}], ids=str
)
def test_forged_floors(floors):
    _, cache = filled(prompt(20))
    frame = split(bytes(cache.serialize().numpy()))[0]
    assert opened(frame)[2]["policy"]["floors"] == [[1, "int8"]]
    forgery = forged(frame, lambda metadata: metadata["policy"].update(floors=floors))
    with pytest.raises(WireError, match="floors"):
        Assembler(SpectrumCache, config("llama", num_hidden_layers=3)).feed(forgery)
