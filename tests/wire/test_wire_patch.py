"""Tokens of a received cache rise to a higher tier, wholly or not at all."""

import random

import pytest
import torch
from every_tier import EveryTierAndDropped, all_in
from families import config, left_padded, model, prompt
from test_wire import assert_equal, filled, sized
from wire_forge import forged

from spectrumkv_hf import SpectrumCache, wire
from spectrumkv_hf.policy import FP16, INT4, INT8, TIERS
from spectrumkv_hf.policy.policies import INT2
from spectrumkv_hf.wire.frame import FrameHeader, Kind, WireError
from spectrumkv_hf.wire.patch import ExactCopy, pack_bits, request, unpack_bits


def sides(m, lengths=(300,), **kwargs):
    """A cache on both sides, the copy on the sender's, and the mask of the prompt."""
    ids, mask = left_padded(list(lengths))
    cache = SpectrumCache(m.config, **{"recent_window": 8, "budget": 0.3, **kwargs})
    copy = ExactCopy(cache)
    with torch.no_grad():
        m(ids, past_key_values=cache, attention_mask=mask)
    return SpectrumCache.deserialize(cache.serialize(), config=m.config), copy, mask


def lift(cache, copy, tier, **kwargs):
    for layer in range(len(cache.layers)):
        if (frame := request(cache, layer, tier, **kwargs)) is not None:
            cache.apply_patch(copy.patch(frame))


def snapshot(cache):
    return [{name: t.clone() for name, t in layer.store.tensors()} for layer in cache.layers]


def assert_unchanged(cache, before):
    for old, new in zip(before, snapshot(cache), strict=True):
        assert old.keys() == new.keys()
        assert all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize(("tier", "policy", "budget"), [("int8", "uniform_int8", None), ("fp16", "greedy", 1.0)])
