"""Caches survive the wire bit for bit: whole, in files, frame by frame, in another process."""

import copy
import itertools
import multiprocessing
import pickle

import pytest
import torch
from every_tier import EveryTier, EveryTierAndDropped
from families import FAMILIES, config, left_padded, model, prompt
from pairs import start_method
from safetensors.torch import load as load_safetensors

from spectrumkv_hf import POLICIES, SpectrumCache, cache_argument, wire
from spectrumkv_hf.policy import INT3, TIERS
from spectrumkv_hf.policy.calibrated import LayerShares
from spectrumkv_hf.tiered.layer import SpectrumLayer
from spectrumkv_hf.wire import Assembler, Emitter, FrameHeader, Kind, WireError

SLIDING = {"mistral", "gemma2", "gemma3", "gpt_oss"}
WINDOW = 160
BUDGETS = {"two_tier": 0.3, "sink_protect": 0.3, "greedy": 0.7, "balanced": 0.5, "drop_scored": 0.5, "drop_window": 0.5}


def sized(family):
    return {"sliding_window": WINDOW} if family in SLIDING else {}


PLAN = dict.fromkeys(range(8), (0.0, 0.1, 0.3, 0.2, 0.4))


def options(policy):
    extra = {"adaptive": {"probe_passed": True}, "calibrated": {"layers": PLAN}}.get(policy, {})
    return {"policy": policy, "budget": BUDGETS.get(policy), "recent_window": 8, **extra}


def filled(m, ids, mask=None, **kwargs):
    cache = SpectrumCache(m.config, **{"recent_window": 8, "budget": 0.3, **kwargs})
    with torch.no_grad():
        m(ids, attention_mask=mask, **cache_argument(cache))
    return cache


def contents(layer):
    """Everything that a layer holds, as comparable values; of the tail what is in use."""
    if isinstance(layer, SpectrumLayer):
        if not layer.is_initialized:
            return {}
        store = layer.store
        held = {name: t for name, t in store.tensors() if not name.startswith("tail")}
        held["tail.keys"], held["tail.values"] = store.tail
        names = ("length", "tail_start", "first_kept", "ragged", "drops", "codec", "rotary")
        held |= {name: getattr(store, name) for name in names}
        return held | {"record_past": getattr(layer, "record_past", None), "kv_heads": layer.kv_heads}
    return {name: value for name, value in vars(layer).items() if name != "device"}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def assert_equal(one, other):
    assert one.policy == other.policy
    assert one.codec == other.codec
    assert len(one.layers) == len(other.layers)
    for x, y in zip(one.layers, other.layers, strict=True):
        assert type(x) is type(y)
        left, right = contents(x), contents(y)
        for name in left.keys() | right.keys():
            assert same(left.get(name), right.get(name)), name


def sent(cache, cfg):
    return SpectrumCache.deserialize(cache.serialize(), config=cfg)


def assert_continues_equally(m, one, other, batch, mask=None, steps=90):
    """Decoding on both gives the same bits, past the point where new tokens are tiered; most of them come at once."""
    assert_equal(one, other)
    sizes = [1, 1, 1, steps - 6, 1, 1, 1] if steps > 6 else [1] * steps
    for new in prompt(steps, batch, seed=100).split(sizes, dim=1):
        if mask is not None:
            mask = torch.cat((mask, torch.ones_like(new)), dim=1)
        with torch.no_grad():
            logits = [m(new, past_key_values=cache, attention_mask=mask).logits for cache in (one, other)]
        assert torch.equal(*logits)
    assert_equal(one, other)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [[300], [300, 210, 17]], ids=str)
def test_families_and_batches(family, lengths):
    m = model(family, **sized(family))
    ids, mask = left_padded(lengths)
    mask = mask if len(lengths) > 1 else None
    cache = filled(m, ids, mask)
    assert_continues_equally(m, cache, sent(cache, m.config), len(lengths), mask)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("codec", "scope"),
    [
        *itertools.product(["spectrum", "absmax"], ["head", "layer", "token"]),
        ("spectrum2", "head"),
        ("spectrum2", "layer"),
    ],
)
def test_policies(policy, codec, scope):
    m = model("gemma3", **sized("gemma3"))
    cache = filled(m, prompt(300, 2), codec=codec, scope=scope, **options(policy))
    assert_continues_equally(m, cache, sent(cache, m.config), 2, steps=75)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("lengths", [[300], [300, 210, 17]], ids=str)
