"""Tier maps, 2 or 4 bits a token: which tier holds it. See docs/wire-format.md."""

from collections.abc import Sequence

import torch

from ..backend.tensor_cache import keep


def map_bits(tiers: int) -> int:
    """Bits of a code in the map of a layer with so many tiers. The largest code is left for tokens of none of them."""
    return 2 if tiers <= 3 else 4


def map_width(tokens: int, bits: int) -> int:
    """Bytes of the map of a row of `tokens` tokens."""
    return -(-tokens * bits // 8)


def pack_map(codes: torch.Tensor, bits: int = 2) -> torch.Tensor:
    """Codes of 2 or 4 bits as bytes, the first in the lowest bits: uint8 `[..., tokens]` to `[..., map_width]`."""
    size, per_byte = codes.shape[-1], 8 // bits
    whole = codes.new_zeros(*codes.shape[:-1], map_width(size, bits) * per_byte)
    whole[..., :size] = codes
    if bits == 4:
        return whole[..., ::2] | whole[..., 1::2] << 4
    # The product's uppermost byte is the sum of the codes, each shifted to its place; lower bits never carry into it.
    return (whole.view(torch.int32) * (1 << 24 | 1 << 18 | 1 << 12 | 1 << 6) >> 24).to(torch.uint8)


def unpack_map(packed: torch.Tensor, bits: int = 2) -> torch.Tensor:
    """The codes of `pack_map`, padding included, uint8 `[..., bytes * 8 / bits]`."""
    return _codes_of_bytes(bits, packed.device)[packed.int()].view(torch.uint8)


@keep(16)
def _codes_of_bytes(bits: int, device: torch.device) -> torch.Tensor:
    """The codes of each byte, as the bytes of an int32 or, of two codes, an int16 `[256]`."""
    byte = torch.arange(256, dtype=torch.int32)
    if bits == 4:
        return (byte & 15 | (byte & 240) << 4).to(torch.int16).to(device)
    return (byte & 3 | (byte & 12) << 6 | (byte & 48) << 12 | (byte & 192) << 18).to(device)


def tier_positions(
    packed: torch.Tensor, tokens: int, sizes: Sequence[int], start: int, bits: int = 2
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Positions of each tier's tokens, from a packed tier map.

    Args:
        packed: uint8 `[batch, heads, map_width]`, as of `pack_map`; any bytes will do.
        tokens: How many the map has, at least 1. What it says behind them is ignored.
        sizes: Places for the tokens of code 0, of code 1, ...: at most `2**bits`.
        start: Position of the first token.
        bits: Of a code, 2 or 4.

    Returns:
        int32 `[batch, heads, size]` for each of `sizes`: in ascending order, behind -1 where a row has fewer tokens of
        the code; the first ones where it has more. And the number of tokens of each code, int64
        `[batch, heads, 2**bits]`.
    """
    codes = unpack_map(packed, bits)[..., :tokens]
    others = range(len(sizes), 2**bits)
    if codes.is_cpu:  # NumPy takes a tenth of PyTorch's time to compare bytes
        found, numbers = [], []
        for code, size in enumerate(sizes):
            mask = torch.from_numpy(codes.numpy() == code)
            count = mask.sum(-1)
            if count.numel() and int(count.max()) > size:
                found.append(_find_unseen(mask.cumsum(-1), count, size, start))
            else:
                found.append(_find(mask, count, size, start))
            numbers.append(count)
        numbers += [torch.from_numpy((codes.numpy() == code).sum(-1)) for code in others]
        return found, torch.stack(numbers, dim=-1)
    ranks = [(codes == code).cumsum(-1) for code in range(len(sizes))]
    known = [r[..., -1] for r in ranks] + [(codes == code).sum(-1) for code in others]
    found = [_find_unseen(r, count, size, start) for r, count, size in zip(ranks, known, sizes, strict=False)]
    return found, torch.stack(known, dim=-1)


def _find(mask: torch.Tensor, count: torch.Tensor, size: int, start: int) -> torch.Tensor:
    """Places of the `count` True in each row of `mask`, `[batch, heads, tokens]`, counted from `start`, behind -1.

    Returns:
        int32 `[batch, heads, size]`.
    """
    places = torch.from_numpy(mask.numpy().ravel().nonzero()[0])
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
