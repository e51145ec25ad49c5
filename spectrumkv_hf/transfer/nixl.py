"""Frames by NIXL: one-sided writes into staging buffers of the receiver, over RDMA, TCP or what else UCX finds.

A frame is cut into parts no longer than a slot of the staging buffers. Each part is written into a free slot and
announced by a notification, which says where in which frame it belongs and carries the frame's head, and with it the
layer: notifications come in any order. The receiver copies parts out of the slots, so that no peer can write into a
cache, and gives slots back over a TCP connection of our own, on which the ends also meet, reply, and see each other
die. No pickle is involved. Whoever reaches the port can send; use networks that you trust. A `key` of the transfer
authenticates frames and replies, but not how the ends meet: NIXL reads the receiver's description of itself before.
"""

import socket
import struct
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import torch

from spectrumkv_hf.transfer.nixl_end import HELLO, HELLO_MAGIC, MAX_STAGING, POLL, VERSION, End, meet, readable
from spectrumkv_hf.transfer.transport import HEAD_BYTES, REPLY_BYTES, TransportError, stalled
from spectrumkv_hf.wire import WireError
from spectrumkv_hf.wire.frame import host_bytes

PART = struct.Struct(f"<8sQIIQQ{HEAD_BYTES}s")
"""A notification: magic, number of the frame on this connection, slot, bytes of the part, its offset in the payload,
bytes of the payload, the frame's head."""
PART_MAGIC = b"SPKVPART"
MESSAGE = struct.Struct(f"<B{REPLY_BYTES}s")
"""What the receiver says later: the kind, and a reply, or the number of a slot that is free again."""
REPLY, SLOT_FREE = range(2)
LEAST = 1.0
"""Seconds for the greeting of a sender that came at the last moment."""


