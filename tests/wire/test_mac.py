"""Frames with MACs: who has no key can make no bytes that are read, and who has one reads no others."""

import hashlib
import itertools
import mmap
import random
import struct
import zlib

import pytest
import torch
from families import model, prompt
from test_wire_patch import assert_unchanged, sides, snapshot
from wire_forge import CONFIG, forged, golden_cache, split

from spectrumkv_hf import SpectrumCache, cache_argument, wire
from spectrumkv_hf.wire import Assembler, Emitter, FrameHeader, KeyRefused, WireError
from spectrumkv_hf.wire import read as reading
from spectrumkv_hf.wire.mac import check_key, key_id, mac
from spectrumkv_hf.wire.patch import ExactCopy, request

KEY, OTHER = bytes(range(32)), b"another key of some length"
PLAIN = golden_cache().serialize().numpy().tobytes()
WRONG = r"its MAC is wrong|has a MAC of another key|has no MAC"


def read(data, key=KEY, **options):
    return SpectrumCache.deserialize(data, CONFIG, key=key, **options)


def is_golden(cache):
    return cache.serialize().numpy().tobytes() == PLAIN


@pytest.fixture(scope="module")
def keyed():
    return golden_cache().serialize(key=KEY).numpy().tobytes()


def assert_refused(data, message=WRONG, key=KEY, error=WireError):
    with pytest.raises(error, match=message):
        read(data, key)
    with pytest.raises(error, match=message):
        assembler = Assembler(SpectrumCache, CONFIG, key=key)
        for frame in split(data):
            assembler.feed(frame)
    assert assembler.expected is None  # and takes no more


# -- what is written --------------------------------------------------------------------------------------------------


def test_frames_by_the_document(keyed):
    """A reader that knows docs/wire-format.md only; but for flags, key, stream and MACs the bytes are those without."""
    at, macs, plain = 0, [], split(PLAIN)
    for index, frame in enumerate(plain):
        head = keyed[at : at + 64]
        end = at + len(frame)
        (flags, stream) = (struct.unpack_from("<I", head, 20)[0], struct.unpack_from("<Q", head, 40)[0])
        assert flags == 1 and head[48:56] == hashlib.blake2b(key=KEY, digest_size=8, person=b"key id").digest()
        assert zlib.crc32(head[:60]) == struct.unpack_from("<I", head, 60)[0]
        state = hashlib.blake2b(keyed[at:end], key=KEY, person=b"frame")
        if index == len(plain) - 1:
            state.update(b"".join(macs))
        macs.append(state.digest())
        assert keyed[end : end + 64] == macs[-1]
        alike = head[:20] + bytes(4) + head[24:40] + bytes(20)
        assert alike == frame[:60] and keyed[at + 64 : end] == frame[64:]
        assert stream == struct.unpack_from("<Q", keyed, 40)[0] != 0
        at = end + 64
    assert at == len(keyed)


def test_without_a_key_nothing_changes(tmp_path):
    cache = golden_cache()
    cache.save(tmp_path / "cache")
    written = [cache.serialize(), torch.cat(list(wire.frames(cache))), wire.serialize(cache, key=None)]
    assert [t.numpy().tobytes() for t in written] == [PLAIN] * 3 == [(tmp_path / "cache").read_bytes()] * 3


def test_streams_differ():
    """So that no frame of one can stand in another."""
    one, other = (golden_cache().serialize(key=KEY) for _ in range(2))
    assert not torch.equal(one, other)
    given = [wire.serialize(golden_cache(), stream=7, key=KEY) for _ in range(2)]
    assert torch.equal(*given) and FrameHeader.parse(given[0]).stream == 7


# -- every way there and back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, torch.tensor])
@pytest.mark.parametrize("key", [KEY, bytes(16), b"\xff" * 64], ids=len)
def test_buffers(kind, key):
    data = golden_cache().serialize(key=key).numpy().tobytes()
    given = torch.frombuffer(bytearray(data), dtype=torch.uint8) if kind is torch.tensor else kind(data)
    assert is_golden(read(given, key))
    assert is_golden(read(memoryview(bytes(3) + data)[3:], key))  # aligned to nothing


