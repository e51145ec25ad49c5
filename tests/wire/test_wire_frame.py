"""The bytes themselves: golden files, the digest, and that every kind of damage and malice is a WireError."""

import hashlib
import json
import random
import resource
import struct
import time
import tracemalloc
import zlib
from pathlib import Path

import pytest
import reference
import torch
from families import config
from wire_forge import CONFIG, forged, golden_cache, opened, payload_of, resealed, sealed, split

from spectrumkv_hf import SpectrumCache, wire
from spectrumkv_hf.policy.policies import INT2, INT3
from spectrumkv_hf.tiered.store import Arena, TieredStore
from spectrumkv_hf.wire import read as wire_read
from spectrumkv_hf.wire.frame import FrameHeader, WireError, _send, as_tensor, digest, host_bytes, put
from spectrumkv_hf.wire.payload import BEGINNING, Later
from spectrumkv_hf.wire.read import Assembler, Beginnings, _read
from spectrumkv_kernels import CODECS, Quantized, decode

GOLDEN = Path(__file__).parent / "golden" / "wire-v1.bin"
"""What `golden_cache` gives. Format version 1 must read it for ever, and write it as long as it is the current one."""
GOLDEN_FILES = {"spectrum": GOLDEN, "spectrum2": GOLDEN.with_name("wire-v1-spectrum2.bin")}
"""By codec; that of `spectrum2` has five tiers, and so a map of 4 bits a token."""


@pytest.fixture(scope="module")
def data():
    return golden_cache().serialize().numpy().tobytes()


@pytest.fixture(scope="module")
def data2():
    return golden_cache("spectrum2").serialize().numpy().tobytes()


def read(buffer):
    return SpectrumCache.deserialize(buffer, config=CONFIG)


def assert_refused(buffer, message=None, at=None):
    with pytest.raises(WireError, match=message) as caught:
        read(buffer)
    if at:
        assert str(caught.value).startswith(at), str(caught.value)


