"""Modules for `evaluate.load`, each a folder with a script, and what makes their inputs of logits and caches.

`evaluate` is imported when a module is loaded, not before.
"""

from spectrumkv_hf.evaluation.metrics.inputs import CacheBytes, cache_bytes, token_divergence
from spectrumkv_hf.evaluation.metrics.loading import MODULES, load, path_of

__all__ = ["MODULES", "CacheBytes", "cache_bytes", "load", "path_of", "token_divergence"]