def test_into_a_given_buffer(keyed):
    out = torch.full((len(keyed) + 100,), 7, dtype=torch.uint8)
    written = wire.serialize(golden_cache(), out=out, key=KEY)
    assert written.data_ptr() == out.data_ptr() and len(written) == len(keyed) and (out[len(keyed) :] == 7).all()
    assert is_golden(read(written))
    with pytest.raises(ValueError, match=f"out is {len(keyed)} bytes"):
        wire.serialize(golden_cache(), out=out[: len(keyed) - 1], key=KEY)


@pytest.mark.parametrize("mapped", [True, False])
def test_files(tmp_path, mapped):
    path = tmp_path / "cache"
    golden_cache().save(path, key=KEY)
    assert is_golden(SpectrumCache.load(path, CONFIG, mmap=mapped, key=KEY))
    for key, message in ((None, "the reader has no key"), (OTHER, "a MAC of another key")):
        with pytest.raises(KeyRefused, match=f"the header frame|frame 0.*{message}"):
            SpectrumCache.load(path, CONFIG, mmap=mapped, key=key)
    golden_cache().save(path)
    with pytest.raises(KeyRefused, match="it has no MAC"):
        SpectrumCache.load(path, CONFIG, mmap=mapped, key=KEY)


def test_what_was_checked_is_what_is_used(tmp_path, keyed):
    """Who writes into a file after it was checked changes no cache: it is never mapped."""
    path = tmp_path / "cache"
    path.write_bytes(keyed)
    with path.open("r+b") as file:
        mapping = mmap.mmap(file.fileno(), 0)
        caches = [SpectrumCache.load(path, CONFIG, key=KEY), read(mapping)]
        file.write(bytes(len(keyed)))
        file.flush()
        assert not any(mapping[:64])
        assert all(map(is_golden, caches))


@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_streams(family):
    """Of a prefill, frame by frame, in buffers at any place."""
    m, frames = model(family), []
    cache = SpectrumCache(m.config, budget=0.3, recent_window=8)
    with Emitter(cache, frames.append, key=KEY), torch.no_grad():
        m(prompt(200), **cache_argument(cache))
    assert torch.equal(SpectrumCache.deserialize(torch.cat(frames), m.config, key=KEY).serialize(), cache.serialize())
    assembler, got = Assembler(SpectrumCache, m.config, key=KEY), None
    for frame in frames:
        assert got is None
        got = assembler.feed(frame.numpy().tobytes())
    assert torch.equal(got.serialize(), cache.serialize())
    with pytest.raises(KeyRefused, match="no key"):
        Assembler(SpectrumCache, m.config).feed(frames[0])


def test_frames_in_any_order_of_work():
    """A writer may make them in its own order, as long as the end comes last."""
    writer = wire.FrameWriter(golden_cache(), key=KEY)
    layers = [writer.layer(index) for index in (1, 0)]
    assert is_golden(read(torch.cat([writer.header(), layers[1], layers[0], writer.end()])))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_devices(device, keyed):
    """MACs are made on the host; what they are of may lie anywhere."""
    cache = read(keyed, device=device)
    data = cache.serialize(key=KEY)
    assert data.device.type == cache.layers[0].device.type == device
    assert is_golden(read(data.cpu())) and is_golden(read(data))
    assert torch.cat(list(wire.frames(cache, 7, KEY))).cpu().equal(wire.serialize(golden_cache(), 7, key=KEY))
    damaged = data.clone()
    damaged[-100] ^= 1
    with pytest.raises(WireError, match="its MAC is wrong"):
        read(damaged)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_every_byte_counts(keyed):
    """Also with all checksums right, as who has no key can make them."""
    rng, starts = random.Random(0), [0, *itertools.accumulate(map(len, split(keyed)))][:-1]
    for at in range(len(keyed)):
        data = bytearray(keyed)
        data[at] ^= 1 << rng.randrange(8)
        with pytest.raises(WireError):
            read(bytes(data))
        start = max(start for start in starts if start <= at)
        if at - start < 60:  # in a header, the digest being in there, under the MAC
            data[start + 60 : start + 64] = struct.pack("<I", zlib.crc32(data[start : start + 60]))
            with pytest.raises(WireError, match="MAC|truncated|no frame|version|kind|reserved|out of order|of stream"):
                read(bytes(data))


