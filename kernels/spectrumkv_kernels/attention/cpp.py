"""C++ twin of `attention` for tensors on a CPU: what it reads is converted in registers, in one pass.

In plain torch codes have to become a float32 tensor before they can be multiplied, and a read is some forty operations.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from spectrumkv_kernels.attention import reference as attention
from spectrumkv_kernels.backend import build_cpp
from spectrumkv_kernels.codec.quantize import Quantized
from spectrumkv_kernels.codec.reference import Codec, dims
from spectrumkv_kernels.rotation.rotary import Rotary
from spectrumkv_kernels.segment import Segment

FINE = 256
"""Positions that share a coarse rotation: `exp(i t f) = exp(i 256 (t // 256) f) exp(i (t % 256) f)`; as in the C++."""
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3}
NO_MASK = 4
NO_VIEW = (0, 0, 0, 0)


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled functions, built at the first call.

    Raises:
        OSError: they can't be built here.
    """
    loaded = build_cpp.load(Path(__file__).with_name("attention.cpp"), ("workspace_floats", "tiered_attention"))
    pointer, real = ctypes.c_void_p, ctypes.c_float
    loaded.workspace_floats.argtypes, loaded.workspace_floats.restype = (pointer,), ctypes.c_int64
    loaded.tiered_attention.argtypes = (pointer, pointer, pointer, real, real, real)
    loaded.tiered_attention.restype = None
    return loaded


def tiered_attention(
    query: torch.Tensor,
    segments: Sequence[Segment],
    *,
    length: int,
    scale: float,
    codec: Codec,
    mean: torch.Tensor | None,
    rotary: Rotary,
    mask: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    ragged: bool = False,
) -> torch.Tensor:
    """As `attention.tiered_attention`, which does what this one doesn't: gradients, other dtypes, other devices.

    The result depends on neither the number of threads nor the size of the batch.
    """
    held = [s for s in segments if s.bits < 16 and s.positions.shape[-1]]
    held += [s for s in segments if s.bits == 16 and s.positions.shape[-1]]
    if not _covers(query, held, mask):
        return attention.tiered_attention(
            query, segments, length=length, scale=scale, codec=codec, mean=mean, rotary=rotary, mask=mask,
            window=window, softcap=softcap, sinks=sinks, ragged=ragged,
        )  # fmt: skip
    batch, heads, queries, key_dim = query.shape
    kv_heads, value_dim = held[0].positions.shape[1], dims(held[0])[1]
    pairs = len(rotary.inv_freq) if mean is not None else 0
    # Named, since only their addresses are handed over.
    query = _rows(query)
    held = [_whole(s) for s in held]
    mean = None if mean is None else mean.contiguous()
    sinks = None if sinks is None else sinks.float().contiguous()
    angles = _angles(rotary, max(1 << (length - 1).bit_length(), 4096)) if pairs else None
    if mask is None:
        masked: tuple[int, ...] = (NO_MASK, *NO_VIEW, 0, 0)
        lowest = 0.0
    else:
        # 0 for what is the same for all rows of the batch, or all heads
        strides = [0 if size == 1 else stride for size, stride in zip(mask.shape[:3], mask.stride(), strict=False)]
        masked = (KINDS[mask.dtype], mask.data_ptr(), *strides, mask.stride(3), mask.shape[3])
        lowest = torch.finfo(mask.dtype).min / 2 if mask.dtype != torch.bool else 0.0
    fields = [
        batch, kv_heads, heads // kv_heads, queries, key_dim, value_dim, length,
        codec.symmetric, codec.hadamard, pairs, rotary.interleaved,
        _address(mean), _address(angles), KINDS[query.dtype], query.data_ptr(), *query.stride()[:3], *masked,
        window or 0 if mask is None else 0, ragged, _address(sinks), torch.get_num_threads(), len(held),
    ]  # fmt: skip
    for segment in held:
        fields += _fields(segment)
    problem = (ctypes.c_int64 * len(fields))(*fields)
    functions = library()
    workspace = torch.empty(functions.workspace_floats(problem))
    out = torch.empty(batch, heads, queries, value_dim)
    functions.tiered_attention(problem, workspace.data_ptr(), out.data_ptr(), scale, softcap or 0.0, lowest)
    return out.to(query.dtype)


def _covers(query: torch.Tensor, held: Sequence[Segment], mask: torch.Tensor | None) -> bool:
    if query.device.type != "cpu" or query.dtype not in KINDS or (torch.is_grad_enabled() and query.requires_grad):
        return False
    if mask is not None and mask.dtype not in KINDS:
        return False
    return all(
        isinstance(s.keys, Quantized) or (s.keys.dtype in KINDS and s.values.dtype == s.keys.dtype) for s in held
    )


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied where its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _whole(segment: Segment) -> Segment:
    bits, keys, values, positions = segment
    if isinstance(keys, Quantized):
        return Segment(bits, Quantized(*map(_rows, keys)), Quantized(*map(_rows, values)), _rows(positions))
    return Segment(bits, _rows(keys), _rows(values), _rows(positions))


def _fields(segment: Segment) -> list[int]:
    """The fields of the structure `Segment` in attention.cpp."""
    bits, keys, values, positions = segment
    if isinstance(keys, Quantized):
        kind, views = 0, (*_view(keys.codes), *_view(values.codes), *_view(positions))
        views += (*_view(keys.affine), *_view(values.affine))
    else:
        kind, views = KINDS[keys.dtype], (*_view(keys), *_view(values), *_view(positions), *NO_VIEW, *NO_VIEW)
    return [bits, kind, positions.shape[2], *views]


def _view(tensor: torch.Tensor) -> tuple[int, ...]:
    return tensor.data_ptr(), *tensor.stride()[:3]


@functools.lru_cache(maxsize=32)
def _angles(rotary: Rotary, length: int) -> torch.Tensor:
    """Cosines, then sines of the first `FINE` positions, then of every `FINE`th below `length`: float32, exact."""
    positions = torch.cat((torch.arange(FINE), torch.arange(0, length, FINE))).double()
    angles = positions[:, None] * torch.tensor(rotary.inv_freq, dtype=torch.float64)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()
