"""Transfers by a key: who has none on the way can make no cache of another, and none that was sent before."""

import functools
import re
import threading
import zlib

import chaos
import families
import pytest
import torch
from chaos import queue_ends
from families import prompt
from pairs import PATIENCE, peer
from wire_forge import forged

from spectrumkv_hf import SpectrumCache, cache_argument, wire
from spectrumkv_hf.transfer import CacheReceiver, CacheSender, TransferError, recv_cache, send_cache
from spectrumkv_hf.transfer.link import (
    ACCEPTED,
    LOST,
    REFUSED,
    REPLY,
    STOP,
    pack_reply,
    pack_stop,
    session_key,
    unpack_reply,
    unpack_stop,
)
from spectrumkv_hf.wire import FrameHeader, Kind, WireError

KEY, OTHER = b"k" * 32, b"o" * 16
HEAD = bytes(range(64))
QUICK = 0.3
"""Seconds of waits that are to fail."""


@functools.cache
def model():
    return families.model("llama")


def filled(seed=0):
    cache = SpectrumCache(model().config, "sink_protect", 0.3)
    with torch.no_grad():
        model()(prompt(100, seed=seed), **cache_argument(cache))
    return cache


@functools.cache
def sent():
    """The cache that goes over, and the bytes that it must be at the other end."""
    return filled(), filled().serialize().numpy().tobytes()


def both(sender, receiver, key=KEY, other=KEY):
    """What becomes of both sides of a transfer."""
    sides = {}
    cache, _ = sent()

    def send():
        sides["sent"] = chaos.send_side(cache, sender, PATIENCE, key=key)

    thread = threading.Thread(target=send)
    thread.start()
    sides["received"] = chaos.receive_side(model().config, receiver, PATIENCE, other)
    thread.join()
    return sides["sent"], sides["received"]


def assert_failed(side, message, usable=None):
    assert isinstance(side.error, TransferError) and re.search(message, str(side.error)), side
    assert usable is None or side.error.group_usable == usable


def assert_succeeded(sides):
    assert [side.error for side in sides] == [None, None] and sides[1].result == sent()[1]


# -- every transport --------------------------------------------------------------------------------------------------


def send_both_ways():
    """Whole and streamed; the cache's bytes, and those on the way."""
    cache = filled()
    report = send_cache(cache, peer(), timeout=PATIENCE, key=KEY)
    other = SpectrumCache(model().config, "sink_protect", 0.3)
    with CacheSender(other, peer(), timeout=PATIENCE, key=KEY) as sender, torch.no_grad():
        model()(prompt(100), **cache_argument(other))
    assert report.frames == sender.report.frames == len(cache.layers) + 3
    return cache.serialize().clone(), [report.bytes, sender.report.bytes]


def receive_both_ways():
    receivers = [CacheReceiver(peer(), model().config, timeout=PATIENCE, key=KEY) for _ in range(2)]
    caches = [receiver.receive().serialize().clone() for receiver in receivers]
    return caches, [receiver.report.bytes for receiver in receivers]


def test_round_trip(pair):
    """A greeting of 192 bytes goes ahead, and each frame has 64 more."""
    (data, there), (received, here), _ = pair(send_both_ways, receive_both_ways)
    assert all(torch.equal(data, each) for each in received)
    assert there == here == [len(data) + 192 + 4 * 64] * 2


def send_to_another_key(key):
    with pytest.raises(TransferError) as caught:
        send_cache(filled(), peer(), timeout=PATIENCE, key=key)
    return str(caught.value)


def receive_by_another_key(key):
    with pytest.raises(TransferError) as caught:
        recv_cache(peer(), model().config, timeout=PATIENCE, key=key)
    return str(caught.value)


KEYS = {
    "no receiver's": (
        KEY,
        None,
        "without a MAC, and this side has a key: .*has no key to check",
        "has no key to check",
    ),
    "no sender's": (None, KEY, "with a MAC, and this side has no key: .*it has no MAC", "it has no MAC"),
    "two": (KEY, OTHER, "with a wrong MAC: it has another key", "it has a MAC of another key"),
}


