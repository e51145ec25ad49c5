"""Every operation with its implementations: the reference in plain PyTorch, and how to get the others."""

from collections.abc import Callable
from typing import Any

from .attention import reference as attention
from .backend.dispatch import Operation
from .codec import frame
from .codec import partition as tiers
from .codec import reference as codec
from .scores import reference as scores
from .wire import affine, checksum, tier_map


def _triton_fit_frame() -> Callable[..., Any]:
    from .codec import triton_frame

    return triton_frame.fit_frame


def _triton_query_power() -> Callable[..., Any]:
    from .codec import triton_frame

    return triton_frame.query_power


def _triton_partition() -> Callable[..., Any]:
    from .codec import triton_partition

    return triton_partition.partition


def _triton_encode() -> Callable[..., Any]:
    from .codec import triton_encode

    return triton_encode.encode


def _triton_encode_tiers() -> Callable[..., Any]:
    from .codec import triton_encode

    return triton_encode.encode_tiers


def _triton_decode() -> Callable[..., Any]:
    from .codec import triton_codec

    return triton_codec.decode


def _triton_dense() -> Callable[..., Any]:
    from .codec import triton_codec

    return triton_codec.dense


def _triton_attention() -> Callable[..., Any]:
    from .attention import triton_attention

    return triton_attention.tiered_attention


def _cpp_attention() -> Callable[..., Any]:
    from .attention import cpp

    cpp.library()
    return cpp.tiered_attention


def _triton_scores() -> Callable[..., Any]:
    from .scores import triton_scores

    return triton_scores.attention_scores


def _triton_digest_sums() -> Callable[..., Any]:
    from .wire import triton_checksum

    return triton_checksum.digest_sums


def _cpp_digest_sums() -> Callable[..., Any]:
    from .wire import cpp_checksum

    cpp_checksum.library()
    return cpp_checksum.digest_sums


def _triton_write_sums() -> Callable[..., Any]:
    from .wire import triton_checksum

    return triton_checksum.write_sums


def _cpp_write_sums() -> Callable[..., Any]:
    from .wire import cpp_checksum

    cpp_checksum.library()
    return cpp_checksum.write_sums


def _cpp_tier_positions() -> Callable[..., Any]:
    from .wire import cpp_tier_map

    cpp_tier_map.library()
    return cpp_tier_map.tier_positions


def _cpp_affine_flaws() -> Callable[..., Any]:
    from .wire import cpp_affine

    cpp_affine.library()
    return cpp_affine.affine_flaws


fit_frame = Operation(frame.fit_frame, triton=_triton_fit_frame)
query_power = Operation(frame.query_power, triton=_triton_query_power)
partition = Operation(tiers.partition, triton=_triton_partition)
encode = Operation(codec.encode, triton=_triton_encode)
encode_tiers = Operation(codec.encode_tiers, triton=_triton_encode_tiers)
decode = Operation(codec.decode, triton=_triton_decode)
dense = Operation(codec.dense, triton=_triton_dense)
tiered_attention = Operation(attention.tiered_attention, triton=_triton_attention, cpp=_cpp_attention)
attention_scores = Operation(scores.attention_scores, triton=_triton_scores)
digest_sums = Operation(checksum.digest_sums, triton=_triton_digest_sums, cpp=_cpp_digest_sums)
write_sums = Operation(checksum.write_sums, triton=_triton_write_sums, cpp=_cpp_write_sums)
tier_positions = Operation(tier_map.tier_positions, cpp=_cpp_tier_positions)
affine_flaws = Operation(affine.affine_flaws, cpp=_cpp_affine_flaws)
