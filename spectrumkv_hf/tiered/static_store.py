"""A store of fixed capacity, which decoding can change without the host: inside a compiled graph, or a captured one."""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from spectrumkv_hf.policy import DROPPED, TIERS, Counts, Policy, Tier, increments, lifted
from spectrumkv_hf.tiered.readback import send
from spectrumkv_hf.tiered.store import TAIL_STEP, Arena, Contents, TensorMap, TieredStore, by_tier, sizes_of
from spectrumkv_kernels import Codec, Rotary
from spectrumkv_kernels.backend.tensor_cache import keep
from spectrumkv_kernels.static.layout import BASE, BLOCK, LENGTH, STATE, Layout, Room, Views, layout_of, number_of
from spectrumkv_kernels.static.operations import prepare

assert BLOCK == TAIL_STEP, "eager and compiled decoding tier alike"

RANKED = {"attention": "kv_norm", "attention_value": "kv_norm", "kv_norm": "kv_norm", "recency": "recency"}
"""What ranks the tokens that decoding tiers, by the policy's importance: no attention scores are at hand then."""
SPARE = 8
"""Tokens that an arena has room for beyond what the policy says for a full layer."""


def undecodable(policy: Policy) -> str:
    """Why tokens can't be tiered without the host by this policy, or an empty string."""
    if policy.lossless:
        return ""
    if policy.importance not in RANKED:
        return f"importance {policy.importance!r} ranks on the host"
    if policy.scope != "head":
        return f"scope {policy.scope!r} ranks across heads"
    return ""


@dataclass(frozen=True)
class Plan:
    """What a store of fixed capacity is told once.

    Attributes:
        capacity: Tokens that it takes in all.
        policy: By which tokens are tiered.
        floor: The policy's for this layer.
        window: Only the last ones are kept, as many as this, in a layer with a sliding window.
        beside: Tiers that other layers have. This one keeps a few places for them, so that all layers run the same code
            and it is compiled once.
    """

    capacity: int
    policy: Policy
    floor: Tier | None = None
    window: int | None = None
    beside: tuple[Tier, ...] = ()

    @functools.cached_property
    def rooms(self) -> tuple[tuple[Tier, int], ...]:
        """Tokens that each stored tier has room for; 0 for one that the policy does not use."""
        return _rooms(self)

    @property
    def ring(self) -> int:
        """Places of the tail: decoding has at most `TAIL_STEP + 1` tokens more there than stay, and adds one."""
        if self.policy.lossless:
            return min(self.window or self.capacity, self.capacity)
        return min(self.policy.recent_window + TAIL_STEP + 2, self.capacity)


class Step(NamedTuple):
    """What a decode step needs to know of a layer.

    Attributes:
        buffer: uint8, all tensors of the layer.
        state: int32, how full they are.
        layout: Of the buffer.
        number: Of the layout.
        by_host: A step reads counts on the host, where there are no kernels for the layout: no CUDA graph can hold it.
    """

    buffer: torch.Tensor
    state: torch.Tensor
    layout: Layout
    number: int
    by_host: bool


