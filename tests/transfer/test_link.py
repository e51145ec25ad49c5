"""Replies: what a sender takes for the answer to a frame, and a receiver's words where they fail."""

import pytest
from chaos import queue_ends, tensor
from wire_forge import CONFIG, golden_cache

from spectrumkv_hf.transfer import TransferError, recv_cache
from spectrumkv_hf.transfer.link import ACCEPTED, LOST, REFUSED, REPLY, pack_reply, unpack_reply
from spectrumkv_hf.transfer.transport import TransportError
from spectrumkv_hf.wire import WireError, frames

HEAD, OTHER = bytes(range(64)), bytes(64)


@pytest.mark.parametrize("status", [ACCEPTED, REFUSED])
def test_of_a_frame(status):
    reply = pack_reply(status, HEAD, "because")
    assert unpack_reply(reply, HEAD) == (status, "because")
    with pytest.raises(WireError, match="to another frame"):
        unpack_reply(reply, OTHER)


def test_of_a_head_that_can_not_be_read():
    """It is not the one that was sent."""
    assert unpack_reply(pack_reply(LOST, OTHER, "damaged"), HEAD) == (LOST, "damaged")


def test_flips():
    """No refusal turns into its opposite."""
    reply = pack_reply(REFUSED, HEAD, "because")
    for bit in range(8 * REPLY.size):
        changed = bytearray(reply)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError, match="damaged|SPKV|b'"):
            unpack_reply(bytes(changed), HEAD)


@pytest.mark.parametrize("size", [0, 511, 513])
def test_lengths(size):
    with pytest.raises(WireError, match=f"{size} bytes instead of 512"):
        unpack_reply(pack_reply(ACCEPTED, HEAD, "").ljust(size, b"\0")[:size], HEAD)


@pytest.mark.parametrize("ends", ["head", "payload", "reply"])
def test_a_refusal_outlives_the_connection(ends, monkeypatch):
    """Where the connection ends behind it, the receiver still says why it refused."""
    sender, receiver = queue_ends()
    damaged, *others = (frame.numpy().tobytes() for frame in frames(golden_cache()))
    for frame in (damaged[:-1] + b"!", *others):
        sender.send(tensor(frame), 1)
    name = {"head": "receive_head", "payload": "receive_payload"}.get(ends, ends)
    operation, count = getattr(receiver, name), iter(range(9))

    def once(*arguments):
        if next(count):
            raise TransportError("the connection ended")
        return operation(*arguments)

    monkeypatch.setattr(receiver, name, once)
    with pytest.raises(TransferError, match="frame 0.*its digest is wrong") as caught:
        recv_cache(receiver, CONFIG, timeout=1)
    assert not caught.value.group_usable and "the connection ended" in str(caught.value.__cause__)
