"""What the fuzzer runs on its bytes: reading them must give a sound cache or a WireError, nothing else, at a cost in
proportion to them; so must using the cache.

The first byte chooses a reader, the rest is its stream. Checksums are put right first, so that damage gets past them.
"""

import functools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from families import config  # noqa: E402
from wire_forge import CONFIG, _counting, golden_cache, resealed, split  # noqa: E402
from wire_hostile import spending, streams  # noqa: E402

from spectrumkv_hf import SpectrumCache
from spectrumkv_hf.tiered.layer import SpectrumLayer
from spectrumkv_hf.wire import WireError
from spectrumkv_hf.wire.frame import FrameHeader
from spectrumkv_hf.wire.patch import ExactCopy, request
from spectrumkv_hf.wire.payload import EXPANSION, FREE_LENGTH

HYBRID = config("qwen3_next")
WINDOWS = config("gemma3", sliding_window=136, head_dim=8)
CONFIGS = (CONFIG, HYBRID, WINDOWS)
PATCHES, REQUESTS = {3: "spectrum", 5: "spectrum2"}, {4: "spectrum", 6: "spectrum2"}
"""Readers of patches and of requests, and the codecs of their caches."""
READERS = len(CONFIGS) + len(PATCHES) + len(REQUESTS)


SECONDS, SECONDS_A_BYTE = 1.0, 1e-5
"""CPU time of reading, and as much again of use."""
READ_MEMORY, READ_MEMORY_A_BYTE = 16 << 20, 100
"""Bytes of memory that reading may take."""
USE_MEMORY, USE_MEMORY_A_BYTE = 64 << 20, EXPANSION * 16
"""The same of use, with a layer dequantised; what its few bytes may stand for is `EXPANSION` elements."""


def one_input(data: bytes) -> None:
    """Read `data` as the first byte says, and use what comes of it."""
    if not data:
        return
    stream = resealed(data[1:])
    with spending() as spent:
        cache = read(data[0] % READERS, stream)
    assert spent.seconds < SECONDS + SECONDS_A_BYTE * len(data), f"{spent.seconds} s for {len(data)} bytes"
    assert spent.memory < READ_MEMORY + READ_MEMORY_A_BYTE * len(data), f"{spent.memory} for {len(data)} bytes"
    if cache is None:
        return
    with spending() as spent:
        used(cache)
    assert spent.seconds < SECONDS + SECONDS_A_BYTE * len(data), f"{spent.seconds} s for {len(data)} bytes"
    assert spent.memory < USE_MEMORY + USE_MEMORY_A_BYTE * len(data), f"{spent.memory} for {len(data)} bytes"


def read(reader: int, stream: bytes) -> SpectrumCache | None:
    """The cache in a stream, if it gives one."""
    try:
        if reader in PATCHES:
            cache = golden_cache(PATCHES[reader])
            cache.apply_patch(stream)
        elif reader in REQUESTS:
            copy, _ = requested(REQUESTS[reader])
            FrameHeader.parse(copy.patch(stream))
            return None
        else:
            cache = SpectrumCache.deserialize(stream, config=CONFIGS[reader])
    except WireError as problem:
        message = str(problem)
        message.encode()
        assert message.isprintable() and len(message) < 500, message[:500]
        return None
    return cache


def used(cache: SpectrumCache) -> None:
    """What was accepted must bear use."""
    for layer in cache.layers:
        if isinstance(layer, SpectrumLayer) and layer.is_initialized:
            keys, values = layer.store.dense(layer.store.first_kept)
            assert keys.shape[2] == values.shape[2] == layer.store.length - layer.store.first_kept
            layer.store.tier_map(layer.store.first_kept)
    if cache.get_seq_length() > FREE_LENGTH:  # what is written may be shorter than what was read, by spaces
        return
    again = cache.serialize()
    config_of = next(c for c in CONFIGS if SpectrumCache(c).identity == cache.identity)
    assert torch.equal(SpectrumCache.deserialize(again, config=config_of).serialize(), again)


@functools.cache
def requested(codec: str) -> tuple[ExactCopy, bytes]:
    """A sender that holds exact tokens of the golden cache's shape, and a request to it."""
    sender = SpectrumCache(CONFIG, codec=codec)
    copy = ExactCopy(sender)
    sender.layers[0].update(_counting((2, 2, 15, 8), torch.float16), _counting((2, 2, 15, 8), torch.float16, 50))
    frame = request(golden_cache(codec), 0, "int8")
    assert frame is not None
    return copy, frame.numpy().tobytes()


def seeds() -> dict[str, bytes]:
    """Sound inputs to start from."""
    found = {
        f"golden {codec}": bytes([0]) + golden_cache(codec).serialize().numpy().tobytes() for codec in PATCHES.values()
    }
    for policy in ("fp16", "two_tier"):
        cache = SpectrumCache(CONFIG, policy=policy, recent_window=2)
        for layer in cache.layers:
            layer.update(*(torch.randn(1, 2, 70, 8, generator=torch.Generator().manual_seed(3)) for _ in range(2)))
        found[policy] = bytes([0]) + cache.serialize().numpy().tobytes()
    hybrid = SpectrumCache(HYBRID)
    hybrid.layers[0].update_conv_state(torch.ones(1, 4, 4))
    hybrid.layers[0].update_recurrent_state(torch.ones(1, 2, 4, 4))
    hybrid.layers[1].update(torch.ones(1, 2, 5, 32), torch.ones(1, 2, 5, 32))
    found["hybrid"] = bytes([1]) + hybrid.serialize().numpy().tobytes()
    for name, window in (("windows", 4), ("small_windows", 64)):
        cache = SpectrumCache(WINDOWS, recent_window=window)
        for _ in range(3):
            for layer in cache.layers:
                layer.update(torch.ones(1, 2, 90, 8), torch.ones(1, 2, 90, 8))
        found[name] = bytes([2]) + cache.serialize().numpy().tobytes()
    for patch, reader, codec in zip(PATCHES, REQUESTS, PATCHES.values(), strict=True):
        copy, frame = requested(codec)
        found[f"request {codec}"] = bytes([reader]) + frame
        found[f"patch {codec}"] = bytes([patch]) + copy.patch(frame).numpy().tobytes()
    assert all(split(data[1:]) for data in found.values())
    return found


def hostile() -> dict[str, bytes]:
    """Inputs of `wire_hostile` that fit."""
    at = {id(config): index for index, config in enumerate(CONFIGS)}
    found = {name: (at.get(id(cfg)), data) for name, (cfg, data) in streams().items()}
    return {name: bytes([reader]) + data for name, (reader, data) in found.items() if reader is not None}
