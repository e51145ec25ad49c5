"""C++ twin of `checksum` for tensors on a CPU: one pass at the speed of memory, which copies as well."""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from ..backend import build_cpp
from . import checksum
from .checksum import ROW, row_weights


class Piece(ctypes.Structure):
    """As in checksum.cpp."""

    _fields_ = [("source", ctypes.c_void_p), ("count", ctypes.c_int64)]


class Request(ctypes.Structure):
    """As in checksum.cpp."""

    _fields_ = [
        ("pieces", ctypes.POINTER(Piece)),
        ("count", ctypes.c_int64),
        ("words", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("threads", ctypes.c_int64),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled function, built at the first call.

    Raises:
        OSError: it can't be built here.
    """
    loaded = build_cpp.load(Path(__file__).with_name("checksum.cpp"), ("write_sums",), (Piece, Request))
    return build_cpp.takes(loaded, {"write_sums": None}, Request)


def digest_sums(words: torch.Tensor) -> torch.Tensor:
    """As `checksum.digest_sums`, which does those of other devices."""
    if not words.is_cpu:
        return checksum.digest_sums(words)
    return _sums(words, [(0, words.numel())])


def write_sums(payload: torch.Tensor, tensors: Sequence[torch.Tensor], start: int) -> torch.Tensor:
    """As `checksum.write_sums`, which does those of other devices."""
    if not (payload.is_cpu and all(tensor.is_cpu for tensor in tensors)):
        return checksum.write_sums(payload, tensors, start)
    words = payload.view(torch.int64)
    pieces, place = [(0, start // 8)], start  # the address, 0 for what is there, and the number of words
    held = [tensor.contiguous() for tensor in tensors]  # named, since only their addresses are handed over
    for i, tensor in enumerate(held):
        if tensor.nbytes % 8:
            checksum.write(payload, held[i:], place)
            break
        pieces.append((tensor.data_ptr(), tensor.nbytes // 8))
        place += tensor.nbytes
    pieces.append((0, words.numel() - sum(count for _, count in pieces)))
    return _sums(words, pieces)


def _sums(words: torch.Tensor, pieces: list[tuple[int, int]]) -> torch.Tensor:
    """Sums of `words`, after the pieces that lie elsewhere have been put there."""
    sums = torch.empty(-(-words.numel() // ROW) + ROW, dtype=torch.int64)
    request = Request(
        pieces=(Piece * len(pieces))(*[Piece(*piece) for piece in pieces]),
        count=len(pieces),
        words=words.data_ptr(),
        weights=row_weights(words.device).data_ptr(),
        sums=sums.data_ptr(),
        threads=torch.get_num_threads(),
    )
    library().write_sums(request)
    return sums
