"""Caches on their way to another process: over ranks of `torch.distributed`, a shared folder, or NIXL.

`exchange` is what users call; `link` sends and acknowledges frames, `transport` carries them between ranks. `directory`
and `nixl` are transports that are imported by name, the latter with the extra of that name. `prefix_store` keeps caches
where later prompts find them by their tokens. `break_even` tells from measured rates whether compressing pays.
"""

from spectrumkv_hf.transfer.exchange import (
    CacheReceiver,
    CacheSender,
    TransferError,
    TransferReport,
    recv_cache,
    send_cache,
)

__all__ = ["CacheReceiver", "CacheSender", "TransferError", "TransferReport", "recv_cache", "send_cache"]
