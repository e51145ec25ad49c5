"""Where a layer of fixed capacity keeps what: all its tensors in one buffer, and how full they are in another."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, overload

import torch

from ..codec.quantize import Quantized
from ..codec.reference import Codec
from ..rotation.rotary import Rotary

BLOCK = 64
"""Tokens that decoding tiers at a time."""
ALIGNMENT = 64
"""Bytes; where each tensor of a buffer begins."""
LENGTH, TICKET, BASE, REFUSED = range(4)
"""Entries of a layer's state: tokens seen; programs of a launch that are done; position of the first token that was not
tiered when the host last wrote; tokens that came when the layer was full, and were not taken."""
STATE = 16
"""Entries that there is room for."""


class Room(NamedTuple):
    """The arena of a tier.

    Attributes:
        bits: Of a code; 16 for exact tokens.
        tokens: That it has room for in each row and head.
    """

    bits: int
    tokens: int


class Arena(NamedTuple):
    """The tensors of a tier's arena, over all that it has room for. As in `Segment`, but for the name of bits."""

    bits: int
    keys: torch.Tensor | Quantized
    values: torch.Tensor | Quantized
    positions: torch.Tensor


class Arenas(Sequence[Arena]):
    """Arenas that are made when they are asked for: the prompt fills some of a layer's only."""

    def __init__(self, make: Callable[[int], Arena], count: int) -> None:
        self._make = make
        self._made: list[Arena | None] = [None] * count

    def __len__(self) -> int:
        return len(self._made)

    @overload
    def __getitem__(self, index: int) -> Arena: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Arena]: ...

    def __getitem__(self, index: int | slice) -> Arena | Sequence[Arena]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        made = self._made[index]
        if made is None:
            made = self._made[index] = self._make(index % len(self))
        return made


class Views(NamedTuple):
    """The tensors in a buffer.

    Attributes:
        keys, values: The tail, exact: `[batch, kv_heads, ring, dim]`. The token at position `p` lies at
            `(p - base) % ring`.
        arenas: One for each of `Layout.rooms`.
        totals: int32 `[blocks + 1, rooms]`: tokens in each arena once decoding has tiered that many blocks.
        own: int32 `[blocks, batch or 1, rooms]`: tokens of each row that go into each arena with each block. The
            others that a block brings are padding, or are dropped.
        pads: int32 `[batch]`: padding tokens at the start of each row.
        frame: float32 `[batch, kv_heads, codec.frame_size]`.
    """

    keys: torch.Tensor
    values: torch.Tensor
    arenas: Arenas
    totals: torch.Tensor
    own: torch.Tensor
    pads: torch.Tensor
    frame: torch.Tensor


