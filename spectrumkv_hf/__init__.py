"""SpectrumKV for Transformers: a KV cache with a precision for each token."""

from spectrumkv_hf.cache import SpectrumCache
from spectrumkv_hf.calls import cache_argument
from spectrumkv_hf.memory import MemoryReport
from spectrumkv_hf.policy import POLICIES, TIERS, Policy, get_policy

__version__ = "0.1.0"
__all__ = ["POLICIES", "TIERS", "MemoryReport", "Policy", "SpectrumCache", "cache_argument", "get_policy"]