class TestGolden:
    @pytest.mark.parametrize("codec", GOLDEN_FILES)
    def test_bytes(self, codec):
        assert golden_cache(codec).serialize().numpy().tobytes() == GOLDEN_FILES[codec].read_bytes()

    @pytest.mark.parametrize("codec", GOLDEN_FILES)
    def test_contents(self, codec):
        ours, theirs = golden_cache(codec).layers[0].store, read(GOLDEN_FILES[codec].read_bytes()).layers[0].store
        theirs.check_integrity()
        for (name, a), (other, b) in zip(ours.tensors(), theirs.tensors(), strict=True):
            assert name == other
            assert a.dtype == b.dtype
            assert torch.equal(a, b) if not name.startswith("tail") else torch.equal(a[:, :, :2], b)

    def test_fields_of_a_header(self):
        """docs/wire-format.md, by hand."""
        head = GOLDEN.read_bytes()[:64]
        magic, version, kind, index, layer, flags, length, check, stream = struct.unpack("<8sHHIiIQQQ", head[:48])
        assert (magic, version, kind, index, layer, flags, stream) == (b"SPECTRKV", 1, 1, 0, -1, 0, 0)
        assert head[48:60] == bytes(12)
        assert struct.unpack("<I", head[60:])[0] == zlib.crc32(head[:60])
        payload = GOLDEN.read_bytes()[64 : 64 + -(-length // 64) * 64]
        assert check == plain_digest(payload)
        assert json.loads(payload[8:length])["__metadata__"].keys() == {"spectrumkv"}

    @pytest.mark.parametrize(
        ("codec", "tiers", "bits"), [("spectrum", [16, 8, 4], 2), ("spectrum2", [16, 8, 4, 3, 2], 4)]
    )
    def test_positions_by_the_document(self, codec, tiers, bits):
        """A reader that knows docs/wire-format.md only."""
        metadata, tensors = plain_layer(GOLDEN_FILES[codec].read_bytes())
        assert metadata["tiers"] == tiers
        (batch, heads, packed), bytes_of_map = tensors["map"]
        store = golden_cache(codec).layers[0].store
        for row in range(batch):
            for head in range(heads):
                line = bytes_of_map[(row * heads + head) * packed :]
                per_byte = 8 // bits
                codes = [
                    line[i // per_byte] >> bits * (i % per_byte) & 2**bits - 1 for i in range(metadata["tail_start"])
                ]
                for code, arena in enumerate(store.arenas.values()):
                    held = [i for i, c in enumerate(codes) if c == code]
                    assert [-1] * (len(arena) - len(held)) + held == arena.positions[row, head].tolist()

    @pytest.mark.parametrize("bits", [8, 4, 3, 2])
    def test_values_by_the_document(self, bits):
        """Of `spectrum2`: what codes, one-byte scales and the frame stand for."""
        _, tensors = plain_layer(GOLDEN_FILES["spectrum2"].read_bytes())
        shape, raw = tensors["mean"]
        assert shape == [2, 2, 8 + 8 + 8 + 1]
        frame = torch.tensor(struct.unpack("<100f", raw), dtype=torch.float64).view(shape)
        mean, key_scale, value_mean, value_scale = frame[..., None, :].split([8, 8, 8, 1], dim=-1)
        store = golden_cache("spectrum2").layers[0].store
        (arena,) = (arena for tier, arena in store.arenas.items() if tier.bits == bits)
        keys, values = (plain_values(tensors, f"int{bits}.{side}", bits) for side in ("keys", "values"))
        keys = keys * key_scale + reference.rotated(store.rotary, mean.expand_as(keys), arena.positions)
        values = values * value_scale + value_mean
        places = arena.positions.clamp(min=0).long().unsqueeze(-1).expand_as(keys)
        for ours, dense in zip((keys, values), store.dense(), strict=True):
            held = dense.double().gather(2, places)
            assert ((ours - held).abs() <= 2e-3 * ours.abs() + 1e-2)[arena.positions >= 0].all()  # of float16


def plain_layer(data):
    """Metadata and tensors, shape and bytes by name, of the first layer of a stream."""
    at = 64 + -(-struct.unpack("<Q", data[24:32])[0] // 64) * 64 + 64  # the first layer's payload
    (size,) = struct.unpack("<Q", data[at : at + 8])
    tensors = json.loads(data[at + 8 : at + 8 + size])
    metadata = json.loads(tensors.pop("__metadata__")["spectrumkv"])
    begin = at + 8 + size
    found = {
        name: (t["shape"], data[begin + t["data_offsets"][0] : begin + t["data_offsets"][1]])
        for name, t in tensors.items()
    }
    return metadata, found


def plain_values(tensors, name, bits):
    """What codes of `spectrum2` and their scales stand for, times the Hadamard matrix: `[batch, heads, n, 8]`."""
    (batch, heads, n, width), raw = tensors[f"{name}.codes"]
    vectors = []
    for i, scale in enumerate(tensors[f"{name}.affine"][1]):
        packed = raw[i * width : (i + 1) * width]
        if bits == 3:
            codes = [packed[c % 2] >> 2 * (c // 2) & 3 for c in range(8)]
            codes = [2 * upper + (packed[2] >> c & 1) for c, upper in enumerate(codes)]
        else:
            codes = [packed[c % width] >> bits * (c // width) & 2**bits - 1 for c in range(8)]
        step = 2 ** (7 / 8 * (2 - bits) + (scale - 128) / 32)
        vectors.append([(code + 0.5 - 2 ** (bits - 1)) * step for code in codes])
    return torch.tensor(vectors, dtype=torch.float64).view(batch, heads, n, 8) @ reference.sylvester(8)


def plain_digest(payload):
    """The digest as docs/wire-format.md words it, with Python's integers."""
    sums = reference.digest_sums(struct.unpack(f"<{len(payload) // 8}Q", payload))
    packed = struct.pack(f"<{len(sums)}Q", *sums)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


class TestDigest:
    @pytest.mark.parametrize("size", [64, 8192, 8192 + 64, 3 * 8192, 2**20 + 8192 + 128])
    def test_equals_its_description(self, size):
        payload = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
        assert digest(payload) == plain_digest(payload.numpy().tobytes())

    def test_every_bit_and_every_swap_counts(self):
        payload = torch.randint(0, 256, (8192 + 64,), dtype=torch.uint8)
        before = digest(payload)
        seen = {before}
        for byte in range(0, len(payload), 13):
            for bit in range(8):
                payload[byte] ^= 1 << bit
                seen.add(digest(payload))
                payload[byte] ^= 1 << bit
        assert digest(payload) == before
        assert len(seen) == 1 + 8 * len(range(0, len(payload), 13))
        words = payload.view(torch.int64)
        for i, j in ((0, 1), (5, 1025), (1024, 1030)):
            swapped = words.clone()
            swapped[[i, j]] = swapped[[j, i]]
            assert digest(swapped.view(torch.uint8)) != before
        signs = words.clone()  # modulo 2^64 a weighted sum alone would not see these two
        signs[[3, 77]] ^= -(2**63)
        assert digest(signs.view(torch.uint8)) != before


def test_pieces_go_to_a_device_as_to_the_host():
    pieces = [(128, bytes(range(64))), (64, b"x" * 64), (320, bytes(range(128)))]
    ours, theirs = torch.full((2, 512), 7, dtype=torch.uint8)
    put(ours, pieces)
    _send(theirs, pieces)
    assert torch.equal(ours, theirs)
    assert all(bytes(ours[at : at + len(data)].tolist()) == data for at, data in pieces)
    assert (ours == 7).sum() >= 512 - 256


@pytest.mark.parametrize(
    ("lengths", "most"), [((4160, 5120, 5120, 5120, 5120, 320), 4), ((6400, 64, 64, 64, 128, 9000, 9000, 64), 8)]
)
@pytest.mark.parametrize("ahead", [True, False])
def test_beginnings_wherever_frames_begin(monkeypatch, lengths, most, ahead):
    """A device is read ahead of, the CPU is not."""
    reads = []
    if ahead:
        monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda tensor: False))
    monkeypatch.setattr(wire_read, "host_bytes", lambda data: reads.append(data) or host_bytes(data))
    data = torch.randint(0, 256, (sum(lengths),), dtype=torch.uint8)
    beginnings, at = Beginnings(data), 0
    for length in lengths:
        assert beginnings.at(at) == data[at : at + BEGINNING].numpy().tobytes()
        at += length
        beginnings.length = length
    assert len(reads) <= most if ahead else sum(map(len, reads)) <= len(lengths) * BEGINNING


@pytest.mark.parametrize("length", [64, 128, 4096, 5000])
def test_what_is_read_ahead_is_there(monkeypatch, length):
    """A guess costs no more than the rest of the buffer, be frames as short as they can."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda tensor: False))
    reads = []
    monkeypatch.setattr(wire_read, "host_bytes", lambda data: reads.append(data) or host_bytes(data))
    beginnings = Beginnings(torch.zeros(20 * length, dtype=torch.uint8))
    beginnings.length = length
    beginnings.at(length)
    assert sum(read.numel() for read in reads) <= 19 * length


def test_nothing_is_guessed_from_the_header_frame(data, monkeypatch):
    """Which is shorter than the layers' frames."""
    lengths = []
    at = Beginnings.at
    monkeypatch.setattr(Beginnings, "at", lambda self, start: lengths.append(self.length) or at(self, start))
    read(data)
    frames = split(data)
    assert lengths == [0, 0, len(frames[1]), len(frames[2])]


class TestDamage:
    def test_the_cache_is_sound(self, data):
        assert read(data).get_seq_length() == 15
        assert 3000 < len(data) < 20_000

    def test_cuts(self, data):
        borders, at = [], 0
        for frame in split(data):
            borders += [at, at + 1, at + 63, at + 64, at + 65]
            at += len(frame)
        cuts = borders + random.Random(0).choices(range(len(data)), k=1000)
        for cut in cuts:
            assert_refused(data[:cut], "truncated|the buffer ends here|a frame header has 64 bytes")
        assert_refused(data[: borders[5]], "the buffer ends here", at="layer 0, at byte")

    def test_more_behind_the_end(self, data):
        assert_refused(data + b"\0", "1 bytes behind the end frame")
        assert_refused(data + data, "behind the end frame")

    def test_flipped_bits(self, data):
        """Wherever a bit flips, padding included."""
        rng, damaged = random.Random(1), bytearray(data)
        began = time.monotonic()
        for _ in range(10_000):
            byte, bit = rng.randrange(len(data)), rng.randrange(8)
            damaged[byte] ^= 1 << bit
            with pytest.raises(WireError):
                read(damaged)
            damaged[byte] ^= 1 << bit
        assert time.monotonic() - began < 60

    def test_bursts(self, data):
        rng = random.Random(2)
        for _ in range(500):
            damaged, at = bytearray(data), rng.randrange(len(data))
            burst = rng.randbytes(rng.randrange(1, 100))
            damaged[at : at + len(burst)] = burst
            if damaged != data:
                with pytest.raises(WireError):
                    read(damaged)

    def test_missing_doubled_and_swapped_frames(self, data):
        frames = split(data)
        for order in ([0, 2, 3], [0, 1, 3], [0, 1, 1, 2, 3], [1, 0, 2, 3], [0, 2, 1, 3], [0, 1, 2, 2], [3]):
            assert_refused(b"".join(frames[i] for i in order), "out of order")


class TestHeaders:
    @pytest.mark.parametrize(
        ("offset", "value", "message"),
        [
            (0, b"SAFETENS", "no frame: begins with b'SAFETENS'"),
            (8, struct.pack("<H", 2), "format version 2; this release reads version 1"),
            (10, struct.pack("<H", 77), "unknown kind of frame: 77"),
            (20, struct.pack("<I", 1), "reserved fields"),
            (59, b"\1", "reserved fields"),
            (24, struct.pack("<Q", 2**63), "truncated: a frame of 9223372036854775872 bytes"),
            (24, struct.pack("<Q", 2**64 - 1), "truncated"),
            (24, struct.pack("<Q", 0), "damaged payload|0 bytes"),
            (40, struct.pack("<Q", 5), "a frame of stream 0 in stream 5"),
            (12, struct.pack("<I", 1), "out of order"),
            (16, struct.pack("<i", 0), "out of order"),
        ],
        ids=str,
    )
    def test_fields(self, data, offset, value, message):
        head = bytearray(data[:60])
        head[offset : offset + len(value)] = value
        assert_refused(bytes(head) + struct.pack("<I", zlib.crc32(head)) + data[64:], message)

    def test_version_comes_before_the_checksum(self, data):
        """A later version may have another header."""
        assert_refused(data[:8] + b"\2\0" + bytes(54) + data[64:], "format version 2")

    def test_what_is_no_stream(self):
        for junk in (b"", b"\0" * 1000, b"SPECTRKV" * 8, bytes(63), random.Random(0).randbytes(5000)):
            assert_refused(junk)


MODEL_CHANGES = {
    "model_type": {"family": "qwen2"},
    "num_hidden_layers": {"num_hidden_layers": 3},
    "num_key_value_heads": {"num_key_value_heads": 4},
    "head_dim": {"head_dim": 16},
}


@pytest.mark.parametrize("field", MODEL_CHANGES)
def test_other_models(data, field):
    base = {"head_dim": 8, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "family": "llama"}
    changes = {**base, **MODEL_CHANGES[field]}
    with pytest.raises(WireError, match="a cache of another model") as caught:
        SpectrumCache.deserialize(data, config=config(changes.pop("family"), **changes))
    assert "in config" in str(caught.value)


def test_another_rope(data):
    other = type(CONFIG)(**{**CONFIG.to_dict(), "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    with pytest.raises(WireError, match="another model: rope_parameters.rope_theta is 10000.0, in config 500000.0"):
        SpectrumCache.deserialize(data, config=other)


def edited(name, value):
    def edit(metadata):
        assert name in metadata
        metadata[name] = value

    return edit


def policy(**changes):
    return lambda metadata: metadata["policy"].update(changes)


HEADER_EDITS = {
    "unknown codec": (edited("codec", "gzip"), "unknown codec 'gzip'"),
    "codec of no text": (edited("codec", ["spectrum"]), "field 'codec'"),
    "negative batch": (edited("batch", -1), "field 'batch' is -1"),
    "huge batch": (edited("batch", 2**40), "field 'batch'"),
    "batch as a flag": (edited("batch", True), "field 'batch' is True"),
    "huge length": (edited("length", 2**31), "field 'length'"),
    "length as a fraction": (edited("length", 15.0), "field 'length' is 15.0"),
    "other length": (edited("length", 14), "field 'length' is 15, expected 14"),
    "other batch": (edited("batch", 3), "has shape"),
    "unknown policy": (policy(name="best"), "unknown policy 'best'"),
    "policy without a field": (lambda m: m["policy"].pop("seed"), "no field 'seed'"),
    "policy with a field more": (policy(evil=1), "unknown fields in the metadata: \\['evil'\\]"),
    "budget out of range": (policy(budget=0.1), "serves budgets"),
    "window of no number": (policy(recent_window="64"), "recent_window"),
    "window as a flag": (policy(recent_window=True), "recent_window"),
    "unknown importance": (policy(importance="magic"), "importance is one of"),
    "negative decay": (policy(decay=-1.0), "decay"),
    "policy as a list": (edited("policy", []), "field 'policy'"),
    "a layer less": (lambda m: m["layers"].pop(), "1 layers, where the config has 2"),
    "another class": (edited("layers", ["SpectrumLayer", "DynamicLayer"]), "layer 1 is 'DynamicLayer'"),
    "classes of no text": (edited("layers", [1, {}]), "layer 0 is 1, where"),
    "a field more": (lambda m: m.update(more=1), "unknown fields"),
    "a field less": (lambda m: m.pop("model"), "no field 'model'"),
}


@pytest.mark.parametrize("case", HEADER_EDITS)
def test_header_frames(data, case):
    edit, message = HEADER_EDITS[case]
    frames = split(data)
    frames[0] = forged(frames[0], edit)
    assert_refused(b"".join(frames), message)


def described(name, field, value):
    def describe(entries):
        assert name in entries
        if field is None:
            entries[name] = value
        else:
            entries[name][field] = value

    return describe


def renamed(name, other):
    return lambda entries: entries.update({other: entries.pop(name)})


def poked(name, value, dtype, at=0):
    """Tensors' bytes with the first number of one replaced, or the one at `at`."""

    def data(entries, raw):
        begin = entries[name]["data_offsets"][0] + at * dtype.itemsize
        number = torch.tensor([value], dtype=dtype).view(torch.uint8).numpy().tobytes()
        raw[begin : begin + len(number)] = number
        return raw

    return data


def map_of(heads):
    """Another tier map behind all other tensors, for so many heads."""

    def data(entries, raw):
        entries["old"], size = entries["map"], 2 * heads * 4
        entries["map"] = {"dtype": "U8", "shape": [2, heads, 4], "data_offsets": [len(raw), len(raw) + size]}
        return raw + bytes(size)

    return data


def replaced(text, by):
    return lambda encoded: encoded.replace(text, by, 1)


def nested(depth):
    return lambda encoded: b'{"x":' + b"[" * depth + b"]" * depth + b"}"


ESCAPED = b'"__metadata__":{"spectrumkv":"{'
LAYER_EDITS = {
    # Metadata
    "another layer": ({"edit": edited("layer", 1)}, "field 'layer' is 1"),
    "another class": ({"edit": edited("class", "DynamicLayer")}, "field 'class'"),
    "a window": ({"edit": edited("window", 7)}, "a window of 7"),
    "records a past": ({"edit": edited("record_past", True)}, "records no past"),
    "tail before its start": ({"edit": edited("tail_start", 16)}, "'tail_start' is 16, not from 0 to 15"),
    "another tail": ({"edit": edited("tail_start", 12)}, "tensor 'tail.keys' has shape"),
    "gone tokens": ({"edit": edited("first_kept", 1)}, "tokens before 1 are gone"),
    "drops as a number": ({"edit": edited("drops", 1)}, "field 'drops'"),
    "unknown tiers": ({"edit": edited("tiers", [16, 8, 5])}, "tiers are some of"),
    "another tier": ({"edit": edited("tiers", [16, 8, 2])}, "no tensor 'int2.keys.codes'"),
    "tiers twice": ({"edit": edited("tiers", [16, 8, 8])}, "tiers are some of"),
    "tiers in another order": ({"edit": edited("tiers", [8, 16, 4])}, "tiers are some of"),
    "tiers of no number": ({"edit": edited("tiers", [16, {}, 4])}, "tiers are some of"),
    "a tier less": ({"edit": edited("tiers", [16, 8])}, "tier map are in no tier|unknown tensors"),
    "no tiers": ({"edit": edited("tiers", [])}, "no tier"),
    "not initialised": ({"edit": edited("initialized", False)}, "unknown fields"),
    "a field more": ({"edit": lambda m: m.update(x=1)}, "unknown fields"),
    # Descriptions of tensors
    "huge shape": ({"describe": described("mean", "shape", [2**47, 2**47, 8])}, "does not fill"),
    "shape beyond all": ({"describe": described("mean", "shape", [2**60, 2, 8])}, "integer out of range"),
    "negative shape": ({"describe": described("mean", "shape", [-2, -2, 8])}, "tensor 'mean' has shape"),
    "shape of flags": ({"describe": described("mean", "shape", [True, 4, 8])}, "tensor 'mean' has shape"),
    "shape of many": ({"describe": described("mean", "shape", [1] * 500)}, "tensor 'mean' has shape"),
    "no shape": ({"describe": described("mean", "shape", None)}, "tensor 'mean' has shape"),
    "another shape": ({"describe": described("mean", "shape", [4, 8])}, "tensor 'mean' has shape \\(4, 8\\)"),
    "offsets backwards": ({"describe": described("mean", "data_offsets", [128, 0])}, "does not fill"),
    "offsets beyond": ({"describe": described("mean", "data_offsets", [10**6, 10**6 + 128])}, "overlap, hole"),
    "offsets overlap": ({"describe": described("mean", "data_offsets", [1, 129])}, "overlap, hole"),
    "one offset": ({"describe": described("mean", "data_offsets", [0])}, "tensor 'mean' has shape"),
    "unknown dtype": ({"describe": described("mean", "dtype", "F8_E4M3")}, "dtype 'F8_E4M3'"),
    "dtype of no text": ({"describe": described("mean", "dtype", [])}, "dtype"),
    "description of no object": ({"describe": described("mean", None, 3)}, "is described by 3"),
    "a tensor less": ({"describe": lambda d: d.pop("mean")}, "overlap, hole|tensors fill"),
    "tail in another dtype": ({"describe": described("tail.keys", "dtype", "BF16")}, "torch.bfloat16"),
    "unknown name": ({"describe": renamed("mean", "average")}, "no tensor 'mean'"),
    "a hole at the end": ({"data": lambda d, raw: raw + bytes(64)}, "tensors fill"),
    "bytes missing": ({"data": lambda d, raw: raw[:-1]}, "tensors fill"),
    # JSON
    "duplicate tensor": ({"text": replaced(b'"mean":', b'"tail.keys":')}, "duplicate name in JSON: 'tail.keys'"),
    "duplicate field": (
        {"text": replaced(ESCAPED, ESCAPED + b'\\"drops\\":false,')},
        "duplicate name in JSON: 'drops'",
    ),
    "NaN in JSON": ({"text": replaced(b'\\"length\\":15', b'\\"length\\":NaN')}, "NaN in JSON"),
    "infinity in JSON": ({"text": replaced(b'\\"length\\":15', b'\\"length\\":1e999')}, "number out of range"),
    "digits": ({"text": replaced(b'\\"length\\":15', b'\\"length\\":' + b"9" * 9000)}, "integer out of range"),
    "no JSON": ({"text": lambda t: b"\xff" + t}, "no JSON"),
    "half a JSON": ({"text": lambda t: t[:-1]}, "no JSON"),
    "no object": ({"text": lambda t: b"[1]"}, "a JSON object was expected"),
    "deep JSON": ({"text": nested(100_000)}, "no JSON"),
    "no metadata": ({"describe": lambda d: d.pop("__metadata__")}, "no '__metadata__'"),
    "metadata of no text": ({"describe": lambda d: d.update(__metadata__={"spectrumkv": 1})}, "no '__metadata__'"),
    # Numbers
    "NaN scale": ({"data": poked("int4.keys.affine", torch.nan, torch.float16)}, "tensor 'int4.keys.affine' has NaN"),
    "infinite scale": ({"data": poked("int8.values.affine", torch.inf, torch.float16)}, "tensor 'int8.values.affine'"),
    "negative scale": ({"data": poked("int8.keys.affine", -1, torch.float16)}, "'int8.keys.affine' has scales below 0"),
    "NaN zero": ({"data": poked("int4.values.affine", torch.nan, torch.float16, 1)}, "tensor 'int4.values.affine'"),
    "infinite zero": ({"data": poked("int4.keys.affine", -torch.inf, torch.float16, 1)}, "tensor 'int4.keys.affine'"),
    "NaN mean": ({"data": poked("mean", torch.nan, torch.float32)}, "tensor 'mean' has NaN"),
    "negative padding": ({"data": poked("pads", -1, torch.int64)}, "paddings are not from 0 to 15"),
    "padding beyond": ({"data": poked("pads", 16, torch.int64)}, "paddings are not from 0 to 15"),
    # Positions: the map can name none twice and none out of range, but too many, too few or unknown tiers
    "too many FP16": ({"data": poked("map", 0, torch.uint8)}, "more tokens than it has"),
    "tokens of no tier": ({"data": poked("map", 0xFF, torch.uint8)}, "in no tier"),
    "map of three heads": ({"data": map_of(3)}, "the tier map is for 3 heads; the layer has 2"),
    "map of a million heads": ({"data": map_of(10**6)}, "the tier map is for 1000000 heads; the layer has 2"),
    "map of no heads": ({"data": map_of(0)}, "the tier map is for 0 heads; the layer has 2"),
}


def poked_frame(value, at):
    return {"data": poked("mean", value, torch.float32, at)}


def with_tensors(**changes):
    """Tensors put in the place of others, by name with `_` for `.`, or taken out by None; all others as they are."""

    def data(entries, raw):
        replaced = {name.replace("_", "."): tensor for name, tensor in changes.items()}
        out = b""
        for name in [name for name in entries if name != "__metadata__"]:
            begin, end = entries[name]["data_offsets"]
            part = raw[begin:end]
            if name in replaced and replaced[name] is None:
                del entries[name]
                continue
            if name in replaced:
                tensor = replaced[name]
                part = tensor.view(torch.uint8).numpy().tobytes()
                kind = {torch.uint8: "U8", torch.float16: "F16", torch.float32: "F32"}[tensor.dtype]
                entries[name].update(dtype=kind, shape=list(tensor.shape))
            entries[name]["data_offsets"] = [len(out), len(out) + len(part)]
            out += part
        return out

    return {"data": data}


BYTES, FLOATS = torch.uint8, torch.float32
SCALE_RANGE = "tensor 'mean' has scales that are not from 1e-29 to 2e\\+19"
SPECTRUM2_EDITS = {
    # The frame: the mean of 8 keys, their scales, the mean of 8 values, their scale
    "NaN in the mean": (poked_frame(torch.nan, 0), "tensor 'mean' has NaN"),
    "NaN key scale": (poked_frame(torch.nan, 8), "tensor 'mean' has NaN"),
    "infinite key scale": (poked_frame(torch.inf, 15), "tensor 'mean' has NaN or infinity"),
    "infinite mean of values": (poked_frame(-torch.inf, 16), "tensor 'mean' has NaN or infinity"),
    "key scale of 0": (poked_frame(0.0, 8), SCALE_RANGE),
    "key scale of -0": (poked_frame(-0.0, 15), SCALE_RANGE),
    "negative key scale": (poked_frame(-1.0, 15), SCALE_RANGE),
    "tiny key scale": (poked_frame(2.0**-97, 9), SCALE_RANGE),
    "huge key scale": (poked_frame(2.0**65, 9), SCALE_RANGE),
    "value scale of 0": (poked_frame(0.0, 24), SCALE_RANGE),
    "negative value scale": (poked_frame(-2.0, 99), SCALE_RANGE),
    "huge value scale": (poked_frame(1e38, 49), SCALE_RANGE),
    "no frame": (with_tensors(mean=None), "no tensor 'mean'"),
    "the mean alone": (with_tensors(mean=torch.ones(2, 2, 8)), r"'mean' has shape \(2, 2, 8\), not \(2, 2, 25\)"),
    "frame of halves": (with_tensors(mean=torch.ones(2, 2, 25).half()), "'mean' has dtype torch.float16"),
    # One-byte scales
    "scale of a half": (
        with_tensors(int4_keys_affine=torch.ones(2, 2, 2, 1).half()),
        "'int4.keys.affine' has dtype torch.float16, not torch.uint8",
    ),
    "scale and zero": (
        with_tensors(int4_values_affine=torch.ones(2, 2, 2, 2, dtype=BYTES)),
        r"'int4.values.affine' has shape \(2, 2, 2, 2\), not \(2, 2, 2, 1\)",
    ),
    "a scale less": (
        with_tensors(int3_keys_affine=torch.ones(2, 2, 2, 1, dtype=BYTES)),
        "'int3.keys.affine' has shape",
    ),
    # Codes of 3 and 2 bits
    "3-bit codes as of 4 bits": (
        with_tensors(int3_keys_codes=torch.ones(2, 2, 3, 4, dtype=BYTES)),
        "'int3.keys.codes'",
    ),
    "2-bit codes as of 4 bits": (
        with_tensors(int2_keys_codes=torch.ones(2, 2, 4, 4, dtype=BYTES)),
        "'int2.keys.codes'",
    ),
    "values of another number": (
        with_tensors(int2_values_codes=torch.ones(2, 2, 5, 2, dtype=BYTES)),
        "'int2.values.codes' has shape",
    ),
    # The map of 4 bits a token
    "a map of 2 bits": (with_tensors(map=torch.zeros(2, 2, 4, dtype=BYTES)), r"'map' has shape .*, not \(2, any, 7\)"),
    "too many in FP16": ({"data": poked("map", 0, BYTES, 2)}, "more tokens than it has"),
    "code behind the tiers": ({"data": poked("map", 0x05, BYTES)}, "in no tier"),
    "another unknown code": ({"data": poked("map", 0xE0, BYTES, 1)}, "in no tier"),
    "dropped without drops": ({"data": poked("map", 0xF2, BYTES, 2)}, "in no tier"),
    "tiers that need 2 bits only": ({"edit": edited("tiers", [16, 8, 4])}, "'map' has shape|unknown tensors"),
    "a nibble after the last token": ({"data": poked("map", 0x10, BYTES, 6)}, "bits after the tier map's last token"),
    "tiers in another order": ({"edit": edited("tiers", [16, 8, 4, 2, 3])}, "tiers are some of"),
}


@pytest.mark.parametrize("case", LAYER_EDITS)
def test_layer_frames(data, case):
    changes, message = LAYER_EDITS[case]
    frames = split(data)
    frames[1] = forged(frames[1], **changes)
    assert_refused(b"".join(frames), message, at=f"layer 0, at byte {len(frames[0])} of")


@pytest.mark.parametrize("case", SPECTRUM2_EDITS)
def test_layer_frames_of_spectrum2(data2, case):
    changes, message = SPECTRUM2_EDITS[case]
    frames = split(data2)
    frames[1] = forged(frames[1], **changes)
    assert_refused(b"".join(frames), message, at=f"layer 0, at byte {len(frames[0])} of")


@pytest.mark.parametrize(("at", "value"), [(8, 2.0**-96), (8, 2.0**64), (24, 2.0**-96), (24, 2.0**64), (0, -3e38)])
def test_frames_at_their_limits(data2, at, value):
    """They are sound, and what they stand for is finite in float32, if not in the model's dtype."""
    frames = split(data2)
    frames[1] = forged(frames[1], **poked_frame(value, at))
    store = read(resealed(b"".join(frames))).layers[0].store
    assert store.frame.flatten()[at] == value
    for arena in list(store.arenas.values())[1:]:
        both = decode(
            arena.keys, arena.values, arena.positions, arena.tier.bits, store.codec, store.frame, store.rotary
        )
        assert all(side.isfinite().all() for side in both)


@pytest.mark.parametrize("byte", [0, 1, 128, 254, 255])
def test_every_one_byte_scale_is_sound(data2, byte):
    frames = split(data2)
    frames[1] = forged(frames[1], data=poked("int2.keys.affine", byte, BYTES))
    cache = read(resealed(b"".join(frames)))
    assert cache.layers[0].keys.isfinite().all()


def test_absent_tokens_of_a_wide_map(data2):
    """15 stands for a token that is in no tier, where tokens were dropped."""
    frames = split(data2)
    frames[1] = forged(frames[1], edited("drops", True), data=poked("map", 0xF2, BYTES, 2))
    sent = resealed(b"".join(frames))
    store = read(sent).layers[0].store
    assert store.tier_map()[0, 0, 4:6].tolist() == [4, 0] and store.ragged
    assert read(sent).serialize().numpy().tobytes() == sent


@pytest.mark.parametrize(
    ("tier", "channels", "message"),
    [
        (INT3, 8, None),
        (INT3, 12, "int3.keys has 12 channels; codes of 3 bits need multiples of 8"),
        (INT2, 12, None),
        (INT2, 10, "int2.keys has 10 channels; codes of 2 bits need multiples of 4"),
    ],
)
@pytest.mark.parametrize("codec", CODECS)
def test_channels_that_codes_do_not_fill(tier, channels, message, codec):
    cache = SpectrumCache(CONFIG, codec=codec)
    layer = cache.layers[0]
    numbers, dtype = layer.codec.affine
    side = Quantized(
        torch.zeros(1, 2, 3, channels * tier.bits // 8, dtype=torch.uint8), torch.ones(1, 2, 3, numbers, dtype=dtype)
    )
    frame = torch.ones(1, 2, layer.codec.frame_size(channels, channels)) if layer.codec.center else None
    arena = Arena(tier, side, side, torch.arange(3, dtype=torch.int32).expand(1, 2, 3))
    tail = torch.zeros(1, 2, 0, channels).half()
    store = TieredStore.assemble(
        tail, tail, layer.codec, layer.rotary, length=3, tail_start=3, arenas=[arena], frame=frame
    )
    layer.adopt(store)
    sent = b"".join(split(cache.serialize().numpy().tobytes())[:2])
    if message is None:
        message = "the buffer ends here"  # and nothing was wrong before
    assert_refused(sent, message)


@pytest.mark.parametrize(("golden", "bits"), [("data", 0xC0), ("data2", 0xF0)])
def test_bits_after_the_map(request, golden, bits):
    def last(entries, raw):
        raw[entries["map"]["data_offsets"][1] - 1] |= bits
        return raw

    frames = split(request.getfixturevalue(golden))
    frames[1] = forged(frames[1], data=last)
    assert_refused(b"".join(frames), "bits after the tier map's last token")


@pytest.mark.parametrize("size", [2**64 - 1, 2**63, 2**32, 2**20 + 56, 10**4, 57, 0])
def test_safetensors_headers_of_false_length(data, size):
    frames = split(data)
    header, *_ = opened(frames[1])
    payload = bytearray(frames[1][64 : 64 + header.length])
    payload[:8] = struct.pack("<Q", size)
    frames[1] = sealed(header, bytes(payload))
    assert_refused(b"".join(frames), "a safetensors header of|no JSON", at="layer 0")


def test_tiny_payloads(data):
    frames = split(data)
    header, *_ = opened(frames[1])
    for payload in (b"", b"\0" * 7, payload_of(b"{}", b"")):
        assert_refused(frames[0] + sealed(header, payload), "has no safetensors header|no '__metadata__'")


def reordered(*first):
    """The tensors in another order, those of these names in front."""

    def data(entries, raw):
        names = [name for name in entries if name != "__metadata__"]
        out = b""
        for name in sorted(names, key=lambda name: first.index(name) if name in first else len(first)):
            begin, end = entries[name]["data_offsets"]
            entries[name]["data_offsets"] = [len(out), len(out) + end - begin]
            out += raw[begin:end]
        return out

    return data


class TestAlignment:
    """Kernels read pairs of scale and zero as words of 4 bytes, codes as words of 2, and more where they can."""

    @pytest.fixture
    def frames(self):
        """Of a cache whose tier maps have 2 bytes."""
        cache = SpectrumCache(
            CONFIG, policy="balanced", budget=0.4, recent_window=2, scope="layer", importance="recency"
        )
        for layer in cache.layers:
            layer.update(*(torch.randn(1, 2, 70, 8, generator=torch.Generator().manual_seed(3)).half() for _ in "kv"))
            layer.crop(-62)
        return split(cache.serialize().numpy().tobytes())

    @pytest.mark.parametrize("on_cpu", [True, False])
    def test_of_a_forged_payload(self, frames, monkeypatch, on_cpu):
        assert opened(frames[1])[1]["map"]["shape"] == [1, 1, 2]
        plain = read(b"".join(frames)).layers[0].store
        altered = forged(frames[1], data=reordered("mean", "map"))
        offsets = {name: entry["data_offsets"][0] for name, entry in opened(altered)[1].items() if name[0] != "_"}
        assert any(at % 4 == 2 for name, at in offsets.items() if name.endswith("affine")), offsets
        if not on_cpu:
            monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda tensor: False))
        store = read(resealed(b"".join([frames[0], altered, *frames[2:]]))).layers[0].store
        monkeypatch.undo()
        for (name, ours), (_, theirs) in zip(store.tensors(), plain.tensors(), strict=True):
            assert torch.equal(ours, theirs), name
            assert ours.data_ptr() % min(ours.nbytes & -ours.nbytes or 1, 64) == 0, name

    def test_what_lies_well_is_not_copied(self, frames):
        data = torch.frombuffer(bytearray(b"".join(frames)), dtype=torch.uint8).clone()
        inside = range(data.data_ptr(), data.data_ptr() + len(data))
        for name, tensor in read(data).layers[0].store.tensors():
            assert name.endswith("positions") or not tensor.numel() or tensor.data_ptr() in inside, name


class TestWithoutWaiting:
    """How a device's buffer is read: what would have to wait for it is checked at the end."""

    def read(self, data):
        later = Later()
        cache = _read(as_tensor(data), Assembler(SpectrumCache, CONFIG), later)
        later.settle()
        return cache

    @pytest.mark.parametrize("codec", GOLDEN_FILES)
    def test_as_on_a_device(self, codec, monkeypatch):
        """Every way that a device takes, on the CPU."""
        data = GOLDEN_FILES[codec].read_bytes()
        monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda tensor: False))
        assert golden_cache(codec).serialize().numpy().tobytes() == data
        cache = self.read(data)
        assert cache.serialize().numpy().tobytes() == data
        ours, theirs = read(data).layers[0].store, cache.layers[0].store
        assert ours.ragged == theirs.ragged
        for (name, a), (other, b) in zip(ours.tensors(), theirs.tensors(), strict=True):
            assert name == other and torch.equal(a, b)

    def test_damage(self, data, monkeypatch):
        monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda tensor: False))
        rng, damaged = random.Random(3), bytearray(data)
        for _ in range(300):
            byte, bit = rng.randrange(len(data)), rng.randrange(8)
            damaged[byte] ^= 1 << bit
            with pytest.raises(WireError):
                self.read(damaged)
            damaged[byte] ^= 1 << bit

    @pytest.mark.parametrize(
        ("golden", "changes", "message"),
        [
            *(("data", *LAYER_EDITS[name]) for name in LAYER_EDITS),
            *(("data2", *edit) for edit in SPECTRUM2_EDITS.values()),
        ],
        ids=[*LAYER_EDITS, *(f"spectrum2: {name}" for name in SPECTRUM2_EDITS)],
    )
    def test_checks(self, request, golden, changes, message, monkeypatch):
        monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda tensor: False))
        frames = split(request.getfixturevalue(golden))
        assembler, later = Assembler(SpectrumCache, CONFIG), Later()
        with pytest.raises(WireError, match=message):
            for frame in (frames[0], forged(frames[1], **changes)):
                whole = as_tensor(bytearray(frame))
                assembler._add(FrameHeader.parse(whole), whole[64:], later=later)
            later.settle()

    def test_nothing_is_settled_before_the_end(self, data):
        damaged = bytearray(data)
        damaged[len(b"".join(split(data)[:2])) - 1] ^= 1  # behind the first layer's tensors
        later = Later()
        assert _read(as_tensor(damaged), Assembler(SpectrumCache, CONFIG), later) is not None
        with pytest.raises(WireError, match="digest"):
            later.settle()


@pytest.mark.parametrize(("field", "value"), [("frames", 5), ("digest", "0" * 16), ("more", 1)])
def test_end_frames(data, field, value):
    frames = split(data)
    frames[3] = forged(frames[3], lambda metadata: metadata.update({field: value}))
    assert_refused(b"".join(frames), field)


def test_memory_stays_in_proportion(data):
    """Bombs must not make the reader allocate."""
    frames = split(data)
    bombs = [
        forged(frames[1], **LAYER_EDITS[case][0])
        for case in ("huge shape", "shape of many", "offsets beyond", "digits")
    ]
    read(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for bomb in bombs:
        tracemalloc.start()
        assert_refused(frames[0] + bomb)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024  # KiB; what tensors take counts here


def test_a_failure_leaves_other_caches_alone(data):
    cache = read(data)
    assembler = wire.Assembler(SpectrumCache, CONFIG)
    frames = split(data)
    assembler.feed(frames[0])
    with pytest.raises(WireError):
        assembler.feed(forged(frames[1], edited("layer", 1)))
    assert torch.equal(cache.serialize(), torch.frombuffer(bytearray(data), dtype=torch.uint8))
    assert FrameHeader.parse(data).kind == wire.Kind.HEADER
