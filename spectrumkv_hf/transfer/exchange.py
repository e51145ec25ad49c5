"""Caches from a prefill to a decode process, whole or layer by layer while prefill runs.

They go between ranks of `torch.distributed`, or over another transport (docs/engines.md). The sender
sends the frames of `spectrumkv_hf.wire`. The receiver checks a frame's header before it makes room for the payload, and
acknowledges or refuses every frame; the sender never has more than `in_flight` frames unacknowledged.
"""

import queue
import secrets
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig

from spectrumkv_hf import wire
from spectrumkv_hf.spectrum_cache import SpectrumCache
from spectrumkv_hf.transfer.link import (
    ACCEPTED,
    LOST,
    REFUSED,
    STOP,
    STOP_MAGIC,
    FrameSender,
    GivenUp,
    TransferError,
    TransferReport,
    check_timeout,
    describe,
    in_words,
    layer_of,
    located,
    pack_reply,
    session_key,
    unpack_stop,
)
from spectrumkv_hf.transfer.transport import (
    HEAD_BYTES,
    RankTransport,
    ReceivingTransport,
    SendingTransport,
    TransportError,
)
from spectrumkv_hf.wire import FrameHeader, Kind, WireError
from spectrumkv_hf.wire.frame import Place, host_bytes
from spectrumkv_hf.wire.mac import FrameMacs, check_key
from spectrumkv_hf.wire.payload import read_payload

__all__ = ["CacheReceiver", "CacheSender", "TransferError", "TransferReport", "recv_cache", "send_cache"]

MAX_FRAME_BYTES = 1 << 30
HOST = torch.device("cpu")
"""Where stops and greetings lie, wherever the cache does."""


def send_cache(
    cache: SpectrumCache,
    dst: int | SendingTransport,
    group: dist.ProcessGroup | None = None,
    timeout: float = 60.0,
    in_flight: int = 2,
    key: bytes | None = None,
) -> TransferReport:
    """Send a cache to rank `dst`, which receives it by `recv_cache`; returns when it is there in full.

    Args:
        cache: Any; it may be used further.
        dst: Global rank, or a transport that leads to the receiver.
        group: Of the rank: process group with a backend for CPU tensors; None: the default group. One transfer at a
            time between two of its ranks.
        timeout: Seconds that a message may take; on a slow link, more than a layer's frame needs.
        in_flight: Frames sent and not yet acknowledged, 1 or more; each is a copy of one layer.
        key: 16 to 64 random bytes, which the receiver has too. All messages of both get MACs; those without a right
            one, and those of another transfer, are refused. None: there are none.

    Raises:
        TransferError: the peer died, was too slow, refused a frame, or has another key or none.
        WireError: the cache can't be written.
        ValueError: a timeout, `in_flight` or key out of range.
    """
    sender = FrameSender(sending_to(dst, group), timeout, in_flight, key)
    sender.send(cache)
    return sender.report


def recv_cache(
    src: int | ReceivingTransport,
    config: PreTrainedConfig,
    group: dist.ProcessGroup | None = None,
    timeout: float = 60.0,
    **options: Any,
) -> SpectrumCache:
    """Receive the cache that rank `src` sends by `send_cache` or a `CacheSender`.

    Args:
        src: Global rank, or a transport that leads to the sender.
        config: Of the model that will use the cache.
        group: Of the rank: process group with a backend for CPU tensors; None: the default group.
        timeout: Seconds that a message may take.
        options: `first_timeout`, `device`, `max_frame_bytes`, `model` and `key` of `CacheReceiver`.

    Raises:
        TransferError: the peer died, was too slow, gave up, sent damage, or has another key or none. There is no cache
            then.
        ValueError: a timeout or key out of range.
    """
    return CacheReceiver(src, config, group, timeout, **options).receive()


