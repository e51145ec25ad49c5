"""Tensor operations of SpectrumKV: codecs, attention over tiers, importance. Knows nothing of Transformers.

An operation is called as a function and runs where its tensors are: `tiered_attention(query, ...)`. Its `reference`
in plain PyTorch specifies it.
"""

from .backend.tensor_cache import clear_caches
from .codec.frame import key_mean, split_frame
from .codec.quantize import (
    FLOAT16_MAX,
    Quantized,
    dequantize,
    divisor,
    pack,
    quantize,
    saturated,
    unpack,
)
from .codec.reference import CODECS, DEFAULT_CODEC, Codec, take
from .operations import (
    affine_flaws,
    attention_scores,
    decode,
    dense,
    digest_sums,
    encode,
    encode_tiers,
    fit_frame,
    partition,
    query_power,
    tier_positions,
    tiered_attention,
    write_sums,
)
from .rotation.hadamard import hadamard
from .rotation.rotary import Rotary
from .scores.reference import real_tokens
from .segment import Segment
from .wire.tier_map import map_bits, map_width, pack_map

__all__ = [
    "CODECS", "DEFAULT_CODEC", "FLOAT16_MAX", "Codec", "Quantized", "Rotary", "Segment", "affine_flaws",
    "attention_scores", "clear_caches", "decode", "dense", "dequantize", "digest_sums", "divisor", "encode",
    "encode_tiers", "fit_frame", "hadamard", "key_mean", "map_bits", "map_width", "pack", "pack_map", "partition",
    "quantize", "query_power", "real_tokens", "saturated", "split_frame", "take", "tier_positions", "tiered_attention",
    "unpack", "write_sums",
]  # fmt: skip
