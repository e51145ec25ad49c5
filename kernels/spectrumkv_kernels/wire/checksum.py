"""Sums under the wire format's digest. See docs/wire-format.md."""

from collections.abc import Iterator, Sequence

import torch

from ..backend.tensor_cache import keep

ROW = 1024
"""64-bit words in a row."""
_STEP = 128
"""Rows that are summed at a time."""


def digest_sums(words: torch.Tensor) -> torch.Tensor:
    """What the digest hashes: a weighted sum of each row of 1024 words and the sum of each column, modulo 2^64.

    Args:
        words: int64 `[words]`, contiguous; zeros are understood to fill up the last row.

    Returns:
        int64 `[ceil(words / 1024) + 1024]`: the sums of the rows, then those of the columns.
    """
    weights = row_weights(words.device)
    whole = words.numel() // ROW * ROW
    rows = words[:whole].view(-1, ROW)
    columns = torch.zeros(ROW, dtype=torch.int64, device=words.device)
    sums = []
    if words.device.type == "cpu":
        # Products of integer matrices exist on CPUs only. In steps that fit the processor's cache memory is read once.
        ones = torch.ones(_STEP, dtype=torch.int64)
        for part in rows.split(_STEP):
            sums.append(torch.mv(part, weights))
            columns.addmv_(part.t(), ones[: len(part)])
    else:
        for part in rows.split(64 * _STEP):
            sums.append((part * weights).sum(1))
            columns += part.sum(0)
    if whole < words.numel():
        rest = words[whole:]
        sums.append((rest * weights[: len(rest)]).sum(0, keepdim=True))
        columns[: len(rest)] += rest
    return torch.cat((*sums, columns))


def write_sums(payload: torch.Tensor, tensors: Sequence[torch.Tensor], start: int) -> torch.Tensor:
    """Write tensors into a payload, of which the rest is there, and give its `digest_sums`.

    Args:
        payload: uint8 `[bytes]`, contiguous, a multiple of 8 of them.
        tensors: Go there one behind the other, each to a multiple of its item's size; of any strides.
        start: Where the first one begins, in bytes: a multiple of 8.
    """
    write(payload, tensors, start)
    return digest_sums(payload.view(torch.int64))


def write(payload: torch.Tensor, tensors: Sequence[torch.Tensor], start: int) -> None:
    """Write tensors one behind the other, as `write_sums` does."""
    for tensor in tensors:
        payload[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        start += tensor.nbytes


@keep(8)
def row_weights(device: torch.device) -> torch.Tensor:
    """The weight of each word of a row: int64 `[1024]`."""
    return torch.tensor(list(_splitmix(ROW)), dtype=torch.int64).to(device)


def _splitmix(count: int) -> Iterator[int]:
    """Odd 64-bit numbers from SplitMix64 with seed 0, as signed integers."""
    mask, state = (1 << 64) - 1, 0
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        z = (z ^ (z >> 31)) | 1
        yield z - (1 << 64) if z >> 63 else z
