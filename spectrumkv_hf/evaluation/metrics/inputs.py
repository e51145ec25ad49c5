"""What the modules take, made of tensors and caches while they are there: `evaluate` keeps inputs as plain numbers."""

from typing import Any, TypedDict

import torch
from transformers.cache_utils import Cache, EncoderDecoderCache

from spectrumkv_hf.evaluation.subjects.baselines.accounting import reachable_tensors
from spectrumkv_hf.probe.divergence import token_kl, token_losses
from spectrumkv_hf.spectrum_cache import SpectrumCache
from spectrumkv_hf.tiered.memory import storage_bytes


def token_divergence(
    exact: torch.Tensor, other: torch.Tensor, ids: torch.Tensor | None = None
) -> dict[str, list[float]]:
    """One window for `kv_divergence`: `metric.add(**token_divergence(exact, other, ids))`.

    It takes memory for a few positions at a time, in float32, whatever the vocabulary.

    Args:
        exact: Logits of the exact run, `[tokens, vocabulary]`.
        other: Those of the run that is compared, of the same shape.
        ids: The tokens that both were computed at, `[tokens]`; each is predicted by the logits before it. None: no
            perplexity is wanted.

    Returns:
        `kl` and `agreement` of every position, `loss` and `exact_loss` of every token but the first.

    Raises:
        ValueError: shapes that do not fit.
    """
    if exact.dim() != 2 or exact.shape != other.shape or not len(exact):
        raise ValueError(
            f"logits of a window are [tokens, vocabulary], of both runs alike, got {list(exact.shape)} and "
            f"{list(other.shape)}"
        )
    if ids is not None and ids.shape != exact.shape[:1]:
        raise ValueError(f"ids are [tokens], as many as the {len(exact)} of the logits, got {list(ids.shape)}")
    return {
        "kl": token_kl(exact, other).tolist(),
        "agreement": (exact.argmax(-1) == other.argmax(-1)).double().tolist(),
        "loss": [] if ids is None else token_losses(other, ids).tolist(),
        "exact_loss": [] if ids is None else token_losses(exact, ids).tolist(),
    }


class CacheBytes(TypedDict):
    """One cache for `kv_memory`: `measurement.add(**cache_bytes(cache))`."""

    stored: int
    exact: int


def cache_bytes(cache: Cache, exact: Cache | int | None = None) -> CacheBytes:
    """Bytes of any cache of Transformers, and those of the keys and values of its tokens in the model's dtype.

    Args:
        cache: After its prefill. `stored` is every byte that it keeps alive: whole storages, each counted once, of a
            `StaticCache` the room for tokens that are not there yet too.
        exact: What is compared with: the bytes, or an exact cache of the same tokens. None: by the layers' own shapes
            and lengths, which a `QuantizedCache` tells too. A cache that dropped tokens doesn't know them any more and
            counts those that it kept.

    Raises:
        ValueError: the cache holds no tokens, or `exact` is not positive.
    """
    sizes = _bytes(cache)
    if isinstance(exact, Cache):
        sizes["exact"] = _bytes(exact)["exact"]
    elif exact is not None:
        sizes["exact"] = exact
    if sizes["exact"] <= 0:
        raise ValueError(
            f"a {type(cache).__name__} of {sizes['stored']} bytes is compared with {sizes['exact']} bytes: measure "
            "caches after their prefill"
        )
    return sizes


def _bytes(cache: Cache) -> CacheBytes:
    if isinstance(cache, EncoderDecoderCache):
        both = _bytes(cache.self_attention_cache), _bytes(cache.cross_attention_cache)
        return CacheBytes(stored=sum(each["stored"] for each in both), exact=sum(each["exact"] for each in both))
    if isinstance(cache, SpectrumCache):
        report = cache.memory()
        return CacheBytes(stored=report.stored, exact=report.exact)
    return CacheBytes(stored=storage_bytes(reachable_tensors(cache)), exact=sum(map(_exact_bytes, cache.layers)))


CODES = ("_quantized_keys", "_quantized_values")


def _exact_bytes(layer: Any) -> int:
    """Of the keys and values of the tokens that a stock layer holds, in their dtype; its other states as they are."""
    others = {name: value for name, value in vars(layer).items() if name not in CODES}
    keys, values = others.pop("keys", None), others.pop("values", None)
    total = storage_bytes(each for each in reachable_tensors(others) if each.dim())  # lengths have no dimension
    if keys is None or values is None:
        return total
    if hasattr(layer, CODES[0]):  # the backend alone knows the shape behind its codes
        coded = [layer._dequantize(held) for name in CODES if (held := getattr(layer, name)) is not None]
        return total + keys.itemsize * sum(each.numel() for each in (*coded, keys, values))
    for each in (keys, values):
        held = min(int(layer.get_seq_length()), each.shape[-2])  # room beyond the tokens, or a window below them
        total += each[..., :held, :].nbytes
    return total