class NixlListener:
    """Where a receiver waits for senders.

    Args:
        host: Address of the interface to listen on.
        port: 0: a free one.

    Attributes:
        address: Host and port, for `NixlSender`.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self._socket = socket.create_server((host, port))
        self.address: tuple[str, int] = self._socket.getsockname()[:2]

    def accept(self, timeout: float = 60.0, slots: int = 4, slot_bytes: int = 4 << 20) -> "NixlReceiver":
        """The next sender's connection.

        Args:
            timeout: Seconds to wait for it.
            slots: Parts of frames that may be on their way, 1 or more.
            slot_bytes: The longest part. Each end has staging buffers of `slots * slot_bytes`, at most 4 GiB.

        Raises:
            TransportError: none came.
            ImportError, RuntimeError: NIXL is not installed, or can't be used.
        """
        if slots < 1 or slot_bytes < 1 or slots * slot_bytes > MAX_STAGING:
            raise ValueError(f"slots and slot_bytes are 1 or more, together at most 4 GiB, got {slots} of {slot_bytes}")
        until = time.monotonic() + timeout
        self._socket.settimeout(timeout)
        try:
            connection, _ = self._socket.accept()
        except TimeoutError:
            raise TransportError(f"no sender came to {self.address} in {timeout:g} s") from None
        return NixlReceiver(connection, max(until - time.monotonic(), LEAST), slots, slot_bytes)

    def close(self) -> None:
        """Accept no more; connections stay."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class NixlReceiver(End):
    """The receiving end; a `spectrumkv_hf.transfer.transport.ReceivingTransport`. Made by `NixlListener.accept`."""

    def __init__(self, connection: socket.socket, timeout: float, slots: int, slot_bytes: int) -> None:
        super().__init__("the sender", connection, slots, slot_bytes)
        self._parts: dict[int, list[tuple[Any, ...]]] = {}  # by number of the frame; at most one for each slot
        self._next = 0
        with self._watched():
            metadata = self._agent.get_agent_metadata()
            hello = HELLO.pack(HELLO_MAGIC, VERSION, slots, slot_bytes, self._staging.data_ptr(), len(metadata))
            connection.settimeout(timeout)
            connection.sendall(hello + metadata)

    def receive_head(self, timeout: float) -> bytes:
        self._wait_for_part(time.monotonic() + timeout, timeout)
        return bytes(self._parts[self._next][0][-1])

    def receive_payload(self, size: int, device: torch.device, timeout: float) -> torch.Tensor:
        first = self._parts[self._next][0]
        total, head = first[5:]
        payload = torch.empty(size if total == size else 0, dtype=torch.uint8)
        got, until = 0, time.monotonic() + timeout
        while got < total:
            self._wait_for_part(until, timeout)
            _, _, slot, length, offset, this_total, this_head = self._parts[self._next].pop()
            if this_total != total or this_head != head or offset + length > total:
                raise self._failed(f"{self.peer} announced parts of a frame that don't fit together")
            if total == size:
                payload[offset : offset + length] = self._staging[slot, :length]
            got += length
            self._tell(SLOT_FREE, slot.to_bytes(4, "little"), timeout)
        del self._parts[self._next]
        self._next += 1
        if total != size:
            raise WireError(f"the payload has {total} bytes, its header says {size}")
        return payload

    def reply(self, reply: bytes, timeout: float) -> None:
        self._tell(REPLY, reply, timeout)

    def _tell(self, kind: int, data: bytes, timeout: float) -> None:
        self._hear_nothing(0)  # a sender that is gone must not seem to hear
        connection = self._connection()
        with self._watched():
            try:
                connection.settimeout(timeout)
                connection.sendall(MESSAGE.pack(kind, data))
            except TimeoutError:
                raise self._failed(stalled(self.peer, timeout)) from None

    def _wait_for_part(self, until: float, timeout: float) -> None:
        """Wait for a part of the next frame, for `timeout` seconds in all, which end at `until`."""
        while not self._parts.get(self._next):
            self._connection()
            with self._watched():
                notes = self._agent.get_new_notifs()
            for note in (note for of_peer in notes.values() for note in of_peer):
                self._note(note)
            if notes:
                continue
            self._hear_nothing(POLL)  # only now: what a peer sent before it died counts
            self._check_time(until, timeout)

    def _hear_nothing(self, pause: float) -> None:
        """Notice within `pause` seconds that the sender is gone."""
        noise = bytearray()
        self._heard(noise, pause)
        if noise:
            raise self._failed(f"{self.peer} sent {len(noise)} bytes on a connection on which it says nothing")

    def _note(self, note: bytes) -> None:
        """Keep a notification, once it is sound."""
        if len(note) != PART.size or not note.startswith(PART_MAGIC):
            raise self._failed(
                f"{self.peer} sent a notification of {len(note)} bytes that announces no part of a frame"
            )
        part = PART.unpack(note)
        _, number, slot, length, *_ = part
        kept = [other[2] for parts in self._parts.values() for other in parts]
        near = self._next <= number <= self._next + self._slots
        if not near or slot >= self._slots or slot in kept or not 1 <= length <= self._slot_bytes:
            raise self._failed(
                f"{self.peer} announced {length} bytes of frame {number} in slot {slot}: impossible here"
            )
        self._parts.setdefault(number, []).append(part)


