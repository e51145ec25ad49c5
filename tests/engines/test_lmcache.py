"""LMCache's own storage manager over its file backend: store, restart, load. Skipped where LMCache is missing."""

import argparse
import contextlib
import inspect
import json
import os
import time

import pytest
import torch
from families import config

os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")
pytest.importorskip("lmcache.v1.distributed.serde", reason="LMCache is not installed: make test-engines")

from lmcache.v1.distributed.api import GroupedObjectKeys, MemoryLayoutDesc, ObjectKey, PrefetchTaskSpec
from lmcache.v1.distributed.config import (
    EvictionConfig,
    L1ManagerConfig,
    L1MemoryManagerConfig,
    StorageManagerConfig,
)
from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
from lmcache.v1.distributed.serde import Deserializer, Serializer, create_serde_processor
from lmcache.v1.distributed.serde.base import SerdeConfig
from lmcache.v1.distributed.storage_manager import StorageManager

from spectrumkv_hf.engines.lmcache_serde import SpectrumDeserializer, SpectrumSerializer, chunk_codec
from spectrumkv_hf.wire.frame import FrameHeader

LAYERS, HEADS, TOKENS, DIM = 2, 2, 32, 16
HIDDEN = HEADS * DIM
PLANES = MemoryLayoutDesc([torch.Size((2, LAYERS, TOKENS, HIDDEN))], [torch.bfloat16])
SIDE_BY_SIDE = MemoryLayoutDesc([torch.Size((LAYERS, TOKENS, 2 * HIDDEN))], [torch.float32])
SEVERAL = MemoryLayoutDesc(
    [*PLANES.shapes, torch.Size((LAYERS, 8, 2 * HIDDEN)), torch.Size((3, 5)), torch.Size((2, LAYERS, TOKENS, HIDDEN))],
    [torch.float16, torch.float32, torch.float32, torch.uint8],
)
KEYS = [ObjectKey(bytes([i]) * 8, "some/model", 0x01000100, cache_salt="tenant") for i in range(3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a model's config."""
    folder = tmp_path_factory.mktemp("model")
    config("llama").save_pretrained(folder)
    return str(folder)


def adapter(folder, **serde):
    return {
        "type": "plugin",
        "module_path": "spectrumkv_hf.engines.lmcache_serde",
        "class_name": "SpectrumL2Adapter",
        "adapter_params": {"type": "fs", "base_path": str(folder)},
        "serde": {"type": "spectrum", "layout": "per_token", "budget": 0.3, **serde},
    }


@contextlib.contextmanager
def server(*specs):
    """What the server builds of its `--l2-adapter` options."""
    adapters = parse_args_to_l2_adapters_config(argparse.Namespace(l2_adapter=[json.dumps(spec) for spec in specs]))
    l1 = L1ManagerConfig(L1MemoryManagerConfig(16 << 20, use_lazy=False, shm_name=""))
    manager = StorageManager(StorageManagerConfig(l1, EvictionConfig("LRU"), adapters))
    try:
        yield manager
    finally:
        manager.close()


def chunks(layout):
    """Random chunks, each a list of tensors."""
    generator = torch.Generator().manual_seed(1)
    shaped = list(zip(layout.shapes, layout.dtypes, strict=True))
    return [[(torch.randn(s, generator=generator) * 20 + 30).to(d) for s, d in shaped] for _ in KEYS]


def put(manager, layout, keys, contents):
    objects = manager.reserve_write(keys, layout)
    for key, tensors in zip(keys, contents, strict=True):
        for index, tensor in enumerate(tensors):
            objects[key].get_tensor(index).copy_(tensor)
    manager.finish_write(keys)


def files(folder, count, seconds=20):
    """The files of a folder in the order of `KEYS`, once there are `count`."""
    end = time.monotonic() + seconds
    while len(found := sorted(folder.glob("*.data"))) < count and time.monotonic() < end:
        time.sleep(0.01)
    return found


def get(manager, layout, keys):
    """Hits in L2, and the chunks, or None where one is missing."""
    handle = manager.submit_prefetch_task(PrefetchTaskSpec([GroupedObjectKeys(keys, 0, layout)]))
    assert manager.wait_prefetch_status(handle, 20)
    result = manager.query_prefetch_status(handle)
    hits = result.l2_hit_cells[0].popcount()
    assert result.l1_hit_cells[0].popcount() == 0
    assert result.hit_cells[0].popcount() == hits
    if hits < len(keys):
        return hits, None
    with manager.read_prefetched_results(keys) as objects:
        found = [[o.get_tensor(i).clone() for i in range(len(layout.shapes))] for o in objects]
    manager.finish_read_prefetched(keys)
    return hits, found


def stored(folder, spec, layout=PLANES, contents=None):
    """Store chunks, stop the server."""
    with server(spec) as manager:
        put(manager, layout, KEYS, chunks(layout) if contents is None else contents)
        assert len(files(folder, len(KEYS))) == len(KEYS)
    return files(folder, len(KEYS))


def reconstructed(codec, keys, values):
    """What the codec makes of keys and values, `[layers, kv_heads, tokens, head_dim]`."""
    part = keys.contiguous(), values.contiguous()
    spec = codec.specs([torch.Size((LAYERS, keys.shape[2], 2 * HIDDEN))], [keys.dtype])
    return codec.blocks.restore(codec.blocks.compress([part]), spec)[0]


class TestRestart:
    def test_planes(self, tmp_path, model):
        """`[2, layers, tokens, hidden]`: every chunk is the codec's reconstruction, and its file has the exact size."""
        found = stored(tmp_path, adapter(tmp_path, model=model))
        codec = chunk_codec("per_token", model, budget=0.3)
        size = SpectrumSerializer(codec).estimate_serialized_size(PLANES)
        assert [path.stat().st_size for path in found] == [size] * 3
        with server(adapter(tmp_path, model=model)) as manager:
            hits, loaded = get(manager, PLANES, KEYS)
        assert hits == 3
        for (chunk,), (back,) in zip(chunks(PLANES), loaded, strict=True):
            keys, values = chunk.view(2, LAYERS, TOKENS, HEADS, DIM).transpose(2, 3)
            expected = torch.stack(reconstructed(codec, keys, values)).transpose(2, 3).reshape(chunk.shape)
            assert torch.equal(back, expected)
            assert not torch.equal(back, chunk)
            assert (back - chunk).abs().float().mean() < 3

    @pytest.mark.parametrize("where", ["per_token", "vllm_cpu"])
    def test_side_by_side(self, tmp_path, model, where):
        """`[layers, tokens, 2 * hidden]`, as it comes from vLLM on GPUs and on CPUs."""
        spec = adapter(tmp_path, model=model, layout=where, block_size=8)
        stored(tmp_path, spec, SIDE_BY_SIDE)
        codec = chunk_codec(where, model, budget=0.3, block_size=8)
        with server(spec) as manager:
            hits, loaded = get(manager, SIDE_BY_SIDE, KEYS)
        assert hits == 3
        for (chunk,), (back,) in zip(chunks(SIDE_BY_SIDE), loaded, strict=True):
            keys, values = rows(chunk, where)
            for ours, theirs in zip(rows(back, where), reconstructed(codec, keys, values), strict=True):
                assert torch.equal(ours, theirs)

    def test_several_tensors(self, tmp_path, model):
        """What is no chunk of keys and values comes back bit by bit; the rest, of any length, as the codec makes it."""
        stored(tmp_path, adapter(tmp_path, model=model), SEVERAL)
        codec = chunk_codec("per_token", model, budget=0.3)
        with server(adapter(tmp_path, model=model)) as manager:
            hits, loaded = get(manager, SEVERAL, KEYS)
        assert hits == 3
        for chunk, back in zip(chunks(SEVERAL), loaded, strict=True):
            assert torch.equal(back[2], chunk[2])
            assert torch.equal(back[3], chunk[3])
            assert not torch.equal(back[0], chunk[0])
            keys, values = rows(chunk[1], "per_token")
            for ours, theirs in zip(rows(back[1], "per_token"), reconstructed(codec, keys, values), strict=True):
                assert torch.equal(ours, theirs)

    def test_fp16_policy_is_exact(self, tmp_path, model):
        spec = adapter(tmp_path, model=model, policy="fp16", budget=1.0)
        stored(tmp_path, spec)
        with server(spec) as manager:
            hits, loaded = get(manager, PLANES, KEYS)
        assert hits == 3
        assert all(torch.equal(back, chunk) for (chunk,), (back,) in zip(chunks(PLANES), loaded, strict=True))

    def test_native_adapter_and_threads(self, tmp_path):
        """Another backend behind the plugin, heads by number instead of by a config, and two workers."""
        spec = adapter(tmp_path, kv_heads=HEADS, head_dim=DIM, max_workers=2)
        spec["adapter_params"] = {"type": "fs_native", "base_path": str(tmp_path), "num_workers": 2}
        stored(tmp_path, spec)
        with server(spec) as manager:
            hits, _ = get(manager, PLANES, KEYS)
        assert hits == 3


def rows(chunk, where):
    """Keys and values of `[layers, tokens, 2 * hidden]` by hand, `[layers, kv_heads, tokens, head_dim]`."""
    blocks = chunk.view(LAYERS, -1, 8, HEADS, 2 * DIM).transpose(2, 3)  # [layers, blocks, heads, 8, 2 * dim]
    if where == "vllm_cpu":
        keys, values = blocks.reshape(*blocks.shape[:3], 16, DIM).chunk(2, dim=3)
        keys = keys.reshape(*blocks.shape[:3], DIM, 8).transpose(3, 4)
    else:
        keys, values = blocks[..., :DIM], blocks[..., DIM:]
    return [side.transpose(1, 2).reshape(LAYERS, HEADS, -1, DIM) for side in (keys, values)]


class TestMisses:
    """No damage is a hit. LMCache fails a batch as a whole, so each chunk is asked for on its own too."""

    def assert_missed(self, spec, index=1, others=2, before=0):
        """`before`: chunks of the batch that are hits, those in front of a file that is too short to be read."""
        with server(spec) as manager:
            assert get(manager, PLANES, KEYS) == (before, None)
        with server(spec) as manager:
            assert get(manager, PLANES, KEYS[index : index + 1]) == (0, None)
            rest = [key for i, key in enumerate(KEYS) if i != index]
            assert sum(get(manager, PLANES, [key])[0] for key in rest) == others

    @pytest.mark.parametrize("at", [8, 70, 600, -900, -70], ids=str)
    def test_flipped_byte(self, tmp_path, model, at):
        """In the header, the JSON, exact tokens, codes and scales."""
        spec = adapter(tmp_path, model=model)
        path = stored(tmp_path, spec)[1]
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)
        self.assert_missed(spec)

    @pytest.mark.parametrize("size", [0, 63, 64, -64, -1], ids=str)
    def test_short(self, tmp_path, model, size):
        spec = adapter(tmp_path, model=model)
        path = stored(tmp_path, spec)[1]
        path.write_bytes(path.read_bytes()[:size])
        self.assert_missed(spec, before=1)

    def test_zeros(self, tmp_path, model):
        spec = adapter(tmp_path, model=model)
        path = stored(tmp_path, spec)[1]
        path.write_bytes(bytes(path.stat().st_size))
        self.assert_missed(spec)

    def test_anothers_chunk(self, tmp_path, model):
        """Sound, but stored for other tokens."""
        spec = adapter(tmp_path, model=model)
        found = stored(tmp_path, spec)
        found[1].write_bytes(found[0].read_bytes())
        self.assert_missed(spec)

    def test_anothers_tenant(self, tmp_path, model):
        spec = adapter(tmp_path, model=model)
        stored(tmp_path, spec)
        theirs = [ObjectKey(key.chunk_hash, key.model_name, key.kv_rank, cache_salt="other") for key in KEYS]
        for path in files(tmp_path, 3):
            path.rename(path.with_name(path.name.replace("@tenant", "@other")))
        with server(spec) as manager:
            assert get(manager, PLANES, theirs) == (0, None)

    @pytest.mark.parametrize(
        "change",
        [{"revision": "2"}, {"importance": "positional"}, {"model": None, "kv_heads": HEADS, "head_dim": DIM}],
        ids=lambda change: next(iter(change)),
    )
    def test_wrong_model_or_settings(self, tmp_path, model, change):
        """Blobs of the same size under the same key."""
        stored(tmp_path, adapter(tmp_path, model=model))
        other = {"model": model, **change}
        with server(adapter(tmp_path, **{k: v for k, v in other.items() if v is not None})) as manager:
            assert get(manager, PLANES, KEYS) == (0, None)

    def test_wrong_layout(self, tmp_path, model):
        stored(tmp_path, adapter(tmp_path, model=model), SIDE_BY_SIDE)
        with server(adapter(tmp_path, model=model, layout="vllm_cpu", block_size=8)) as manager:
            assert get(manager, SIDE_BY_SIDE, KEYS) == (0, None)

    def test_not_finite_is_not_stored(self, tmp_path, model):
        contents = chunks(PLANES)
        contents[1][0][0, 0, 9, 3] = torch.nan
        with server(adapter(tmp_path, model=model)) as manager:
            put(manager, PLANES, KEYS[:1], contents[:1])
            assert len(files(tmp_path, 1)) == 1  # alone: a batch is stored as a whole, or not at all
            put(manager, PLANES, KEYS[1:2], contents[1:2])
            assert len(files(tmp_path, 2, seconds=1)) == 1


class TestContract:
    """Of LMCache's base classes: a change there fails here, not as a warning in a log."""

    @pytest.mark.parametrize(
        ("base", "ours", "name"),
        [
            (Serializer, SpectrumSerializer, "serialize"),
            (Serializer, SpectrumSerializer, "estimate_serialized_size"),
            (Deserializer, SpectrumDeserializer, "deserialize"),
        ],
    )
    def test_signatures(self, base, ours, name):
        theirs, mine = (inspect.signature(getattr(cls, name)).parameters for cls in (base, ours))
        assert list(theirs) == list(mine)

    def test_nothing_else_is_abstract(self):
        assert Serializer.__abstractmethods__ == {"serialize", "estimate_serialized_size"}
        assert Deserializer.__abstractmethods__ == {"deserialize"}

    def test_without_a_key(self):
        """LMCache up to 0.5.2 passes two arguments."""
        assert inspect.signature(SpectrumSerializer.serialize).parameters["key"].default is None
        assert inspect.signature(SpectrumDeserializer.deserialize).parameters["key"].default is None

    def test_size_of_the_header(self, model):
        """The estimate counts the frame's header, the JSON and the padding."""
        codec = chunk_codec("per_token", model, budget=0.3)
        blob = codec.blocks.compress([codec.layout.split(chunks(PLANES)[0][0])])
        assert len(blob) == SpectrumSerializer(codec).estimate_serialized_size(PLANES)
        assert FrameHeader.parse(blob).padded + 64 == len(blob)


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"kv_heads": 2, "head_dim": 16}, ValueError, "needs layout"),
            ({"layout": "per_token"}, ValueError, "give model, or kv_heads and head_dim"),
            ({"layout": "gpu", "kv_heads": 2, "head_dim": 16}, ValueError, "layout is one of"),
            ({"layout": "vllm_cpu", "kv_heads": 2, "head_dim": 16}, ValueError, "needs block"),
            ({"layout": "per_token", "kv_heads": 2, "head_dim": 15}, ValueError, "head_dim must be even"),
            ({"layout": "per_token", "kv_heads": 2, "head_dim": 16, "colour": 1}, TypeError, "no option colour"),
            ({"layout": "per_token", "kv_heads": 2, "head_dim": 16, "max_workers": 0}, ValueError, "max_workers"),
            (
                {"layout": "per_token", "kv_heads": 2, "head_dim": 16, "tensor_parallel": 0},
                ValueError,
                "tensor_parallel",
            ),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_refused(self, settings, error, message):
        with pytest.raises(error, match=message):
            create_serde_processor(SerdeConfig("spectrum", settings))

    def test_heads_of_a_worker(self, model):
        assert chunk_codec("per_token", model).layout.kv_heads == 2
        assert chunk_codec("per_token", model, tensor_parallel=2).layout.kv_heads == 1
        assert chunk_codec("per_token", model, tensor_parallel=4).layout.kv_heads == 1

    @pytest.mark.parametrize(
        ("params", "message"),
        [({"base_path": "x"}, "need a type"), ({"type": "fs", "base_path": "x", "serde": {}}, "beside adapter_params")],
    )
    def test_plugin(self, tmp_path, params, message):
        spec = adapter(tmp_path, kv_heads=2, head_dim=16)
        spec["adapter_params"] = params
        with pytest.raises(ValueError, match=message), server(spec):
            pass
