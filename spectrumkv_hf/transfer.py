"""Caches from a prefill to a decode process over `torch.distributed`, whole or layer by layer while prefill runs.

The sender sends each frame of `spectrumkv_hf.wire` as two messages: its header of fixed size, which the receiver checks
before it makes room for the second, the payload at its exact size. (gloo aborts the process when a buffer is too small,
and says nothing when it is too large.) The receiver acknowledges or refuses every frame, and the sender never has more
than `in_flight` frames unacknowledged.

Headers and acknowledgements are CPU tensors. Payloads are CPU tensors too, unless the group's backend for CUDA is NCCL
(`init_process_group("cpu:gloo,cuda:nccl")`); then they go from device to device, and both caches must lie on CUDA
devices. That path has not been tested.
"""

import queue
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig

from spectrumkv_hf import wire
from spectrumkv_hf.cache import SpectrumCache
from spectrumkv_hf.transfer_link import (
    ACCEPTED,
    HEADER_TAG,
    LOST,
    PAYLOAD_TAG,
    REASON_BYTES,
    REFUSED,
    REPLY_TAG,
    STOP,
    STOP_MAGIC,
    FrameSender,
    GivenUp,
    Link,
    TransferError,
    TransferReport,
    bytes_of,
    describe,
    frame_name,
    layer_in,
    reply_tensor,
)
from spectrumkv_hf.wire import FrameHeader, WireError

__all__ = ["CacheReceiver", "CacheSender", "TransferError", "TransferReport", "recv_cache", "send_cache"]

MAX_FRAME_BYTES = 1 << 30


def send_cache(
    cache: SpectrumCache,
    dst: int,
    group: dist.ProcessGroup | None = None,
    timeout: float = 60.0,
    in_flight: int = 2,
) -> TransferReport:
    """Send a cache to rank `dst`, which receives it by `recv_cache`; returns when it is there in full.

    Args:
        cache: Any; it may be used further.
        dst: Global rank.
        group: Process group with a backend for CPU tensors; None: the default group. One transfer at a time between
            two of its ranks.
        timeout: Seconds that a message may take; on a slow link, more than a layer's frame needs.
        in_flight: Frames sent and not yet acknowledged, 1 or more; each is a copy of one layer.

    Raises:
        TransferError: the peer died, was too slow, or refused a frame.
        WireError: the cache can't be written.
    """
    sender = FrameSender(dst, group, timeout, in_flight)
    sender.send(cache)
    return sender.report


def recv_cache(
    src: int,
    config: PreTrainedConfig,
    group: dist.ProcessGroup | None = None,
    timeout: float = 60.0,
    **options: Any,
) -> SpectrumCache:
    """Receive the cache that rank `src` sends by `send_cache` or a `CacheSender`.

    Args:
        src: Global rank.
        config: Of the model that will use the cache.
        group, timeout: As of `send_cache`.
        options: Further ones of `CacheReceiver`.

    Raises:
        TransferError: the peer died, was too slow, gave up, or sent damage. There is no cache then.
    """
    return CacheReceiver(src, config, group, timeout, **options).receive()


