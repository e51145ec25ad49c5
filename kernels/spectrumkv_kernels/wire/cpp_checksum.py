"""C++ twin of `checksum` for tensors on a CPU: one pass at the speed of memory, which copies as well."""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from spectrumkv_kernels.backend import build_cpp
from spectrumkv_kernels.wire import checksum
from spectrumkv_kernels.wire.checksum import ROW, row_weights


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled function, built at the first call.

    Raises:
        OSError: it can't be built here.
    """
    loaded = build_cpp.load(Path(__file__).with_name("checksum.cpp"), ("write_sums",))
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    loaded.write_sums.argtypes = (pointer, integer, pointer, pointer, pointer, integer)
    loaded.write_sums.restype = None
    return loaded


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
    sums = torch.empty(-(-words.numel() // ROW) + ROW, dtype=torch.int64)
    fields = (ctypes.c_int64 * (2 * len(pieces)))(*(field for piece in pieces for field in piece))
    weights, threads = row_weights(words.device), torch.get_num_threads()
    library().write_sums(fields, len(pieces), words.data_ptr(), weights.data_ptr(), sums.data_ptr(), threads)
    return sums
