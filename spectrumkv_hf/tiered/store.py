"""The tensors of one layer: an arena per tier, and a tail of recent tokens that are exact."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self
from weakref import WeakKeyDictionary

import torch

from spectrumkv_hf.policy import DROPPED, FP16, TIERS, Counts, Policy, Tier, exempt, increments, lifted
from spectrumkv_hf.tiered.readback import Readback
from spectrumkv_kernels import (
    Codec,
    Quantized,
    Rotary,
    Segment,
    dense,
    encode,
    encode_tiers,
    fit_frame,
    partition,
    saturated,
    take,
)
from spectrumkv_kernels.backend.tensor_cache import keep_longest
from spectrumkv_kernels.segment import Growing, can_pack, pack_positions, packing_gains

TAIL_STEP = 64
"""The tail's buffer grows by this many tokens at most, and decoding tiers this many at a time."""
SLACK = 5
"""The tail's buffer has room for at most one more token for this many that were seen: a short chat stays small."""

TensorMap = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Arena:
    """The tokens of one tier in one layer: as `spectrumkv_kernels.Segment`, whose fields these are.

    Attributes:
        places: Positions as they are stored: plain, or packed.
    """

    tier: Tier
    keys: torch.Tensor | Quantized
    values: torch.Tensor | Quantized
    places: torch.Tensor

    def __len__(self) -> int:
        return (self.keys if isinstance(self.keys, torch.Tensor) else self.keys.codes).shape[2]

    @property
    def positions(self) -> torch.Tensor:
        """int32 `[batch, kv_heads, tokens]`, ascending, behind -1 where a row has fewer tokens."""
        return self.segment.unpacked().positions

    def packed(self, possible: bool | None = None) -> "Arena":
        """With packed positions, where that is possible and takes fewer bytes; only what is coded is worth it.

        Args:
            possible: What `can_pack` says of them, where it is known.
        """
        if self.tier == FP16 or self.segment.packed or not packing_gains(len(self)):
            return self
        if not (bool(can_pack(self.places)) if possible is None else possible):
            return self
        return replace(self, places=pack_positions(self.places))

    def unpacked(self) -> "Arena":
        """With plain positions, as is needed wherever tokens move: a tile has no meaning for some of its tokens."""
        return replace(self, places=self.positions) if self.segment.packed else self

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @functools.cached_property
    def segment(self) -> Segment:
        """What attention reads; an arena's tensors are never replaced."""
        return Segment(self.tier.bits, self.keys, self.values, self.places)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor with its name: `keys.codes`, `keys.affine`, ..., `positions`."""
        for side in ("keys", "values"):
            stored = getattr(self, side)
            if isinstance(stored, torch.Tensor):
                yield side, stored
            else:
                yield from ((f"{side}.{name}", t) for name, t in stored._asdict().items())
        yield "positions", self.places

    def map(self, function: TensorMap) -> "Arena":
        """A new arena of `function` of every tensor, called in the order of `tensors`."""

        def side(stored: torch.Tensor | Quantized) -> torch.Tensor | Quantized:
            if isinstance(stored, torch.Tensor):
                return function(stored)
            return Quantized(function(stored.codes), function(stored.affine))

        return replace(self, keys=side(self.keys), values=side(self.values), places=function(self.places))

    def extended(self, other: "Arena") -> "Arena":
        """A new arena with the tokens of `other` behind its own."""

        theirs = (tensor for _, tensor in other.unpacked().tensors())  # in the order in which `map` visits its own
        return self.unpacked().map(lambda own: torch.cat((own, next(theirs)), dim=2))

    def kept(self, keep: torch.Tensor) -> "Arena":
        """A new arena of the tokens where `keep`, bool `[batch, kv_heads, tokens]`; rows with fewer start with -1."""
        if self.segment.packed:
            return self.unpacked().kept(keep)
        counts = keep.sum(-1, keepdim=True)
        size = int(counts.max()) if keep.numel() else 0
        order = torch.argsort(keep.to(torch.uint8), dim=-1, stable=True)[..., len(self) - size :]  # kept ones last
        arena = self.map(lambda t: take(t, order))
        empty = torch.arange(size, device=keep.device) < size - counts
        arena.places.masked_fill_(empty, -1)
        return arena


KEPT_COUNTING = 1 << 20
"""Positions up to which they are kept, 4 MiB of them."""


def _counting(start: int, length: int, device: torch.device) -> torch.Tensor:
    """`start`, `start + 1`, ... up to `length`: int32 `[length - start]`, kept for all layers and steps."""
    if length > KEPT_COUNTING:
        return torch.arange(start, length, dtype=torch.int32, device=device)
    return _counting_to(length, device)[start:length]


@keep_longest(4096)
def _counting_to(length: int, device: torch.device) -> torch.Tensor:
    return torch.arange(length, dtype=torch.int32, device=device)


def owned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied where it is a view that would keep a larger storage alive."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


class Contents(NamedTuple):
    """What a store holds at one moment; never changed, only replaced as a whole. `TieredStore` has the same names."""

    keys: torch.Tensor
    values: torch.Tensor
    arenas: Mapping[Tier, Arena]
    length: int = 0
    tail_start: int = 0
    first_kept: int = 0
    frame: torch.Tensor | None = None
    pads: torch.Tensor | None = None
    ragged: bool = False
    drops: bool = False
    borrowed: bool = False

    def grown_from(self, before: "Contents") -> bool:
        """Whether these are the same tensors, of which the tail's hold more or fewer tokens."""
        return (
            self.keys is before.keys
            and self.values is before.values
            and self.arenas is before.arenas
            and self.tail_start == before.tail_start
        )