class NixlSender(End):
    """The sending end; a `spectrumkv_hf.transfer.transport.SendingTransport`.

    Args:
        host: The receiver's, the first of `NixlListener.address`.
        port: The second of it.
        timeout: Seconds to wait for the connection and for what the receiver says first.

    Raises:
        TransportError: no connection, or to something else.
        ImportError, RuntimeError: NIXL is not installed, or can't be used.

    Example:
        ```python
        with NixlSender("10.0.0.2", 29700) as transport:
            send_cache(cache, transport)
        ```
    """

    def __init__(self, host: str, port: int, timeout: float = 60.0) -> None:
        self._transfers: dict[int, Any] = {}  # by slot, until the receiver has freed it
        self._freed: set[int] = set()  # of those, the ones that NIXL has still to call done
        self._replies: deque[bytes] = deque()
        self._said = bytearray()
        self._number = self._replied = 0
        metadata, slots, slot_bytes, self._address, connection = meet(host, port, timeout)
        super().__init__("the receiver", connection, slots, slot_bytes)
        self._free = deque(range(slots))
        with self._watched():
            self._receiver = self._agent.add_remote_agent(metadata)

    def send(self, frame: torch.Tensor, timeout: float) -> None:
        head, payload = host_bytes(frame[:HEAD_BYTES]), frame[HEAD_BYTES:].cpu()
        used = []
        until = time.monotonic() + timeout
        for offset in range(0, len(payload), self._slot_bytes):
            part = payload[offset : offset + self._slot_bytes]
            while not self._free:
                self._listen()
                self._check_time(until, timeout)
            slot = self._free.popleft()
            self._staging[slot, : len(part)] = part
            note = PART.pack(PART_MAGIC, self._number, slot, len(part), offset, len(payload), head)
            self._write(slot, len(part), note)
            used.append(slot)
        self._number += 1
        while not self._done(used):
            self._listen()  # NIXL notifies only while the sender looks
            self._check_time(until, timeout)

    def receive_reply(self, timeout: float) -> bytes:
        until = time.monotonic() + timeout
        while not self._replies:  # those that came before the connection ended count
            self._listen()
            self._check_time(until, timeout)
        return self._replies.popleft()

    def _write(self, slot: int, length: int, note: bytes) -> None:
        """Begin to write a slot's first `length` bytes into the receiver's slot."""
        self._connection()
        with self._watched():
            agent, at = self._agent, slot * self._slot_bytes
            ours, theirs = (
                agent.get_xfer_descs([(address + at, length, 0)], mem_type="DRAM")
                for address in (self._staging.data_ptr(), self._address)
            )
            self._transfers[slot] = agent.initialize_xfer("WRITE", ours, theirs, self._receiver, note)
            if agent.transfer(self._transfers[slot]) == "ERR":
                raise ConnectionError("NIXL could not write")

    def _done(self, slots: list[int]) -> bool:
        """Whether NIXL has written these, as far as they have not been freed since."""
        with self._watched():
            states = [self._agent.check_xfer_state(self._transfers[slot]) for slot in slots if slot in self._transfers]
            if "ERR" in states:
                raise ConnectionError("NIXL could not write")
        return "PROC" not in states

    def _listen(self) -> None:
        """Take in what the receiver says, and drive NIXL."""
        self._done(list(self._transfers))
        self._heard(self._said, POLL)
        for kind, data in self._messages():
            if kind == REPLY:
                self._replies.append(data)
                self._replied += 1
                if self._replied > self._number + 1:  # one may be on its way
                    raise self._failed(f"{self.peer} replied {self._replied} times to {self._number} frames")
                continue
            slot = int.from_bytes(data[:4], "little")
            if kind != SLOT_FREE or slot not in self._transfers or slot in self._freed:
                raise self._failed(f"{self.peer} freed slot {slot}, which held nothing (message {kind})")
            self._freed.add(slot)
        for slot in [slot for slot in self._freed if self._done([slot])]:
            self._freed.remove(slot)
            with self._watched():
                self._transfers.pop(slot).release()
            self._free.append(slot)

    def _messages(self) -> Iterator[tuple[int, bytes]]:
        while len(self._said) >= MESSAGE.size:
            yield MESSAGE.unpack(self._said[: MESSAGE.size])
            del self._said[: MESSAGE.size]

    def _failed(self, message: str) -> TransportError:
        with suppress(OSError):  # the receiver may have said why, where NIXL only knows that it is gone
            while self._socket is not None and readable(self._socket, 0):
                data = self._socket.recv(1 << 16)
                self._said += data
                if not data:
                    break
        self._replies += [data for kind, data in self._messages() if kind == REPLY]
        return super()._failed(message)

    def _release(self) -> None:
        for transfer in self._transfers.values():
            with suppress(Exception):
                transfer.release()
        self._transfers.clear()
        with suppress(Exception):
            self._agent.remove_remote_agent(self._receiver)
