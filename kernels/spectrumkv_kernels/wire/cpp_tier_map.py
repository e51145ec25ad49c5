"""C++ twin of `tier_map` for tensors on a CPU: one pass over the bytes for each code."""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from spectrumkv_kernels.backend import build_cpp
from spectrumkv_kernels.wire import tier_map
from spectrumkv_kernels.wire.tier_map import CODES


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled function, built at the first call.

    Raises:
        OSError: it can't be built here.
    """
    loaded = build_cpp.load(Path(__file__).with_name("tier_map.cpp"), ("tier_positions",))
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    loaded.tier_positions.argtypes = (pointer, integer, integer, integer, pointer, pointer, pointer)
    loaded.tier_positions.restype = None
    return loaded


def tier_positions(
    packed: torch.Tensor, tokens: int, sizes: Sequence[int], start: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """As `tier_map.tier_positions`, which does those of other devices."""
    if not packed.is_cpu:
        return tier_map.tier_positions(packed, tokens, sizes, start)
    packed = packed.contiguous()  # named, since only its address is handed over
    rows = packed.shape[:2]
    found = [torch.empty(*rows, size, dtype=torch.int32) for size in sizes]
    counts = torch.empty(*rows, CODES, dtype=torch.int64)
    none = [0] * (CODES - len(found))
    places = (ctypes.c_int64 * CODES)(*sizes, *none)
    out = (ctypes.c_void_p * CODES)(*(t.data_ptr() for t in found), *none)
    library().tier_positions(packed.data_ptr(), rows.numel(), tokens, start, places, out, counts.data_ptr())
    return found, counts