@dataclass(frozen=True)
class Layout:
    """How a layer of fixed capacity is laid out, and by which rule decoding moves its tokens on.

    Decoding tiers `BLOCK` tokens of the tail whenever more than `recent_window + BLOCK` lie there: before it adds a
    token to a layer that holds `length`, as many blocks as `blocks(length)` says must have been tiered. So all counts
    follow from the length, and a captured graph decides by one number on the device.

    Attributes:
        batch, kv_heads, key_dim, value_dim, dtype: Of keys and values.
        capacity: Tokens that the layer takes in all.
        ring: Places of the tail: `capacity` where nothing is tiered or forgotten, the window where only that is kept.
        rooms: The tiers, the most precise first.
        recent_window: Tokens that decoding leaves in the tail.
        sinks: Tokens at the start of each row that rank first.
        padded: Rows have padding at their start.
        ragged: Some positions in the arenas are -1: places that no token has.
        score: What ranks tokens: `kv_norm`, the norm of the value over that of the key, or `recency`.
        decay: Per token, on the score.
        codec, rotary: How codes are made.
    """

    batch: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    capacity: int
    ring: int
    rooms: tuple[Room, ...]
    recent_window: int
    sinks: int
    padded: bool
    ragged: bool
    score: str
    decay: float
    codec: Codec
    rotary: Rotary

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        """Kept, because every step looks up what belongs to the layout."""
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    @property
    def tiers(self) -> bool:
        """Whether decoding tiers at all."""
        return bool(self.rooms)

    @property
    def blocks(self) -> int:
        """Blocks that decoding tiers at most."""
        return -(-self.capacity // BLOCK) if self.rooms else 0

    def due(self, length: int, base: int) -> int:
        """Blocks that must have been tiered before a token is added to `length` others.

        Args:
            length: Tokens seen.
            base: Position of the first token in the tail when none had been.
        """
        return max(0, length - base - self.recent_window - 1) // BLOCK if self.rooms else 0

    def done(self, length: int, base: int) -> int:
        """Blocks that have been tiered when the last of `length` tokens was added. Arguments as in `due`."""
        return self.due(length - 1, base)

    @functools.cached_property
    def places(self) -> tuple[tuple[str, torch.dtype, tuple[int, ...], int], ...]:
        """Name, dtype, shape and first byte of each tensor in the buffer, which are contiguous."""
        rows, exact = (self.batch, self.kv_heads), self.dtype
        wanted: list[tuple[str, torch.dtype, tuple[int, ...]]] = [
            ("keys", exact, (*rows, self.ring, self.key_dim)),
            ("values", exact, (*rows, self.ring, self.value_dim)),
            ("totals", torch.int32, (self.blocks + 1, len(self.rooms))),
            ("own", torch.int32, (self.blocks, self.batch if self.padded else 1, len(self.rooms))),
            ("pads", torch.int32, (self.batch,)),
            ("frame", torch.float32, (*rows, self.codec.frame_size(self.key_dim, self.value_dim))),
        ]
        for bits, tokens in self.rooms:
            for side, dim in (("keys", self.key_dim), ("values", self.value_dim)):
                if bits == 16:
                    wanted.append((f"{bits}.{side}", exact, (*rows, tokens, dim)))
                else:
                    wanted.append((f"{bits}.{side}.codes", torch.uint8, (*rows, tokens, dim * bits // 8)))
                    affine, kind = self.codec.affine
                    wanted.append((f"{bits}.{side}.affine", kind, (*rows, tokens, affine)))
            wanted.append((f"{bits}.positions", torch.int32, (*rows, tokens)))
        placed, start = [], 0
        for name, dtype, shape in wanted:
            placed.append((name, dtype, shape, start))
            start += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        return (*placed, ("end", torch.uint8, (0,), start))

    @property
    def size(self) -> int:
        """Bytes of the buffer."""
        return self.places[-1][3]

    @functools.cached_property
    def _strided(self) -> list[list[tuple[torch.dtype, tuple[int, ...], list[int], int]]]:
        """`places` with strides, and the first element in the place of the first byte: those of the layer, and of each
        room."""
        every = [
            (dtype, shape, [math.prod(shape[i + 1 :]) for i in range(len(shape))], start // dtype.itemsize)
            for _, dtype, shape, start in self.places
        ]
        ends = [6, *(3 if bits == 16 else 5 for bits, _ in self.rooms)]
        return [every[end - size : end] for size, end in zip(ends, itertools.accumulate(ends), strict=True)]

    def views(self, buffer: torch.Tensor) -> Views:
        """The tensors in a buffer, uint8 `[size]`."""
        wholes = {dtype: buffer.view(dtype) for dtype in {dtype for _, dtype, _, _ in self.places}}

        def tensors(part: int) -> list[torch.Tensor]:
            return [
                wholes[dtype].as_strided(shape, strides, first) for dtype, shape, strides, first in self._strided[part]
            ]

        def arena(room: int) -> Arena:
            bits, found = self.rooms[room].bits, tensors(1 + room)
            if bits == 16:
                return Arena(bits, *found)
            return Arena(bits, Quantized(*found[:2]), Quantized(*found[2:4]), found[4])

        keys, values, totals, own, pads, frame = tensors(0)
        return Views(keys, values, Arenas(arena, len(self.rooms)), totals, own, pads, frame)


_layouts: list[Layout] = []
_numbers: dict[Layout, int] = {}


def number_of(layout: Layout) -> int:
    """A number for a layout, the same for equal ones: what an operation of a compiled graph takes in its place."""
    if layout not in _numbers:
        _numbers[layout] = len(_layouts)
        _layouts.append(layout)
    return _numbers[layout]


def layout_of(number: int) -> Layout:
    """The layout of a number."""
    return _layouts[number]


def slots(layout: Layout, base: int, start: int, stop: int) -> Sequence[tuple[int, int]]:
    """Stretches of the ring, first place and number of places, that hold the positions from `start` to `stop`."""
    first, count = (start - base) % layout.ring, stop - start
    before = min(count, layout.ring - first)
    return [(first, before), (0, count - before)] if count > before else [(first, count)]
