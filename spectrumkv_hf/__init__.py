"""SpectrumKV for Transformers: a KV cache with a precision for each token."""

from spectrumkv_hf.policy import POLICIES, TIERS, Policy, get_policy
from spectrumkv_hf.support.calls import cache_argument
from spectrumkv_hf.tiered.cache import SpectrumCache
from spectrumkv_hf.tiered.memory import MemoryReport
from spectrumkv_hf.version import __version__ as __version__

__all__ = ["POLICIES", "TIERS", "MemoryReport", "Policy", "SpectrumCache", "cache_argument", "get_policy"]
