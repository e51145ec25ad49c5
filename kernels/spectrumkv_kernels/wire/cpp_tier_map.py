"""C++ twin of `tier_map` for tensors on a CPU: one pass over the bytes for each code."""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from ..backend import build_cpp
from . import tier_map

CODES = 16
"""What a code of 4 bits tells apart; as in tier_map.cpp."""


class Request(ctypes.Structure):
    """As in tier_map.cpp."""

    _fields_ = [
        ("packed", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("start", ctypes.c_int64),
        ("bits", ctypes.c_int64),
        ("sizes", ctypes.c_int64 * CODES),
        ("out", ctypes.c_void_p * CODES),
        ("counts", ctypes.c_void_p),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled function, built at the first call.

    Raises:
        OSError: it can't be built here.
    """
    loaded = build_cpp.load(Path(__file__).with_name("tier_map.cpp"), ("tier_positions",), (Request,))
    return build_cpp.takes(loaded, {"tier_positions": None}, Request)


def tier_positions(
    packed: torch.Tensor, tokens: int, sizes: Sequence[int], start: int, bits: int = 2
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """As `tier_map.tier_positions`, which does those of other devices."""
    if not packed.is_cpu:
        return tier_map.tier_positions(packed, tokens, sizes, start, bits)
    packed = packed.contiguous()  # named, since only its address is handed over
    rows = packed.shape[:2]
    found = [torch.empty(*rows, size, dtype=torch.int32) for size in sizes]
    counts = torch.empty(*rows, 2**bits, dtype=torch.int64)
    request = Request(
        packed=packed.data_ptr(),
        rows=rows.numel(),
        tokens=tokens,
        start=start,
        bits=bits,
        sizes=tuple(sizes),  # of codes that are not asked for: 0
        out=tuple([t.data_ptr() for t in found]),
        counts=counts.data_ptr(),
    )
    library().tier_positions(request)
    return found, counts
