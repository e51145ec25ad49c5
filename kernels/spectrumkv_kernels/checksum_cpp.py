"""C++ twin of `checksum` for tensors on a CPU: one pass at the speed of memory."""

import ctypes
import functools

import torch

from spectrumkv_kernels import build_cpp, checksum
from spectrumkv_kernels.checksum import ROW, row_weights


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled function, built at the first call.

    Raises:
        OSError: it can't be built here.
    """
    loaded = build_cpp.load("checksum")
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    loaded.digest_sums.argtypes, loaded.digest_sums.restype = (pointer, integer, pointer, pointer, integer), None
    return loaded


def digest_sums(words: torch.Tensor) -> torch.Tensor:
    """As `checksum.digest_sums`, which does those of other devices."""
    if words.device.type != "cpu":
        return checksum.digest_sums(words)
    sums = torch.empty(-(-words.numel() // ROW) + ROW, dtype=torch.int64)
    weights, threads = row_weights(words.device), torch.get_num_threads()
    library().digest_sums(words.data_ptr(), words.numel(), weights.data_ptr(), sums.data_ptr(), threads)
    return sums
