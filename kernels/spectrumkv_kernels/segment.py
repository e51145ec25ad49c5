"""What attention reads: the tokens of one tier."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, overload

import torch


def contiguous_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied where its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


TILE = 64
"""Tokens of a tile of packed positions, in which the steps from token to token take a byte each."""
START = 4
"""Bytes of the position of a tile's first token, which come before them."""


def can_pack(positions: torch.Tensor) -> torch.Tensor:
    """Whether every step fits a byte and every place has a token, bool `[]`, without waiting for the device."""
    if not positions.numel():
        return torch.zeros((), dtype=torch.bool, device=positions.device)
    starts, steps = _tiles(positions)
    least, most = steps.aminmax()
    return (least >= 0) & (most <= 255) & (starts.amin() >= 0)


def pack_positions(positions: torch.Tensor) -> torch.Tensor:
    """Ascending positions, int32 `[batch, kv_heads, tokens]`, in about a quarter of the bytes.

    A tile is the position of its first token, an int32, and a step for each of its tokens: 0 for the first, then how
    far the position is ahead of the one before.

    Args:
        positions: Ascending.

    Returns:
        uint8 `[batch, kv_heads, ceil(tokens / TILE), START + TILE]`. It says nothing unless `can_pack`.
    """
    starts, steps = _tiles(positions)
    return torch.cat((starts.view(torch.uint8), steps.to(torch.uint8)), dim=-1)


def packing_gains(tokens: int) -> bool:
    """Whether so many positions take fewer bytes when they are packed."""
    return -(-tokens // TILE) * (START + TILE) < 4 * tokens


def _tiles(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the tiles' first tokens, and steps: int32 `[batch, kv_heads, tiles, 1 and TILE]`."""
    tokens = positions.shape[-1]
    tiles = -(-tokens // TILE)
    steps = positions.diff(dim=-1, prepend=positions[..., :1])
    steps = torch.nn.functional.pad(steps, (0, tiles * TILE - tokens)).unflatten(-1, (tiles, TILE))
    steps[..., 0] = 0
    return positions[..., ::TILE].unsqueeze(-1).contiguous(), steps


def unpack_positions(packed: torch.Tensor, tokens: int) -> torch.Tensor:
    """The positions that `pack_positions` took, int32 `[batch, kv_heads, tokens]`."""
    starts = packed[..., :START].contiguous().view(torch.int32)
    return (starts + packed[..., START:].cumsum(-1, dtype=torch.int32)).flatten(-2)[..., :tokens]


class _Fields(NamedTuple):
    bits: int
    keys: Any
    values: Any
    positions: torch.Tensor


class Segment(_Fields):
    """Tokens of one tier: what one pass of the attention reads.

    Attributes:
        bits: 16 for exact tokens, else the width of a code.
        keys: A tensor `[batch, kv_heads, tokens, head_dim]` in the model's dtype for 16 bits, else `Quantized`.
        values: Likewise.
        positions: int32 `[batch, kv_heads, tokens]`, the slots of the tokens, ascending, -1 where a row has no token;
            or as `pack_positions` has them.
        known: What an implementation has found out about these tensors and need not find out at every read.
    """

    @property
    def tokens(self) -> int:
        return (self.keys if isinstance(self.keys, torch.Tensor) else self.keys.codes).shape[2]

    @property
    def packed(self) -> bool:
        """Whether its positions are."""
        return self.positions.dtype == torch.uint8

    def tensors(self) -> list[torch.Tensor]:
        """All its tensors: of keys, of values, positions."""
        sides = ([side] if isinstance(side, torch.Tensor) else [*side] for side in (self.keys, self.values))
        return [*(tensor for side in sides for tensor in side), self.positions]

    def unpacked(self) -> "Segment":
        """The same with plain positions."""
        if not self.packed:
            return self
        return Segment(self.bits, self.keys, self.values, unpack_positions(self.positions, self.tokens))

    @functools.cached_property
    def known(self) -> dict[str, Any]:
        return {}


class Growing(Sequence[Segment]):
    """Segments of which the last one has room for more tokens, that come without anything being moved.

    Attributes:
        others: All but the last one.
        room: The last one, which is exact, with all the places that it has.
        tokens: How many of these are taken, the first ones.
        known: As `Segment.known`, of all segments and whatever the number of tokens.
    """

    def __init__(self, others: Sequence[Segment], room: Segment) -> None:
        self.others, self.room, self.tokens = tuple(others), room, 0
        self.known: dict[str, Any] = {}

    @property
    def now(self) -> tuple[Segment, ...]:
        """The segments as they are now."""
        bits, *room = self.room
        return (*self.others, Segment(bits, *(tensor.narrow(2, 0, self.tokens) for tensor in room)))

    @overload
    def __getitem__(self, index: int) -> Segment: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Segment]: ...

    def __getitem__(self, index: int | slice) -> Segment | Sequence[Segment]:
        return self.now[index]

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.now)

    def __len__(self) -> int:
        return len(self.others) + 1