class Packing(NamedTuple):
    """Positions of a tier, before it is known whether they can be packed.

    Attributes:
        flag: Which one of a tiering's tells that they can't.
        tier: Theirs.
        plain: As they are, where they have been packed on the chance; None: they are to be packed.
    """

    flag: int
    tier: Tier
    plain: torch.Tensor | None


class Tiering(NamedTuple):
    """Tokens that have been given their tiers, before it is known whether codes stand for all of them.

    Attributes:
        before, made: What the store held and holds.
        flags: What the device will tell: as those of `encode_tiers`.
        packing: Positions that are or may be packed.
        exactly: Tiers once more, and leaves exact what no code stands for.
    """

    before: Contents
    made: Contents
    flags: Readback
    packing: Sequence[Packing]
    exactly: Callable[[], Contents]


_growing: "WeakKeyDictionary[TieredStore, Growing]" = WeakKeyDictionary()
"""What `TieredStore.growing` keeps. Beside the stores: copies have none, and the table of positions is everyone's."""


class TieredStore:
    """Keys and values of one layer.

    Positions are slots: 0 for the first token seen, padding included. Tokens before `tail_start` lie in the arenas, in
    ascending order, or were dropped; the others lie exact in the tail. Counts per tier are the same for all rows and
    heads, so operations on the batch are plain gathers.

    Every change is built aside and takes effect by one assignment, so that an error or an interrupt in the middle of it
    leaves the store as it was.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, codec: Codec, rotary: Rotary) -> None:
        """An empty store for tensors like `keys` and `values`, `[batch, kv_heads, any, dim]`."""
        self.codec, self.rotary = codec, rotary
        self._contents: Contents
        self._read = False
        empty = [side.new_empty(*side.shape[:2], 0, side.shape[3]) for side in (keys, values)]
        self._now = Contents(empty[0], empty[1], {})

    @classmethod
    def assemble(
        cls,
        keys: torch.Tensor,
        values: torch.Tensor,
        codec: Codec,
        rotary: Rotary,
        *,
        length: int,
        arenas: Sequence[Arena] = (),
        tail_start: int = 0,
        first_kept: int = 0,
        frame: torch.Tensor | None = None,
        pads: torch.Tensor | None = None,
        ragged: bool = False,
        drops: bool = False,
    ) -> Self:
        """A store of tensors that belong to someone else, which are not copied and into which nothing will be written.

        Args:
            keys, values: The tail, `[batch, kv_heads, length - tail_start, dim]`.
            codec, rotary: How the arenas are coded.
            length, tail_start, first_kept, frame, pads, ragged, drops: As the attributes of these names.
            arenas: One for each tier.

        Raises:
            ValueError: the numbers of tokens do not fit together.
        """
        store = cls(keys, values, codec, rotary)
        if not 0 <= first_kept <= tail_start <= length or keys.shape[2] != length - tail_start:
            raise ValueError(
                f"a tail of {keys.shape[2]} tokens does not end at {length} where it starts at {tail_start}, or tokens "
                f"before {first_kept} are missing from it"
            )
        store._now = Contents(
            keys,
            values,
            store._stored(arenas),
            length,
            tail_start,
            first_kept,
            frame,
            pads,
            ragged,
            drops,
            borrowed=True,
        )
        return store

    @property
    def _now(self) -> Contents:
        return self._contents

    @_now.setter
    def _now(self, contents: Contents) -> None:
        if self._read and not contents.grown_from(self._contents):
            _growing.pop(self, None)  # so that tensors of which there are new ones don't stay alive
            self._read = False
        self._contents = contents

    @property
    def contents(self) -> Contents:
        """All that is held."""
        return self._contents

    @property
    def length(self) -> int:
        """Tokens seen, `tail_start` and the tail's together."""
        return self._contents.length

    @property
    def tail_start(self) -> int:
        """Position of the tail's first token."""
        return self._contents.tail_start

    @property
    def first_kept(self) -> int:
        """Tokens before this position may be gone, for a layer with a window."""
        return self._now.first_kept

    @property
    def arenas(self) -> Mapping[Tier, Arena]:
        """By tier, the most precise first."""
        return self._contents.arenas

    @property
    def frame(self) -> torch.Tensor | None:
        """float32 `[batch, kv_heads, codec.frame_size]`, set when tokens are first tiered; None before that and where
        the codec has none."""
        return self._contents.frame

    @property
    def pads(self) -> torch.Tensor | None:
        """Padding tokens at the start of each row, int64 `[batch]`, or None where there are none."""
        return self._contents.pads

    @property
    def ragged(self) -> bool:
        """Some positions are -1."""
        return self._contents.ragged

    @property
    def drops(self) -> bool:
        """Some tokens were dropped."""
        return self._contents.drops

    @property
    def buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the tail lies in, `[batch, kv_heads, capacity, dim]`; its tokens come first."""
        return self._contents.keys, self._contents.values

    @property
    def device(self) -> torch.device:
        return self._now.keys.device

    @property
    def batch_size(self) -> int:
        return self._now.keys.shape[0]

    @property
    def tail_length(self) -> int:
        return self._contents.length - self._contents.tail_start

    @property
    def tail(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Exact keys and values from `tail_start` on, views `[batch, kv_heads, tail_length, dim]`."""
        tokens = self.tail_length
        return self._now.keys.narrow(2, 0, tokens), self._now.values.narrow(2, 0, tokens)

    def publish(self) -> None:
        """Say that what is held stays until the next update; see `StaticStore`."""

    # -- adding and tiering tokens ------------------------------------------------------------------------------------

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add tokens, `[batch, kv_heads, tokens, dim]`, to the tail."""
        now = self._contents
        held = now.length - now.tail_start
        grown, length = held + keys.shape[2], now.length + keys.shape[2]
        room = min(now.keys.shape[2], now.values.shape[2])
        if held == 0 and grown > room:
            self._now = now._replace(keys=owned(keys), values=owned(values), length=length, borrowed=False)
            return
        fixed = now.borrowed or (now.keys.is_inference() and not torch.is_inference_mode_enabled())  # no writing to it
        if grown > room or fixed:
            now = _with_capacity(now, grown, length)
        # Behind the tokens that are held: what is not finished here is not seen.
        now.keys.narrow(2, held, grown - held).copy_(keys)
        now.values.narrow(2, held, grown - held).copy_(values)
        self._now = now._replace(length=length)

    def note_padding(self, real: torch.Tensor) -> None:
        """Learn where rows begin, from `real`, bool `[batch, n]`, for the last `n` tokens: False at the start pads."""
        start = self.length - real.shape[-1]
        leading = (real.cumsum(-1) == 0).sum(-1)
        if self.pads is not None:
            leading = torch.where(self.pads == start, start + leading, self.pads)
        elif start or not bool(leading.any()):
            return
        self._now = self._now._replace(pads=leading)

    def note_ragged(self) -> None:
        """Learn that some positions are -1."""
        self._now = self._now._replace(ragged=True)

    def _row_index(self, tokens: int) -> torch.Tensor:
        """Place in its row of each of the tail's first `tokens`, int64 `[batch or 1, tokens]`; below 0 for padding."""
        positions = torch.arange(self.tail_start, self.tail_start + tokens, device=self.device)
        return positions[None] if self.pads is None else positions - self.pads[:, None]

    def settle_frame(self, sinks: int, query_power: torch.Tensor | None = None) -> None:
        """Fix the frame of rows that have none, from their tokens in the tail but the sinks and padding.

        Args:
            sinks: First tokens of each row.
            query_power: As in `fit_frame`.
        """
        self._now = self._now._replace(frame=self._settled_frame(sinks, query_power))

    def _settled_frame(self, sinks: int, query_power: torch.Tensor | None) -> torch.Tensor | None:
        if not self.codec.center:
            return None
        begins = None if self.pads is None else self.pads >= self.tail_start  # rows of which nothing is tiered yet
        if self.frame is not None and (begins is None or not bool(begins.any())):
            return self.frame
        keys, values = self.tail
        least = sinks if self.tail_length > sinks else 0
        start, balanced = self.tail_start, self.codec.balanced
        frame = fit_frame(keys, values, start, self.rotary, balanced, least, self.pads, query_power)
        if self.frame is not None and begins is not None:
            frame = torch.where(begins[:, None, None], frame, self.frame)
        return frame

    def tier(
        self,
        tokens: int,
        policy: Policy,
        score: torch.Tensor,
        floor: Tier | None = None,
        query_power: torch.Tensor | None = None,
        beside: Iterable[Tier] = (),
    ) -> Tiering:
        """Give the oldest `tokens` of the tail their tiers, by rank of `score`, without waiting for the device.

        Nothing may be done with the store until `confirm` has been called.

        Args:
            tokens: How many, counted from `tail_start`.
            policy: Says how many go into each tier.
            score: float32 `[batch, kv_heads, tokens]`, higher ranks first, NaN last. Padding ranks last, and fills up
                the arenas of rows that have fewer real tokens than others.
            floor: The policy's for this layer.
            query_power: As in `fit_frame`, for rows whose frame is fixed now.
            beside: Tiers that other layers have: all then run the same code, which is compiled once.
        """
        before, frame = self._now, self._settled_frame(policy.sinks, query_power)
        made, widths, flags, packing = self._tiered(tokens, policy, score, floor, frame, beside)
        self._now = made

        def exactly() -> Contents:
            exact = torch.stack([self._inexpressible(tokens, bits, frame) for bits in widths]).any(0)
            again, *_ = self._tiered(tokens, policy, score, floor, frame, beside, exact)
            return again._replace(arenas=self._stored(again.arenas.values()))

        return Tiering(before, made, Readback(flags), packing, exactly)

    def confirm(self, tiering: Tiering) -> None:
        """Wait for the device, and see to it that what `tier` has made holds every token.

        Tokens that no code stands for, because something in them is not finite or beyond the scales of float16, stay
        exact. So that counts are equal for all heads, others of the best rank then do in heads with fewer of them.
        """
        if self._now is not tiering.made:  # an interrupt came behind it
            return
        lost, *_ = flags = tiering.flags.read()
        if lost:
            self._now = tiering.before
            self._now = tiering.exactly()
        elif tiering.packing:
            arenas = dict(tiering.made.arenas)
            for flag, tier, plain in tiering.packing:
                if plain is None:
                    arenas[tier] = arenas[tier].packed(not flags[flag])
                elif flags[flag]:
                    arenas[tier] = replace(arenas[tier], places=owned(plain))
            self._now = tiering.made._replace(arenas=arenas)

    def _tiered(
        self,
        tokens: int,
        policy: Policy,
        score: torch.Tensor,
        floor: Tier | None,
        frame: torch.Tensor | None,
        beside: Iterable[Tier],
        exact: torch.Tensor | None = None,
    ) -> tuple[Contents, list[int], torch.Tensor, list[Packing]]:
        """Store the tail's first `tokens` in their tiers.

        Args:
            tokens, policy, score, floor, beside: As in `tier`.
            exact: As in `_assign`. Positions stay plain then: nobody asks whether they could be packed.

        Returns:
            The contents then; bits of the codes that tokens have got; and flags and packing, as in `Tiering`.
        """
        assign = self._assign if self.pads is None else self._assign_padded
        order, counts = assign(tokens, policy, score, floor, exact)
        spaces = self._spaces(counts)
        used = {FP16, *policy.tiers, *beside, *(tier for tier, count in counts.items() if count)}
        tiers = [tier for tier in TIERS if tier in used and tier != DROPPED]
        sizes = [counts.get(tier, 0) for tier in tiers]
        keys, values = (t[:, :, :tokens] for t in self.tail)
        flags = torch.zeros(1 + len(tiers), dtype=torch.bool, device=self.device)
        packs = self._packs and exact is None
        at_once = packs and not self.arenas  # of all coded tiers or of none: for each choice code is compiled
        segments = encode_tiers(
            keys,
            values,
            order,
            sizes,
            [tier.bits for tier in tiers],
            self.codec,
            frame,
            self.rotary,
            self.tail_start,
            flags,
            [spaces[tier].segment if tier in spaces else None for tier in tiers],
            [at_once and tier != FP16 for tier in tiers],
        )
        grown, first = dict(self.arenas), 0
        packing: list[Packing] = []
        for flag, (tier, segment, size) in enumerate(zip(tiers, segments, sizes, strict=True), start=1):
            if not size:
                continue
            places = segment.positions
            if segment.packed:
                plain = order.narrow(-1, first, size)
                if packing_gains(size):
                    packing.append(Packing(flag, tier, plain))
                else:
                    places = owned(plain)
            first += size
            arena = grown[tier] = self._joined(grown.get(tier), Arena(tier, segment.keys, segment.values, places))
            if packs and not at_once and tier != FP16 and packing_gains(len(arena)):
                flags[flag] = ~can_pack(arena.places)
                packing.append(Packing(flag, tier, None))
        now = self._shortened(tokens)._replace(
            arenas=by_tier(grown.values()),
            tail_start=self.tail_start + tokens,
            frame=frame,
            drops=self.drops or counts.get(DROPPED, 0) > 0,
        )
        widths = [tier.bits for tier, size in zip(tiers, sizes, strict=True) if size and tier != FP16]
        return now, widths, flags, packing

    @property
    def _packs(self) -> bool:
        """Whether positions of coded tokens are packed: where the codec counts bytes."""
        return self.codec.balanced

    def _stored(self, arenas: Iterable[Arena]) -> dict[Tier, Arena]:
        """Arenas by tier, as they are kept."""
        return by_tier(arena.packed() for arena in arenas) if self._packs else by_tier(arenas)

    def _joined(self, old: Arena | None, new: Arena) -> Arena:
        """What a tier holds once more tokens have come."""
        return new if old is None else old.extended(new)

    def _shortened(self, tokens: int) -> Contents:
        """The contents without the tail's first `tokens`."""
        return _with_capacity(self._now, self.tail_length - tokens, self.length, skip=tokens)

    def _spaces(self, counts: Mapping[Tier, int]) -> dict[Tier, Arena]:
        """Where so many tokens more can be written behind those of each tier, if there is a place for them."""
        return {}

    def _inexpressible(self, tokens: int, bits: int, frame: torch.Tensor | None) -> torch.Tensor:
        """Which of the tail's first `tokens` no code of `bits` stands for, bool `[batch, kv_heads, tokens]`."""
        keys, values = (t[:, :, :tokens] for t in self.tail)
        positions = _counting(self.tail_start, self.tail_start + tokens, self.device)
        positions = positions.expand(*keys.shape[:3]).contiguous()
        coded = encode(keys, values, positions, bits, self.codec, frame, self.rotary)
        lost = saturated(coded[0]) | saturated(coded[1])
        return lost & (self._row_index(tokens) >= 0).unsqueeze(1)

    def _assign(
        self, tokens: int, policy: Policy, score: torch.Tensor, floor: Tier | None, exact: torch.Tensor | None
    ) -> tuple[torch.Tensor, Counts]:
        """Which tokens go to which tier.

        Args:
            tokens, policy, score, floor: As in `tier`.
            exact: Tokens that have to stay exact, bool `[batch, kv_heads, tokens]`, or None.

        Returns:
            Positions, grouped by tier and ascending in each, int32 `[batch, kv_heads, tokens]`; and each tier's number.
        """
        start, leading = self.tail_start, min(max(policy.sinks - self.tail_start, 0), tokens)
        row = lifted(increments(policy, start, tokens), floor)
        if exact is not None:  # they come before the sinks
            row = exempt(row, _most(exact))
            score = score.nan_to_num(nan=0.0)
            score[..., :leading] = torch.finfo(score.dtype).max
            score, leading = score.masked_fill(exact, torch.inf), 0
        return partition(score, [row.get(tier, 0) for tier in TIERS], start, leading), row

    def _assign_padded(
        self, tokens: int, policy: Policy, score: torch.Tensor, floor: Tier | None, exact: torch.Tensor | None
    ) -> tuple[torch.Tensor, Counts]:
        """`_assign` for rows that begin at different places.

        The real tokens of each row take the documented counts for their number. The longest row sizes the arenas, and
        the padding of the others fills them up.
        """
        batch, heads = score.shape[:2]
        place = self._row_index(tokens)
        before = place[:, 0].clamp(min=0).tolist()
        now = (place >= 0).sum(-1).tolist()

        def counts(had: int, new: int) -> Counts:
            return exempt(lifted(increments(policy, had, new), floor), min(_most(exact), new))

        score = score.nan_to_num(nan=0.0)
        rows = [counts(had, new) for had, new in zip(before, now, strict=True)]
        own = torch.tensor([[row.get(tier, 0) for tier in TIERS] for row in rows])
        most = sizes_of(rows, tokens)
        sizes = torch.tensor(list(most.values()))

        def tier_by(rank: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
            edges = counts.cumsum(-1)[:, None].expand(batch, heads, -1).contiguous().to(rank.device)
            return torch.searchsorted(edges, rank, right=True)

        score = score.masked_fill((place < policy.sinks)[:, None], torch.finfo(score.dtype).max)
        if exact is not None:
            score = score.masked_fill(exact, torch.inf)
        score = score.masked_fill((place < 0)[:, None], -torch.inf)
        ranked = torch.argsort(score, dim=-1, descending=True, stable=True)
        places = torch.arange(tokens, device=self.device).expand_as(ranked).contiguous()
        rank = torch.empty_like(ranked).scatter_(-1, ranked, places)
        filler = (rank - torch.tensor(now, device=self.device)[:, None, None]).clamp(min=0)
        tier_of = torch.where((place < 0)[:, None], tier_by(filler, (sizes - own).clamp(min=0)), tier_by(rank, own))
        # Where one row has its sinks among many others' middle, tiers may want more than all tokens together. The least
        # precise then gives some up; said here, so that positions stay in order within each tier.
        order = torch.argsort(tier_of, dim=-1, stable=True)
        tier_of = tier_of.scatter(-1, order, tier_by(places, sizes.expand(batch, -1)))
        order = torch.argsort(tier_of, dim=-1, stable=True)  # grouped by tier, positions ascending in each
        return (order + self.tail_start).to(torch.int32), most

    # -- reading ------------------------------------------------------------------------------------------------------

    def segments(self) -> list[Segment]:
        """Arenas and tail, as `tiered_attention` reads them."""
        return [*[arena.segment for arena in self.arenas.values()], self._tail_segment(*self.tail)]

    def growing(self) -> Growing:
        """`segments`, the same object for as long as the tail grows in its buffers. Read it before the next change."""
        kept, now = _growing.get(self), self._contents
        if kept is None:
            places = min(now.keys.shape[2], now.values.shape[2])  # halfway through `replace_tail` they differ
            room = self._tail_segment(now.keys.narrow(2, 0, places), now.values.narrow(2, 0, places))
            self._read = True  # first: after an interrupt it must not be that something is kept and this is not known
            kept = _growing[self] = Growing([arena.segment for arena in now.arenas.values()], room)
        kept.tokens = now.length - now.tail_start
        return kept

    def _tail_segment(self, keys: torch.Tensor, values: torch.Tensor) -> Segment:
        counting = _counting(self.tail_start, self.tail_start + keys.shape[2], self.device)
        return Segment(FP16.bits, keys, values, counting.as_strided(keys.shape[:3], (0, 0, 1)))

    def dense(self, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values from position `start` on, `[batch, kv_heads, length - start, dim]`, in their own dtypes.

        What was dropped is 0. Views of the tail where nothing else is asked for.
        """
        if start >= self.tail_start:
            skip = start - self.tail_start
            keys, values = self.tail
            return keys[:, :, skip:], values[:, :, skip:]
        size, dtype = self.length - start, self._now.keys.dtype
        complete = not (self.drops or self.ragged) and start >= self.first_kept
        return dense(self.segments(), start, size, dtype, self.codec, self.frame, self.rotary, complete)

    def tier_map(self, start: int = 0) -> torch.Tensor:
        """Bits of every token from `start` on, int64 `[batch, kv_heads, length - start]`: 0 for what was dropped."""
        size = self.length - start
        bits = torch.zeros(*self._now.keys.shape[:2], size + 1, dtype=torch.int64, device=self.device)
        for arena in self.arenas.values():
            bits.scatter_(2, self._slot(arena.positions, start, size), arena.tier.bits)
        bits = bits[..., :size]
        bits[..., max(self.tail_start - start, 0) :] = FP16.bits
        return bits

    def _slot(self, positions: torch.Tensor, start: int, size: int) -> torch.Tensor:
        """Column of each position in a buffer that begins at `start`; `size` for those before it."""
        return torch.where(positions >= start, positions.long() - start, size)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the store with its name."""
        for tier, arena in self.arenas.items():
            yield from ((f"{tier.name}.{name}", tensor) for name, tensor in arena.tensors())
        yield "tail.keys", self._now.keys
        yield "tail.values", self._now.values
        if self.frame is not None:
            yield "frame", self.frame
        if self.pads is not None:
            yield "pads", self.pads

    def parts(self) -> Iterator[tuple[str, int]]:
        """Every tensor's name and the bytes that it keeps alive."""
        for name, tensor in self.tensors():
            yield name, tensor.untyped_storage().nbytes()

    def tiered_bytes(self) -> int:
        """Bytes of the arenas' tokens and the frame, exact numbers at two bytes each."""
        tensors = [tensor for arena in self.arenas.values() for _, tensor in arena.tensors()]
        size = sum(2 * t.numel() if t.is_floating_point() else t.nbytes for t in tensors)
        return size + (0 if self.frame is None or not tensors else self.frame.nbytes)

    def storages(self) -> Iterator[torch.Tensor]:
        """Tensors whose storages are all that the store keeps alive."""
        yield from (tensor for _, tensor in self.tensors())

    # -- removing, moving and exchanging tokens -----------------------------------------------------------------------

    def crop(self, length: int) -> None:
        """Forget the tokens from position `length` on, in tail and arenas alike."""
        now = self._now
        if length < now.tail_start:
            arenas, ragged = self._filtered(lambda positions: positions < length)
            keys, values = (t[:, :, :0].clone() for t in (now.keys, now.values))
            now = now._replace(keys=keys, values=values, arenas=arenas, ragged=ragged, tail_start=length)
        elif now.keys.shape[2] > 2 * _capacity(length - now.tail_start, length):
            now = _with_capacity(now, length - now.tail_start, length)
        pads = None if now.pads is None else now.pads.clamp(max=length)
        now = now._replace(length=length, pads=pads, first_kept=min(now.first_kept, length))
        if length == 0:
            now = now._replace(frame=None, pads=None, drops=False)
        self._now = now

    def discard(self, start: int) -> None:
        """Free the tokens before position `start`, which no query will see again."""
        now = self._now
        if start <= now.first_kept:
            return
        gone = max(start - now.tail_start, 0)
        if gone:
            now = _with_capacity(now, self.tail_length - gone, now.length, skip=gone)
        arenas, ragged = self._filtered(lambda positions: positions >= start)
        self._now = now._replace(arenas=arenas, ragged=ragged, first_kept=start, tail_start=now.tail_start + gone)

    def _filtered(self, keep: TensorMap) -> tuple[dict[Tier, Arena], bool]:
        """Arenas of the tokens whose positions `keep` is True of, and whether some positions are -1 now."""
        left = []
        for arena in self.arenas.values():
            positions = arena.positions
            wanted = keep(positions) & (positions >= 0)
            kept = arena if bool(wanted.all()) else arena.kept(wanted)
            if len(kept):
                left.append(kept)
        stored = self._stored(left)
        return stored, _ragged(stored)

    def lift(self, wanted: torch.Tensor, arena: Arena) -> None:
        """Put the tokens of `arena` in the place of those `wanted`, bool `[batch, kv_heads, tail_start]`."""
        arenas: dict[Tier, Arena] = {}
        for tier, old in self.arenas.items():
            positions = old.positions
            stays = (positions >= 0) & ~wanted.gather(2, positions.clamp(min=0).long())
            arenas[tier] = old if bool(stays.all()) else old.kept(stays)
        # `extended` copies, so that nothing of what was given stays alive.
        empty = arena.unpacked().map(lambda t: t[:, :, :0])
        joined = arenas.get(arena.tier, empty).extended(arena)
        order = torch.argsort(joined.positions, dim=-1, stable=True)
        joined = joined.map(lambda t: take(t, order))
        arenas[arena.tier] = joined.kept(joined.positions >= 0)
        arenas = self._stored(arena for arena in arenas.values() if len(arena))
        self._now = self._now._replace(arenas=arenas, ragged=_ragged(arenas))

    def with_arenas(self, arenas: Sequence[Arena]) -> "TieredStore":
        """A store that shares all with this one but its arenas, which have to hold the same tokens."""
        keys, values = self.tail
        other = TieredStore(keys, values, self.codec, self.rotary)
        other._now = self._now._replace(arenas=self._stored(arenas))
        return other

    def replace_tail(self, keys: torch.Tensor | None = None, values: torch.Tensor | None = None) -> None:
        """Other exact keys or values, `[batch, kv_heads, any, dim]`, in the place of all that are held.

        The two can be given one after the other; until both are as long, the length is that of the shorter.
        """
        given = zip((keys, values), self.sides, strict=True)
        keys, values = (owned(old if new is None else new.detach()) for new, old in given)
        self._now = Contents(keys, values, {}, length=min(keys.shape[2], values.shape[2]))

    @property
    def sides(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`tail`, and between two calls of `replace_tail` the new keys beside the old values, or the reverse."""
        halfway = self._now.keys.shape[2] != self._now.values.shape[2]
        return self.buffers if halfway else self.tail

    def map(self, function: TensorMap) -> None:
        """Replace every tensor by `function` of it, for operations on the batch and moves between devices."""
        now = self._now
        self._now = now._replace(
            arenas={tier: arena.map(function) for tier, arena in now.arenas.items()},
            keys=function(now.keys),
            values=function(now.values),
            frame=None if now.frame is None else function(now.frame),
            pads=None if now.pads is None else function(now.pads),
        )

    def check_integrity(self) -> None:
        """For tests: raise an `AssertionError` unless every token lies in one place, and all sizes fit together."""
        now = self._now
        batch, heads = now.keys.shape[:2]
        assert now.keys.shape[:3] == now.values.shape[:3]
        assert 0 <= now.first_kept <= now.tail_start <= now.length
        assert self.tail_length <= now.keys.shape[2]
        assert list(now.arenas) == [tier for tier in TIERS if tier in now.arenas]
        times = torch.zeros(batch, heads, now.tail_start + 1, dtype=torch.int64)
        for tier, arena in now.arenas.items():
            assert arena.tier == tier and len(arena)
            positions = arena.positions.cpu()
            assert positions.dtype == torch.int32 and positions.shape == (batch, heads, len(arena))
            assert all(t.shape[:3] == positions.shape for _, t in arena.unpacked().tensors())
            assert int(positions.amin()) >= -1
            empty = positions < 0
            assert now.ragged or not bool(empty.any())
            steps = positions.diff(dim=-1)
            assert bool(((steps > 0) | empty[..., :-1]).all())  # ascending, behind the places that are empty
            times.scatter_add_(
                2, positions.long().where(~empty, now.tail_start), torch.ones_like(positions, dtype=torch.int64)
            )
        times = times[..., : now.tail_start]
        assert bool((times <= 1).all())
        assert now.drops or bool((times[..., now.first_kept :] == 1).all())
        coded = any(tier.bits < FP16.bits for tier in now.arenas)
        assert (now.frame is not None) or not (coded and self.codec.center)
        assert now.frame is None or bool(now.frame.isfinite().all())
        assert now.pads is None or now.pads.shape == (batch,)


def _capacity(held: int, length: int) -> int:
    """Tokens that the tail's buffers have room for where `held` lie in them, of `length` that were seen."""
    return min(-(-held // TAIL_STEP) * TAIL_STEP, held + length // SLACK)


def _with_capacity(now: Contents, held: int, length: int, skip: int = 0) -> Contents:
    """The contents with new buffers, which have room for `held` tokens and start with the tail's from `skip` on.

    Args:
        length: As in `_capacity`.
    """
    capacity = _capacity(held, length)
    copied = min(now.length - now.tail_start - skip, held)

    def resized(old: torch.Tensor) -> torch.Tensor:
        new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
        new.narrow(2, 0, copied).copy_(old.narrow(2, skip, copied))
        return new

    return now._replace(keys=resized(now.keys), values=resized(now.values), borrowed=False)


def by_tier(arenas: Iterable[Arena]) -> dict[Tier, Arena]:
    """Arenas by their tiers, the most precise first."""
    return {arena.tier: arena for arena in sorted(arenas, key=lambda arena: -arena.tier.bits)}


def _ragged(arenas: Mapping[Tier, Arena]) -> bool:
    """Whether some positions are -1; they come first in their rows."""
    plain = [arena.places for arena in arenas.values() if not arena.segment.packed]  # packed ones have none
    return any(bool((positions[..., :1] < 0).any()) for positions in plain)


def sizes_of(rows: Sequence[Counts], tokens: int) -> Counts:
    """How many of `tokens` each tier takes, for all of `TIERS`, where the rows of a batch have these counts.

    The most that a row has. The least precise tier in use takes the padding that is left; where rows want more than
    there are, the least precise tiers give it up.
    """
    sizes = {tier: max(row.get(tier, 0) for row in rows) for tier in TIERS}
    spare = tokens - sum(sizes.values())
    if spare > 0:
        sizes[next((tier for tier in reversed(TIERS) if sizes[tier]), TIERS[-1])] += spare
    for tier in reversed(TIERS):
        given = min(sizes[tier], max(-spare, 0))
        sizes[tier] -= given
        spare += given
    return sizes


def _most(exact: torch.Tensor | None) -> int:
    """The most tokens of a row and head that are marked, bool `[batch, kv_heads, tokens]`."""
    return 0 if exact is None or not exact.numel() else int(exact.sum(-1).max())