class StaticStore(TieredStore):
    """A store whose tensors lie in one buffer that never moves, with their counts beside them on the device.

    The host changes it as any store, and then calls `publish`. Decoding changes it on the device, by the operations of
    `spectrumkv_kernels.static`; the host sees that after `pull`.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, codec: Codec, rotary: Rotary, plan: Plan) -> None:
        """An empty store for tensors like `keys` and `values`, `[batch, kv_heads, any, dim]`."""
        self.plan = plan
        self.step: Step | None = None
        self._views: Views | None = None
        self._tables: tuple[Any, ...] = ()
        self._fitting: tuple[Any, ...] | None = None
        """For what the buffer was laid out last."""
        super().__init__(keys, values, codec, rotary)

    @property
    def _now(self) -> Contents:
        return self._contents

    @_now.setter
    def _now(self, contents: Contents) -> None:
        self._contents, self._published = contents, False

    def __getstate__(self) -> dict[str, Any]:
        """Without the buffer: a copy holds tensors of its own until it is published."""
        state = self.__dict__ | {"step": None, "_views": None, "_tables": (), "_fitting": None, "_published": False}
        now = self._contents
        tail = (t[:, :, : self.tail_length].clone() for t in (now.keys, now.values))
        arenas = {tier: arena.map(torch.clone) for tier, arena in now.arenas.items()}
        frame = None if now.frame is None else now.frame.clone()
        keys, values = tail
        return state | {"_contents": now._replace(keys=keys, values=values, arenas=arenas, frame=frame)}

    @property
    def published(self) -> bool:
        """Whether a decode step would find what is held."""
        return self._published

    def take(self, other: TieredStore) -> None:
        """Hold what another store holds, whose tensors are copied when this one is published.

        Raises:
            ValueError: all tokens are exact here, and some of those that are needed were dropped.
        """
        if self.plan.policy.lossless and other.arenas:
            self._now = self._exactly(other)
        else:
            self._now = other.contents._replace(arenas=self._stored(other.arenas.values()))

    def _exactly(self, other: TieredStore) -> Contents:
        """What another store holds, without its tiers, for which there is no room: as their codes stand for it."""
        start = max(other.first_kept, 0 if self.plan.window is None else other.length - self.plan.window + 1)
        if other.drops:
            missing = other.tier_map(start) == DROPPED.bits
            if other.pads is not None:
                missing &= torch.arange(start, other.length, device=other.device) >= other.pads[:, None, None]
            if missing.any():
                raise ValueError(
                    "a window is exact in a cache of fixed capacity, and tokens of it were dropped: give the cache its "
                    "capacity (max_cache_len) when it is made"
                )
        keys, values = other.dense(start)
        return other.contents._replace(
            keys=keys, values=values, arenas={}, tail_start=start, first_kept=start, frame=None, ragged=False,
            drops=False, borrowed=True,
        )  # fmt: skip

    def succeed(self, before: "StaticStore | None") -> None:
        """Use the buffer of a store that is no longer used, where it fits: graphs that were captured read it there."""
        if before is not None and before.step is not None:
            self.step, self._views = before.step, before._views

    # -- in the buffer ------------------------------------------------------------------------------------------------

    def _wanted(self, least: dict[Tier, int]) -> Layout:
        """The layout for tensors like those held, with room in each arena for as many tokens as `least` says."""
        now, plan = self._contents, self.plan
        old = {} if self.step is None else {room.bits: room.tokens for room in self.step.layout.rooms}
        rooms = []
        for tier, tokens in plan.rooms:
            tokens = max(tokens, old.get(tier.bits, 0))
            needed = least.get(tier, 0)
            if needed > tokens:
                tokens = needed + SPARE
            if tokens:
                rooms.append(Room(tier.bits, tokens))
        batch, heads, _, dim = now.keys.shape
        return Layout(
            batch=batch,
            kv_heads=heads,
            key_dim=dim,
            value_dim=now.values.shape[3],
            dtype=now.keys.dtype,
            capacity=plan.capacity,
            ring=plan.ring,
            rooms=tuple(rooms),
            recent_window=plan.policy.recent_window,
            sinks=plan.policy.sinks,
            padded=now.pads is not None and bool(rooms),
            ragged=now.ragged,
            score=RANKED.get(plan.policy.importance, "kv_norm"),
            decay=plan.policy.decay,
            codec=self.codec,
            rotary=self.rotary,
        )

    def _lay_out(self, least: dict[Tier, int]) -> Views:
        """The tensors in the buffer, which is made, or made anew where they don't fit it."""
        now = self._contents
        wanted = least, now.keys.shape[0], now.keys.dtype, now.keys.device, now.pads is None, now.ragged
        if self._views is not None and wanted == self._fitting:
            return self._views
        layout = layout_of(number_of(self._wanted(least)))  # the one that all layers like this share
        step, device = self.step, self._contents.keys.device
        if step is None or step.layout != layout or step.buffer.device != device or self._views is None:
            with torch.inference_mode(False):  # tensors that are made there can't be changed outside
                buffer = torch.empty(layout.size, dtype=torch.uint8, device=device)
                state = torch.empty(STATE, dtype=torch.int32, device=device)  # all of it is written to publish
            for tensor in (buffer, state):
                # Captured graphs find them at their address; for another cache one is captured, not compiled, anew.
                torch._dynamo.mark_static_address(tensor, guard=False)
                torch._dynamo.mark_static(tensor)
            self.step = Step(buffer, state, layout, number_of(layout), by_host=not prepare(buffer, layout))
            self._views, self._tables = layout.views(buffer), ()
        self._fitting = wanted
        return self._views

    @property
    def _packs(self) -> bool:
        return False  # steps on the device keep them plain

    def _stored(self, arenas: Iterable[Arena]) -> dict[Tier, Arena]:
        return by_tier(arena.unpacked() for arena in arenas)

    def _whole(self, tier: Tier) -> Arena | None:
        """All the room that the buffer has for a tier."""
        if self._views is None or self.step is None:
            return None
        bits = tier.bits
        for i, room in enumerate(self.step.layout.rooms):
            if room.bits == bits:
                return Arena(tier, *self._views.arenas[i][1:])
        return None

    def _spaces(self, counts: Mapping[Tier, int]) -> dict[Tier, Arena]:
        now, spaces = self._contents, {}
        had = {tier: len(now.arenas.get(tier, ())) for tier, _ in self.plan.rooms}
        grown = {tier: tokens + counts.get(tier, 0) for tier, tokens in had.items()}
        # Room for what decoding will bring, too, so that these tokens need not move when they are published.
        self._lay_out(self._tables_of(grown, now.tail_start + sum(counts.values()), self._padding()).most)
        for tier, tokens in had.items():
            if grown[tier] > tokens:
                whole = self._whole(tier)
                assert whole is not None
                spaces[tier] = _narrowed(whole, grown[tier], tokens)
        return spaces

    def _padding(self) -> tuple[int, ...] | None:
        """`pads` on the host."""
        return None if self.pads is None else tuple(self.pads.tolist())

    def _tables_of(self, had: Mapping[Tier, int], start: int, pads: tuple[int, ...] | None) -> "_Tables":
        """What decoding will do from position `start` on, where arenas have so many tokens then."""
        plan = self.plan
        more = max(plan.capacity - start - plan.policy.recent_window, 0) // BLOCK + 1
        return _decoded(plan.policy, plan.floor, tuple(had.items()), start, pads, more)

    def _joined(self, old: Arena | None, new: Arena) -> Arena:
        whole = self._whole(new.tier)
        assert whole is not None  # the new tokens lie there
        if old is None:
            return new
        if old.places.data_ptr() != whole.places.data_ptr():
            return super()._joined(old, new)
        return _narrowed(whole, len(new) + len(old))

    def _shortened(self, tokens: int) -> Contents:
        now, views, left = self._contents, self._views, self.tail_length - tokens
        if views is None or left > self.plan.ring or now.keys.data_ptr() == views.keys.data_ptr():
            return super()._shortened(tokens)
        for ring, held in zip((views.keys, views.values), self.tail, strict=True):
            ring.narrow(2, 0, left).copy_(held.narrow(2, tokens, left))
        return now._replace(keys=views.keys, values=views.values, borrowed=False)

    def publish(self) -> None:
        """Put what is held where a decode step finds it."""
        if self._published:
            return
        now, plan = self._contents, self.plan
        ring = plan.ring
        if now.length - now.tail_start > ring:
            if plan.window is None:
                return  # an update is not finished: what has come is still to be tiered
            skip = now.length - now.tail_start - ring
            now = now._replace(
                keys=now.keys[:, :, skip:], values=now.values[:, :, skip:], tail_start=now.tail_start + skip,
                first_kept=now.tail_start + skip,
            )  # fmt: skip
        pads = self._padding()
        tables = None
        if not plan.policy.lossless:
            had = {tier: len(now.arenas.get(tier, ())) for tier, _ in plan.rooms}
            tables = self._tables_of(had, now.tail_start, pads)
        views = self._lay_out({} if tables is None else tables.most)
        assert self.step is not None
        layout, arenas = self.step.layout, {}
        for tier, arena in now.arenas.items():
            whole = self._whole(tier)
            if whole is None:
                assert not len(arena), f"{len(arena)} tokens of {tier.bits} bits have no room"
                continue
            if arena.places.data_ptr() != whole.places.data_ptr():
                _copy(arena, whole)
                arena = _narrowed(whole, len(arena))
            arenas[tier] = arena
        tail = now.length - now.tail_start
        for own, given in ((views.keys, now.keys), (views.values, now.values)):
            if own.data_ptr() != given.data_ptr():
                own.narrow(2, 0, tail).copy_(given.narrow(2, 0, tail))
        if now.frame is not None and now.frame.data_ptr() != views.frame.data_ptr():
            views.frame.copy_(now.frame)
        known = (layout, tables, pads)
        if known != self._tables:
            rooms = {room.bits for room in layout.rooms}
            kept = tuple(i for i, (tier, _) in enumerate(plan.rooms) if tier.bits in rooms)
            start, written = _head(layout, tables, kept, pads, now.keys.device)
            self.step.buffer.narrow(0, start, len(written)).copy_(written)
            self._tables = known
        state = torch.zeros(STATE, dtype=torch.int32)
        state[LENGTH], state[BASE] = now.length, now.tail_start
        send(state, self.step.state)
        self._contents = now._replace(
            keys=views.keys,
            values=views.values,
            arenas=arenas,
            frame=None if now.frame is None else views.frame,
            borrowed=False,
        )
        self._published = True

    def pull(self) -> int:
        """Learn what decoding has changed since `publish`.

        Returns:
            How many tokens it refused because the layer was full.
        """
        assert self.step is not None and self._views is not None and self._published
        length, _, base, refused = self.step.state[:4].tolist()
        layout, now, views = self.step.layout, self._contents, self._views
        done = layout.done(length, base)
        start = max(base + BLOCK * done, length - layout.ring) if not layout.rooms else base + BLOCK * done
        tail = length - start
        contents = now._replace(length=length)
        if start != base:  # the tail no longer begins at the front of the ring
            order = torch.arange(start - base, length - base, device=views.keys.device) % layout.ring
            for side in (views.keys, views.values):
                side[:, :, :tail] = side[:, :, order]
            contents = contents._replace(tail_start=start)
            if not layout.rooms:
                contents = contents._replace(first_kept=start)
        if done:
            _, tables, _ = self._tables
            counts = dict(zip((tier for tier, _ in self.plan.rooms), tables.totals[done].tolist(), strict=True))
            arenas = {}
            for room in views.arenas:
                tier = next(tier for tier in TIERS if tier.bits == room.bits)
                if counts[tier]:
                    arenas[tier] = _narrowed(Arena(tier, *room[1:]), counts[tier])
            drops = now.drops or int(tables.dropped[:done].sum()) > 0
            frame = views.frame if self.codec.center and any(tier.bits < 16 for tier in arenas) else now.frame
            contents = contents._replace(arenas=arenas, drops=drops, frame=frame)
        self._contents = contents
        self._published = start == base and not refused
        return refused

    # -- as every store -----------------------------------------------------------------------------------------------

    def map(self, function: TensorMap) -> None:
        super().map(function)
        if self.step is not None and self.step.buffer.device != self._contents.keys.device:
            self.step, self._views, self._fitting = None, None, None

    def parts(self) -> Iterator[tuple[str, int]]:
        if self.step is None or not self._published:
            yield from super().parts()
            return
        used = 0
        for name, tensor in self.tensors():
            if name.startswith("tail."):
                tensor = tensor[:, :, : self.tail_length]
            if name != "pads":
                used += tensor.nbytes
                yield name, tensor.nbytes
        yield "free", self.step.buffer.nbytes + self.step.state.nbytes - used

    def storages(self) -> Iterator[torch.Tensor]:
        yield from super().storages()
        if self.step is not None:
            yield from (self.step.buffer, self.step.state)


