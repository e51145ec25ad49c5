"""What carries frames between processes: the protocol, and `torch.distributed`. Others: `spectrumkv_hf.engines`."""

import time
from collections import deque
from contextlib import suppress
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from spectrumkv_hf.wire import FrameHeader

HEADER_TAG, PAYLOAD_TAG, REPLY_TAG, NO_TAG = 0x534B0, 0x534B1, 0x534B2, 0x534B3
"""Tags of the messages, so that none is taken for one that the caller sends between the same ranks."""
HEAD_BYTES = FrameHeader.SIZE
REPLY_BYTES = 512
POLL = 0.0002
"""Seconds between looks at a message on a device."""


class TransportError(RuntimeError):
    """The peer is gone, too slow, or talks nonsense. The transport is closed; it serves no further transfer."""


class Transport(Protocol):
    """One end of a connection that carries frames one way and a reply to each of them the other way.

    A frame is a head of 64 bytes and a payload of one byte or more; its meaning is no matter of the transport. Frames
    and replies come in the order in which they were sent. A transport bounds its own buffers; how many frames are on
    their way is the sender's concern. No wait is without a timeout, in seconds, and every method but `close` raises a
    `TransportError` where the connection is of no further use. One thread at a time uses a transport, and one cache at
    a time goes over it; the next one may follow.

    Attributes:
        peer: The other end, in the words of error messages.
    """

    peer: str

    def close(self) -> None:
        """End the connection: the peer's next wait fails at once. Never raises, and may be called twice."""


class SendingTransport(Transport, Protocol):
    """The end that sends frames."""

    def send(self, frame: torch.Tensor, timeout: float) -> None:
        """Hand over a frame, uint8 `[64 + payload]` on any device, which must not change until its reply."""

    def receive_reply(self, timeout: float) -> bytes:
        """The reply, 512 bytes, to the oldest frame that has none."""
        ...


class ReceivingTransport(Transport, Protocol):
    """The end that receives them."""

    def receive_head(self, timeout: float) -> bytes:
        """The next frame's head; `receive_payload` must follow, unless the connection is closed."""
        ...

    def receive_payload(self, size: int, device: torch.device, timeout: float) -> torch.Tensor:
        """The payload behind the head, uint8 `[size]`, its memory aligned to 64 bytes, on the device or the CPU.

        Raises:
            WireError: the payload has another length, as far as the transport can tell. The frame is consumed.
        """
        ...

    def reply(self, reply: bytes, timeout: float) -> None:
        """Answer the frame that was received, in 512 bytes."""