@pytest.mark.parametrize("case", KEYS)
def test_keys_that_differ(pair, case):
    """Both sides say why."""
    key, other, message, answer = KEYS[case]
    texts = pair(functools.partial(send_to_another_key, key), functools.partial(receive_by_another_key, other))
    assert re.search(message, texts[0]) and re.search(answer, texts[1]), texts


# -- somebody in between ----------------------------------------------------------------------------------------------


class Between:
    """A connection on which somebody sees all frames and replies, and puts others in their place.

    Args:
        frame, reply: Take the number of one, and it; give what arrives.
    """

    def __init__(self, frame=lambda number, frame: frame, reply=lambda number, reply: reply):
        self.frames, self.replies = [], []
        self.sender, self.receiver = queue_ends()
        send, answer = self.sender.send, self.receiver.reply

        def altered_send(sent, timeout):
            self.frames.append(sent.numpy().tobytes())
            send(chaos.tensor(frame(len(self.frames) - 1, self.frames[-1])), timeout)

        def altered_reply(said, timeout):
            self.replies.append(said)
            answer(reply(len(self.replies) - 1, said), timeout)

        self.sender.send, self.receiver.reply = altered_send, altered_reply

    def transfer(self, key=KEY, other=KEY):
        return both(self.sender, self.receiver, key, other)


@functools.cache
def recorded():
    """Frames and replies of a transfer by the key, greeting first."""
    between = Between()
    assert_succeeded(between.transfer())
    return between.frames, between.replies


def test_what_goes_over():
    frames, replies = recorded()
    heads = [FrameHeader.parse(frame) for frame in frames]
    assert [head.kind for head in heads] == [Kind.GREETING, Kind.HEADER, Kind.LAYER, Kind.LAYER, Kind.END]
    assert len({head.key_id for head in heads[1:]}) == 1 and heads[0].key_id != heads[1].key_id
    status, drawn = unpack_reply(replies[0], frames[0][:64], KEY)
    session = session_key(KEY, frames[0][:64], drawn)
    assert (status, len(drawn)) == (ACCEPTED, 32)
    assert [unpack_reply(r, f[:64], session) for r, f in zip(replies[1:], frames[1:], strict=True)] == [(0, "")] * 4
    stream = b"".join(frames[1:])
    assert SpectrumCache.deserialize(stream, model().config, key=session).serialize().numpy().tobytes() == sent()[1]


@pytest.mark.parametrize("at", range(1, 5))
def test_frames_of_another_transfer(at):
    """Each is refused at once, where it was put in; the sender hears that another frame was answered than its own."""
    frames, _ = recorded()
    between = Between(frame=lambda number, frame: frames[at] if number == at else frame)
    mine, theirs = between.transfer()
    place = ["", "frame 0", "layer 0", "layer 1", "frame 3"][at]
    assert_failed(theirs, f"{place}.*it has a MAC of another key")
    assert_failed(mine, "replied to another frame")


@pytest.mark.parametrize("alter", ["earlier", "repeated", "other place"])
def test_frames_of_this_transfer_elsewhere(alter):
    held = []

    def frame(number, data):
        held.append(data)
        if number != 3:
            return data
        if alter != "other place":
            return held[1 if alter == "earlier" else 2]
        head = FrameHeader.parse(data)  # as what it is not, under right checksums
        moved = FrameHeader(**{**vars(FrameHeader.parse(held[2])), "index": head.index, "layer": head.layer})
        return moved.pack() + held[2][64:]

    mine, theirs = Between(frame=frame).transfer()
    assert_failed(theirs, "out of order|its MAC is wrong")
    assert mine.error is not None


def test_a_whole_transfer_again():
    """To a receiver that waits for one: greeting, frames and all; it draws another number."""
    frames, _ = recorded()
    sender, receiver = queue_ends()
    for frame in frames:
        sender.send(chaos.tensor(frame), QUICK)
    with pytest.raises(TransferError, match="it has a MAC of another key"):
        recv_cache(receiver, model().config, timeout=QUICK, key=KEY)