def test_every_cut(keyed):
    for size in [*range(200), *range(len(keyed) - 200, len(keyed)), *range(200, len(keyed), 97)]:
        with pytest.raises(WireError):
            read(keyed[:size])
    with pytest.raises(WireError, match="64 bytes behind the end frame"):
        read(keyed + bytes(64))


def with_mac_of(frame, other):
    return frame[:-64] + other[-64:]


def edited(frame, **changes):
    """A frame of other contents with right checksums, and the old MAC."""
    return forged(frame[:-64], **changes) + frame[-64:]


def as_plain(frame):
    """A frame that says it has no MAC."""
    head = bytearray(frame[:60])
    head[20:24], head[48:56] = bytes(4), bytes(8)
    return bytes(head) + struct.pack("<I", zlib.crc32(head)) + frame[64:-64]


def test_forged(keyed):
    """Contents under right checksums, MACs of other frames, none at all."""
    frames = split(keyed)
    header, layer, other, end = frames
    other_data = lambda _, raw: raw[:-1] + bytes([raw[-1] ^ 1])  # noqa: E731
    for altered in (
        [header, edited(layer, data=other_data), other, end],
        [header, with_mac_of(layer, other), other, end],
        [header, layer, other, with_mac_of(end, header)],
        [edited(header, edit=lambda metadata: metadata["policy"].update(budget=0.4)), layer, other, end],
        [header, as_plain(layer), other, end],
        [as_plain(frame) for frame in frames],
        [*frames[:3], as_plain(end)],
        [header, layer[:-64] + mac(OTHER, b"frame", layer[:-64]), other, end],
        [header, layer[:-64] + mac(None, b"frame", layer[:-64]), other, end],
        [header, layer[:-64] + bytes(64), other, end],
    ):
        assert_refused(b"".join(altered))


def test_frames_in_another_place(keyed):
    """Moved, left out, doubled: of one stream, and of others with the same key."""
    frames, others = split(keyed), split(golden_cache("spectrum2").serialize(key=KEY).numpy().tobytes())
    twins = split(golden_cache().serialize(key=KEY).numpy().tobytes())
    for order in ([0, 2, 3], [0, 1, 3], [0, 1, 1, 2, 3], [1, 0, 2, 3], [0, 2, 1, 3], [0, 1, 2, 2], [3]):
        assert_refused(b"".join(frames[i] for i in order), "out of order")
    for theirs in (others, twins):
        for at in range(4):
            mixed = [*frames[:at], theirs[at], *frames[at + 1 :]]
            assert_refused(b"".join(mixed), "a frame of stream")


def test_streams_of_one_number():
    """The end frame's MAC has all others in it, whatever their number and their checksums say."""
    caches = [golden_cache() for _ in range(2)]
    caches[1].layers[0].store.tail[0].add_(1)
    one, other = (split(wire.serialize(cache, stream=5, key=KEY).numpy().tobytes()) for cache in caches)
    assert one[1] != other[1]
    with pytest.raises(WireError, match="its MAC is wrong"):
        read(b"".join([one[0], other[1], *one[2:]]))


def test_nothing_is_read_before_the_mac(keyed, monkeypatch):
    """Of a frame that is refused, not even its JSON."""
    frames = split(keyed)
    read_frames = []
    original = reading.read_payload
    monkeypatch.setattr(
        reading, "read_payload", lambda header, *rest: read_frames.append(header.index) or original(header, *rest)
    )
    for at, frame in enumerate(frames):
        read_frames.clear()
        damaged = frame[:100] + bytes([frame[100] ^ 1]) + frame[101:]
        with pytest.raises(WireError, match="its MAC is wrong"):
            read(b"".join([*frames[:at], damaged, *frames[at + 1 :]]))
        assert read_frames == list(range(at))


def test_the_wrong_key(keyed):
    assert_refused(keyed, "a MAC of another key", OTHER, KeyRefused)
    assert_refused(keyed, "it has a MAC, and the reader has no key to check it", None, KeyRefused)
    assert_refused(PLAIN, "it has no MAC", KEY, KeyRefused)
    for near in (KEY[:-1], KEY + b"\0", KEY[:-1] + b"\0"):
        assert_refused(keyed, "a MAC of another key", near, KeyRefused)


