"""What a reader does is in proportion to the bytes it was given; what it refuses is a WireError that can be shown."""

import sys

import pytest
import torch
from families import model, prompt
from wire_forge import CONFIG, golden_cache, split
from wire_hostile import NESTED, NESTED_IN_LAYERS, WINDOWS, behind_windows, nested, spending, stream, streams

from spectrumkv_hf import SpectrumCache
from spectrumkv_hf.transfer.link import REASON_BYTES, REFUSED, pack_reason, pack_reply, unpack_reason, unpack_reply
from spectrumkv_hf.wire import WireError

SECONDS, SECONDS_A_BYTE = 0.5, 2e-6
MEMORY, MEMORY_A_BYTE = 16 << 20, 100


def refusal(data, config=CONFIG):
    """The message, which can be printed, logged and sent."""
    with pytest.raises(WireError) as caught:
        SpectrumCache.deserialize(data, config=config)
    message = str(caught.value)
    assert message.isprintable() and len(message) < REASON_BYTES
    assert unpack_reply(pack_reply(REFUSED, bytes(64), message), bytes(64)) == (REFUSED, message)
    return message


@pytest.mark.parametrize("name", streams())
def test_refused_at_little_cost(name):
    config, data = streams()[name]
    refusal(b"")  # so that what has to be loaded once is
    with spending() as spent:
        refusal(data, config)
    assert spent.seconds < SECONDS + SECONDS_A_BYTE * len(data)
    assert spent.memory < MEMORY + MEMORY_A_BYTE * len(data)


@pytest.mark.parametrize("field", [*NESTED, *NESTED_IN_LAYERS])
def test_deep_nesting(field):
    """Up to where the parser gives up, and beyond: what is parsed is shown in messages, a few calls deeper."""
    frames = split(golden_cache().serialize().numpy().tobytes())
    at, changes = (0, NESTED[field]) if field in NESTED else (1, NESTED_IN_LAYERS[field])
    messages, limit = set(), sys.getrecursionlimit()  # which PyTorch raises when it compiles, for the whole process
    for depth in (100, *range(limit - 200, limit)):
        messages.add(refusal(b"".join([*frames[:at], nested(depth, **changes)(frames[at])])).partition("stream:")[2])
    assert any("recursion" in message for message in messages)
    assert any("recursion" not in message for message in messages)


def test_the_error_of_a_policy_is_no_longer_than_its_field():
    """Whose length the policy does not know; see `test_refused_at_little_cost` for the others."""
    data = stream(golden_cache(), lambda m: m["policy"].update(importance="a" * 1000))
    assert "importance is one of" in refusal(data)


@torch.no_grad()
def test_a_window_far_ahead():
    """The length alone costs next to nothing, neither when it is read nor when it is used."""

    def used(length):
        cache = SpectrumCache.deserialize(behind_windows(length), config=WINDOWS)
        for layer in cache.layers:
            assert layer.keys.shape == layer.values.shape
        m(prompt(1), past_key_values=cache)
        assert cache.get_seq_length() == length + 1

    m = model("mistral", sliding_window=136)
    used(300)
    with spending() as spent:
        used(80_000)
    assert spent.memory < MEMORY


def thrifty(policy, budget, tokens, recent_window, **options):
    """A cache by a policy at the least that it can keep."""
    cache = SpectrumCache(CONFIG, policy=policy, budget=budget, recent_window=recent_window, **options)
    for layer in cache.layers:
        keys, values = torch.randn(2, 1, 2, tokens, 8, generator=torch.Generator().manual_seed(3)).half()
        layer.update(keys, values)
        layer.tier_map()
    return cache


@pytest.mark.parametrize("policy", ["two_tier", "drop_scored", "drop_window"])
@pytest.mark.parametrize("recent_window", [0, 64])
@pytest.mark.parametrize("tokens", [65, 99, 1000, 20_000])
@pytest.mark.parametrize("scope", ["head", "layer"])
def test_the_thriftiest_caches_travel(policy, recent_window, tokens, scope):
    cache = thrifty(policy, 0.01, tokens, recent_window, scope=scope)
    data = cache.serialize()
    assert torch.equal(SpectrumCache.deserialize(data, config=CONFIG).serialize(), data)


def test_what_no_reader_would_take_is_not_written(tmp_path):
    """A cache of which next to nothing is left: all that was kept has been cropped."""
    cache = thrifty("drop_window", 0.01, 300_000, 0, sinks=0)
    cache.crop(-5000)
    message = "layer 0: .* stand for 9440000 elements, 295000 tokens .* almost all of them dropped"
    for write in (cache.serialize, lambda: cache.save(tmp_path / "cache")):
        with pytest.raises(WireError, match=message):
            write()
    assert not list(tmp_path.iterdir())


def test_a_length_that_no_reader_would_take_is_not_written(tmp_path):
    cache = SpectrumCache.deserialize(behind_windows(80_000), config=WINDOWS)
    for store in (layer.store for layer in cache.layers):
        now = store._now
        store._now = now._replace(
            **{name: getattr(now, name) + 100_000 for name in ("length", "tail_start", "first_kept")}
        )
    for write in (cache.serialize, lambda: cache.save(tmp_path / "cache")):
        with pytest.raises(WireError, match=r"180000 tokens in a stream of \d+ bytes; it can have"):
            write()
    assert not list(tmp_path.iterdir())


def test_texts_of_peers():
    """Whatever an error says can be sent, and what arrives can be printed."""
    for text in ("x" * 600, "\ud800", "é" * 300, "\x1b[2J\n", ""):
        raw = pack_reason(text)
        assert len(raw) <= REASON_BYTES
        assert unpack_reason(raw).isprintable()
    assert unpack_reason(pack_reason("Größe \ud800")) == "Größe \\ud800"
    assert unpack_reason(b"\x1b[31mred\xff") == "\ufffd[31mred\ufffd"