@pytest.mark.parametrize("start", [("uniform_int4", None), ("two_tier", 0.3), ("sink_protect", 0.3), ("balanced", 0.5)])
@pytest.mark.parametrize("codec", ["spectrum", "absmax"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("lengths", [(300,), (300, 210)], ids=str)
def test_all_tokens_lifted_are_a_cache_of_that_tier(tier, policy, budget, start, codec, family, lengths):
    m = model(family, **sized(family))
    cache, copy, mask = sides(m, lengths, policy=start[0], budget=start[1], codec=codec)
    lift(cache, copy, tier)
    ids, _ = left_padded(list(lengths))
    other = filled(m, ids, mask, policy=policy, budget=budget, codec=codec)
    for ours, theirs in zip(cache.layers, other.layers, strict=True):
        bits = ours.tier_map()
        assert int(bits[bits > 0].min()) == FP16.bits if tier == "fp16" else INT8.bits
        lifted = (bits == (16 if tier == "fp16" else 8)).unsqueeze(-1)
        first = ours.store.first_kept
        for a, b in ((ours, theirs),):
            for x, y in zip(a.store.dense(first), b.store.dense(first), strict=True):
                assert torch.equal(x * lifted[:, :, first:], y * lifted[:, :, first:])


@pytest.mark.parametrize("tier", TIERS[:4], ids=lambda tier: tier.name)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("lengths", [(300,), (300, 210)], ids=str)
@pytest.mark.usefixtures("with_every_tier")
def test_spectrum2_is_lifted_to_any_tier(tier, family, lengths):
    """Bit for bit what a cache of that tier holds: codes are made in the receiver's frame."""
    m = model(family, **sized(family))
    cache, copy, mask = sides(m, lengths, policy=EveryTierAndDropped.name, budget=None, codec="spectrum2")
    before = [layer.tier_map() for layer in cache.layers]
    lift(cache, copy, tier.name)
    ids, _ = left_padded(list(lengths))
    other = SpectrumCache(m.config, policy=all_in(tier), codec="spectrum2")
    with torch.no_grad():
        m(ids, past_key_values=other, attention_mask=mask)
    for bits, ours, theirs in zip(before, cache.layers, other.layers, strict=True):
        first = ours.store.first_kept
        assert torch.equal(ours.tier_map()[..., first:], bits[..., first:].clamp(min=tier.bits))
        assert torch.equal(ours.store.frame, theirs.store.frame)
        ours.store.check_integrity()
        lifted = (ours.tier_map() == tier.bits)[..., first:].unsqueeze(-1)
        for x, y in zip(ours.store.dense(first), theirs.store.dense(first), strict=True):
            assert torch.equal(x * lifted, y * lifted)
    assert_equal(cache, SpectrumCache.deserialize(cache.serialize(), config=m.config))


@pytest.mark.usefixtures("with_every_tier")
@pytest.mark.parametrize("name", ["keys.affine", "values.codes"])
def test_a_request_knows_tokens_of_spectrum2_again(name):
    """By their one-byte scales, and by codes, since scales alone may be alike."""
    cache, copy, _ = sides(model("llama"), policy=EveryTierAndDropped.name, budget=None, codec="spectrum2")
    patch = copy.patch(request(cache, 0, "int8", positions=range(150, 300), source="int2"))
    tensor = dict(cache.layers[0].store.arenas[INT2].tensors())[name]
    tensor.bitwise_xor_(1)
    with pytest.raises(WireError, match="the tokens have changed"):
        cache.apply_patch(patch)
    tensor.bitwise_xor_(1)
    cache.apply_patch(patch)


def test_channels_that_the_tier_can_not_take():
    cfg = config("llama", head_dim=12)
    cache = SpectrumCache(cfg, policy=all_in(INT2), codec="spectrum2")
    copy = ExactCopy(cache)
    for layer in cache.layers:
        layer.update(*torch.randn(2, 1, 2, 100, 12))
    with pytest.raises(WireError, match="keys has 12 channels; codes of 3 bits need multiples of 8"):
        copy.patch(request(cache, 0, "int3"))
    cache.apply_patch(copy.patch(request(cache, 0, "int4")))
    assert list(cache.layers[0].store.arenas) == [INT4]


@pytest.mark.parametrize(("at", "value"), [(0, torch.nan), (16, 0.0), (31, -1.0), (48, torch.inf), (48, 1e30)])
def test_frames_of_requests_are_checked(at, value):
    cache, copy, _ = sides(model("llama"), policy="uniform_int4", budget=None, codec="spectrum2")
    store = cache.layers[0].store
    store.frame[0, 1, at] = value
    with pytest.raises(WireError, match="'mean' has NaN or infinity|'mean' has scales that are not from"):
        copy.patch(request(cache, 0, "int8"))


@pytest.mark.parametrize(
    "kwargs", [{}, {"positions": range(40, 90)}, {"source": "int4", "positions": [5, 77, 77, 299]}]
)
def test_what_was_not_asked_for_stays(kwargs):
    m = model("llama")
    cache, copy, _ = sides(m, (300, 210))
    old = [layer.tier_map() for layer in cache.layers]
    keys = [layer.keys for layer in cache.layers]
    frame = request(cache, 1, "fp16", **kwargs)
    cache.apply_patch(copy.patch(frame))
    for i, (before, dense, layer) in enumerate(zip(old, keys, cache.layers, strict=True)):
        asked = torch.zeros(300, dtype=torch.bool)
        asked[list(kwargs.get("positions", range(300)))] = i == 1
        expected = torch.where(asked & ((before == 4) if "source" in kwargs else (before < 16)), 16, before)
        assert torch.equal(layer.tier_map(), expected)
        same = (expected == before).unsqueeze(-1)
        assert torch.equal(layer.keys * same, dense * same)


def test_arenas_stay_in_order_and_counts_equal():
    m = model("llama")
    cache, copy, _ = sides(m, (300, 210))
    lift(cache, copy, "int8", positions=range(0, 200, 3))
    lift(cache, copy, "fp16", positions=range(10, 150, 7))
    for layer in cache.layers:
        store = layer.store
        assert store.ragged
        assert list(store.arenas) == [FP16, INT8, INT4]
        held = torch.cat([arena.positions for arena in store.arenas.values()], dim=-1)
        for arena in store.arenas.values():
            p = arena.positions
            assert ((p[..., 1:] > p[..., :-1]) | (p[..., :-1] < 0)).all()
            assert (p[..., 0] >= 0).any()  # no more empty places than needed
        for head in held.flatten(0, 1):
            assert sorted(head[head >= 0].tolist()) == list(range(store.tail_start))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_decoding_goes_on_and_comes_closer(family):
    m = model(family, **sized(family))
    exact = filled(m, prompt(300), policy="greedy", budget=1.0)
    cache, copy, _ = sides(m, policy="uniform_int4", budget=None)

    def logits(used):
        with torch.no_grad():
            return m(prompt(1, seed=3), past_key_values=SpectrumCache.deserialize(used.serialize(), m.config)).logits

    expected, errors = logits(exact), []
    for tier, tokens in ((None, 0), ("int8", 150), ("int8", 300), ("fp16", 300)):
        if tier:
            lift(cache, copy, tier, positions=range(tokens))
        errors.append((logits(cache) - expected).norm().item())
    assert errors[2] < errors[1] < errors[0]
    assert errors[3] <= 1e-5 * expected.norm().item()
    with torch.no_grad():
        m.generate(prompt(301), past_key_values=cache, max_new_tokens=100, do_sample=False)


def test_dropped_tokens_come_back():
    m = model("llama")
    cache, copy, _ = sides(m, policy="drop_scored", budget=0.5)
    assert (cache.layers[0].tier_map() == 0).any()
    lift(cache, copy, "fp16", source="dropped")
    assert all((layer.tier_map() == 16).all() for layer in cache.layers)
    exact = filled(m, prompt(300), policy="greedy", budget=1.0)
    assert torch.equal(cache.layers[1].keys, exact.layers[1].keys)


def test_a_patch_keeps_nothing_of_the_frame():
    cache, copy, _ = sides(model("llama"))
    frame = copy.patch(request(cache, 0, "fp16"))
    cache.apply_patch(frame)
    begin, end = frame.data_ptr(), frame.data_ptr() + frame.numel()
    tensors = [t for _, t in cache.layers[0].store.tensors()]
    assert not any(begin <= t.data_ptr() < end for t in tensors)
    frame.fill_(0)
    assert torch.isfinite(cache.layers[0].keys).all()


def test_only_what_is_missing_travels():
    m = model("llama")
    cache, copy, _ = sides(m, policy="uniform_int4", budget=None)
    layer = cache.layers[0]
    frame = copy.patch(request(cache, 0, "fp16", positions=range(100)))
    exact = 100 * layer.kv_heads * 2 * layer.store.tail[0].shape[3] * 4
    assert exact < len(frame) < exact + 1500


@pytest.mark.parametrize("kind", ["patch", "request"])
def test_damage_leaves_the_cache_as_it_was(kind):
    m = model("llama")
    cache, copy, _ = sides(m, (140, 130))
    asked = request(cache, 1, "int8", positions=range(60))
    frame = (copy.patch(asked) if kind == "patch" else asked).numpy().tobytes()
    target = cache.apply_patch if kind == "patch" else copy.patch
    before, rng = snapshot(cache), random.Random(0)
    for _ in range(1500):
        damaged = bytearray(frame)
        damaged[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)
        with pytest.raises(WireError):
            target(damaged)
    for cut in [0, 1, 63, 64, 65, len(frame) - 1, *rng.choices(range(len(frame)), k=300)]:
        with pytest.raises(WireError):
            target(frame[:cut])
    with pytest.raises(WireError):
        target(frame + bytes(64))
    assert_unchanged(cache, before)
    cache.apply_patch(copy.patch(asked))


def poke(name, byte):
    def data(entries, raw):
        raw[entries[name]["data_offsets"][0]] = byte
        return raw

    return data


FORGED = {
    "no tier": ({"edit": lambda m: m.update(tier=5)}, "tokens are not lifted to 5 bits"),
    "lowest tier": ({"edit": lambda m: m.update(tier=1)}, "tokens are not lifted to 1 bits"),
    "a lower tier": ({"edit": lambda m: m.update(tier=4)}, "'keys.codes' has shape"),
    "another tier": ({"edit": lambda m: m.update(tier=16)}, "no tensor 'keys'"),
    "beyond the arenas": ({"edit": lambda m: m.update(tokens=m["tokens"] + 1)}, "'tokens' is"),
    "start beyond": ({"edit": lambda m: m.update(start=1)}, "'tokens' is"),
    "huge": ({"edit": lambda m: m.update(tokens=2**40)}, "'tokens' is"),
    "another base": ({"edit": lambda m: m.update(base="0" * 16)}, "the tokens have changed"),
    "other tokens": ({"data": poke("wanted", 0xFE)}, "has shape|the tokens have changed"),
    "fewer tokens": ({"data": poke("wanted", 0)}, "has shape|the tokens have changed"),
    "a field more": ({"edit": lambda m: m.update(x=1)}, "unknown fields"),
    "a tensor less": ({"describe": lambda d: d.update(x=d.pop("keys.affine"))}, "no tensor 'keys.affine'"),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_patches(case):
    cache, copy, _ = sides(model("llama"), policy="uniform_int4", budget=None)
    changes, message = FORGED[case]
    frame = copy.patch(request(cache, 0, "int8", positions=range(50))).numpy().tobytes()
    before = snapshot(cache)
    with pytest.raises(WireError, match=message):
        cache.apply_patch(forged(frame, **changes))
    assert_unchanged(cache, before)


@pytest.mark.parametrize("change", ["reorder", "crop", "reset", "twice", "another"])
def test_patches_for_tokens_that_have_changed(change):
    m = model("llama")
    cache, copy, _ = sides(m, (300, 280))
    asked = request(cache, 0, "fp16", source="int8")
    patch = copy.patch(asked)
    if change == "reorder":
        cache.reorder_cache(torch.tensor([1, 0]))
    elif change == "crop":
        cache.crop(-100)
    elif change == "reset":
        cache.reset()
    elif change == "twice":
        cache.apply_patch(patch)
    elif change == "another":
        cache.apply_patch(copy.patch(request(cache, 0, "fp16", positions=range(200))))
    with pytest.raises(WireError, match="tokens have changed|'tokens' is|holds tokens"):
        cache.apply_patch(patch)


def test_decoding_between_request_and_patch():
    """The answer takes its time; new tokens are tiered meanwhile."""
    m = model("llama")
    cache, copy, _ = sides(m)
    patch = copy.patch(request(cache, 0, "fp16"))
    tiered = cache.layers[0].store.tail_start
    with torch.no_grad():
        for step in range(150):
            m(prompt(1, seed=step), past_key_values=cache)
    assert cache.layers[0].store.tail_start > tiered
    cache.apply_patch(patch)
    assert (cache.layers[0].tier_map()[..., :tiered] == 16).all()
    assert (cache.layers[0].tier_map()[..., tiered:] < 16).any()
    assert_equal(cache, SpectrumCache.deserialize(cache.serialize(), config=m.config))


def test_frames_of_the_wrong_kind_and_layer():
    m = model("llama")
    cache, copy, _ = sides(m)
    asked = request(cache, 0, "fp16")
    assert FrameHeader.parse(asked).kind == Kind.REQUEST
    with pytest.raises(WireError, match="a frame of kind REQUEST, expected PATCH"):
        cache.apply_patch(asked)
    with pytest.raises(WireError, match="a frame of kind LAYER, expected REQUEST"):
        copy.patch(wire.layer_frame(cache, 0))
    with pytest.raises(WireError, match="out of order"):
        wire.Assembler(SpectrumCache, m.config).feed(copy.patch(asked))
    copy.clear()
    assert copy.nbytes == 0
    with pytest.raises(WireError, match="a request for layer 0; exact tokens are here of"):
        copy.patch(asked)
    qwen = model("deepseek_v3")
    with pytest.raises(WireError, match="layer 0 is no tiered layer"):
        filled(qwen, prompt(100)).apply_patch(sides(m)[1].patch(asked))


def test_requests_for_nothing_or_nonsense():
    m = model("llama")
    cache, _, _ = sides(m)
    assert request(cache, 0, "fp16", positions=[299]) is None
    assert request(cache, 0, "fp16", positions=[]) is None
    for kwargs, message in (
        ({"tier": "int1"}, "lifted to fp16, int8, int4, int3, int2; got 'int1'"),
        ({"tier": "dropped"}, "got 'dropped'"),
        ({"tier": "int8", "source": "fp16"}, "source is a tier below 'int8'"),
        ({"tier": "int8", "positions": [300]}, "positions are from 0 to 299"),
        ({"tier": "int8", "positions": [-1]}, "positions are from 0 to 299"),
        ({"tier": "int8", "layer": 2}, "layer 2 is no tiered layer"),
    ):
        with pytest.raises(ValueError, match=message):
            request(cache, **{"layer": 0, **kwargs})
    with pytest.raises(ValueError, match="before the prefill"):
        ExactCopy(cache)


def test_a_copy_keeps_views_alone():
    cache, copy, _ = sides(model("llama"))
    assert copy.nbytes == 2 * 2 * 2 * 300 * 16 * 4
    copy.stop()
    with torch.no_grad():
        model("llama")(prompt(5), past_key_values=cache)
    assert copy.nbytes == 2 * 2 * 2 * 300 * 16 * 4


@pytest.mark.parametrize("size", [1, 7, 8, 9, 100])
def test_bits_are_packed_and_back(size):
    flags = torch.rand(2, 3, size) < 0.5
    packed = pack_bits(flags)
    assert packed.shape == (2, 3, -(-size // 8))
    assert torch.equal(unpack_bits(packed)[..., :size], flags)
    assert [bool(packed[0, 0, 0] >> i & 1) for i in range(min(size, 8))] == flags[0, 0, :8].tolist()
