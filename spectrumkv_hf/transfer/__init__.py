"""Caches on their way to another process: over ranks of `torch.distributed`, a shared folder, or NIXL."""

from spectrumkv_hf.transfer.exchange import (
    CacheReceiver,
    CacheSender,
    TransferError,
    TransferReport,
    recv_cache,
    send_cache,
)

__all__ = ["CacheReceiver", "CacheSender", "TransferError", "TransferReport", "recv_cache", "send_cache"]
