"""Tensor operations of SpectrumKV: codecs, attention over tiers, importance. Knows nothing of Transformers."""

from spectrumkv_kernels.attention import Segment, tiered_attention
from spectrumkv_kernels.codec import CODECS, Codec, decode, dense, encode, key_mean, take
from spectrumkv_kernels.dispatch import operation
from spectrumkv_kernels.hadamard import hadamard
from spectrumkv_kernels.quantize import Quantized, dequantize, pack, quantize, saturated, unpack
from spectrumkv_kernels.rotary import Rotary
from spectrumkv_kernels.scores import attention_scores, real_tokens

__all__ = [
    "CODECS",
    "Codec",
    "Quantized",
    "Rotary",
    "Segment",
    "attention_scores",
    "decode",
    "dense",
    "dequantize",
    "encode",
    "hadamard",
    "key_mean",
    "operation",
    "pack",
    "quantize",
    "real_tokens",
    "saturated",
    "take",
    "tiered_attention",
    "unpack",
]
