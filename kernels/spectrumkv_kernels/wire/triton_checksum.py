"""Triton twin of `checksum`: one launch. Integers are summed in any order to the same bits."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..backend.launch_triton import cdiv, launch, on_device
from .checksum import ROW, row_weights, write

ROWS, COLUMNS = 8, 256
"""Rows of a program, and how many of their columns it reads at a time."""


@triton.jit(do_not_specialize=["count", "rows"])
def digest_kernel(words, weights, sums, count, rows, ROW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums of `ROWS` rows, and what they add to those of the columns, which begin at 0. Grid: rows / ROWS."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS], tl.int64)
    for start in range(0, ROW, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        place = row.to(tl.int64)[:, None] * ROW + column[None, :]
        x = tl.load(words + place, mask=place < count, other=0)
        total += tl.sum(x * tl.load(weights + column)[None, :], 1)
        tl.atomic_add(sums + rows + column, tl.sum(x, 0), sem="relaxed")
    tl.store(sums + row, total, mask=row < rows)


def digest_sums(words: torch.Tensor) -> torch.Tensor:
    """As `checksum.digest_sums`."""
    rows = -(-words.numel() // ROW)
    sums = words.new_zeros(rows + ROW)
    if rows:
        with on_device(words):
            tensors = {"words": words, "weights": row_weights(words.device), "sums": sums}
            numbers = {"count": words.numel(), "rows": rows}
            constants = {"ROW": ROW, "ROWS": ROWS, "COLUMNS": COLUMNS}
            launch(digest_kernel, (cdiv(rows, ROWS),), tensors, numbers, constants)
    return sums


def write_sums(payload: torch.Tensor, tensors: Sequence[torch.Tensor], start: int) -> torch.Tensor:
    """As `checksum.write_sums`."""
    write(payload, tensors, start)
    return digest_sums(payload.view(torch.int64))
