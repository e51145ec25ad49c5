"""C++ twin of `affine` for tensors on a CPU: one pass over each, at the speed of memory."""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from ..backend import build_cpp
from . import affine


class Affine(ctypes.Structure):
    """As in affine.cpp."""

    _fields_ = [("numbers", ctypes.c_void_p), ("count", ctypes.c_int64), ("step", ctypes.c_int64)]


class Request(ctypes.Structure):
    """As in affine.cpp."""

    _fields_ = [
        ("affines", ctypes.POINTER(Affine)),
        ("count", ctypes.c_int64),
        ("flaws", ctypes.POINTER(ctypes.c_int64)),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled function, built at the first call.

    Raises:
        OSError: it can't be built here.
    """
    loaded = build_cpp.load(Path(__file__).with_name("affine.cpp"), ("affine_flaws",), (Affine, Request))
    return build_cpp.takes(loaded, {"affine_flaws": None}, Request)


def affine_flaws(affines: Sequence[torch.Tensor]) -> list[int]:
    """As `affine.affine_flaws`, which does those of other devices."""
    if not all(t.is_cpu for t in affines):
        return affine.affine_flaws(affines)
    count = len(affines)
    given = (Affine * count)(*[Affine(t.data_ptr(), t.numel(), t.shape[-1]) for t in affines])
    flaws = (ctypes.c_int64 * count)()
    library().affine_flaws(Request(affines=given, count=count, flaws=flaws))
    return list(flaws)
