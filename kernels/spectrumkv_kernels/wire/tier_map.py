"""Tier maps, 2 bits a token: which tier holds it. See docs/wire-format.md."""

from collections.abc import Sequence

import numpy as np
import torch

from spectrumkv_kernels.backend.tensor_cache import keep

CODES = 4
"""What 2 bits tell apart."""


def pack_map(codes: torch.Tensor) -> torch.Tensor:
    """Four 2-bit codes a byte, the first in the lowest bits: uint8 `[..., tokens]` to `[..., ceil(tokens / 4)]`."""
    size = codes.shape[-1]
    whole = codes.new_zeros(*codes.shape[:-1], -(-size // 4) * 4)
    whole[..., :size] = codes
    # The product's uppermost byte is the sum of the codes, each shifted to its place; lower bits never carry into it.
    return (whole.view(torch.int32) * (1 << 24 | 1 << 18 | 1 << 12 | 1 << 6) >> 24).to(torch.uint8)


def unpack_map(packed: torch.Tensor) -> torch.Tensor:
    """The codes of `pack_map`, padding included, uint8 `[..., 4 * bytes]`."""
    return _codes_of_bytes(packed.device)[packed.int()].view(torch.uint8)


@keep(8)
def _codes_of_bytes(device: torch.device) -> torch.Tensor:
    """The four codes of each byte, as the bytes of an int32 `[256]`."""
    byte = torch.arange(256, dtype=torch.int32)
    return (byte & 3 | (byte & 12) << 6 | (byte & 48) << 12 | (byte & 192) << 18).to(device)


def tier_positions(
    packed: torch.Tensor, tokens: int, sizes: Sequence[int], start: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Positions of each tier's tokens, from a packed tier map.

    Args:
        packed: uint8 `[batch, heads, ceil(tokens / 4)]`, as of `pack_map`; any bytes will do.
        tokens: How many the map has, at least 1. What it says behind them is ignored.
        sizes: Places for the tokens of code 0, of code 1, ...: at most four.
        start: Position of the first token.

    Returns:
        int32 `[batch, heads, size]` for each of `sizes`: in ascending order, behind -1 where a row has fewer tokens of
        the code; the first ones where it has more. And the number of tokens of each code, int64 `[batch, heads, 4]`.
    """
    codes = unpack_map(packed)[..., :tokens]
    if codes.is_cpu:  # NumPy takes a tenth of PyTorch's time to compare bytes
        seen = [torch.from_numpy(codes.numpy() == code) for code in range(CODES)]
        counts = torch.stack([mask.sum(-1) for mask in seen], dim=-1)
        most = counts.flatten(0, -2).amax(0).tolist() if counts.numel() else CODES * [0]
        found = []
        for size, mask, count, greatest in zip(sizes, seen, counts.unbind(-1), most, strict=False):
            if greatest > size:
                found.append(_find_unseen(mask.cumsum(-1), count, size, start))
            else:
                found.append(_find(mask, count, size, start))
        return found, counts
    ranks = [(codes == code).cumsum(-1) for code in range(len(sizes))]
    known = [r[..., -1] for r in ranks] + [(codes == code).sum(-1) for code in range(len(sizes), CODES)]
    found = [_find_unseen(r, count, size, start) for r, count, size in zip(ranks, known, sizes, strict=False)]
    return found, torch.stack(known, dim=-1)


def _find(mask: torch.Tensor, count: torch.Tensor, size: int, start: int) -> torch.Tensor:
    """Places of the `count` True in each row of `mask`, `[batch, heads, tokens]`, counted from `start`, behind -1.

    Returns:
        int32 `[batch, heads, size]`.
    """
    places = torch.from_numpy(np.flatnonzero(mask.numpy()))
    rows, tokens = count.numel(), mask.shape[-1]
    if len(places) == rows * size:
        begins = torch.arange(rows) * tokens - start
        return places.view(rows, size).sub_(begins.unsqueeze(1)).to(torch.int32).view(*count.shape, size)
    found = torch.full((*count.shape, size), -1, dtype=torch.int32)
    found[torch.arange(size) >= size - count.unsqueeze(-1)] = (places % tokens + start).to(torch.int32)
    return found


def _find_unseen(ranks: torch.Tensor, count: torch.Tensor, size: int, start: int) -> torch.Tensor:
    """`_find` of the mask whose running sum is `ranks`, for devices: the host need not know how many True there are.

    Where there are more than `size`, these are the first.
    """
    first = torch.arange(1 - size, 1, device=ranks.device)
    wanted = first + count.clamp(max=size).unsqueeze(-1)  # the first of them, the second, ...
    return (torch.searchsorted(ranks, wanted, out_int32=True) + start).masked_fill_(wanted < 1, -1)