class CacheSender:
    """Sends a cache layer by layer while prefill fills it, in a thread of its own.

    A layer goes out as soon as its prefill is final, so that its transfer hides behind the prefill of later layers.
    Prefill never waits for the link: a frame is written when the link can take it. The cache must not change between
    its prefill and the end of `finish`.

    Args:
        cache: Empty; attach the sender before the prefill.
        dst: Global rank, or a transport that leads to the receiver.
        group: Of the rank: process group with a backend for CPU tensors; None: the default group.
        timeout: Seconds that a message may take; on a slow link, more than a layer's frame needs.
        in_flight: Frames sent and not yet acknowledged, 1 or more; each is a copy of one layer.
        tokens: Length of the cache at which its layers are final; for a prefill in chunks, that of the whole prompt.
            None: the first forward's.
        key: As in `send_cache`. The thread computes the MACs.

    Example:
        ```python
        with CacheSender(cache, dst=1) as sender:
            model(**inputs, **cache_argument(cache))
        print(sender.report)
        ```
    """

    def __init__(
        self,
        cache: SpectrumCache,
        dst: int | SendingTransport,
        group: dist.ProcessGroup | None = None,
        timeout: float = 60.0,
        in_flight: int = 2,
        tokens: int | None = None,
        key: bytes | None = None,
    ) -> None:
        self._cache, self._tokens = cache, tokens
        transport = sending_to(dst, group)
        self._sender = FrameSender(transport, timeout, in_flight, key)
        self._final: queue.SimpleQueue[int] = queue.SimpleQueue()  # frames that may be written
        self._frames_due = 0
        self._given_up: GivenUp | None = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"cache to {transport.peer}", daemon=True)
        self._detach = cache.on_layer(self._on_layer)
        self._thread.start()

    @property
    def report(self) -> TransferReport:
        """Of the frames so far."""
        return self._sender.report

    def finish(self) -> TransferReport:
        """Send what has not been sent, and wait until the receiver has the whole cache.

        Raises:
            TransferError: the peer died, was too slow, or refused a frame, now or during prefill.
            WireError: the cache can't be written.
        """
        self._close(len(self._cache.layers) + 2)
        if self._failure is not None:
            raise self._failure
        return self.report

    def abort(self, reason: str = "aborted") -> None:
        """Send no more, and tell the receiver why; it raises a `TransferError`. Never raises."""
        self._given_up = GivenUp(reason)
        self._close(0)

    def __enter__(self) -> "CacheSender":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            self.finish()
        else:
            self.abort(describe(error))

    def _close(self, frames_due: int) -> None:
        self._detach()
        self._final.put(frames_due)
        self._thread.join()  # every wait in there has a timeout

    def _on_layer(self, index: int) -> None:
        layer = self._cache.layers[index]
        if self._tokens is not None and layer.get_seq_length() != self._tokens:
            return
        if layer.device.type == "cuda":
            torch.cuda.current_stream(layer.device).synchronize()  # the thread reads on another stream
        self._final.put(index + 2)

    def _run(self) -> None:
        try:
            self._sender.send(self._cache, self._wait_for)
        except BaseException as problem:  # `finish` raises it
            self._failure = problem

    def _wait_for(self, index: int) -> None:
        """Wait until frame `index` may be written: the header with the first layer, the end when `finish` says so."""
        while self._given_up is None and self._frames_due <= max(index, 1):
            self._frames_due = max(self._frames_due, self._final.get())
        if self._given_up is not None:
            raise self._given_up