@pytest.mark.parametrize("policy", [EveryTier, EveryTierAndDropped])
@pytest.mark.usefixtures("with_every_tier")
def test_every_tier_of_spectrum2(family, lengths, policy):
    """GQA, sliding windows, a model without RoPE; maps of 4 bits a token."""
    m = model(family, **sized(family))
    ids, mask = left_padded(lengths)
    mask = mask if len(lengths) > 1 else None
    cache = filled(m, ids, mask, policy=policy.name, codec="spectrum2", budget=None)
    stores = [layer.store for layer in cache.layers]
    assert all(
        list(store.arenas) == list(TIERS[:-1]) and store.drops == (policy is EveryTierAndDropped) for store in stores
    )
    for index, store in enumerate(stores):
        tensors = load_safetensors(payload_of_layer(cache, index))
        assert tensors["map"].shape[2] == -(-(store.tail_start - store.first_kept) // 2)
        assert tensors["int3.keys.codes"].shape[3] * 8 == store.tail[0].shape[3] * 3
        assert torch.equal(tensors["mean"], store.frame)
    assert_continues_equally(m, cache, sent(cache, m.config), len(lengths), mask, steps=75)


@pytest.mark.parametrize("scope", ["head", "layer", "token"])
@pytest.mark.parametrize("operation", [lambda c: c.crop(-75), lambda c: c.reorder_cache(torch.tensor([2, 0, 0]))])
@pytest.mark.usefixtures("with_every_tier")
def test_every_tier_after_operations(scope, operation):
    m = model("gemma3", **sized("gemma3"))
    ids, mask = left_padded([300, 210, 100])
    options = {"policy": EveryTierAndDropped.name, "codec": "spectrum2", "recent_window": 8, "scope": scope}
    cache = SpectrumCache(m.config, **options)
    cache.activate_past_recording()
    with torch.no_grad():
        m(ids, past_key_values=cache, attention_mask=mask)
    operation(cache)
    assert_equal(cache, sent(cache, m.config))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("policy", ["sink_protect", "greedy", "fp16"])
def test_dtypes(dtype, policy):
    m = copy.deepcopy(model("llama")).to(dtype)
    cache = filled(m, prompt(300, 2), **options(policy))
    other = sent(cache, m.config)
    assert other.layers[0].keys.dtype == dtype
    assert_continues_equally(m, cache, other, 2, steps=3)


@pytest.mark.parametrize("tokens", [1, 5, 73, 136, 137])
def test_lengths_around_the_first_tiering(tokens):
    m = model("llama")
    cache = filled(m, prompt(tokens))
    assert_continues_equally(m, cache, sent(cache, m.config), 1)


def test_an_empty_cache():
    cfg = config("gemma3")
    other = sent(SpectrumCache(cfg, budget=0.4, decay=0.01), cfg)
    assert other.get_seq_length() == 0
    assert other.policy.decay == 0.01


@pytest.mark.parametrize(
    "operation", ["crop", "crop_tail", "reorder", "select", "repeat", "decoded", "cropped_to_nothing"]
)
@pytest.mark.parametrize("policy", ["sink_protect", "two_tier"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
def test_after_operations(operation, policy, family):
    if family == "qwen3_next" and operation not in ("reorder", "decoded"):
        pytest.skip("Transformers has no such operation for linear attention")
    m, batch = model(family, **sized(family)), 3
    ids, mask = left_padded([300, 210, 100])
    cache = SpectrumCache(m.config, **options(policy))
    if "crop" in operation:
        cache.activate_past_recording()
    with torch.no_grad():
        m(ids, past_key_values=cache, attention_mask=mask)
    if operation == "crop":
        cache.crop(-75)
        mask = mask[:, :-75]
        assert any(layer.store.ragged for layer in cache.layers)
    elif operation == "crop_tail":
        cache.crop(-3)
        mask = mask[:, :-3]
    elif operation == "cropped_to_nothing":
        cache.crop(-300)
        mask = mask[:, :0]
    elif operation == "reorder":
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        mask = mask[[2, 0, 0]]
    elif operation == "select":
        cache.batch_select_indices(torch.tensor([1]))
        mask, batch = mask[[1]], 1
    elif operation == "repeat":
        cache.batch_repeat_interleave(2)
        mask, batch = mask.repeat_interleave(2, 0), 6
    elif operation == "decoded":
        for step in range(150):
            mask = torch.cat((mask, mask.new_ones(3, 1)), dim=1)
            with torch.no_grad():
                m(prompt(1, 3, seed=step), past_key_values=cache, attention_mask=mask)
    other = sent(cache, m.config)
    assert_continues_equally(m, cache, other, batch, mask, steps=75)


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_generate_goes_on(family, kwargs):
    m = model(family)
    ids = torch.cat((prompt(150), prompt(150)), dim=1)
    cache = filled(m, ids[:, :-1])
    buffer = cache.serialize()
    before = buffer.clone()
    texts = []
    for used in (cache, SpectrumCache.deserialize(buffer, config=m.config)):
        used.batch_repeat_interleave(kwargs.get("num_beams", 1))
        texts.append(m.generate(ids, past_key_values=used, max_new_tokens=80, do_sample=False, **kwargs))
    assert torch.equal(*texts)
    assert torch.equal(buffer, before)


def test_deferred_tiering_is_finished():
    """A layer that others read in the same forward waits for the next update, or for its frame."""
    m = model("llama")
    cache = SpectrumCache(m.config, budget=0.3, recent_window=8)
    for layer in cache.layers:
        layer.defer = True
    announced = []
    cache.on_layer(announced.append)
    with torch.no_grad():
        m(prompt(300), past_key_values=cache)
    assert announced == []
    other = sent(cache, m.config)
    assert announced == [0, 1]
    assert other.layers[0].store.arenas
    assert_continues_equally(m, cache, other, 1, steps=2)


class TestBuffers:
    @pytest.fixture(scope="class")
    @staticmethod
    def cache():
        return filled(model("llama"), prompt(300, 2))

    @pytest.mark.parametrize(
        "kind", [bytes, bytearray, lambda b: memoryview(b), lambda b: torch.frombuffer(bytearray(b), dtype=torch.uint8)]
    )
    @pytest.mark.filterwarnings("error")
    def test_kinds(self, cache, kind):
        data = kind(cache.serialize().numpy().tobytes())
        assert_equal(cache, SpectrumCache.deserialize(data, config=config("llama")))

    @pytest.mark.parametrize("buffer", [3, "text", torch.zeros(4), torch.zeros(4, 4, dtype=torch.uint8), None])
    def test_what_is_no_buffer(self, buffer):
        with pytest.raises(TypeError, match="buffer is"):
            SpectrumCache.deserialize(buffer, config=config("llama"))

    def test_no_copy_of_the_payload(self, cache):
        buffer = cache.serialize()
        begin, end = buffer.data_ptr(), buffer.data_ptr() + buffer.numel()
        other = SpectrumCache.deserialize(buffer, config=config("llama"))
        inside = outside = 0
        for layer in other.layers:
            for name, tensor in layer.store.tensors():
                if begin <= tensor.data_ptr() < end:
                    inside += tensor.nbytes
                    assert tensor.untyped_storage().nbytes() == tensor.nbytes
                else:
                    outside += tensor.nbytes
                    assert name.endswith("positions")
        assert inside > 5 * outside
        assert other.memory().stored == inside + outside

    @pytest.mark.parametrize("shift", [1, 2, 4, 8, 32])
    def test_unaligned_buffers_are_copied(self, cache, shift):
        data = cache.serialize()
        buffer = torch.zeros(len(data) + shift, dtype=torch.uint8)
        buffer[shift:] = data
        assert_equal(cache, SpectrumCache.deserialize(buffer[shift:], config=config("llama")))

    def test_nothing_writes_into_the_buffer(self, cache):
        """Not even where a crop leaves room in the tail, and appending where it is empty."""
        m, buffer = model("llama"), cache.serialize()
        before = buffer.clone()
        other = SpectrumCache.deserialize(buffer, config=m.config)
        with torch.no_grad():
            for crop in (4, 1, 0):
                other.crop(-crop)
                m(prompt(2, 2, seed=crop), past_key_values=other)
            other.crop(-20)
            m(prompt(100, 2, seed=9), past_key_values=other)
        assert torch.equal(buffer, before)

    def test_inference_mode(self):
        """Neither a cache nor a buffer from inference mode can be written to outside of it."""
        m = model("llama")
        cache = SpectrumCache(m.config, budget=0.3, recent_window=8)
        with torch.inference_mode():
            m(prompt(300), past_key_values=cache)
            buffer = cache.serialize()
            inside = SpectrumCache.deserialize(buffer, config=m.config)
        outside = SpectrumCache.deserialize(buffer, config=m.config)
        assert_continues_equally(m, inside, outside, 1, steps=3)
        with torch.inference_mode():
            assert_continues_equally(m, inside, outside, 1, steps=3)

    def test_a_buffer_for_the_bytes(self, cache):
        data = cache.serialize()
        buffer = torch.ones(len(data) + 100, dtype=torch.uint8)
        written = wire.serialize(cache, out=buffer)
        assert torch.equal(written, data)
        assert written.data_ptr() == buffer.data_ptr()
        assert (buffer[len(data) :] == 1).all()
        with pytest.raises(ValueError, match=f"out is {len(data)} bytes or more"):
            wire.serialize(cache, out=buffer[: len(data) - 1])
        with pytest.raises(TypeError, match="uint8"):
            wire.serialize(cache, out=buffer.float())

    def test_the_size_is_that_of_the_tensors(self):
        """Positions become a map of 2 bits, and spare places of the tail don't travel."""
        cache = filled(copy.deepcopy(model("qwen3")).half(), prompt(900, 8), recent_window=64)
        parts = cache.memory().parts
        positions = sum(size for name, size in parts.items() if name.endswith("positions"))
        held = cache.memory().stored - positions
        assert cache.serialize().numel() <= 1.01 * (held + positions / 16)

    def test_copies_of_a_received_cache(self, cache):
        other = sent(cache, config("llama"))
        for clone in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
            assert_equal(cache, clone)
        assert len(pickle.dumps(other)) < 1.5 * cache.memory().stored

    def test_files(self, cache, tmp_path):
        path = tmp_path / "cache.spectrumkv"
        path.write_bytes(b"old")
        cache.save(path)
        assert path.read_bytes() == cache.serialize().numpy().tobytes()
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
        assert_equal(cache, SpectrumCache.load(path, config=config("llama")))

    def test_a_file_that_can_not_be_written_leaves_the_old_one(self, tmp_path, monkeypatch):
        path = tmp_path / "cache.spectrumkv"
        path.write_bytes(b"old")
        broken = filled(model("llama"), prompt(200))
        broken.layers[1].crop(-1)
        with pytest.raises(WireError, match="layer 1 holds 199 tokens"):
            broken.save(path)
        assert path.read_bytes() == b"old"
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
        path.write_bytes(b"")
        with pytest.raises(WireError, match="empty"):
            SpectrumCache.load(path, config=config("llama"))


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
def test_on_a_gpu(family):
    """From GPU to GPU nothing but headers passes the host; the bytes are those that the CPU writes."""
    m = copy.deepcopy(model(family, **sized(family))).cuda()
    cache = SpectrumCache(m.config, budget=0.3, recent_window=8)
    with torch.no_grad():
        m(prompt(300, 2).cuda(), past_key_values=cache)
    buffer = cache.serialize()
    assert buffer.is_cuda
    received = SpectrumCache.deserialize(buffer, config=m.config)
    assert_equal(cache, received)
    on_cpu = SpectrumCache.deserialize(buffer.cpu(), config=m.config)
    assert torch.equal(on_cpu.serialize(), buffer.cpu())
    damaged = buffer.clone()
    damaged[-400] ^= 1
    with pytest.raises(WireError, match="layer [0-9]+, at byte .* digest"):
        SpectrumCache.deserialize(damaged, config=m.config)
    back = SpectrumCache.deserialize(buffer.cpu(), config=m.config, device="cuda")
    with torch.no_grad():
        logits = [m(prompt(1, 2).cuda(), past_key_values=used).logits for used in (cache, received, back)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def write_next_logits(family, path, logits):
    m = model(family, **sized(family))
    cache = SpectrumCache.load(path, config=m.config)
    torch.set_num_threads(1)
    with torch.no_grad():
        torch.save(m(prompt(1, 2), past_key_values=cache).logits, logits)


@pytest.mark.parametrize("family", ["gemma3", "qwen3_next"])
def test_another_process_reads_the_same(family, tmp_path):
    m = model(family, **sized(family))
    cache = filled(m, prompt(300, 2))
    path, logits = tmp_path / "cache", tmp_path / "logits"
    cache.save(path)
    process = multiprocessing.get_context(start_method()).Process(target=write_next_logits, args=(family, path, logits))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == 0
    with torch.no_grad():
        assert torch.equal(torch.load(logits), m(prompt(1, 2), past_key_values=cache).logits)


class TestStreams:
    @pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next", "deepseek_v3"])
    @pytest.mark.parametrize("settings", [{}, {"scope": "token"}, {"policy": "fp16", "budget": None}], ids=str)
    def test_an_emitter_sends_what_frames_gives(self, family, settings):
        m = model(family, **sized(family))
        cache = SpectrumCache(m.config, **{"recent_window": 8, "budget": 0.3, **settings})
        assembler, emitted, results = Assembler(SpectrumCache, m.config), [], []

        def emit(frame):
            emitted.append(frame)
            results.append(assembler.feed(frame))

        with Emitter(cache, emit, stream=5), torch.no_grad():
            m(prompt(300, 2), past_key_values=cache)
        assert results[:-1] == [None] * (len(results) - 1)
        assert torch.equal(torch.cat(emitted), torch.cat(list(wire.frames(cache, stream=5))))
        assert_continues_equally(m, cache, results[-1], 2, steps=2)

    def test_layers_go_while_prefill_runs(self):
        m = model("llama")
        cache = SpectrumCache(m.config, budget=0.3)
        events = []
        hook = m.model.layers[1].register_forward_pre_hook(lambda *_: events.append("layer 1 begins"))
        try:
            with Emitter(cache, lambda frame: events.append(FrameHeader.parse(frame).layer)), torch.no_grad():
                m(prompt(300), past_key_values=cache)
        finally:
            hook.remove()
        assert events == [-1, 0, "layer 1 begins", 1, -1]

    def test_chunks(self):
        m = model("llama")
        cache, frames = SpectrumCache(m.config, budget=0.3, recent_window=8), []
        with Emitter(cache, frames.append, tokens=300), torch.no_grad():
            for chunk in prompt(300).split(100, dim=1):
                assert not frames
                m(chunk, past_key_values=cache)
        assert torch.equal(torch.cat(frames), cache.serialize())

    def test_an_emitter_that_fails_is_heard_and_leaves_the_cache(self):
        m = model("llama")
        cache = SpectrumCache(m.config, budget=0.3, recent_window=8)

        def emit(frame):
            raise ConnectionError("peer gone")

        with pytest.raises(ConnectionError, match="peer gone"), Emitter(cache, emit), torch.no_grad():
            m(prompt(300), past_key_values=cache)
        assert not cache.layers[0].on_final

    def test_copies_have_no_listeners(self):
        m = model("llama")
        cache, calls = SpectrumCache(m.config), []
        remove = cache.on_layer(calls.append)
        clone = copy.deepcopy(cache)
        with torch.no_grad():
            m(prompt(5), past_key_values=clone)
            assert calls == []
            m(prompt(5), past_key_values=cache)
            assert calls == [0, 1]
            remove()
            m(prompt(5), past_key_values=cache)
        assert calls == [0, 1]

    @pytest.fixture(scope="class")
    @staticmethod
    def frames():
        return list(wire.frames(filled(model("llama"), prompt(300, 2)), stream=9))

    @pytest.mark.parametrize(
        ("order", "message"),
        [
            ([1], "expected the header frame as frame 0, got layer 0 as frame 1"),
            ([0, 2], "layer 1, at byte .*: out of order: expected layer 0 as frame 1, got layer 1 as frame 2"),
            ([0, 1, 1], "layer 0, .*expected layer 1 as frame 2, got layer 0"),
            ([0, 1, 3], "expected layer 1 as frame 2, got a frame of kind END"),
            ([0, 0], "expected layer 0 as frame 1, got a frame of kind HEADER"),
            ([0, 1, 2, 2], "expected the end frame as frame 3, got layer 1"),
        ],
        ids=str,
    )
    def test_order(self, frames, order, message):
        assembler = Assembler(SpectrumCache, config("llama"))
        for index in order[:-1]:
            assert assembler.feed(frames[index]) is None
        with pytest.raises(WireError, match=message):
            assembler.feed(frames[order[-1]])
        assert assembler.expected is None
        with pytest.raises(WireError, match="the stream is broken"):
            assembler.feed(frames[1])

    def test_nothing_comes_behind_the_end(self, frames):
        assembler = Assembler(SpectrumCache, config("llama"))
        assert isinstance([assembler.feed(frame) for frame in frames][-1], SpectrumCache)
        with pytest.raises(WireError, match="the stream is complete"):
            assembler.feed(frames[3])

    def test_frames_of_other_streams(self, frames):
        cache = filled(model("llama"), prompt(300, 2, seed=1))
        assembler = Assembler(SpectrumCache, config("llama"))
        assembler.feed(frames[0])
        with pytest.raises(WireError, match="a frame of stream 8 in stream 9"):
            assembler.feed(wire.layer_frame(cache, 0, stream=8))
        # With one number for both the end frame tells.
        assembler = Assembler(SpectrumCache, config("llama"))
        for frame in (frames[0], wire.layer_frame(cache, 0, stream=9), frames[2]):
            assembler.feed(frame)
        with pytest.raises(WireError, match="'digest'"):
            assembler.feed(frames[3])

    def test_a_limit(self, frames):
        assembler = Assembler(SpectrumCache, config("llama"), limit=20_000)
        assembler.feed(frames[0])
        with pytest.raises(WireError, match="more than the limit of 20000"):
            assembler.feed(frames[1])

    def test_headers_say_what_comes(self, frames):
        headers = [FrameHeader.parse(frame) for frame in frames]
        assert [h.kind for h in headers] == [Kind.HEADER, Kind.LAYER, Kind.LAYER, Kind.END]
        assert [h.layer for h in headers] == [-1, 0, 1, -1]
        assert all(FrameHeader.SIZE + h.padded == len(f) for h, f in zip(headers, frames, strict=True))


def payload_of_layer(cache, index):
    """The payload of a layer's frame, a file of safetensors."""
    frame = wire.layer_frame(cache, index)
    return frame[FrameHeader.SIZE : FrameHeader.SIZE + FrameHeader.parse(frame).length].numpy().tobytes()


def test_payloads_are_safetensors():
    cache = filled(model("llama"), prompt(300, 2))
    tensors = load_safetensors(payload_of_layer(cache, 1))
    held = dict(cache.layers[1].store.tensors())
    assert torch.equal(tensors["int4.keys.codes"], held["int4.keys.codes"])
    assert torch.equal(tensors["mean"], held["frame"])


def test_a_shared_map_travels_once():
    m = model("llama")
    sizes = {}
    for scope in ("head", "layer"):
        sizes[scope] = load_safetensors(payload_of_layer(filled(m, prompt(900), scope=scope), 0))["map"].shape[1]
    assert sizes == {"head": 2, "layer": 1}


def test_layers_and_policies_that_can_not_travel():
    class Own(type(SpectrumCache(config("llama")).policy)):
        name = "own"

    with pytest.raises(WireError, match="can't be serialised: a receiver knows"):
        SpectrumCache(config("llama"), policy=Own()).serialize()
    for number in ({"seed": 2**60},):
        with pytest.raises(WireError, match="out of range|Out of range"):
            SpectrumCache(config("llama"), **number).serialize()
    whole = SpectrumCache(config("deepseek_v3"))
    whole.layers[0].update(*(torch.ones(1, 4, 3, 16, dtype=torch.int32) for _ in range(2)))
    with pytest.raises(WireError, match="'keys' has dtype torch.int32"):
        whole.serialize()
    cache = SpectrumCache(config("llama"))
    cache.layers[1] = object()
    with pytest.raises(WireError, match="layers of class object can't be serialised"):
        cache.serialize()


def test_a_plan_for_codes_that_the_channels_do_not_fill(monkeypatch):
    """Refused when it is read, though no token is in a tier yet."""
    m = model("llama", head_dim=12)
    plan = options("calibrated") | {"layers": dict.fromkeys(range(8), (0.0, 0.0, 1.0, 0.0, 0.0))}
    cache = filled(m, prompt(5), codec="spectrum2", **plan)
    assert sent(cache, m.config).policy == cache.policy
    data = cache.serialize()
    monkeypatch.setattr(LayerShares, "tiers", (INT3,))
    with pytest.raises(WireError, match="tail.keys has 12 channels; codes of 3 bits need multiples of 8"):
        SpectrumCache.deserialize(data, m.config)
