"""Messages of a transfer: frames with bounded room and a reply to each, no wait without a timeout.

Where both sides have a key, a greeting goes ahead of the frames, and the reply to it has a number that the receiver has
drawn. From key, greeting and number both derive the key of this transfer, which all further messages have MACs of:
nothing that was recorded in another transfer, nor the whole of it, passes for part of this one.
"""

import hashlib
import secrets
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

from spectrumkv_hf import wire
from spectrumkv_hf.spectrum_cache import SpectrumCache
from spectrumkv_hf.transfer.transport import HEAD_BYTES, SendingTransport, TransportError
from spectrumkv_hf.wire import WireError
from spectrumkv_hf.wire.frame import Kind, Place, host_bytes
from spectrumkv_hf.wire.mac import FrameMacs, check_key, is_same, mac
from spectrumkv_hf.wire.payload import Payload

REASON_BYTES = 489
SHORT_MAC = 32
"""Bytes of the MAC of stops and replies."""
STOP = struct.Struct(f"<8sIQ{SHORT_MAC}s12x{REASON_BYTES}s23x")
"""What a sender sends in place of a frame when it gives up: magic, bytes of the reason, the stream, with a key the MAC
of all before and behind it; as payload the reason."""
STOP_MAGIC = b"SPKVSTOP"
REPLY = struct.Struct(f"<8sBH8s{REASON_BYTES}sI")
"""What a receiver replies to every frame and to a stop: magic, status, bytes of the reason, BLAKE2b of the head that it
answers, the reason, CRC-32 of all before it. Without the hash every reply behind one that was lost, or came twice,
would pass for that of another frame; without the checksum a flipped bit would turn a refusal into its opposite. With a
key the last bytes of the reason's room are the MAC of all before them."""
REPLY_MAGIC, KEYED_REPLY_MAGIC = b"SPKVREPL", b"SPKVKEYR"
SIGNED = REPLY.size - 4 - SHORT_MAC
"""Where the MAC is in a reply with one."""
ACCEPTED, REFUSED, LOST = range(3)
"""Statuses: taken; refused, and the rest of the stream with it; a header from which nothing can go on."""


class TransferError(RuntimeError):
    """A transfer failed: the peer died, stalled, gave up, or sent damage. The sender's cache is as it was.

    Attributes:
        layer: The layer on its way, or -1 for the frames before and after the layers.
        group_usable: Whether the process group, or the transport, can serve another transfer. After a timeout or the
            death of a peer it can't: the connection is closed. Make another, with `torch.distributed.new_group` or as
            the first one was made.
    """

    def __init__(self, message: str, layer: int = -1, group_usable: bool = False) -> None:
        super().__init__(message)
        self.layer, self.group_usable = layer, group_usable


@dataclass
class TransferReport:
    """What a transfer took, by one side's `time.monotonic()`.

    Attributes:
        frames: Frames acknowledged.
        bytes: Bytes of those frames.
        started: When the first frame was handed to the transport, or its header arrived; seconds.
        finished: When the last frame was acknowledged; seconds.
        packing: Seconds spent writing frames, or reading them into the cache.
    """

    frames: int = 0
    bytes: int = 0
    started: float = 0.0
    finished: float = 0.0
    packing: float = 0.0

    @property
    def seconds(self) -> float:
        """From the first frame to the last, waiting for layers included."""
        return self.finished - self.started

    @property
    def bandwidth(self) -> float:
        """Bytes per second over `seconds`: of a cache sent whole, that of the link."""
        return self.bytes / self.seconds if self.seconds else 0.0


class GivenUp(Exception):
    """The sending side wants no more frames sent."""


@dataclass
class _Pending:
    """A frame that is not acknowledged."""

    place: Place | None
    frame: torch.Tensor
    head: bytes


@contextmanager
def located(place: Place | None) -> Iterator[None]:
    """A transport's error in here becomes that of a frame; of None, of the end of a stream."""
    try:
        yield
    except TransportError as problem:
        raise TransferError(f"{in_words(place)}: {problem}", layer_of(place)) from problem


def in_words(place: Place | None) -> str:
    """A place, or the end of the stream."""
    return "the end of the stream" if place is None else str(place)


