"""Messages of a transfer: frames with bounded room and a reply to each, no wait without a timeout."""

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
from spectrumkv_hf.wire.frame import Place, host_bytes

REASON_BYTES = 489
STOP = struct.Struct(f"<8sIQ44x{REASON_BYTES}s23x")
"""What a sender sends in place of a frame when it gives up: magic, bytes of the reason, the stream; as payload the
reason."""
STOP_MAGIC = b"SPKVSTOP"
REPLY = struct.Struct(f"<8sBH8s{REASON_BYTES}sI")
"""What a receiver replies to every frame and to a stop: magic, status, bytes of the reason, BLAKE2b of the head that it
answers, the reason, CRC-32 of all before it. Without the hash every reply behind one that was lost, or came twice,
would pass for that of another frame; without the checksum a flipped bit would turn a refusal into its opposite."""
REPLY_MAGIC = b"SPKVREPL"
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

    def __init__(self, transport: SendingTransport, timeout: float, in_flight: int) -> None:
        if in_flight < 1:
            raise ValueError(f"in_flight is a number of frames, 1 or more, got {in_flight!r}")
        self._transport = transport
        self._timeout = check_timeout("timeout", timeout)
        self._in_flight = in_flight
        self._pending: deque[_Pending] = deque()
        self._stream = 0
        self.report = TransferReport()

    def send(self, cache: SpectrumCache, wait_for: Callable[[int], None] = lambda index: None) -> None:
        """Send all frames of a cache, frame `index` after `wait_for(index)`."""
        layers = len(cache.layers)
        self._stream = secrets.randbits(63)
        frames = wire.frames(cache, stream=self._stream)
        with self._telling_why():
            for index in range(layers + 2):
                wait_for(index)
                began = time.monotonic()
                frame = next(frames)
                self.report.packing += time.monotonic() - began
                self._settle(self._in_flight - 1)
                self.report.started = self.report.started or time.monotonic()
                self._push(frame, Place.of(index, layers))
            self._settle(0)

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

    def _settle(self, left: int) -> None:
        """Wait for replies until `left` frames have none."""
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

    def _acknowledge(self) -> tuple[_Pending, int, str]:
        """The oldest frame on its way, and what the receiver says of it."""
        pending, transport = self._pending[0], self._transport
        with located(pending.place):
            reply = transport.receive_reply(self._timeout)
        try:
            status, reason = unpack_reply(reply, pending.head)
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
        text = pack_reason(reason)
        stop = STOP.pack(STOP_MAGIC, len(text), self._stream, text)
        self._push(torch.frombuffer(bytearray(stop), dtype=torch.uint8), None)
        self._acknowledge()


def pack_reply(status: int, head: bytes, reason: str) -> bytes:
    """An answer to the frame, or the stop, with this head."""
    text = pack_reason(reason)
    reply = REPLY.pack(REPLY_MAGIC, status, len(text), _name(head), text, 0)[:-4]
    return reply + zlib.crc32(reply).to_bytes(4, "little")


def unpack_reply(reply: bytes, head: bytes) -> tuple[int, str]:
    """Status and reason of an answer to what has this head.

    Raises:
        WireError: it is none, it is damaged, or it answers something else.
    """
    if len(reply) != REPLY.size:
        raise WireError(f"{len(reply)} bytes instead of {REPLY.size}")
    magic, status, size, answered, reason, check = REPLY.unpack(reply)
    if magic != REPLY_MAGIC:
        raise WireError(repr(magic))
    if check != zlib.crc32(reply[:-4]):
        raise WireError("what is damaged: its CRC-32 is wrong")
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
