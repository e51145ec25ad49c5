"""Streams under right checksums that are made to hang a reader, to fill its memory, or to break its error messages."""

import ctypes
import functools
import gc
import json
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from families import config
from wire_forge import CONFIG, forged, golden_cache, opened, payload_of, resealed, sealed, split

from spectrumkv_hf import SpectrumCache

WINDOWS = config("mistral", sliding_window=136)
MLA = config("deepseek_v3")
LIBC = ctypes.CDLL(None)
MOST = 1 << 24
MARK = "@@"
SURROGATE = "\ud800\x1b[31m\n"


class Spent:
    """What a block took: seconds of CPU time, and bytes of memory at most."""

    seconds = 0.0
    memory = 0


@contextmanager
def spending():
    """Measures a block; memory as the system sees it, that of tensors included."""
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)  # else what was freed before is taken unseen
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    gc.collect()
    gc.freeze()  # else a collection in the block goes through all that other tests have left, which takes a second
    before, began, spent = _resident("VmRSS"), time.process_time(), Spent()
    try:
        yield spent
    finally:
        spent.seconds = time.process_time() - began
        gc.unfreeze()
        spent.memory = max(_resident("VmHWM") - before, 0)


def _resident(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10


def with_text(frame, text, data=b""):
    """A frame whose payload's JSON is `text`."""
    return sealed(opened(frame)[0], payload_of(text, data))


def layered(frame, metadata, described=None, data=b""):
    """A layer's frame of these metadata, tensor descriptions and bytes."""
    entries = {"__metadata__": {"spectrumkv": json.dumps(metadata)}, **(described or {})}
    return with_text(frame, json.dumps(entries).encode(), data)


def empty(shape, dtype="F16"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}


def stream(cache, header=None, layer=None, index=0):
    """The stream of a cache with its header's metadata edited, and a layer's frame replaced by `layer(frame)`."""
    frames = split(cache.serialize().numpy().tobytes())
    if header is not None:
        frames[0] = forged(frames[0], header)
    if layer is not None:
        frames[1 + index] = layer(frames[1 + index])
    return resealed(b"".join(frames))


def tiered(**changes):
    """Metadata of a tiered layer without any token that is held."""
    fields = {"layer": 0, "class": "SpectrumLayer", "initialized": True, "window": None, "record_past": False}
    sizes = {"length": MOST, "tail_start": MOST, "first_kept": 0, "drops": True, "tiers": []}
    return fields | sizes | changes


def dropped(length, shape=(1, 2, 0, 8), batch=1, more=(), **changes):
    """A stream whose first layer has dropped all of its `length` tokens."""

    def header(metadata):
        metadata.update(batch=batch, length=length)

    described = {name: empty(list(shape)) for name in ("tail.keys", "tail.values")} | dict(more)
    metadata = tiered(length=length, tail_start=length, **changes)
    cache = SpectrumCache(CONFIG, policy="two_tier", budget=0.3)
    return stream(cache, header, lambda frame: layered(frame, metadata, described))


def nested(depth, edit=None, describe=None):
    """A change to a frame by which a list nested `depth` times takes the place of the mark that `edit` or `describe`
    leaves."""
    brackets = b"[" * depth + b"]" * depth

    def text(encoded):
        assert MARK.encode() in encoded
        return encoded.replace(rf"\"{MARK}\"".encode(), brackets).replace(f'"{MARK}"'.encode(), brackets)

    return lambda frame: forged(frame, edit, describe, text=text)


NESTED = {
    "model": {"edit": lambda m: m.update(model=MARK)},
    "field of the model": {"edit": lambda m: m["model"].update(head_dim=MARK)},
    "unknown field of the model": {"edit": lambda m: m["model"].update(more=MARK)},
    "codec": {"edit": lambda m: m.update(codec=MARK)},
    "batch": {"edit": lambda m: m.update(batch=MARK)},
    "layers": {"edit": lambda m: m.update(layers=[MARK, MARK])},
    "policy": {"edit": lambda m: m.update(policy=MARK)},
    "budget": {"edit": lambda m: m["policy"].update(budget=MARK)},
    "floors": {"edit": lambda m: m["policy"].update(floors=MARK)},
    "tier of a floor": {"edit": lambda m: m["policy"].update(floors=[[0, MARK]])},
}
"""What of a header frame may be a list nested deeply."""
NESTED_IN_LAYERS = {
    "tiers": {"edit": lambda m: m.update(tiers=[MARK])},
    "window": {"edit": lambda m: m.update(window=MARK)},
    "tensor": {"describe": lambda d: d.update(mean=MARK)},
    "dtype": {"describe": lambda d: d["mean"].update(dtype=MARK)},
    "shape": {"describe": lambda d: d["mean"].update(shape=[MARK])},
    "metadata": {"describe": lambda d: d.update(__metadata__=MARK)},
}


def policy(**changes):
    return lambda metadata: metadata["policy"].update(changes)


def renamed_tensor(name):
    return lambda frame: forged(frame, describe=lambda entries: entries.update({name: entries.pop("mean")}))


def behind_windows(length):
    """A cache of few bytes, all of whose layers have windows, that has come very far."""
    cache = SpectrumCache(WINDOWS, recent_window=4)
    for _ in range(3):
        for layer in cache.layers:
            layer.update(torch.ones(1, 2, 90, 16), torch.ones(1, 2, 90, 16))

    def further(metadata):
        for name in ("length", "tail_start", "first_kept"):
            metadata[name] += length - 270

    frames = split(cache.serialize().numpy().tobytes())
    frames[0] = forged(frames[0], lambda metadata: metadata.update(length=length))
    frames[1:3] = [forged(frame, further) for frame in frames[1:3]]
    return resealed(b"".join(frames))


@functools.cache
def streams():
    """By name: the config to read with, and the bytes."""
    golden = golden_cache()
    mib = 1 << 20
    plain = {
        # Text that takes more than its length
        "repeated keys": stream(golden, layer=lambda f: with_text(f, _wrapped(b'"a":0,' * (mib // 8 - 60)))),
        "other keys, one repeated": stream(golden, layer=lambda f: with_text(f, _wrapped(_many_keys(60_000)))),
        "repeated keys within": stream(
            golden, layer=lambda f: with_text(f, b'{"__metadata__":{"spectrumkv":"{%s}"}}' % (rb"\"a\":0," * 99_999))
        ),
        "digits of a fraction": stream(
            golden, layer=lambda f: with_text(f, _wrapped(b'"a":0.%s1,' % (b"1" * 900_000)))
        ),
        "digits of an integer": stream(golden, layer=lambda f: with_text(f, _wrapped(b'"a":%s,' % (b"1" * 900_000)))),
        "many numbers": stream(golden, layer=lambda f: with_text(f, _wrapped(b'"a":[%s0],' % (b"0," * 450_000)))),
        "many empty objects": stream(
            golden, layer=lambda f: with_text(f, _wrapped(b'"a":[%s0],' % (b"{}," * 300_000)))
        ),
        "many tensors": stream(golden, layer=_many_tensors),
        # Text that breaks messages
        "model of surrogates": stream(golden, lambda m: m["model"].update(model_type=SURROGATE)),
        "field of surrogates in the model": stream(golden, lambda m: m["model"].update({SURROGATE: 1})),
        "field of surrogates": stream(golden, lambda m: m.update({SURROGATE: 1})),
        "codec of surrogates": stream(golden, lambda m: m.update(codec=SURROGATE)),
        "policy of surrogates": stream(golden, policy(name=SURROGATE)),
        "importance of surrogates": stream(golden, policy(importance=SURROGATE)),
        "floor of surrogates": stream(golden, policy(floors=[[0, SURROGATE]])),
        "layer of surrogates": stream(golden, lambda m: m.update(layers=[SURROGATE, SURROGATE])),
        "tensor of surrogates": stream(golden, layer=renamed_tensor(SURROGATE)),
        "long tensor": stream(golden, layer=renamed_tensor("x\n" * 250_000)),
        "long field": stream(golden, lambda m: m.update({"y" * 500_000: 1})),
        "long codec": stream(golden, lambda m: m.update(codec="z" * 500_000)),
        "long importance": stream(golden, policy(importance="q\x07" * 70_000)),
        "many floors": stream(golden, policy(floors=[[n, "int8"] for n in range(50_000)])),
        "floors of lists": stream(golden, policy(floors=[[0, []]] * 50_000)),
        "floors of text": stream(golden, policy(floors=["ab"] * 50_000)),
        "long shape": stream(golden, layer=_described("mean", "shape", [1] * 200_000)),
        "long description": stream(golden, layer=_described("mean", None, [1] * 200_000)),
        "huge budget": stream(golden, policy(budget=1e308)),
        "tiny budget": stream(golden, policy(budget=5e-324)),
        "huge tiers": stream(golden, layer=lambda f: forged(f, lambda m: m.update(tiers=[1] * 200_000))),
        # Sizes that no byte stands for
        "dropped": dropped(MOST),
        "dropped by many rows": dropped(4096, (1 << 20, 2, 0, 8), batch=1 << 20),
        "dropped by many heads": dropped(4096, (1, 1 << 40, 0, 8)),
        "dropped by no row": dropped(MOST, (0, 2, 0, 8), batch=0),
        "no token of many heads": dropped(0, (1, 1 << 40, 0, 8), drops=False),
        "no token of wide heads": dropped(1 << 16, (1, 2, 0, 1 << 40)),
        "no element, beyond 64 bits": dropped(1, (1, 1 << 40, 0, 1 << 40)),
        "nothing of a long sequence": stream(SpectrumCache(CONFIG), lambda m: m.update(length=MOST)),
        "tiers of no row": dropped(13, (0, 2, 0, 8), batch=0, tiers=[16], more=_tier_of_no_row(1 << 40)),
        "wide map of no tier": _wide_map_of_no_tier((1 << 17) + 3),
    }
    found = {name: (CONFIG, data) for name, data in plain.items()}
    found["far behind a window"] = WINDOWS, behind_windows(MOST)
    mla = SpectrumCache(MLA)
    for layer in mla.layers:
        layer.update(torch.ones(1, 1, 2, 8), torch.ones(1, 1, 2, 8))
    for name, shape in (("no head", [1, 0, MOST, 8]), ("no channel", [1, 4, MOST, 0])):
        fields = {"layer": 0, "class": "DynamicLayer", "initialized": True, "length": MOST}
        described = {"keys": empty(shape), "values": empty(shape)}
        found[f"stock layer of {name}"] = (
            MLA,
            stream(mla, lambda m: m.update(length=MOST), lambda f, d=described, m=fields: layered(f, m, d)),
        )
    return found


def _wrapped(text):
    """A JSON object that begins with `text`, of entries with a comma each."""
    return b"{" + text + b'"__metadata__":{"spectrumkv":"{}"}}'


def _many_keys(count):
    return b'"0":0,' + b"".join(b'"%x":0,' % n for n in range(count))


def _many_tensors(frame):
    return forged(frame, describe=lambda entries: entries.update({f"{n:x}": empty([0]) for n in range(14_000)}))


def _tier_of_no_row(tokens):
    sides = {f"fp16.{side}": empty([0, 2, tokens, 8]) for side in ("keys", "values")}
    return sides | {"map": empty([0, 1, 4], "U8")}


def _wide_map_of_no_tier(tokens):
    """A map of 4 bits a token whose tokens are in a sixth tier of five."""
    cache = golden_cache("spectrum2")
    store = cache.layers[0].store
    sizes = {"length": store.length + tokens, "tail_start": store.tail_start + tokens, "drops": True}
    store._now = store._now._replace(**sizes)

    def in_the_sixth(entries, raw):
        begin, end = entries["map"]["data_offsets"]
        raw[begin:end] = bytes([0x55]) * (end - begin)
        return raw

    return stream(cache, layer=lambda frame: forged(frame, data=in_the_sixth))


def _described(name, field, value):
    def describe(entries):
        if field is None:
            entries[name] = value
        else:
            entries[name][field] = value

    return lambda frame: forged(frame, describe=describe)
