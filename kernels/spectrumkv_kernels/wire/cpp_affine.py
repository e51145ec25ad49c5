"""C++ twin of `affine` for tensors on a CPU: one pass over each, at the speed of memory."""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from spectrumkv_kernels.backend import build_cpp
from spectrumkv_kernels.wire import affine


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled function, built at the first call.

    Raises:
        OSError: it can't be built here.
    """
    loaded = build_cpp.load(Path(__file__).with_name("affine.cpp"), ("affine_flaws",))
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    loaded.affine_flaws.argtypes, loaded.affine_flaws.restype = (pointer, integer, pointer), None
    return loaded


def affine_flaws(affines: Sequence[torch.Tensor]) -> list[int]:
    """As `affine.affine_flaws`, which does those of other devices."""
    if not all(t.is_cpu for t in affines):
        return affine.affine_flaws(affines)
    fields = [field for t in affines for field in (t.data_ptr(), t.numel(), t.shape[-1])]
    flaws = (ctypes.c_int64 * len(affines))()
    library().affine_flaws((ctypes.c_int64 * len(fields))(*fields), len(affines), flaws)
    return list(flaws)
