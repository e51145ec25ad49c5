"""C++ twin of `attention` for tensors on a CPU: what it reads is converted in registers, in one pass.

In plain torch codes have to become a float32 tensor before they can be multiplied, and a read is some forty operations.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from ..backend import build_cpp
from ..codec.quantize import Quantized, scales
from ..codec.reference import Codec, dims
from ..rotation.rotary import Rotary
from ..segment import Segment, contiguous_rows
from . import reference as attention

FINE = 256
"""Positions that share a coarse rotation: `exp(i t f) = exp(i 256 (t // 256) f) exp(i (t % 256) f)`; as in the C++."""
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3}
NO_MASK = 4
POINTER, INTEGER, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class View(ctypes.Structure):
    """As in attention.cpp."""

    _fields_ = [("data", POINTER), ("row", INTEGER), ("head", INTEGER), ("token", INTEGER)]


class Tokens(ctypes.Structure):
    """As in attention.cpp: a segment."""

    _fields_ = [
        ("bits", INTEGER),
        ("kind", INTEGER),
        ("tokens", INTEGER),
        ("packed", INTEGER),
        ("keys", View),
        ("values", View),
        ("positions", View),
        ("key_affine", View),
        ("value_affine", View),
        ("scales", POINTER),
    ]


class Problem(ctypes.Structure):
    """As in attention.cpp."""

    _fields_ = [
        *((name, INTEGER) for name in ("batch", "kv_heads", "group", "queries", "key_dim", "value_dim", "length")),
        *((name, INTEGER) for name in ("symmetric", "hadamard", "balanced", "pairs", "interleaved")),
        ("frame", POINTER),
        ("angles", POINTER),
        ("query_kind", INTEGER),
        ("query", View),
        ("mask_kind", INTEGER),
        ("mask", View),
        *((name, INTEGER) for name in ("mask_stride", "columns", "window", "ragged")),
        ("sinks", POINTER),
        ("threads", INTEGER),
        ("count", INTEGER),
        ("segments", ctypes.POINTER(Tokens)),
        ("scale", REAL),
        ("softcap", REAL),
        ("lowest", REAL),
        ("workspace", POINTER),
        ("out", POINTER),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled functions, built at the first call.

    Raises:
        OSError: they can't be built here.
    """
    functions = {"workspace_floats": INTEGER, "tiered_attention": None}
    loaded = build_cpp.load(Path(__file__).with_name("attention.cpp"), tuple(functions), (View, Tokens, Problem))
    return build_cpp.takes(loaded, functions, Problem)


def tiered_attention(
    query: torch.Tensor,
    segments: Sequence[Segment],
    *,
    length: int,
    scale: float,
    codec: Codec,
    frame: torch.Tensor | None,
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
    held = sorted((s for s in segments if s.tokens), key=lambda s: s.bits == 16)
    if not _covers(query, held, mask):
        return attention.tiered_attention(
            query, segments, length=length, scale=scale, codec=codec, frame=frame, rotary=rotary, mask=mask,
            window=window, softcap=softcap, sinks=sinks, ragged=ragged,
        )  # fmt: skip
    batch, heads, queries, key_dim = query.shape
    kv_heads, value_dim = held[0].positions.shape[1], dims(held[0])[1]
    pairs = len(rotary.inv_freq) if frame is not None else 0
    # Named, since only their addresses are handed over.
    query = contiguous_rows(query)
    held = [_whole(s) for s in held]
    frame = None if frame is None else frame.contiguous()
    sinks = None if sinks is None else sinks.float().contiguous()
    tables = {s.bits: scales(s.bits, query.device) for s in held if codec.balanced and s.bits < 16}
    angles = rotary.steps(FINE, length, query.device) if pairs else None
    problem = Problem(
        batch=batch,
        kv_heads=kv_heads,
        group=heads // kv_heads,
        queries=queries,
        key_dim=key_dim,
        value_dim=value_dim,
        length=length,
        symmetric=codec.symmetric,
        hadamard=codec.hadamard,
        balanced=codec.balanced,
        pairs=pairs,
        interleaved=rotary.interleaved,
        frame=_address(frame),
        angles=_address(angles),
        query_kind=KINDS[query.dtype],
        query=_view(query),
        mask_kind=NO_MASK,
        window=(window or 0) if mask is None else 0,
        ragged=ragged,
        sinks=_address(sinks),
        threads=torch.get_num_threads(),
        count=len(held),
        segments=(Tokens * len(held))(*(_tokens(s, tables.get(s.bits)) for s in held)),
        scale=scale,
        softcap=softcap or 0.0,
    )
    if mask is not None:
        # 0 for what is the same for all rows of the batch, or all heads
        strides = [0 if size == 1 else stride for size, stride in zip(mask.shape[:3], mask.stride(), strict=False)]
        problem.mask_kind, problem.mask = KINDS[mask.dtype], (mask.data_ptr(), *strides)
        problem.mask_stride, problem.columns = mask.stride(3), mask.shape[3]
        problem.lowest = torch.finfo(mask.dtype).min / 2 if mask.dtype != torch.bool else 0.0
    functions = library()
    workspace = torch.empty(functions.workspace_floats(problem))
    out = torch.empty(batch, heads, queries, value_dim)
    problem.workspace, problem.out = workspace.data_ptr(), out.data_ptr()
    functions.tiered_attention(problem)
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


def _whole(segment: Segment) -> Segment:
    bits, *stored, positions = segment
    keys, values = (
        Quantized(*map(contiguous_rows, side)) if isinstance(side, Quantized) else contiguous_rows(side)
        for side in stored
    )
    return Segment(bits, keys, values, contiguous_rows(positions))


def _tokens(segment: Segment, table: torch.Tensor | None) -> Tokens:
    bits, keys, values, positions = segment
    if isinstance(keys, Quantized):
        views = (_view(keys.codes), _view(values.codes), _view(positions), _view(keys.affine), _view(values.affine))
        return Tokens(bits, 0, segment.tokens, segment.packed, *views, _address(table))
    return Tokens(bits, KINDS[keys.dtype], segment.tokens, segment.packed, _view(keys), _view(values), _view(positions))


def _view(tensor: torch.Tensor) -> tuple[int, ...]:
    """The fields of `View`."""
    return tensor.data_ptr(), *tensor.stride()[:3]