def layer_of(place: Place | None) -> int:
    """The layer of a place, -1 where it has none."""
    return -1 if place is None else place.layer


def check_timeout(name: str, timeout: float) -> float:
    if not timeout > 0:
        raise ValueError(f"{name} is a positive number of seconds, got {timeout!r}")
    return timeout


class FrameSender:
    """Sends frames, of which it keeps a bounded number."""

    def __init__(self, transport: SendingTransport, timeout: float, in_flight: int, key: bytes | None = None) -> None:
        if in_flight < 1:
            raise ValueError(f"in_flight is a number of frames, 1 or more, got {in_flight!r}")
        self._transport = transport
        self._timeout = check_timeout("timeout", timeout)
        self._in_flight = in_flight
        self._pending: deque[_Pending] = deque()
        self._stream = 0
        self._key = self._session = check_key(key)  # the shared one, and the one for messages
        self.report = TransferReport()

    def send(self, cache: SpectrumCache, wait_for: Callable[[int], None] = lambda index: None) -> None:
        """Send all frames of a cache, frame `index` after `wait_for(index)`."""
        layers = len(cache.layers)
        self._stream, self._session = secrets.randbits(63), self._key
        with self._telling_why():
            if self._key is not None:
                wait_for(0)
                self._greet(self._key)
            frames = wire.frames(cache, self._stream, self._session)
            for index in range(layers + 2):
                wait_for(index)
                began = time.monotonic()
                frame = next(frames)
                self.report.packing += time.monotonic() - began
                self._settle(self._in_flight - 1)
                self.report.started = self.report.started or time.monotonic()
                self._push(frame, Place.of(index, layers))
            self._settle(0)

    def _greet(self, key: bytes) -> None:
        """Agree with the receiver on the key of this transfer."""
        _, frame = Payload({}).frame(Kind.GREETING, stream=self._stream, macs=FrameMacs(key))
        self.report.started = self.report.started or time.monotonic()
        self._push(frame, Place(Kind.GREETING))
        head = self._pending[0].head
        self._session = session_key(key, head, self._settle(0))

    @contextmanager
    def _telling_why(self) -> Iterator[None]:
        """Tell the receiver of errors of this side."""
        try:
            yield
        except TransferError:
            raise
        except BaseException as problem:
            with suppress(TransferError):
                self._stop(str(problem) if isinstance(problem, GivenUp) else describe(problem))
            raise

    def _push(self, frame: torch.Tensor, place: Place | None) -> None:
        self._pending.append(_Pending(place, frame, host_bytes(frame[:HEAD_BYTES])))
        try:
            with located(place):
                self._transport.send(frame, self._timeout)
        except TransferError:
            self._settle(0)  # what the receiver said before the end says more
            raise

    def _settle(self, left: int) -> str:
        """Wait for replies until `left` frames have none; what the last of them says."""
        reason = ""
        while len(self._pending) > left:
            pending, status, reason = self._acknowledge()
            if status == REFUSED:
                self._stop("")
                raise self._error(pending, f"refused it: {reason}", usable=True)
            if status != ACCEPTED:
                self._transport.close()
                raise self._error(pending, f"lost the stream: {reason}")
            self.report.frames += 1
            self.report.bytes += pending.frame.numel()
            self.report.finished = time.monotonic()
        return reason

    def _acknowledge(self) -> tuple[_Pending, int, str]:
        """The oldest frame on its way, and what the receiver says of it."""
        pending, transport = self._pending[0], self._transport
        with located(pending.place):
            reply = transport.receive_reply(self._timeout)
        try:
            status, reason = unpack_reply(reply, pending.head, self._session)
        except WireError as problem:
            transport.close()
            raise self._error(pending, f"replied {problem}") from problem
        self._pending.popleft()
        return pending, status, reason

    def _error(self, pending: _Pending, what: str, usable: bool = False) -> TransferError:
        place = pending.place
        return TransferError(f"{in_words(place)}: {self._transport.peer} {what}", layer_of(place), usable)

    def _stop(self, reason: str) -> None:
        """End the stream before its end, so that the transport stays usable."""
        while self._pending:
            self._acknowledge()
        stop = pack_stop(self._stream, reason, self._session)
        self._push(torch.frombuffer(bytearray(stop), dtype=torch.uint8), None)
        self._acknowledge()


