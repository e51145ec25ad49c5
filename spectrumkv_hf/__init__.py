"""SpectrumKV for Transformers: a KV cache with a precision for each token."""

import importlib
from typing import TYPE_CHECKING, Any

from spectrumkv_hf.policy import (
    POLICIES,
    TIERS,
    Adaptive,
    Balanced,
    DropScored,
    DropWindow,
    Greedy,
    Lossless,
    Policy,
    RandomTier,
    SinkProtect,
    Tier,
    TwoTier,
    UniformInt4,
    UniformInt8,
    get_policy,
)
from spectrumkv_hf.spectrum_cache import SpectrumCache
from spectrumkv_hf.support.calls import cache_argument
from spectrumkv_hf.tiered.memory import MemoryReport
from spectrumkv_hf.version import __version__ as __version__
from spectrumkv_hf.wire import WireError

if TYPE_CHECKING:
    from spectrumkv_hf.probe import CalibrationProbe, PaperProbe, ProbeError, probe_model
    from spectrumkv_hf.transfer import (
        CacheReceiver,
        CacheSender,
        TransferError,
        TransferReport,
        recv_cache,
        send_cache,
    )

__all__ = [
    "POLICIES", "TIERS", "Adaptive", "Balanced", "CacheReceiver", "CacheSender", "CalibrationProbe", "DropScored",
    "DropWindow", "Greedy", "Lossless", "MemoryReport", "PaperProbe", "Policy", "ProbeError", "RandomTier",
    "SinkProtect", "SpectrumCache", "Tier", "TransferError", "TransferReport", "TwoTier", "UniformInt4", "UniformInt8",
    "WireError", "cache_argument", "get_policy", "probe_model", "recv_cache", "send_cache",
]  # fmt: skip

_LATER = {
    **dict.fromkeys(("CalibrationProbe", "PaperProbe", "ProbeError", "probe_model"), "spectrumkv_hf.probe"),
    **dict.fromkeys(
        ("CacheReceiver", "CacheSender", "TransferError", "TransferReport", "recv_cache", "send_cache"),
        "spectrumkv_hf.transfer",
    ),
}
"""What is imported at first use, because it takes a while."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return __all__
