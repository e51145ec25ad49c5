"""Messages of a transfer between two ranks: frames with bounded room and a reply to each, no wait without a timeout."""

import secrets
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from spectrumkv_hf import wire
from spectrumkv_hf.cache import SpectrumCache
from spectrumkv_hf.wire import FrameHeader, Kind, WireError

HEADER_TAG, PAYLOAD_TAG, REPLY_TAG, NO_TAG = 0x534B0, 0x534B1, 0x534B2, 0x534B3
"""Tags of the messages, so that none is taken for one that the caller sends between the same ranks."""
REASON_BYTES = 501
STOP = struct.Struct("<8sI52x")
"""What a sender sends in place of a frame's header when it gives up: magic, bytes of the reason that follows."""
STOP_MAGIC = b"SPKVSTOP"
REPLY = struct.Struct(f"<8sBH{REASON_BYTES}s")
"""What a receiver replies to every frame: magic, status, bytes of the reason, the reason."""
REPLY_MAGIC = b"SPKVREPL"
ACCEPTED, REFUSED, LOST = range(3)
"""Statuses: taken; refused, and the rest of the stream with it; a header from which nothing can go on."""


class TransferError(RuntimeError):
    """A transfer failed: the peer died, stalled, gave up, or sent damage. The sender's cache is as it was.

    Attributes:
        layer: The layer on its way, or -1 for the frames before and after the layers.
        group_usable: Whether the process group can serve another transfer. After a timeout or the death of a peer it
            can't: gloo has closed the connection. Make another with `torch.distributed.new_group`.
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
        started: When the first frame was handed to the group, or its header arrived; seconds.
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


class Link:
    """Messages to and from one peer, none without a timeout."""

    def __init__(self, peer: int, group: dist.ProcessGroup | None, timeout: float) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout is a positive number of seconds, got {timeout!r}")
        backends = str(dist.get_backend_config(group))
        if "cpu:" not in backends:
            raise ValueError(
                f"the group's backends are {backends!r}: headers need one for CPU tensors, as in "
                'init_process_group("cpu:gloo,cuda:nccl")'
            )
        if peer == dist.get_rank():
            raise ValueError(f"rank {peer} is this process")
        self.peer, self.group, self.timeout = peer, group, timeout
        self.on_device = "cuda:nccl" in backends

    def post(self, tensor: torch.Tensor, tag: int, what: str, layer: int, sending: bool) -> Any:
        """Begin a message; `wait` for what this returns."""
        try:
            if sending:
                return dist.isend(tensor, self.peer, group=self.group, tag=tag)
            return dist.irecv(tensor, self.peer, group=self.group, tag=tag)
        except RuntimeError as problem:
            raise self._error(problem, what, layer, self.timeout) from problem

    def wait(self, work: Any, what: str, layer: int, timeout: float | None = None) -> None:
        """Wait until a message is through."""
        timeout = self.timeout if timeout is None else timeout
        try:
            work.wait(timedelta(seconds=timeout))
        except RuntimeError as problem:
            raise self._error(problem, what, layer, timeout) from problem

    def send(self, tensor: torch.Tensor, tag: int, what: str, layer: int) -> None:
        self.wait(self.post(tensor, tag, what, layer, sending=True), what, layer)

    def receive(self, tensor: torch.Tensor, tag: int, what: str, layer: int, timeout: float | None = None) -> None:
        self.wait(self.post(tensor, tag, what, layer, sending=False), what, layer, timeout)

    def close(self) -> None:
        """Break the connection, so that what is left on it is never taken for another transfer's."""
        with suppress(RuntimeError):  # gloo closes it when a wait times out
            nothing = dist.irecv(torch.empty(1, dtype=torch.uint8), self.peer, group=self.group, tag=NO_TAG)
            nothing.wait(timedelta(milliseconds=1))  # type: ignore[union-attr]

    def _error(self, problem: RuntimeError, what: str, layer: int, timeout: float) -> TransferError:
        if "Timed out" in str(problem):
            return TransferError(f"{what}: rank {self.peer} is stalled or slow, nothing came in {timeout:g} s", layer)
        reason = str(problem).partition("This is typically")[0].rpartition("] ")[2] or str(problem)
        return TransferError(f"{what}: lost rank {self.peer}: {reason.strip()}", layer)


@dataclass
class _Pending:
    """A frame that is not acknowledged; the tensors must live until then."""

    name: str
    layer: int
    tensors: tuple[torch.Tensor, torch.Tensor]
    works: tuple[Any, Any]
    reply: torch.Tensor
    reply_work: Any