class CacheSender:
    """Sends a cache layer by layer while prefill fills it, in a thread of its own.

    A layer goes out as soon as its prefill is final, so that its transfer hides behind the prefill of later layers.
    Prefill never waits for the link: a frame is written when the link can take it. The cache must not change between
    its prefill and the end of `finish`.

    Args:
        cache: Empty; attach the sender before the prefill. It takes the cache's `on_layer`.
        dst, group, timeout, in_flight: As of `send_cache`.
        tokens: Length of the cache at which its layers are final; for a prefill in chunks, that of the whole prompt.
            None: the first forward's.

    Example:
        ```python
        with CacheSender(cache, dst=1) as sender:
            model(**inputs, past_key_values=cache)
        print(sender.report)
        ```
    """

    def __init__(
        self,
        cache: SpectrumCache,
        dst: int,
        group: dist.ProcessGroup | None = None,
        timeout: float = 60.0,
        in_flight: int = 2,
        tokens: int | None = None,
    ) -> None:
        self._cache, self._tokens = cache, tokens
        self._sender = FrameSender(dst, group, timeout, in_flight)
        self._final: queue.SimpleQueue[int] = queue.SimpleQueue()  # frames that may be written
        self._frames_due = 0
        self._given_up: GivenUp | None = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"cache to rank {dst}", daemon=True)
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
        src, config, group, timeout: As of `recv_cache`.
        first_timeout: Seconds to wait for the first frame, which may come after a whole prefill; None: `timeout`.
        device: Where the cache will lie; None: the CPU.
        max_frame_bytes: The longest frame to make room for.
    """

    def __init__(
        self,
        src: int,
        config: PreTrainedConfig,
        group: dist.ProcessGroup | None = None,
        timeout: float = 60.0,
        first_timeout: float | None = None,
        device: torch.device | str | None = None,
        max_frame_bytes: int = MAX_FRAME_BYTES,
    ) -> None:
        self._link = Link(src, group, timeout)
        if first_timeout is not None and not first_timeout > 0:
            raise ValueError(f"first_timeout is a positive number of seconds, got {first_timeout!r}")
        self._first_timeout = timeout if first_timeout is None else first_timeout
        self._device = torch.device(device or "cpu")
        self._limit = max_frame_bytes
        self._assembler = wire.Assembler(config, self._device)
        self.report = TransferReport()

    def receive(self) -> SpectrumCache:
        """The cache, once its last frame is there and sound.

        Raises:
            TransferError: the peer died, was too slow, gave up, or sent damage.
        """
        link, report = self._link, self.report
        refusal: TransferError | None = None
        while True:
            try:
                header = self._header(refusal)
            except TransferError as problem:
                if refusal is None or problem is refusal:
                    raise
                refusal.group_usable = False
                raise refusal from problem
            name, layer = frame_name(header.layer, header.kind), header.layer
            payload = torch.empty(header.padded, dtype=torch.uint8, device=self._device if link.on_device else "cpu")
            link.receive(payload, PAYLOAD_TAG, name, layer)
            cache, began = None, time.monotonic()
            if refusal is None:
                try:
                    cache = self._assembler.add(header, payload)
                except Exception as problem:  # even what is no WireError: the sender is to know, and not to wait
                    where = "" if isinstance(problem, WireError) else f"{name}: "
                    refusal = TransferError(f"from rank {link.peer}: {where}{describe(problem)}", layer, True)
                    refusal.__cause__ = problem
            report.packing += time.monotonic() - began
            link.send(
                reply_tensor(ACCEPTED if refusal is None else REFUSED, str(refusal or "")), REPLY_TAG, name, layer
            )
            report.frames, report.bytes = report.frames + 1, report.bytes + FrameHeader.SIZE + header.padded
            report.finished = time.monotonic()
            if cache is not None:
                return cache

    def _header(self, refusal: TransferError | None) -> FrameHeader:
        """The next frame's header; or an error, where the sender stops or something else arrives."""
        link, expected = self._link, self._assembler.expected
        head = torch.empty(FrameHeader.SIZE, dtype=torch.uint8)
        layer = layer_in(expected)
        link.receive(head, HEADER_TAG, expected, layer, None if self.report.frames else self._first_timeout)
        if not self.report.frames:
            self.report.started = time.monotonic()
        magic, size = STOP.unpack(bytes_of(head))
        if magic == STOP_MAGIC and size <= REASON_BYTES:
            reason = torch.empty(size, dtype=torch.uint8)
            if size:
                link.receive(reason, PAYLOAD_TAG, "the sender's reason to stop", layer)
            text = bytes_of(reason).decode(errors="replace")
            raise refusal or TransferError(f"rank {link.peer} gave up before {expected}: {text}", layer, True)
        try:
            return FrameHeader.parse(head, self._limit)
        except WireError as problem:
            message = f"from rank {link.peer}: {expected}: {problem}"
            with suppress(TransferError):
                link.send(reply_tensor(LOST, message), REPLY_TAG, expected, layer)
            link.close()
            raise TransferError(message, layer) from problem