class CacheReceiver:
    """Receives one cache; see `recv_cache`.

    Args:
        src: Global rank, or a transport that leads to the sender.
        config: Of the model that will use the cache.
        group: Of the rank: process group with a backend for CPU tensors; None: the default group.
        timeout: Seconds that a message may take.
        first_timeout: Seconds to wait for the first frame, which may come after a whole prefill; None: `timeout`.
        device: Where the cache will lie; None: the CPU.
        max_frame_bytes: The longest frame to make room for.
        model: The model that will use the cache, if its weights are to be compared with those that made it.
        key: 16 to 64 bytes, which the sender has too; see `send_cache`. None: a sender with a key is refused.
    """

    def __init__(
        self,
        src: int | ReceivingTransport,
        config: PreTrainedConfig,
        group: dist.ProcessGroup | None = None,
        timeout: float = 60.0,
        first_timeout: float | None = None,
        device: torch.device | str | None = None,
        max_frame_bytes: int = MAX_FRAME_BYTES,
        model: torch.nn.Module | None = None,
        key: bytes | None = None,
    ) -> None:
        self._transport = receiving_from(src, group)
        self._timeout = check_timeout("timeout", timeout)
        self._first_timeout = check_timeout("first_timeout", timeout if first_timeout is None else first_timeout)
        self._device = torch.device(device or "cpu")
        self._limit = max_frame_bytes
        self._key = self._session = check_key(key)  # the shared one, and the one for messages
        self._assembler = wire.Assembler(SpectrumCache, config, self._device, model=model, key=key)
        self._refusal: TransferError | None = None
        self.report = TransferReport()

    def receive(self) -> SpectrumCache:
        """The cache, once its last frame is there and sound.

        Raises:
            TransferError: the peer died, was too slow, gave up, sent damage, or has another key or none.
        """
        try:
            return self._receive()
        except TransferError as problem:
            refusal = self._refusal
            if refusal is None or problem is refusal:
                raise
            refusal.group_usable = False  # as what came of it ended the connection
            raise refusal from problem

    def _receive(self) -> SpectrumCache:
        transport, report = self._transport, self.report
        while True:
            head, header = self._header()
            place = header.place
            device = HOST if header.kind == Kind.GREETING else self._device
            cache, began, key, said = None, time.monotonic(), self._session, ""
            try:
                with located(place):
                    payload = transport.receive_payload(header.rest, device, self._timeout)
                began = time.monotonic()
                if self._refusal is None and key is not None and key is self._key:
                    said = self._greeted(key, head, header, payload)
                elif self._refusal is None:
                    cache = self._assembler.add(header, payload)
            except TransferError:
                raise
            except Exception as problem:  # even what is no WireError: the sender is to know, and not to wait
                where = "" if isinstance(problem, WireError) and problem.located else f"{place}: "
                message = f"from {transport.peer}: {where}{describe(problem)}"
                self._refusal = refusal = self._refusal or TransferError(message, place.layer, True)
                refusal.__cause__ = refusal.__cause__ or problem
            report.packing += time.monotonic() - began
            with located(place):
                status = REFUSED if self._refusal else ACCEPTED
                transport.reply(pack_reply(status, head, str(self._refusal or said), key), self._timeout)
            report.frames, report.bytes = report.frames + 1, report.bytes + FrameHeader.SIZE + header.rest
            report.finished = time.monotonic()
            if cache is not None:
                return cache

    def _greeted(self, key: bytes, head: bytes, header: FrameHeader, payload: torch.Tensor) -> str:
        """Take the greeting, with which a transfer by key begins; what this side has drawn for the transfer's key.

        Raises:
            WireError: it is none, or none of this key.
        """
        fields, _ = read_payload(header, FrameMacs(key).check(header, payload))
        if header.kind != Kind.GREETING:
            raise WireError("a transfer by key begins with a greeting")
        fields.done()
        drawn = secrets.token_hex(16)
        self._session = session_key(key, head, drawn)
        self._assembler.use_key(self._session)
        return drawn

    def _header(self) -> tuple[bytes, FrameHeader]:
        """The next frame's header, as bytes too; or an error, where the sender stops or something else arrives."""
        transport, expected = self._transport, self._assembler.expected
        with located(expected):
            head = transport.receive_head(self._timeout if self.report.frames else self._first_timeout)
        if not self.report.frames:
            self.report.started = time.monotonic()
        if head.startswith(STOP_MAGIC):
            raise self._stopped(head, expected)
        try:
            return head, FrameHeader.parse(head, self._limit)
        except WireError as problem:
            message = f"from {transport.peer}: {in_words(expected)}: {problem}"
            with suppress(TransportError):
                transport.reply(pack_reply(LOST, head, message, self._session), self._timeout)
            transport.close()
            raise TransferError(message, layer_of(expected)) from problem

    def _stopped(self, head: bytes, expected: Place | None) -> TransferError:
        """Hear out a sender that stops; the error that results."""
        transport = self._transport
        try:
            with located(expected):
                rest = transport.receive_payload(STOP.size - HEAD_BYTES, HOST, self._timeout)
                text = unpack_stop(head + host_bytes(rest), self._session)
                transport.reply(pack_reply(ACCEPTED, head, "", self._session), self._timeout)
        except WireError as problem:
            transport.close()
            return TransferError(f"from {transport.peer}: {in_words(expected)}: {problem}", layer_of(expected))
        message = f"{transport.peer} gave up before {in_words(expected)}: {text}"
        return self._refusal or TransferError(message, layer_of(expected), True)


def sending_to(dst: int | SendingTransport, group: dist.ProcessGroup | None) -> SendingTransport:
    """The transport, or that of a rank."""
    if isinstance(dst, int):
        return RankTransport(dst, group)
    check_transport(dst, "send", group)
    return dst


def receiving_from(src: int | ReceivingTransport, group: dist.ProcessGroup | None) -> ReceivingTransport:
    """The transport, or that of a rank."""
    if isinstance(src, int):
        return RankTransport(src, group)
    check_transport(src, "receive_head", group)
    return src


def check_transport(transport: object, method: str, group: dist.ProcessGroup | None) -> None:
    if not hasattr(transport, method):
        raise TypeError(f"the peer is a rank, or a transport that can {method}, got {type(transport).__name__}")
    if group is not None:
        raise ValueError("a group is that of a rank, but a transport was given")