@pytest.mark.parametrize("greeted", [False, True])
def test_a_file_is_no_transfer(greeted):
    """Bytes that were written by the same key do not pass for a stream, nor with a greeting of another one ahead."""
    frames = [frame.numpy().tobytes() for frame in wire.frames(sent()[0], key=KEY)]
    sender, receiver = queue_ends()
    for frame in [recorded()[0][0]] * greeted + frames:
        sender.send(chaos.tensor(frame), QUICK)
    message = "it has a MAC of another key" if greeted else "a transfer by key begins with a greeting"
    with pytest.raises(TransferError, match=message):
        recv_cache(receiver, model().config, timeout=QUICK, key=KEY)


def test_no_part_of_the_connection_without_a_mac():
    """None of these frames or replies may say that it has none."""

    def plain(frame):
        head = FrameHeader(**{**vars(FrameHeader.parse(frame)), "key_id": bytes(8)})
        return head.pack() + frame[64:-64]

    for at in range(5):
        between = Between(frame=lambda number, frame, at=at: plain(frame) if number == at else frame)
        mine, theirs = between.transfer()
        assert_failed(theirs, "it has no MAC")
        assert mine.error is not None
    for at in range(5):
        accepted = lambda number, reply, at=at: pack_reply(ACCEPTED, HEAD, "") if number == at else reply  # noqa: E731
        mine, _ = Between(reply=accepted).transfer()
        assert_failed(mine, "replied without a MAC, and this side has a key", usable=False)


def damaged(frame):
    """Other contents under right checksums."""
    return forged(frame[:-64], data=lambda _, raw: raw[:-1] + bytes([raw[-1] ^ 1])) + frame[-64:]


@pytest.mark.parametrize("at", [2, 3])
def test_forged_frames(at):
    """What only the MAC finds, and what is refused like any damage: both know why, and the connection serves on."""
    mine, theirs = Between(frame=lambda number, frame: damaged(frame) if number == at else frame).transfer()
    assert_failed(theirs, f"layer {at - 2}.*its MAC is wrong")
    assert_failed(mine, "replied to another frame")
    flipped = lambda number, frame: frame[:-1] + bytes([frame[-1] ^ 1]) if number == at else frame  # noqa: E731
    between = Between(frame=flipped)
    mine, theirs = between.transfer()
    for side in (mine, theirs):
        assert_failed(side, f"layer {at - 2}.*its MAC is wrong", usable=True)
    between.frames = [b""] * 9  # let the next one pass
    assert_succeeded(between.transfer())


def test_a_refusal_does_not_become_its_opposite():
    """Nor is a reply taken for another's, nor one of another transfer."""
    _, replies = recorded()
    for at in range(5):
        between = Between(
            frame=lambda number, frame: damaged(frame) if number == 2 else frame,
            reply=lambda number, reply, at=at: accepting(reply) if number == at else reply,
        )
        mine, theirs = between.transfer()
        assert mine.error is not None and theirs.error is not None
    for at in range(5):
        mine, _ = Between(reply=lambda number, reply, at=at: replies[at] if number == at else reply).transfer()
        assert_failed(mine, "with a wrong MAC|to another frame")
    held = []
    mine, _ = Between(reply=lambda number, reply: held.append(reply) or held[max(number - 1, 0)]).transfer()
    assert_failed(mine, "to another frame|with a wrong MAC")


def accepting(reply):
    """It with another status, under a right checksum."""
    changed = reply[:8] + bytes([ACCEPTED if reply[8] == REFUSED else REFUSED]) + reply[9:-4]
    return changed + zlib.crc32(changed).to_bytes(4, "little")