def _narrowed(arena: Arena, stop: int, start: int = 0) -> Arena:
    """The tokens of an arena in these places."""
    return arena.map(lambda t: t.narrow(2, start, stop - start))


def _copy(source: Arena, target: Arena) -> None:
    """Copy tokens to the front of an arena that has room for them."""
    for (_, new), (_, room) in zip(source.tensors(), target.tensors(), strict=True):
        room[:, :, : len(source)].copy_(new)


@dataclass(frozen=True, eq=False)
class _Tables:
    """What decoding does with each block of tokens.

    Attributes:
        totals: int32 `[blocks + 1, rooms]`: tokens in each arena.
        own: int32 `[blocks, batch or 1, rooms]`: of each row.
        dropped: int64 `[blocks]`: tokens that go nowhere.
        most: Tokens in each arena in the end.
    """

    totals: torch.Tensor
    own: torch.Tensor
    dropped: torch.Tensor
    most: dict[Tier, int]


@keep(64)
def _decoded(
    policy: Policy,
    floor: Tier | None,
    had: tuple[tuple[Tier, int], ...],
    start: int,
    pads: tuple[int, ...] | None,
    blocks: int,
) -> _Tables:
    """What decoding will do with `blocks` blocks from position `start` on, in a layer that has tokens in its arenas.

    The numbers are those by which the host tiers: `TieredStore._assign` and `_assign_padded`.
    """
    tiers = [tier for tier, _ in had]
    totals, rows, dropped = [[tokens for _, tokens in had]], [], []
    for block in range(blocks):
        own = [_row(policy, floor, start + block * BLOCK, pad) for pad in pads or (0,)]
        sizes = sizes_of(own, BLOCK)
        totals.append([count + sizes[tier] for count, tier in zip(totals[-1], tiers, strict=True)])
        rows.append([[row.get(tier, 0) for tier in tiers] for row in own])
        dropped.append(sizes[DROPPED])
    return _Tables(
        torch.tensor(totals, dtype=torch.int32),
        torch.tensor(rows, dtype=torch.int32).view(blocks, -1, len(tiers)),
        torch.tensor(dropped),
        dict(zip(tiers, totals[-1], strict=True)),
    )


