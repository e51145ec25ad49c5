"""Frames as files: a directory that two processes share, on one machine or a file system of both.

The sender writes each frame to a file that appears under its name in one step; the receiver removes it and leaves a
reply in the same way. So the directory never holds more than the frames that the sender may have in flight. Each side
holds a lock on a file of its own: the system drops it when the process dies, which tells death from slowness. Whoever
closes last removes what nobody will read: a frame has what a prompt said.

For a cache that outlives its sender, use `SpectrumCache.save` and `load`.
"""

import errno
import fcntl
import os
import re
import secrets
import time
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

import torch

from spectrumkv_hf.support.folders import file_mode, open_folder
from spectrumkv_hf.support.whole_file import NEW_FILE, open_regular, replacing
from spectrumkv_hf.transfer.transport import HEAD_BYTES, REPLY_BYTES, TransportError, stalled
from spectrumkv_hf.wire import WireError

POLL = 0.002
"""Seconds between two looks for a file."""
_MESSAGE = re.compile(r"(frame|reply)-[0-9]+|\.[0-9a-f]{32}\.part")
"""Files that are of no use without both ends: messages, and those that a process wrote when it died."""


class _End:
    """What both ends have: the directory, a lock of their own and a look at the peer's."""

    role: ClassVar[str]
    other: ClassVar[str]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.peer = f"the {self.other}"
        self._path = Path(path)
        self._lock: int | None = None
        self._closed_by = f"lost {self.peer}: this side closed the connection"
        self._next_frame = self._next_reply = 0
        self._folder = open_folder(path)  # all files are named in it, whatever comes to lie at its path
        try:
            self._lock = self._hold(f"{self.role}.lock")
        except BaseException:
            os.close(self._folder)
            raise

    def _hold(self, name: str) -> int:
        """A file of this name, with a lock that the peer never sees missing."""
        temporary = f".{secrets.token_hex(16)}.lock"
        handle = os.open(temporary, NEW_FILE, 0o600, dir_fd=self._folder)
        try:
            try:
                os.fchmod(handle, file_mode(self._folder))
                fcntl.flock(handle, fcntl.LOCK_EX)
                os.link(temporary, name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            finally:
                os.unlink(temporary, dir_fd=self._folder)
        except FileExistsError:
            os.close(handle)
            raise ValueError(
                f"{self._path / name} exists: a directory serves one sender and one receiver, once"
            ) from None
        except BaseException:
            os.close(handle)
            raise
        return handle

    def close(self) -> None:
        """End the connection; see `Transport.close`. The directory stays, with the files of the locks."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
            try:
                with suppress(OSError):  # of two that close at once both see the other gone
                    if not self._peer_holds():
                        self._clear()
            finally:
                os.close(self._folder)

    def _clear(self) -> None:
        for name in os.listdir(self._folder):
            if _MESSAGE.fullmatch(name):
                with suppress(OSError):
                    os.unlink(name, dir_fd=self._folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _write(self, name: str, data: bytes | memoryview) -> None:
        """A file that appears when all of it is there."""
        self._check_open()
        try:
            with replacing(name, file_mode(self._folder), self._folder, durable=False) as file:
                file.write(data)
        except OSError as problem:
            raise self._failed(f"can't write {name}: {problem}") from problem

    def _arrived(self, name: str, timeout: float) -> BufferedReader:
        """The peer's file, once it is there; its name is free then."""
        until = time.monotonic() + timeout
        while True:
            self._check_open()
            alive = self._peer_lives()  # looked at before the file, so that a file of a peer that is gone counts
            try:
                file = self._open(name)
                try:
                    os.unlink(name, dir_fd=self._folder)
                except BaseException:
                    file.close()
                    raise
                return file
            except FileNotFoundError:
                pass
            except OSError as problem:
                raise self._failed(f"can't read {name}: {problem}") from problem
            if not alive:
                raise self._failed(f"lost {self.peer}: it died or closed the connection before {name}")
            if time.monotonic() > until:
                raise self._failed(stalled(self.peer, timeout))
            time.sleep(POLL)

    def _open(self, name: str) -> BufferedReader:
        """A file that the peer has put into the directory; no link, pipe or device, which it never does."""
        try:
            return open_regular(name, self._folder, follow=False)
        except OSError as problem:
            if problem.errno != errno.ELOOP:
                raise
            raise OSError(errno.ELOOP, "a link, no regular file", name) from None

    def _check_open(self) -> None:
        if self._lock is None:
            raise TransportError(self._closed_by)

    def _peer_lives(self) -> bool:
        """Whether the peer holds its lock, or has yet to come."""
        try:
            return self._peer_holds() is not False
        except OSError as problem:
            raise self._failed(f"lost {self.peer}: {problem}") from problem

    def _peer_holds(self) -> bool | None:
        """Whether the peer holds its lock; None: it has yet to come."""
        try:
            with self._open(f"{self.other}.lock") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return None
        except BlockingIOError:
            return True
        return False

    def _read(self, file: BufferedReader, size: int) -> bytes:
        """The first `size` bytes of a file, as far as there are so many."""
        try:
            return file.read(size)
        except OSError as problem:
            raise self._failed(f"can't read what {self.peer} wrote: {problem}") from problem

    def _failed(self, message: str) -> TransportError:
        self.close()
        self._closed_by = message
        return TransportError(message)


class DirectorySender(_End):
    """The sending end; a `spectrumkv_hf.transfer.transport.SendingTransport`.

    Args:
        path: A directory of its own for each connection, which may serve many transfers one after another; made if
            missing, with 0700. Who can write into it can disturb the connection, and forge a cache where there is
            no `key`; so it must belong to this user or root, or to one who shares it with a group of this user, and
            not be writable for everyone. Frames can be read by this user, and by the group as far as that may read
            the directory.

    Raises:
        ValueError: the directory has or had a sender.
        OSError: it can't be written, or others can write into it.

    Example:
        ```python
        with DirectorySender("/mnt/shared/request-17") as transport:
            send_cache(cache, transport)
        ```
    """

    role, other = "sender", "receiver"

    def send(self, frame: torch.Tensor, timeout: float) -> None:
        self._write(f"frame-{self._next_frame}", frame.cpu().numpy().data)
        self._next_frame += 1

    def receive_reply(self, timeout: float) -> bytes:
        with self._arrived(f"reply-{self._next_reply}", timeout) as file:
            reply = self._read(file, REPLY_BYTES + 1)
        self._next_reply += 1
        if len(reply) != REPLY_BYTES:
            raise self._failed(f"{self.peer}'s reply has {len(reply)} bytes instead of {REPLY_BYTES}")
        return reply


class DirectoryReceiver(_End):
    """The receiving end; a `spectrumkv_hf.transfer.transport.ReceivingTransport`.

    Args, Raises: As in `DirectorySender`.
    """

    role, other = "receiver", "sender"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._file: BufferedReader | None = None  # of the frame whose head was read

    def receive_head(self, timeout: float) -> bytes:
        self._file = self._arrived(f"frame-{self._next_frame}", timeout)
        self._next_frame += 1
        head = self._read(self._file, HEAD_BYTES)
        if len(head) < HEAD_BYTES:
            raise self._failed(f"truncated: {self.peer}'s frame has {len(head)} bytes, its head alone {HEAD_BYTES}")
        return head

    def receive_payload(self, size: int, device: torch.device, timeout: float) -> torch.Tensor:
        self._check_open()
        assert self._file is not None
        with self._file as file:
            left = os.fstat(file.fileno()).st_size - HEAD_BYTES
            if left != size:
                raise WireError(f"the payload has {left} bytes, its header says {size}")
            payload = torch.empty(size, dtype=torch.uint8)
            got = file.readinto(payload.numpy().data)
        if got != size:
            raise WireError(f"the payload was cut to {got} bytes, its header says {size}")
        return payload

    def reply(self, reply: bytes, timeout: float) -> None:
        self._check_open()
        if not self._peer_lives():
            raise self._failed(f"lost {self.peer}: it died or closed the connection")
        self._write(f"reply-{self._next_reply}", reply)
        self._next_reply += 1

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()
