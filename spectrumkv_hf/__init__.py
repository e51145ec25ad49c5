"""SpectrumKV for Transformers: a KV cache with a precision for each token."""

from spectrumkv_hf.policy import POLICIES, TIERS, Policy, get_policy
from spectrumkv_hf.spectrum_cache import SpectrumCache
from spectrumkv_hf.support.calls import cache_argument
from spectrumkv_hf.tiered.memory import MemoryReport

__version__ = "0.1.0"
__all__ = ["POLICIES", "TIERS", "MemoryReport", "Policy", "SpectrumCache", "cache_argument", "get_policy"]
