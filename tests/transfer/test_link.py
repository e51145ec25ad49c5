"""Replies: what a sender takes for the answer to a frame."""

import pytest

from spectrumkv_hf.transfer.link import ACCEPTED, LOST, REFUSED, REPLY, pack_reply, unpack_reply
from spectrumkv_hf.wire import WireError

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