class RankTransport:
    """Both ends of a connection to another rank of a `torch.distributed` process group.

    Heads and replies are CPU tensors. Payloads are CPU tensors too, unless the group's backend for CUDA is NCCL
    (`init_process_group("cpu:gloo,cuda:nccl", device_id=...)`); then they go from device to device, and both caches
    must lie on CUDA devices. The group's NCCL communicator is aborted where a transfer fails; PyTorch ends the process
    then, unless `TORCH_NCCL_ASYNC_ERROR_HANDLING=0` is set before the group is made. Without `device_id` the first
    transfer makes the communicator, and waits for the peer without a limit.

    A head goes as a message of its own, because gloo aborts the process when a buffer is too small, and says nothing
    when it is too large: a truncated payload shows by its digest only.

    Args:
        rank: Global rank of the peer.
        group: Process group with a backend for CPU tensors; None: the default group.
    """

    def __init__(self, rank: int, group: dist.ProcessGroup | None = None) -> None:
        backends = str(dist.get_backend_config(group))
        if "cpu:" not in backends:
            raise ValueError(
                f"the group's backends are {backends!r}: headers need one for CPU tensors, as in "
                'init_process_group("cpu:gloo,cuda:nccl")'
            )
        if rank == dist.get_rank():
            raise ValueError(f"rank {rank} is this process")
        self.peer = f"rank {rank}"
        self._rank, self._group, self._on_device = rank, group, "cuda:nccl" in backends
        self._sent: deque[tuple[list[Any], torch.Tensor, Any]] = deque()  # works, buffer and work of the reply
        self._tensors: deque[tuple[torch.Tensor, torch.Tensor]] = deque()  # must live until their works are done

    def send(self, frame: torch.Tensor, timeout: float) -> None:
        head = frame[:HEAD_BYTES].cpu()
        payload = (frame if self._on_device else frame.cpu())[HEAD_BYTES:]
        works = [self._post(dist.isend, head, HEADER_TAG), self._post(dist.isend, payload, PAYLOAD_TAG)]
        # Where the room for the reply were made later, the receiver would wait in its reply for the sender's model.
        reply = torch.empty(REPLY_BYTES, dtype=torch.uint8)
        self._sent.append((works, reply, self._post(dist.irecv, reply, REPLY_TAG)))
        self._tensors.append((head, payload))

    def receive_reply(self, timeout: float) -> bytes:
        if not self._sent:
            raise TransportError(f"lost {self.peer}: the frame could not be sent")
        works, reply, replied = self._sent[0]
        self._wait(replied, timeout)
        with suppress(TransportError):  # the reply says more
            for work, tensor in zip(works, self._tensors[0], strict=True):
                self._wait(work, timeout, tensor.is_cuda)
        self._sent.popleft()
        self._tensors.popleft()
        return reply.numpy().tobytes()

    def receive_head(self, timeout: float) -> bytes:
        head = torch.empty(HEAD_BYTES, dtype=torch.uint8)
        self._wait(self._post(dist.irecv, head, HEADER_TAG), timeout)
        return head.numpy().tobytes()

    def receive_payload(self, size: int, device: torch.device, timeout: float) -> torch.Tensor:
        payload = torch.empty(size, dtype=torch.uint8, device=device if self._on_device else "cpu")
        self._wait(self._post(dist.irecv, payload, PAYLOAD_TAG), timeout, payload.is_cuda)
        return payload

    def reply(self, reply: bytes, timeout: float) -> None:
        self._wait(self._post(dist.isend, torch.frombuffer(bytearray(reply), dtype=torch.uint8), REPLY_TAG), timeout)

    def close(self) -> None:
        """Break the group's connection to the peer, so that nothing left on it is taken for another transfer's."""
        self._abort()
        with suppress(RuntimeError):  # gloo closes it when a wait times out
            nothing = dist.irecv(torch.empty(1, dtype=torch.uint8), self._rank, group=self._group, tag=NO_TAG)
            nothing.wait(timedelta(milliseconds=1))  # type: ignore[union-attr]

    def _post(self, message: Any, tensor: torch.Tensor, tag: int) -> Any:
        """Begin a message; `_wait` for what this returns."""
        try:
            return message(tensor, self._rank, group=self._group, tag=tag)
        except RuntimeError as problem:
            raise self._lost(problem) from problem

    def _wait(self, work: Any, timeout: float, on_device: bool = False) -> None:
        try:
            if on_device:  # where `wait` only makes the stream wait
                until = time.monotonic() + timeout
                while not work.is_completed():
                    if time.monotonic() > until:
                        raise RuntimeError("Timed out")
                    time.sleep(POLL)
            work.wait(timedelta(seconds=timeout))
        except RuntimeError as problem:
            self._abort()
            if "Timed out" in str(problem):
                raise TransportError(stalled(self.peer, timeout)) from problem
            raise self._lost(problem) from problem

    def _abort(self) -> None:
        """End what NCCL has under way: it would hold the device, and the process, for ever."""
        if self._on_device:
            with suppress(RuntimeError):
                group: Any = self._group or dist.group.WORLD
                group._get_backend(torch.device("cuda")).abort()

    def _lost(self, problem: RuntimeError) -> TransportError:
        reason = str(problem).partition("This is typically")[0].rpartition("] ")[2] or str(problem)
        return TransportError(f"lost {self.peer}: {reason.strip()}")


def stalled(peer: str, timeout: float) -> str:
    """The message of a timeout."""
    return f"{peer} is stalled or slow, nothing came in {timeout:g} s"