# -- patches ----------------------------------------------------------------------------------------------------------


def test_patches():
    cache, copy, _ = sides(model("llama"), (140, 130))
    twin, other, _ = sides(model("llama"), (140, 130))
    asked = request(cache, 1, "int8", positions=range(60), key=KEY)
    cache.apply_patch(copy.patch(asked, KEY), key=KEY)
    twin.apply_patch(other.patch(request(twin, 1, "int8", positions=range(60))))
    assert torch.equal(cache.serialize(), twin.serialize())


@pytest.mark.parametrize("kind", ["patch", "request"])
def test_patches_are_refused(kind):
    cache, copy, _ = sides(model("llama"), (140, 130))
    plain = request(cache, 1, "fp16", positions=range(60, 64))
    asked = request(cache, 1, "fp16", positions=range(60, 64), key=KEY)
    frame, unkeyed, target = asked, plain, copy.patch
    if kind == "patch":
        frame, unkeyed = copy.patch(asked, KEY), copy.patch(plain)
        target = lambda data, key: cache.apply_patch(data, key=key)  # noqa: E731
    frame, before, rng = frame.numpy().tobytes(), snapshot(cache), random.Random(0)
    for at in range(len(frame)):
        damaged = bytearray(frame)
        damaged[at] ^= 1 << rng.randrange(8)
        with pytest.raises(WireError):
            target(damaged, KEY)
    elsewhere = bytearray(frame)
    elsewhere[16] = 0  # the layer
    elsewhere[60:64] = struct.pack("<I", zlib.crc32(elsewhere[:60]))
    for data, key, message in (
        (frame, None, "it has a MAC, and the reader has no key"),
        (frame, OTHER, f"{kind} for layer 1: it has a MAC of another key"),
        (unkeyed, KEY, f"{kind} for layer 1: it has no MAC"),
        (as_plain(frame), KEY, "it has no MAC"),
        (forged(frame[:-64], edit=lambda metadata: metadata.update(base="0" * 16)) + frame[-64:], KEY, "MAC is wrong"),
        (elsewhere, KEY, f"{kind} for layer 0: its MAC is wrong"),
        (frame[:-64], KEY, "bytes of payload and MAC"),
        (frame + bytes(64), KEY, "bytes of payload and MAC"),
    ):
        with pytest.raises(WireError, match=message):
            target(data, key)
    assert_unchanged(cache, before)
    target(frame, KEY)


# -- keys -------------------------------------------------------------------------------------------------------------

NO_KEYS = {
    "15 bytes": b"k" * 15,
    "65 bytes": b"k" * 65,
    "0 bytes": b"",
    "str": "k" * 32,
    "int": 16,
    "bytearray": bytearray(32),
    "memoryview": memoryview(bytes(32)),
    "bool": False,
}


@pytest.mark.parametrize("given", NO_KEYS)
def test_no_keys(given, tmp_path):
    """Every way says what was given and what a key is, and does nothing."""
    key, cache = NO_KEYS[given], golden_cache()
    path = tmp_path / "cache"
    golden_cache().save(path)
    for use in (
        lambda: cache.serialize(key=key),
        lambda: read(PLAIN, key),
        lambda: cache.save(tmp_path / "new", key=key),
        lambda: SpectrumCache.load(path, CONFIG, key=key),
        lambda: next(wire.frames(cache, key=key)),
        lambda: Emitter(cache, print, key=key),
        lambda: Assembler(SpectrumCache, CONFIG, key=key),
        lambda: request(cache, 0, "fp16", key=key),
        lambda: ExactCopy(SpectrumCache(CONFIG)).patch(PLAIN, key),
        lambda: cache.apply_patch(PLAIN, key=key),
    ):
        with pytest.raises(ValueError, match=f"^key is 16 to 64 bytes, or None, got {given}$"):
            use()
    assert list(tmp_path.iterdir()) == [path] and is_golden(cache)


def test_checks_of_keys():
    assert check_key(None) is None and check_key(KEY) == KEY
    assert key_id(None) == bytes(8) and len({key_id(key) for key in (KEY, OTHER, KEY + b"\0", None)}) == 4
    assert mac(KEY, b"one", b"a", b"bc") == mac(KEY, b"one", b"abc") != mac(KEY, b"two", b"abc")