def test_a_stop_of_somebody_else():
    """It ends a transfer, as who can write on a connection always can, but not in the sender's name."""
    stops = [pack_stop(1, "I am the sender", key) for key in (None, OTHER, KEY)]
    for stop in stops:  # before the third frame, when another key than the shared one is in force
        _, theirs = Between(frame=lambda number, frame, stop=stop: stop if number == 2 else frame).transfer()
        assert_failed(theirs, "a stop with a wrong MAC, or none", usable=False)
        assert "I am the sender" not in str(theirs.error)


def test_a_sender_that_gives_up():
    """Before and behind the greeting: the receiver hears it, and the connection serves on."""
    for layers in (0, 1):
        sender, receiver = queue_ends()
        cache = SpectrumCache(model().config, "sink_protect", 0.3)
        sides = []
        thread = threading.Thread(
            target=lambda receiver=receiver, sides=sides: sides.append(
                chaos.receive_side(model().config, receiver, PATIENCE, KEY)
            )
        )
        thread.start()
        with pytest.raises(ArithmeticError), CacheSender(cache, sender, timeout=PATIENCE, key=KEY):
            if layers:
                with torch.no_grad():
                    model()(prompt(100), **cache_argument(cache))
            raise ArithmeticError("no more")
        thread.join()
        assert_failed(sides[0], "gave up before .*: ArithmeticError: no more", usable=True)
        assert_succeeded(both(sender, receiver))


def test_two_transfers_over_one_connection():
    """Each draws a number of its own."""
    sender, receiver = queue_ends()
    assert_succeeded(both(sender, receiver))
    assert_succeeded(both(sender, receiver))


# -- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [ACCEPTED, REFUSED, LOST])
def test_replies(status):
    reply = pack_reply(status, HEAD, "because", KEY)
    assert len(reply) == REPLY.size and unpack_reply(reply, HEAD, KEY) == (status, "because")
    for bit in range(8 * len(reply)):
        changed = bytearray(reply)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError):
            unpack_reply(bytes(changed), HEAD, KEY)
        changed[-4:] = zlib.crc32(changed[:-4]).to_bytes(4, "little")
        if changed != reply:
            with pytest.raises(WireError, match="MAC|b'"):
                unpack_reply(bytes(changed), HEAD, KEY)
    for key in (None, OTHER):
        with pytest.raises(WireError, match="MAC"):
            unpack_reply(reply, HEAD, key)
        with pytest.raises(WireError, match="MAC"):
            unpack_reply(pack_reply(status, HEAD, "because", key), HEAD, KEY)


def test_long_reasons():
    """What a reply has no room for is cut, with a key a little earlier."""
    lengths = [len(unpack_reply(pack_reply(REFUSED, HEAD, "x" * 1000, key), HEAD, key)[1]) for key in (None, KEY)]
    assert lengths == [489, 457]


def test_stops():
    stop = pack_stop(3, "because", KEY)
    assert len(stop) == STOP.size and unpack_stop(stop, KEY) == unpack_stop(stop) == "because"
    for at in range(len(stop)):
        changed = bytearray(stop)
        changed[at] ^= 1
        with pytest.raises(WireError, match="a stop with a wrong MAC, or none"):
            unpack_stop(bytes(changed), KEY)
    for other in (pack_stop(3, "because"), pack_stop(3, "because", OTHER)):
        with pytest.raises(WireError, match="a stop with a wrong MAC, or none"):
            unpack_stop(other, KEY)


@pytest.mark.parametrize(("key", "given"), [(b"short", "5 bytes"), ("k" * 32, "str"), (bytearray(32), "bytearray")])
def test_no_keys(key, given):
    """Nothing is sent, and no thread begun."""
    sender, receiver = queue_ends()
    before = threading.active_count()
    for use in (
        lambda: send_cache(sent()[0], sender, key=key),
        lambda: CacheSender(SpectrumCache(model().config), sender, key=key),
        lambda: recv_cache(receiver, model().config, key=key),
        lambda: CacheReceiver(receiver, model().config, key=key),
    ):
        with pytest.raises(ValueError, match=f"^key is 16 to 64 bytes, or None, got {given}$"):
            use()
    assert threading.active_count() == before and receiver._incoming.empty()