@keep(128)
def _head(
    layout: Layout, tables: _Tables | None, kept: tuple[int, ...], pads: tuple[int, ...] | None, device: torch.device
) -> tuple[int, torch.Tensor]:
    """What a buffer holds of tables and padding, on a device, and at which byte of it: most layers have the same.

    Args:
        kept: The rooms of the plan that the layout has.
    """
    places = {name: (shape, first) for name, _, shape, first in layout.places}
    start, end = places["totals"][1], places["frame"][1]
    head = torch.zeros(end - start, dtype=torch.uint8)

    def write(name: str, numbers: torch.Tensor) -> None:
        shape, first = places[name]
        room = head[first - start :].view(torch.int32)[: math.prod(shape)].view(shape)
        rows = min(len(room), len(numbers))
        room[:rows] = numbers[:rows]

    if tables is not None:
        write("totals", tables.totals[:, kept])
        write("own", tables.own[:, :, kept])
    if pads is not None:
        write("pads", torch.tensor(pads, dtype=torch.int32))
    there = torch.empty(len(head), dtype=torch.uint8, device=device)
    send(head, there)
    return start, there


def _row(policy: Policy, floor: Tier | None, start: int, pad: int) -> Counts:
    """Counts for the real tokens of one row in the block that begins at `start`."""
    before = max(start - pad, 0)
    return lifted(increments(policy, before, min(max(start + BLOCK - pad, 0), BLOCK)), floor)


@functools.lru_cache(maxsize=256)  # equal plans are those of many layers
def _rooms(plan: Plan) -> tuple[tuple[Tier, int], ...]:
    if plan.policy.lossless:
        return ()
    tiered = max(plan.capacity - plan.policy.recent_window, 0)
    counts = [lifted(plan.policy.counts(n), plan.floor) for n in range(max(tiered - BLOCK, 0), tiered + 1)]
    most = {tier: max(count.get(tier, 0) for count in counts) for tier in TIERS if tier != DROPPED}
    return tuple((tier, tokens + SPARE if tokens or tier in plan.beside else 0) for tier, tokens in most.items())