def session_key(key: bytes, head: bytes, drawn: str) -> bytes:
    """The key of one transfer, from the shared one, the head of the greeting, and what the receiver has drawn."""
    return mac(key, b"transfer", head, drawn.encode(), size=32)


def pack_stop(stream: int, reason: str, key: bytes | None = None) -> bytes:
    """What ends a stream before its end."""
    text = pack_reason(reason)
    stop = STOP.pack(STOP_MAGIC, len(text), stream, bytes(SHORT_MAC), text)
    return stop if key is None else stop[:20] + _mac_of_stop(stop, key) + stop[20 + SHORT_MAC :]


def unpack_stop(stop: bytes, key: bytes | None = None) -> str:
    """The reason of a stop.

    Raises:
        WireError: it has another length, or a wrong MAC.
    """
    if len(stop) != STOP.size:
        raise WireError(f"{len(stop)} bytes of a stop, which has {STOP.size}")
    _, size, _, check, reason = STOP.unpack(stop)
    if key is not None and not is_same(check, _mac_of_stop(stop, key)):
        raise WireError("a stop with a wrong MAC, or none")
    return unpack_reason(reason[:size])


def _mac_of_stop(stop: bytes, key: bytes) -> bytes:
    return mac(key, b"stop", stop[:20], stop[20 + SHORT_MAC :], size=SHORT_MAC)


def pack_reply(status: int, head: bytes, reason: str, key: bytes | None = None) -> bytes:
    """An answer to the frame, or the stop, with this head."""
    text, magic = pack_reason(reason), REPLY_MAGIC
    if key is not None:
        text, magic = text[: REASON_BYTES - SHORT_MAC], KEYED_REPLY_MAGIC
    reply = REPLY.pack(magic, status, len(text), _name(head), text, 0)[:-4]
    if key is not None:
        reply = reply[:SIGNED] + mac(key, b"reply", reply[:SIGNED], size=SHORT_MAC)
    return reply + zlib.crc32(reply).to_bytes(4, "little")


def unpack_reply(reply: bytes, head: bytes, key: bytes | None = None) -> tuple[int, str]:
    """Status and reason of an answer to what has this head.

    Raises:
        WireError: it is none, it is damaged, it answers something else, or its MAC is not this key's.
    """
    if len(reply) != REPLY.size:
        raise WireError(f"{len(reply)} bytes instead of {REPLY.size}")
    magic, status, size, answered, reason, check = REPLY.unpack(reply)
    if magic not in (REPLY_MAGIC, KEYED_REPLY_MAGIC):
        raise WireError(repr(magic))
    if check != zlib.crc32(reply[:-4]):
        raise WireError("what is damaged: its CRC-32 is wrong")
    if magic != (REPLY_MAGIC if key is None else KEYED_REPLY_MAGIC):
        has = "without a MAC, and this side has a key" if key else "with a MAC, and this side has no key"
        raise WireError(f"{has}: {unpack_reason(reason[:size])}")
    if key is not None and not is_same(reply[SIGNED:-4], mac(key, b"reply", reply[:SIGNED], size=SHORT_MAC)):
        raise WireError("with a wrong MAC: it has another key, or it is none of this transfer")
    if status != LOST and answered != _name(head):  # a head that can't be read is not the one that was sent
        raise WireError("to another frame")
    return status, unpack_reason(reason[:size])


def _name(head: bytes) -> bytes:
    """What a frame is called in its reply."""
    return hashlib.blake2b(head, digest_size=8).digest()


def pack_reason(reason: str) -> bytes:
    """The beginning of any text, even of one that is no Unicode: reporting an error must not fail for its words."""
    return reason.encode(errors="backslashreplace")[:REASON_BYTES]


def unpack_reason(raw: bytes) -> str:
    """A peer's text, in which what a terminal would obey is replaced."""
    return "".join(c if c.isprintable() else "\ufffd" for c in raw.decode(errors="replace"))


def describe(problem: BaseException) -> str:
    """An error with its type, but for a `WireError`, which says enough."""
    return str(problem) if isinstance(problem, WireError) else f"{type(problem).__name__}: {problem}"
