"""Frames as files: a directory that two processes share, on one machine or a file system of both.

The sender writes each frame to a file that appears under its name in one step; the receiver removes it and leaves a
reply in the same way. So the directory never holds more than the frames that the sender may have in flight. Each side
holds a lock on a file of its own: the system drops it when the process dies, which tells death from slowness.

For a cache that outlives its sender, use `SpectrumCache.save` and `load`.
"""

import fcntl
import os
import stat
import tempfile
import time
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

import torch

from spectrumkv_hf.transport import HEAD_BYTES, REPLY_BYTES, TransportError, stalled
from spectrumkv_hf.wire import WireError

POLL = 0.002
"""Seconds between two looks for a file."""


class _End:
    """What both ends have: the directory, a lock of their own and a look at the peer's."""

    role: ClassVar[str]
    other: ClassVar[str]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.peer = f"the {self.other}"
        self._path = Path(path)
        self._path.mkdir(parents=True, exist_ok=True)
        self._peer_lock = self._path / f"{self.other}.lock"
        self._closed_by = f"lost {self.peer}: this side closed the connection"
        self._next_frame = self._next_reply = 0
        self._lock: int | None = self._hold(self._path / f"{self.role}.lock")

    def _hold(self, name: Path) -> int:
        """A file of this name, with a lock that the peer never sees missing."""
        handle, temporary = tempfile.mkstemp(dir=self._path, prefix=f".{name.name}.")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            os.link(temporary, name)
        except FileExistsError:
            os.close(handle)
            raise ValueError(f"{name} exists: a directory serves one sender and one receiver, once") from None
        except BaseException:
            os.close(handle)
            raise
        finally:
            os.unlink(temporary)
        return handle

    def close(self) -> None:
        """End the connection; see `Transport.close`. The directory stays."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _write(self, name: str, data: bytes | memoryview) -> None:
        """A file that appears when all of it is there."""
        self._check_open()
        temporary = self._path / f".{name}"
        try:
            temporary.write_bytes(data)
            os.replace(temporary, self._path / name)
        except OSError as problem:
            with suppress(OSError):
                temporary.unlink()
            raise self._failed(f"can't write {name}: {problem}") from problem

    def _arrived(self, name: str, timeout: float) -> BufferedReader:
        """The peer's file, once it is there; its name is free then."""
        until = time.monotonic() + timeout
        path = self._path / name
        while True:
            self._check_open()
            alive = self._peer_lives()  # looked at before the file, so that a file of a peer that is gone counts
            try:
                if not stat.S_ISREG(path.lstat().st_mode):
                    raise self._failed(f"{path} is no file")
                file = path.open("rb")
                path.unlink()
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

    def _check_open(self) -> None:
        if self._lock is None:
            raise TransportError(self._closed_by)

    def _peer_lives(self) -> bool:
        """Whether the peer holds its lock, or has yet to come."""
        try:
            with self._peer_lock.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return True
        except BlockingIOError:
            return True
        except OSError as problem:
            raise self._failed(f"lost {self.peer}: {problem}") from problem
        return False

    def _failed(self, message: str) -> TransportError:
        self.close()
        self._closed_by = message
        return TransportError(message)


class DirectorySender(_End):
    """The sending end; a `spectrumkv_hf.transport.SendingTransport`.

    Args:
        path: A directory of its own for each connection, which may serve many transfers one after another; made if
            missing. Who can write into it can disturb the connection, but damage is found.

    Raises:
        ValueError: the directory has or had a sender.
        OSError: it can't be written.

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
            reply = file.read(REPLY_BYTES + 1)
        self._next_reply += 1
        if len(reply) != REPLY_BYTES:
            raise self._failed(f"{self.peer}'s reply has {len(reply)} bytes instead of {REPLY_BYTES}")
        return reply


class DirectoryReceiver(_End):
    """The receiving end; a `spectrumkv_hf.transport.ReceivingTransport`.

    Args, Raises: As of `DirectorySender`.
    """

    role, other = "receiver", "sender"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._file: BufferedReader | None = None  # of the frame whose head was read

    def receive_head(self, timeout: float) -> bytes:
        self._file = self._arrived(f"frame-{self._next_frame}", timeout)
        self._next_frame += 1
        head = self._file.read(HEAD_BYTES)
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
        if not self._peer_lives():
            raise self._failed(f"lost {self.peer}: it died or closed the connection")
        self._write(f"reply-{self._next_reply}", reply)
        self._next_reply += 1

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()
