"""What both ends of a NIXL connection have: agent, registered staging buffers, a TCP connection, and how they meet."""

import importlib
import secrets
import selectors
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

import torch

from spectrumkv_hf.support.extras import missing
from spectrumkv_hf.transfer.transport import TransportError, stalled
from spectrumkv_hf.wire import WireError

HELLO = struct.Struct("<8sHIQQI")
"""What the receiver says first: magic, version, slots, bytes of a slot, address, bytes of the metadata behind it."""
HELLO_MAGIC = b"SPKVNIXL"
VERSION = 1
MAX_METADATA = 1 << 20
MAX_STAGING = 1 << 32
RETRY = 0.05
"""Seconds until a receiver that refused a connection is asked again."""
POLL = 0.0005
"""Seconds between two looks at a transfer or for notifications."""


def readable(connection: socket.socket, pause: float) -> bool:
    """Whether there is something to read, or the end, within `pause` seconds. Any number of files may be open."""
    with selectors.DefaultSelector() as waiting:
        waiting.register(connection, selectors.EVENT_READ)
        return bool(waiting.select(pause))


def new_agent(name: str) -> Any:
    """A NIXL agent with the UCX backend.

    Raises:
        ImportError: NIXL is not installed.
        RuntimeError: it has no UCX.
    """
    for module in ("nixl._api", "nixl_cu13._api", "nixl_cu12._api"):  # the last without the package that chooses
        with suppress(ImportError):
            api = importlib.import_module(module)
            break
    else:
        raise missing("nixl", "this transport")
    agent = api.nixl_agent(name, api.nixl_agent_config(backends=["UCX"]))
    if "UCX" not in agent.backends:
        raise RuntimeError(f"NIXL has no UCX backend here, only {agent.get_plugin_list()}")
    return agent


class End:
    """What both ends have: agent, registered staging buffers, the TCP connection."""

    def __init__(self, peer: str, connection: socket.socket, slots: int, slot_bytes: int) -> None:
        self.peer = peer
        self._closed_by = f"lost {peer}: this side closed the connection"
        self._socket: socket.socket | None = connection
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            self._agent = new_agent(f"spectrumkv-{secrets.token_hex(8)}")
            self._slots, self._slot_bytes = slots, slot_bytes
            self._staging = torch.zeros(slots, slot_bytes, dtype=torch.uint8)
            self._registered: Any = self._agent.register_memory(self._staging)
        except BaseException:
            connection.close()
            raise

    def close(self) -> None:
        """End the connection; see `Transport.close`."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            self._release()
            with suppress(Exception):  # NIXL's errors have no common type
                self._agent.deregister_memory(self._registered)
            self._agent = self._registered = None

    def _release(self) -> None:
        """Let go of what the agent holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _failed(self, message: str) -> TransportError:
        self.close()
        self._closed_by = message
        return TransportError(message)

    def _connection(self) -> socket.socket:
        if self._socket is None:
            raise TransportError(self._closed_by)
        return self._socket

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Errors of NIXL and the connection in here end it."""
        try:
            yield
        except (TransportError, WireError):
            raise
        except Exception as problem:  # NIXL's errors have no common type
            what = str(problem) or type(problem).__name__
            raise self._failed(f"lost {self.peer}: {what}") from problem

    def _heard(self, buffer: bytearray, pause: float) -> None:
        """Append what the peer sends within `pause` seconds.

        Raises:
            TransportError: the peer closed the connection, or died.
        """
        connection = self._connection()
        with self._watched():  # to look takes a descriptor, of which there may be too many
            data = connection.recv(1 << 16) if readable(connection, pause) else None
        if data == b"":
            raise self._failed(f"lost {self.peer}: it died or closed the connection")
        buffer += data or b""

    def _check_time(self, until: float, timeout: float) -> None:
        if time.monotonic() > until:
            raise self._failed(stalled(self.peer, timeout))


def meet(host: str, port: int, timeout: float) -> tuple[bytes, int, int, int, socket.socket]:
    """Connect to a receiver within `timeout` seconds, also one that comes later: its agent's metadata, slots, their
    bytes and address, the connection."""
    where = f"the receiver at {host}:{port}"
    until = time.monotonic() + timeout
    while True:
        try:
            connection = socket.create_connection((host, port), max(until - time.monotonic(), RETRY))
            break
        except OSError as problem:
            if not isinstance(problem, ConnectionRefusedError) or time.monotonic() + RETRY > until:
                raise TransportError(f"can't reach {where}: {problem}") from problem
            time.sleep(RETRY)
    try:
        magic, version, slots, slot_bytes, address, length = HELLO.unpack(exactly(connection, HELLO.size, until))
        if magic != HELLO_MAGIC or version != VERSION:
            raise TransportError(
                f"{where} begins with {magic!r}, version {version}; expected {HELLO_MAGIC!r}, {VERSION}"
            )
        if not slots or not slot_bytes or slots * slot_bytes > MAX_STAGING or length > MAX_METADATA:
            raise TransportError(f"{where} offers {slots} slots of {slot_bytes} bytes and {length} of metadata")
        return exactly(connection, length, until), slots, slot_bytes, address, connection
    except OSError as problem:
        connection.close()
        raise TransportError(f"{where} did not say how to send: {problem}") from problem
    except BaseException:
        connection.close()
        raise


def exactly(connection: socket.socket, count: int, until: float) -> bytes:
    """So many bytes, all of them before `time.monotonic()` is `until`.

    Raises:
        OSError: they did not come.
    """
    data = bytearray()
    while len(data) < count:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        connection.settimeout(left)
        more = connection.recv(count - len(data))
        if not more:
            raise ConnectionError("it closed the connection")
        data += more
    return bytes(data)