class FrameSender:
    """Sends frames, of which it keeps a bounded number."""

    def __init__(self, dst: int, group: dist.ProcessGroup | None, timeout: float, in_flight: int) -> None:
        if in_flight < 1:
            raise ValueError(f"in_flight is a number of frames, 1 or more, got {in_flight!r}")
        self._link = Link(dst, group, timeout)
        self._in_flight = in_flight
        self._pending: deque[_Pending] = deque()
        self.report = TransferReport()

    def send(self, cache: SpectrumCache, wait_for: Callable[[int], None] = lambda index: None) -> None:
        """Send all frames of a cache, frame `index` after `wait_for(index)`."""
        layers = len(cache.layers)
        frames = wire.frames(cache, stream=secrets.randbits(63))
        with self._telling_why():
            for index in range(layers + 2):
                wait_for(index)
                began = time.monotonic()
                frame = next(frames)
                self.report.packing += time.monotonic() - began
                layer = index - 1 if index <= layers else -1
                self._push(frame, "the end frame" if index > layers else frame_name(layer), layer)
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

    def _push(self, frame: torch.Tensor, name: str, layer: int) -> None:
        """Hand a frame to the group, once fewer than `in_flight` others are on their way."""
        self._settle(self._in_flight - 1)
        link = self._link
        head = frame[: FrameHeader.SIZE].cpu()
        payload = (frame if link.on_device else frame.cpu())[FrameHeader.SIZE :]
        if not self.report.started:
            self.report.started = time.monotonic()
        works = (
            link.post(head, HEADER_TAG, name, layer, sending=True),
            link.post(payload, PAYLOAD_TAG, name, layer, sending=True),
        )
        reply = torch.empty(REPLY.size, dtype=torch.uint8)
        reply_work = link.post(reply, REPLY_TAG, name, layer, sending=False)
        self._pending.append(_Pending(name, layer, (head, payload), works, reply, reply_work))

    def _settle(self, left: int) -> None:
        """Wait for replies until `left` frames have none."""
        while len(self._pending) > left:
            pending, status, reason = self._acknowledge()
            if status == REFUSED:
                self._stop("")
                raise TransferError(f"{pending.name}: rank {self._link.peer} refused it: {reason}", pending.layer, True)
            if status != ACCEPTED:
                raise TransferError(f"{pending.name}: rank {self._link.peer} lost the stream: {reason}", pending.layer)
            self.report.frames += 1
            self.report.bytes += sum(t.numel() for t in pending.tensors)
            self.report.finished = time.monotonic()

    def _acknowledge(self) -> tuple[_Pending, int, str]:
        """The oldest frame on its way, and what the receiver says of it."""
        pending, link = self._pending[0], self._link
        link.wait(pending.reply_work, pending.name, pending.layer)
        magic, status, size, reason = REPLY.unpack(bytes_of(pending.reply))
        if magic != REPLY_MAGIC:
            link.close()
            raise TransferError(f"{pending.name}: rank {link.peer} replied {magic!r}", pending.layer)
        if status != LOST:
            for work in pending.works:
                link.wait(work, pending.name, pending.layer)
        self._pending.popleft()
        return pending, status, reason[:size].decode(errors="replace")

    def _stop(self, reason: str) -> None:
        """End the stream before its end, so that the group stays usable."""
        while self._pending:
            self._acknowledge()
        text = reason.encode()[:REASON_BYTES]
        head = torch.frombuffer(bytearray(STOP.pack(STOP_MAGIC, len(text))), dtype=torch.uint8)
        self._link.send(head, HEADER_TAG, "the end of the stream", -1)
        if text:
            body = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            self._link.send(body, PAYLOAD_TAG, "the end of the stream", -1)


def reply_tensor(status: int, reason: str) -> torch.Tensor:
    text = reason.encode()[:REASON_BYTES]
    return torch.frombuffer(bytearray(REPLY.pack(REPLY_MAGIC, status, len(text), text)), dtype=torch.uint8)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()


def describe(problem: BaseException) -> str:
    """An error with its type, but for a `WireError`, which says enough."""
    return str(problem) if isinstance(problem, WireError) else f"{type(problem).__name__}: {problem}"


def frame_name(layer: int, kind: Kind = Kind.HEADER) -> str:
    """A frame, in words."""
    return f"layer {layer}" if layer >= 0 else f"the {kind.name.lower()} frame"


def layer_in(expected: str) -> int:
    """The layer that the assembler expects, or -1."""
    number = expected.removeprefix("layer ")
    return int(number) if number.isdigit() else -1
