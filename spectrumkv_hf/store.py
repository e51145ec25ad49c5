"""The tensors of one layer: an arena per tier, and a tail of recent tokens that are exact."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from spectrumkv_hf.policy import DROPPED, FP16, TIERS, Policy, Tier, increments, lifted
from spectrumkv_kernels import Codec, Quantized, Rotary, Segment, operation, take

TAIL_STEP = 64
"""The tail's buffer grows by this many tokens, and decoding tiers this many at a time."""

TensorMap = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Arena:
    """The tokens of one tier in one layer: as `spectrumkv_kernels.Segment`, whose fields these are."""

    tier: Tier
    keys: torch.Tensor | Quantized
    values: torch.Tensor | Quantized
    positions: torch.Tensor

    def __len__(self) -> int:
        return self.positions.shape[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @functools.cached_property
    def segment(self) -> Segment:
        """What attention reads; an arena's tensors are never replaced."""
        return Segment(self.tier.bits, self.keys, self.values, self.positions)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor with its name: `keys.codes`, `keys.affine`, ..., `positions`."""
        for side in ("keys", "values"):
            stored = getattr(self, side)
            if isinstance(stored, torch.Tensor):
                yield side, stored
            else:
                yield from ((f"{side}.{name}", t) for name, t in stored._asdict().items())
        yield "positions", self.positions

    def map(self, function: TensorMap) -> "Arena":
        """A new arena of `function` of every tensor, called in the order of `tensors`."""

        def side(stored: torch.Tensor | Quantized) -> torch.Tensor | Quantized:
            if isinstance(stored, torch.Tensor):
                return function(stored)
            return Quantized(function(stored.codes), function(stored.affine))

        return replace(self, keys=side(self.keys), values=side(self.values), positions=function(self.positions))

    def extended(self, other: "Arena") -> "Arena":
        """A new arena with the tokens of `other` behind its own."""

        theirs = (tensor for _, tensor in other.tensors())  # in the order in which `map` visits its own
        return self.map(lambda own: torch.cat((own, next(theirs)), dim=2))

    def kept(self, keep: torch.Tensor) -> "Arena":
        """A new arena of the tokens where `keep`, bool `[batch, kv_heads, tokens]`; rows with fewer start with -1."""
        counts = keep.sum(-1, keepdim=True)
        size = int(counts.max()) if keep.numel() else 0
        order = torch.argsort(keep.to(torch.uint8), dim=-1, stable=True)[..., len(self) - size :]  # kept ones last
        arena = self.map(lambda t: take(t, order))
        empty = torch.arange(size, device=keep.device) < size - counts
        arena.positions.masked_fill_(empty, -1)
        return arena


KEPT_COUNTING = 1 << 20
"""Positions up to which they are kept, 4 MiB of them."""


def _counting(start: int, length: int, device: torch.device) -> torch.Tensor:
    """`start`, `start + 1`, ... up to `length`: int32 `[length - start]`, kept for all layers and steps."""
    if length > KEPT_COUNTING:
        return torch.arange(start, length, dtype=torch.int32, device=device)
    return _counting_to(max(1 << (length - 1).bit_length(), 4096), device)[start:length]


@functools.lru_cache(maxsize=8)
def _counting_to(length: int, device: torch.device) -> torch.Tensor:
    return torch.arange(length, dtype=torch.int32, device=device)


def owned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied where it is a view that would keep a larger storage alive."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


class TieredStore:
    """Keys and values of one layer.

    Positions are slots: 0 for the first token seen, padding included. Tokens before `tail_start` lie in the arenas, in
    ascending order, or were dropped; the others lie exact in the tail. Counts per tier are the same for all rows and
    heads, so operations on the batch are plain gathers.

    Attributes:
        length: Tokens seen, `tail_start` and the tail's together.
        arenas: By tier, the most precise first.
        mean: float32 `[batch, kv_heads, head_dim]`, set when tokens are first tiered; None before that and where the
            codec does not centre.
        pads: Padding tokens at the start of each row, int64 `[batch]`, or None where there are none.
        ragged: Some positions are -1.
        drops: Some tokens were dropped.
        first_kept: Tokens before this position may be gone, for a layer with a window.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, codec: Codec, rotary: Rotary) -> None:
        """An empty store for tensors like `keys` and `values`, `[batch, kv_heads, any, dim]`."""
        self.codec, self.rotary = codec, rotary
        self.device = keys.device
        self._keys, self._values = keys[:, :, :0].clone(), values[:, :, :0].clone()
        self.length = 0
        self.tail_start = 0
        self.first_kept = 0
        self.arenas: dict[Tier, Arena] = {}
        self.mean: torch.Tensor | None = None
        self.pads: torch.Tensor | None = None
        self.ragged = False
        self.drops = False
        self._borrowed = False

    @property
    def buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the tail lies in, `[batch, kv_heads, any, dim]`."""
        return self._keys, self._values

    @property
    def batch_size(self) -> int:
        return self._keys.shape[0]

    @property
    def tail_length(self) -> int:
        return self.length - self.tail_start

    @property
    def tail(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Exact keys and values from `tail_start` on, views `[batch, kv_heads, tail_length, dim]`."""
        tokens = self.length - self.tail_start
        return self._keys.narrow(2, 0, tokens), self._values.narrow(2, 0, tokens)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add tokens, `[batch, kv_heads, tokens, dim]`, to the tail."""
        held, grown = self.tail_length, self.tail_length + keys.shape[2]
        if held == 0 and grown > self._keys.shape[2]:
            self._keys, self._values, self._borrowed = owned(keys), owned(values), False
        else:
            fixed = self._keys.is_inference() and not torch.is_inference_mode_enabled()  # can't be written to
            fixed = fixed or self._borrowed
            if grown > self._keys.shape[2] or fixed:
                self._resize(held, grown)
            self._keys.narrow(2, held, grown - held).copy_(keys)
            self._values.narrow(2, held, grown - held).copy_(values)
        self.length += keys.shape[2]

    def adopt_tail(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take tensors that belong to someone else as the tail, without a copy: nothing will be written into them."""
        self._keys, self._values, self._borrowed = keys, values, True

    def _resize(self, held: int, needed: int, skip: int = 0) -> None:
        """New buffers for `needed` tokens, rounded up, which start with `held` tokens from `skip` on."""
        capacity = -(-needed // TAIL_STEP) * TAIL_STEP

        def resized(old: torch.Tensor) -> torch.Tensor:
            new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
            new[:, :, :held] = old[:, :, skip : skip + held]
            return new

        self._keys = resized(self._keys)
        self._values = resized(self._values)
        self._borrowed = False

    def note_padding(self, real: torch.Tensor) -> None:
        """Learn where rows begin, from `real`, bool `[batch, n]`, for the last `n` tokens: False at the start pads."""
        start = self.length - real.shape[-1]
        leading = (real.cumsum(-1) == 0).sum(-1)
        if self.pads is None:
            if start or not bool(leading.any()):
                return
            self.pads = leading
        else:
            self.pads = torch.where(self.pads == start, start + leading, self.pads)

    def _row_index(self, tokens: int) -> torch.Tensor:
        """Place in its row of each of the tail's first `tokens`, int64 `[batch or 1, tokens]`; below 0 for padding."""
        positions = torch.arange(self.tail_start, self.tail_start + tokens, device=self.device)
        return positions[None] if self.pads is None else positions - self.pads[:, None]

    def settle_mean(self, sinks: int) -> None:
        """Fix the mean of rows that have none, from their tokens in the tail but the sinks and padding."""
        if not self.codec.center:
            return
        begins = None if self.pads is None else self.pads >= self.tail_start  # rows of which nothing is tiered yet
        if self.mean is not None and (begins is None or not bool(begins.any())):
            return
        index = self._row_index(self.tail_length)
        positions = torch.arange(self.tail_start, self.length, device=self.device)
        past_sinks = index >= (sinks if self.tail_length > sinks else 0)
        mean = operation("key_mean", self.device)(self.tail[0], positions, self.rotary, past_sinks)
        if self.mean is not None and begins is not None:
            mean = torch.where(begins[:, None, None], mean, self.mean)
        self.mean = mean

    def compress(self, tokens: int, policy: Policy, score: torch.Tensor, floor: Tier | None = None) -> None:
        """Give the oldest `tokens` of the tail their tiers, by rank of `score`.

        Args:
            tokens: How many, counted from `tail_start`.
            policy: Says how many go into each tier.
            score: float32 `[batch, kv_heads, tokens]`, higher ranks first. Padding ranks last, and fills up the
                arenas of rows that have fewer real tokens than others.
            floor: The policy's for this layer.
        """
        self.settle_mean(policy.sinks)
        keys, values = (t[:, :, :tokens] for t in self.tail)
        assign = self._assign if self.pads is None else self._assign_padded
        for tier, chosen in zip(TIERS, assign(tokens, policy, score, floor), strict=True):
            if not chosen.shape[-1]:
                continue
            if tier == DROPPED:
                self.drops = True
                continue
            positions = (chosen + self.tail_start).to(torch.int32)
            arena = self._encode(tier, keys, values, positions, chosen)
            self.arenas[tier] = self.arenas[tier].extended(arena) if tier in self.arenas else arena
        self.arenas = {tier: self.arenas[tier] for tier in TIERS if tier in self.arenas}
        self._forget_head(tokens)

    def _forget_head(self, tokens: int) -> None:
        """Take the oldest `tokens` out of the tail."""
        left = self.tail_length - tokens
        self._resize(left, left, skip=tokens)
        self.tail_start += tokens

    def _assign(self, tokens: int, policy: Policy, score: torch.Tensor, floor: Tier | None) -> Sequence[torch.Tensor]:
        """The tokens that go to each of `TIERS`: ascending, int64 `[batch, kv_heads, any]`."""
        row = lifted(increments(policy, self.tail_start, tokens), floor)
        if self.tail_start < policy.sinks:
            score = score.clone()
            score[..., : policy.sinks - self.tail_start] = torch.inf
        ranked = torch.argsort(score, dim=-1, descending=True, stable=True)
        return [part.sort(-1).values for part in ranked.split([row.get(tier, 0) for tier in TIERS], dim=-1)]

    def _assign_padded(
        self, tokens: int, policy: Policy, score: torch.Tensor, floor: Tier | None
    ) -> Sequence[torch.Tensor]:
        """`_assign` for rows that begin at different places.

        The real tokens of each row take the documented counts for their number. The longest row sizes the arenas, and
        the padding of the others fills them up.
        """
        batch, heads = score.shape[:2]
        place = self._row_index(tokens)
        before = place[:, 0].clamp(min=0).tolist()
        now = (place >= 0).sum(-1).tolist()
        rows = [lifted(increments(policy, had, new), floor) for had, new in zip(before, now, strict=True)]
        own = torch.tensor([[row.get(tier, 0) for tier in TIERS] for row in rows])
        sizes = own.amax(0)
        last = int(sizes.nonzero().max()) if int(sizes.sum()) else len(TIERS) - 1
        sizes[last] += tokens - sizes.sum()

        def tier_by(rank: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
            edges = counts.cumsum(-1)[:, None].expand(batch, heads, -1).contiguous().to(rank.device)
            return torch.searchsorted(edges, rank, right=True)

        score = score.masked_fill((place < policy.sinks)[:, None], torch.inf)
        score = score.masked_fill((place < 0)[:, None], -torch.inf)
        ranked = torch.argsort(score, dim=-1, descending=True, stable=True)
        places = torch.arange(tokens, device=self.device).expand_as(ranked).contiguous()
        rank = torch.empty_like(ranked).scatter_(-1, ranked, places)
        filler = (rank - torch.tensor(now, device=self.device)[:, None, None]).clamp(min=0)
        tier_of = torch.where((place < 0)[:, None], tier_by(filler, sizes - own), tier_by(rank, own))
        # Where one row has its sinks among many others' middle, tiers may want more than all tokens together. The least
        # precise then gives some up; said here, so that positions stay in order within each tier.
        order = torch.argsort(tier_of, dim=-1, stable=True)
        tier_of = tier_of.scatter(-1, order, tier_by(places, sizes.expand(batch, -1)))
        order = torch.argsort(tier_of, dim=-1, stable=True)  # grouped by tier, positions ascending in each
        return order.split(sizes.tolist(), dim=-1)

    def _encode(
        self, tier: Tier, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, chosen: torch.Tensor
    ) -> Arena:
        if tier == FP16:
            return Arena(tier, take(keys, chosen), take(values, chosen), positions)
        encode = operation("encode", self.device)
        k, v = encode(keys, values, positions, tier.bits, self.codec, self.mean, self.rotary, index=chosen)
        return Arena(tier, k, v, positions)

    def segments(self) -> list[Segment]:
        """Arenas and tail, as `tiered_attention` reads them."""
        keys, values = self.tail
        counting = _counting(self.tail_start, self.length, self.device)
        positions = counting.as_strided(keys.shape[:3], (0, 0, 1))
        tail = Segment(FP16.bits, keys, values, positions)
        return [*[arena.segment for arena in self.arenas.values()], tail]

    def dense(self, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values from position `start` on, `[batch, kv_heads, length - start, dim]`, in their own dtypes.

        What was dropped is 0. Views of the tail where nothing else is asked for.
        """
        if start >= self.tail_start:
            skip = start - self.tail_start
            keys, values = self.tail
            return keys[:, :, skip:], values[:, :, skip:]
        size, dtype = self.length - start, self._keys.dtype
        complete = not (self.drops or self.ragged) and start >= self.first_kept
        dense = operation("dense", self.device)
        return dense(self.segments(), start, size, dtype, self.codec, self.mean, self.rotary, complete)

    def tier_map(self, start: int = 0) -> torch.Tensor:
        """Bits of every token from `start` on, int64 `[batch, kv_heads, length - start]`: 0 for what was dropped."""
        size = self.length - start
        bits = torch.zeros(*self._keys.shape[:2], size + 1, dtype=torch.int64, device=self.device)
        for arena in self.arenas.values():
            bits.scatter_(2, self._slot(arena.positions, start, size), arena.tier.bits)
        bits = bits[..., :size]
        bits[..., max(self.tail_start - start, 0) :] = FP16.bits
        return bits

    def _slot(self, positions: torch.Tensor, start: int, size: int) -> torch.Tensor:
        """Column of each position in a buffer that begins at `start`; `size` for those before it."""
        return torch.where(positions >= start, positions.long() - start, size)

    def crop(self, length: int) -> None:
        """Forget the tokens from position `length` on, in tail and arenas alike."""
        if length < self.tail_start:
            self._filter(lambda positions: positions < length)
            self.tail_start = length
            self._keys, self._values = self._keys[:, :, :0].clone(), self._values[:, :, :0].clone()
        self.length = length
        if self.pads is not None:
            self.pads = self.pads.clamp(max=length)
        if length == 0:
            self.mean, self.pads, self.drops = None, None, False

    def discard(self, start: int) -> None:
        """Free the tokens before position `start`, which no query will see again."""
        if start <= self.first_kept:
            return
        self.first_kept = start
        if start > self.tail_start:
            self._forget_head(start - self.tail_start)
        self._filter(lambda positions: positions >= start)

    def _filter(self, keep: TensorMap) -> None:
        self.ragged = False
        for tier, arena in list(self.arenas.items()):
            wanted = keep(arena.positions) & (arena.positions >= 0)
            if not bool(wanted.all()):
                arena = self.arenas[tier] = arena.kept(wanted)
            if not len(arena):
                del self.arenas[tier]
            elif bool((arena.positions < 0).any()):
                self.ragged = True

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the store with its name."""
        for tier, arena in self.arenas.items():
            yield from ((f"{tier.name}.{name}", tensor) for name, tensor in arena.tensors())
        yield "tail.keys", self._keys
        yield "tail.values", self._values
        if self.mean is not None:
            yield "mean", self.mean
        if self.pads is not None:
            yield "pads", self.pads

    def map(self, function: TensorMap) -> None:
        """Replace every tensor by `function` of it, for operations on the batch and moves between devices."""
        self.arenas = {tier: arena.map(function) for tier, arena in self.arenas.items()}
        self._keys, self._values = function(self._keys), function(self._values)
        self.mean = None if self.mean is None else function(self.mean)
        self.pads = None if self.pads is None else function(self.pads)
        self.device = self._keys.device
