"""Triton twin of `attention`: decode attention that reads only the compressed bytes.

Three launches: `prepare_kernel` makes the queries ready, every program of `attend_kernel` reads a share of all segments
for one KV head and row of the batch, and `merge_kernel` joins the parts.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..backend.launch_triton import Held, Launcher, Series, next_power_of_2, on_device, shared, trait
from ..backend.tensor_cache import keep_longest
from ..codec.frame import frame_size
from ..codec.quantize import Quantized
from ..codec.reference import Codec, dims
from ..rotation.rotary import Rotary
from ..segment import Growing, Segment
from . import reference as attention
from .triton_attend import attend_kernel
from .triton_dot import LOG2E
from .triton_merge import merge_kernel
from .triton_prepare import prepare_kernel

# The numbers below were the fastest of those tried on an H100 or H200, for 4 query heads of 128 channels on a KV head.
FINE = 128
"""Positions that share one coarse rotation: `exp(i t f) = exp(i 128 (t // 128) f) exp(i (t % 128) f)`."""
QUERY_PEAK = 1024.0
"""Rotated queries are scaled to this peak, so that float16 holds them with 11 bits whatever their size."""
ROWS = 64
"""Query rows of one program at most."""
PREPARED = 32
"""Query rows whose scores of the mean are computed together."""
TURNED = 16
"""Query rows that are rotated together."""
SHARE_BYTES = 1 << 14
"""A program reads this much at least."""
TILE = {16: 16, 8: 64, 4: 64, 3: 64, 2: 64, 1: 64}
"""Tokens of an iteration, by bits."""
TIME = {16: 3, 8: 5, 4: 4, 3: 6, 2: 4, 1: 4}
"""How long an iteration takes, by bits; of one to another."""
STAGES = 3
"""Depth of the pipeline of loads."""
FITS = {8: (1, 255), 16: (2, 168), 32: (2, 255), 64: (4, 255)}
"""Warps of a program of `attend_kernel`, and registers of a thread, by columns. A single warp waits for no other, and
two would both do the values of narrow codes, whose planes have no more channels than one warp multiplies at a time."""
FITS_OF_8_BITS = 2, 168
"""The same for few columns, up to 128 channels, and codes of 8 bits alone: these are as fast as memory is."""
REGISTERS = 1 << 16
"""Of a multiprocessor."""
PREPARE_OPTIONS = {"num_warps": 4}
MERGED = 32
"""Parts that are joined at a time."""
MERGE_OPTIONS = {"num_warps": 4}
PREPARE_RESIDENT = 4


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def resident(warps: int, registers: int) -> int:
    """Programs with so many warps, and registers of a thread, that a multiprocessor holds at once."""
    return REGISTERS // (32 * warps * -(-registers // 8) * 8)


@functools.lru_cache(maxsize=4096)
def _shares(heads: int, most: int, slots: int) -> int:
    """How many programs, `most` at most, share the tokens of each of `heads`: the fewest that keep `slots` busy."""
    most = max(1, min(most, 4 * slots // heads))

    def busy(shares: int) -> float:
        waves = heads * shares / slots
        return waves / math.ceil(waves)

    best = max(map(busy, range(1, most + 1)))
    return next(n for n in range(1, most + 1) if busy(n) >= 0.95 * best)


@keep_longest(4096)
def tables(length: int, rotary: Rotary, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `Rotary.steps`, the fine angles in float16, and the coarse ones."""
    if not rotary.inv_freq:
        return torch.zeros(1, dtype=torch.float16, device=device), torch.zeros(1, device=device)
    table = rotary.steps(FINE, length, device)
    return table[:FINE].half(), table[FINE:]


class _Laid(NamedTuple):
    """A segment as the kernel takes it.

    Attributes:
        held: Tensors, in rows without gaps between them.
        tokens: How many.
        room: Tokens that the buffers behind it hold for each row and head.
        dims: Head dims of keys and values.
        shared: All rows and heads have the same positions.
        packed: They are packed.
        trait: What of it decides which code is compiled.
    """

    held: Held
    tokens: int
    room: int
    dims: tuple[int, int]
    shared: bool
    packed: bool
    trait: Any


def _laid(segment: Segment) -> _Laid:
    found: _Laid | None = segment.known.get(__name__)
    if found is None:
        room = _room(segment)
        if room is None:
            segment = _contiguous(segment)
            room = segment.tokens
        held = _held(segment)
        traits = (held.made()[0].dtype, segment.packed, *[address % 16 for address in held.addresses])
        alike = not segment.packed and shared(segment.positions)
        found = _Laid(held, segment.tokens, room, dims(segment), alike, segment.packed, traits)
        segment.known[__name__] = found
    return found


def _room(segment: Segment) -> int | None:
    """Tokens that the buffers behind a segment hold for each row and head; None where they are laid out otherwise."""
    _, keys, values, positions = segment
    (batch, heads), tokens = positions.shape[:2], segment.tokens
    sides = (*keys, *values) if isinstance(keys, Quantized) else (keys, values)
    if segment.packed and not positions.is_contiguous():
        return None
    if not segment.packed and not shared(positions):
        sides = (*sides, positions.unsqueeze(-1))
    rooms = set()
    for t in sides:
        strides, dim = t.stride(), t.shape[3]
        room = strides[1] // dim if heads > 1 else strides[0] // dim if batch > 1 else tokens
        if (dim > 1 and strides[3] != 1) or (tokens > 1 and strides[2] != dim):
            return None
        if (heads > 1 and strides[1] != room * dim) or (batch > 1 and strides[0] != heads * room * dim):
            return None
        rooms.add(room)
    return rooms.pop() if len(rooms) == 1 else None


def _contiguous(segment: Segment) -> Segment:
    def whole(stored: Any) -> Any:
        if isinstance(stored, Quantized):
            return Quantized(*(t.contiguous() for t in stored))
        return stored.contiguous()

    return Segment(segment.bits, whole(segment.keys), whole(segment.values), segment.positions.contiguous())


def tiered_attention(
    query: torch.Tensor,
    segments: Sequence[Segment],
    *,
    length: int,
    scale: float,
    codec: Codec,
    frame: torch.Tensor | None,
    rotary: Rotary,
    mask: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    ragged: bool = False,
) -> torch.Tensor:
    """As `attention.tiered_attention`, up to the rounding of queries and weights to 11 bits for coded tokens.

    Nothing is compiled anew as lengths grow, and the host waits for nothing. A CUDA graph can be captured: replays
    read what lies in the same tensors then; positions of -1, with `ragged`, mark places that no token has taken yet.
    """
    device, query = query.device, query.contiguous()
    call = _Call(
        query.shape, query.dtype, device, codec, rotary, frame is not None, mask_kind(mask), window is not None,
        ragged, softcap is not None, sinks is not None,
    )  # fmt: skip
    reading, tail = _known(call, segments, length)
    if reading is None:
        return attention.tiered_attention(
            query, segments, length=length, scale=scale, codec=codec, frame=frame, rotary=rotary, mask=mask,
            window=window, softcap=softcap, sinks=sinks, ragged=ragged,
        )  # fmt: skip
    work = reading.work
    return launch(
        reading.kernels,
        work,
        query,
        reading.held,
        sizes=work.sizes if tail is None else (*work.sizes[:-1], (2 * tail + 3, work.sizes[-1][1])),
        kv_heads=reading.kv_heads,
        value_dim=reading.plan.value_dim,
        length=length,
        scale=scale,
        frame=frame if reading.centred else None,
        rotary=rotary,
        mask=mask,
        window=window,
        softcap=softcap,
        sinks=sinks,
        traits=(work.trait, query.dtype, query.data_ptr() % 16),
        segment_traits=reading.traits,
    )


class _Call(NamedTuple):
    """What a read is given beside segments, as far as launches differ by it."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    codec: Codec
    rotary: Rotary
    frame: bool
    mask: str
    window: bool
    ragged: bool
    softcap: bool
    sinks: bool


class _Reading(NamedTuple):
    """What calls alike need to know of segments.

    Attributes:
        plan, kernels: For these bits and dims.
        work: For as many tokens as the segments have, or the last one has room for.
        held: Tensors of the segments, those in codes first.
        traits: Of each, as in `_Laid`.
        kv_heads: Of each segment.
        centred: The mean of keys is scored.
    """

    plan: "Plan"
    kernels: "Kernels"
    work: "Work"
    held: Held
    traits: tuple[Any, ...]
    kv_heads: int
    centred: bool


def _reading(call: _Call, segments: Iterable[Segment], length: int) -> _Reading | None:
    """Of segments with the tokens of `length` positions; None where the kernels don't do this."""
    held = [s for s in segments if s.tokens]
    held.sort(key=_is_exact)
    laid = [_laid(s) for s in held]
    batch, heads, queries, dim = call.shape
    kv_heads, bits = held[0].positions.shape[1], tuple([s.bits for s in held])
    rows = heads // kv_heads * queries
    plan = plan_of(rows, dim, laid[0].dims[1], bits, call.dtype, call.device)
    if plan is None:
        return None
    check_device("segments", held[0].positions, call.device)
    codec, rotary, centred = call.codec, call.rotary, call.frame and bits[0] < 16
    kernels = kernels_of(
        plan,
        codec.symmetric,
        codec.balanced,
        codec.hadamard,
        centred,
        len(rotary.inv_freq),
        rotary.interleaved,
        tuple([s.shared for s in laid]),
        tuple([s.packed for s in laid]),
        call.mask,
        queries > 1 and call.mask == "none",
        call.window and call.mask == "none",
        call.ragged,
        call.softcap,
        call.sinks,
    )
    tokens, rooms = tuple([s.tokens for s in laid]), tuple([s.room for s in laid])
    return _Reading(
        plan,
        kernels,
        work_of(plan, batch * kv_heads, rows, length if centred else 0, tokens, rooms),
        Held(tuple([s.held.tensors for s in laid]), tuple([s.held.addresses for s in laid])),
        tuple([s.trait for s in laid]),
        kv_heads,
        centred,
    )


def _known(call: _Call, segments: Sequence[Segment], length: int) -> tuple[_Reading | None, int | None]:
    """`_reading` of segments, and where it is of more tokens than the last segment has, how many that has.

    It is kept for calls alike where only the last segment grows: as with one that is full. That has to be read where it
    lies, as a copy would lack the tokens to come.
    """
    if isinstance(segments, Growing) and segments.tokens:
        others = length - segments.tokens
        made_for, reading = segments.known.get(__name__, (None, None))
        if made_for != (call, others):
            room = segments.room
            in_place = _room(room) is not None
            reading = _reading(call, [*segments.others, room], others + room.tokens) if in_place else None
            segments.known[__name__] = (call, others), reading
        if reading is not None:
            return reading, segments.tokens
    return _reading(call, segments, length), None


def launch(
    kernels: "Kernels",
    work: "Work",
    query: torch.Tensor,
    segments: Held,
    *,
    sizes: tuple[tuple[int, int], ...],
    kv_heads: int,
    value_dim: int,
    length: int,
    scale: float,
    frame: torch.Tensor | Held | None,
    rotary: Rotary,
    mask: torch.Tensor | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    traits: Any,
    segment_traits: Any = None,
    counts: torch.Tensor | None = None,
    totals: Held | None = None,
    recent: int = 0,
) -> torch.Tensor:
    """Launch the three kernels on what has been worked out for them.

    Args:
        kernels, work: Of `kernels_of` and `work_of`.
        query: Contiguous, `[batch, heads, queries, head_dim]`.
        segments: Tensors of each, those in codes first, as `attend_kernel` takes them.
        sizes: Of the segments, likewise: those of `work`, or fewer tokens.
        kv_heads, value_dim: Of the segments.
        length: Tokens seen; means nothing where they are counted on the device.
        scale, window, softcap, sinks: As in `tiered_attention`.
        frame, rotary: As in `tiered_attention`.
        mask: As in `tiered_attention`; where tokens are counted on the device its columns are the first positions.
        traits: What of the query, `work`, `counts` and `totals` decides which code is compiled.
        segment_traits: Likewise of the segments.
        counts, totals, recent: As `attend_kernel` takes them where tokens are counted on the device.
    """
    (batch, heads, queries, _), device = query.shape, query.device
    floats = torch.empty(work.workspace, dtype=torch.float32, device=device)
    halves = Held(functools.partial(_halves, floats, work.floats), floats.data_ptr() + 4 * work.floats)
    out = torch.empty((batch, heads, queries, value_dim), dtype=query.dtype, device=device)
    counted = query if counts is None else counts
    total = query if totals is None else totals
    masked, masking, mask_trait, sink_trait = query, UNMASKED, None, None
    if mask is not None:
        check_device("mask", mask, device)
        masked, masking = _masking(mask)
        mask_trait = trait((masked, *masking.strides, masking.columns))
    if sinks is not None:
        check_device("sinks", sinks, device)
        sink_trait = trait(sinks)
    series = _series(kernels, work, queries, kv_heads, scale, window, softcap, recent)
    mask_batch, mask_head, mask_query, mask_stride = masking.strides
    with on_device(query):
        fitted: torch.Tensor | Held = query if frame is None else frame
        tensors: list[tuple[Any, ...]] = [  # in the order of the names in `_series`
            (query, halves, floats, segments, masked, counted, total),
            (floats, query if sinks is None else sinks, fitted, counted, total, out),
        ]
        numbers: list[tuple[Any, ...]] = [
            (sizes, length, mask_batch, mask_head, mask_query, mask_stride, masking.columns, masking.lowest),
            (sizes,),
        ]
        if work.coded:
            fine, coarse = (query, query) if frame is None else tables(work.places, rotary, device)
            tensors.insert(0, (query, fitted, fine, coarse, halves, floats, counted, masked))
            numbers.insert(0, (mask_batch, mask_stride, masking.columns))
        small = sizes[-1][0] < 1 << 31  # the others are those of `work`
        series(tensors, (traits, segment_traits, small, fitted.data_ptr() % 16, mask_trait, sink_trait), numbers)
    return out


@functools.lru_cache(maxsize=256)
def _series(
    kernels: "Kernels",
    work: "Work",
    queries: int,
    kv_heads: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    recent: int,
) -> Series:
    """The launches of the kernels; in one step they are the same for all layers that share a `work`."""
    # With a cap the scores must be in natural units first; else exp2 saves a product.
    units = float(scale) if softcap is not None else scale * LOG2E.value
    prepare = {
        "rotated_at": work.rotated_at,
        "factor_at": work.factor_at,
        "rows": work.rows,
        "flat": work.flat,
        "turning": work.turning,
        "row_blocks": work.row_blocks,
        "blocks": work.each,
        "places": work.places,
        "recent": recent,
        "kv_heads": kv_heads,
        "ticket_at": work.ticket_at,
        "scale": units,
    }
    attend = {
        "columns": work.columns,
        "rotated_at": work.rotated_at,
        "state_at": work.state_at,
        "factor_at": work.factor_at,
        "kv_heads": kv_heads,
        "rows": work.rows,
        "queries": queries,
        "places": work.places,
        "splits": work.splits,
        "window": window or 0,
        "recent": recent,
        "ticket_at": work.ticket_at,
        "own": work.own,
        "scale": units,
        "softcap": float(softcap or 0),
    }
    merge = {
        "columns": work.columns,
        "state_at": work.state_at,
        "rows": work.rows,
        "queries": queries,
        "kv_heads": kv_heads,
        "splits": work.splits,
        "shares": work.grid[1],
        "recent": recent,
    }
    launches: list[tuple[Launcher, tuple[int, ...], tuple[str, ...], dict[str, Any]]] = [
        (
            kernels.attend,
            work.grid,
            (
                *("query", "halves", "floats", "segments", "mask", "counts", "totals"),
                *("sizes", "length", "mask_batch", "mask_head", "mask_query", "mask_stride", "mask_columns"),
                "mask_lowest",
            ),
            attend,
        ),
        (
            kernels.merge,
            (work.flat * work.rows, 1, 1),
            ("partial", "sinks", "frame", "counts", "totals", "out", "sizes"),
            merge,
        ),
    ]
    if work.coded:
        names: tuple[str, ...] = ("query", "frame", "fine", "coarse", "halves", "floats", "counts", "mask")
        names = (*names, "mask_batch", "mask_stride", "mask_columns")
        launches.insert(0, (kernels.prepare, (work.turning + work.scoring, 1, 1), names, prepare))
    return Series(launches)


def _halves(workspace: torch.Tensor, start: int) -> torch.Tensor:
    """The part of a workspace of float32 that is used as float16."""
    return workspace[start:].view(torch.float16)


FOLDED = "folded"
"""A boolean mask that is the same for all heads, and that the scores of the mean take in for coded tokens: read in the
order of positions, it costs nothing there."""


def mask_kind(mask: torch.Tensor | None) -> str:
    """What `kernels_of` calls it."""
    return "none" if mask is None else "bool" if mask.dtype == torch.bool else "additive"


def _is_exact(segment: Segment) -> bool:
    return segment.bits == 16


def _covers(dtype: torch.dtype, dim: int, value_dim: int, bits: tuple[int, ...]) -> bool:
    """Whether the kernels do these dims."""
    wide = 128 if dtype == torch.float32 else 256
    return max(dim, value_dim) <= wide and not any(d * b % 16 for b in bits for d in (dim, value_dim))


@functools.cache
def _overlaps(device: torch.device) -> bool:
    """Kernels can be launched before the one that they wait for has ended (programmatic dependent launch)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@dataclass(frozen=True, eq=False, slots=True)
class Plan:
    """What does not change while a cache grows.

    Attributes:
        dim, value_dim: Head dims of keys and values.
        bits: Of each segment.
        rows_pad: Query rows of a KV head, rounded up to a power of two.
        columns: Of them in one program.
        row_blocks: Programs for all of them.
        costs: Bytes that a token of each segment takes to read.
        tiles: Tokens of one iteration, of each segment.
        times: How long that takes, of one to another.
        block: Channels of a value, rounded up to a power of two.
        coded: Segments that are not exact, which come first.
        overlaps: The merge may be launched before what it waits for has ended.
        processors: Multiprocessors of the device.
        warps, registers: Of a program of `attend_kernel`, and of a thread of it.
    """

    dim: int
    value_dim: int
    bits: tuple[int, ...]
    rows_pad: int
    columns: int
    row_blocks: int
    costs: tuple[int, ...]
    tiles: tuple[int, ...]
    times: tuple[int, ...]
    block: int
    coded: int
    overlaps: bool
    processors: int
    warps: int
    registers: int


@functools.lru_cache(maxsize=256)
def plan_of(
    rows: int,
    dim: int,
    value_dim: int,
    bits: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Plan | None:
    """None where the kernels don't do this."""
    if not _covers(dtype, dim, value_dim, bits):
        return None
    rows_pad = next_power_of_2(rows)
    columns = min(max(rows_pad, 8), ROWS)
    block = next_power_of_2(value_dim)
    wide = max(next_power_of_2(dim), block, 128)
    warps, registers = FITS_OF_8_BITS if columns == 8 and wide == 128 and set(bits) <= {8, 16} else FITS[columns]
    return Plan(
        dim=dim,
        value_dim=value_dim,
        bits=bits,
        rows_pad=rows_pad,
        columns=columns,
        row_blocks=-(-rows // columns),
        costs=tuple((dim + value_dim) * b // 8 + (12 + 2 * rows_pad if b < 16 else 0) for b in bits),
        tiles=tuple(max(TILE[b] * 128 // wide, 16) for b in bits),
        times=tuple([TIME[b] for b in bits]),
        block=block,
        coded=sum(b < 16 for b in bits),
        overlaps=_overlaps(device),
        processors=_multiprocessors(device),
        warps=warps,
        registers=registers,
    )


class Kernels(NamedTuple):
    """The three, for one kind of call."""

    prepare: Launcher
    attend: Launcher
    merge: Launcher


@functools.lru_cache(maxsize=256)
def kernels_of(
    plan: Plan,
    symmetric: bool,
    balanced: bool,
    hadamard: bool,
    centred: bool,
    pairs: int,
    interleaved: bool,
    shared: tuple[bool, ...],
    packed: tuple[bool, ...],
    mask: str,
    causal: bool,
    window: bool,
    ragged: bool,
    softcap: bool,
    sinks: bool,
    counted: tuple[int, ...] | None = None,
    kv_heads: int = 1,
) -> Kernels:
    """The kernels for a kind of call; `counted` is what they take as `COUNTED`, and `mask` its kind."""
    frame = {"FRAME": frame_size(balanced, plan.dim, plan.value_dim), "FITTED": balanced and centred}
    prepare = {
        "D": plan.dim,
        **frame,
        "PAIRS": pairs,
        "INTERLEAVED": interleaved,
        "HADAMARD": hadamard,
        "MEAN": centred,
        "PEAK": QUERY_PEAK,
        "POSITIONS": FINE,
        "ROWS_PAD": plan.rows_pad,
        "TURNED": TURNED,
        "R": PREPARED,
        "FOLDS": mask == FOLDED,
        "ALIKE": kv_heads * plan.rows_pad % PREPARED == 0,
        "PROCESSORS": plan.processors,
        "COUNTED": counted,
    }
    attend = {
        "BITS": plan.bits,
        "SHARED": shared,
        "PACKED": packed,
        "D": plan.dim,
        "DV": plan.value_dim,
        "R": plan.columns,
        "ROWS_PAD": plan.rows_pad,
        "SYMMETRIC": symmetric,
        "MEAN": centred,
        "CAUSAL": causal,
        "WINDOW": window,
        "RAGGED": ragged,
        "MASK": mask,
        "SOFTCAP": softcap,
        "TILES": plan.tiles,
        "TIMES": plan.times,
        "STAGES": STAGES - (mask in ("bool", "additive")),  # masks are read in stages of their own
        "CLAIMS": plan.coded > 1,
        "PROCESSORS": plan.processors,
        "COUNTED": counted,
        "OVERLAPS": plan.overlaps,
    }
    merge = {
        "DV": plan.value_dim,
        "BLOCK": plan.block,
        **frame,
        "HADAMARD": hadamard and plan.coded > 0,
        "SINKS": sinks,
        "S": MERGED,
        "TILES": plan.tiles,
        "TIMES": plan.times,
        "CODED": plan.coded,
        "COUNTED": counted,
        "OVERLAPS": plan.overlaps,
    }
    # The merge may be launched while the last programs of `attend_kernel` run. Launching that one early, too, or both
    # at their predecessors' start was slower: programs that wait take the places of others.
    early = MERGE_OPTIONS | ({"launch_pdl": True} if plan.overlaps else {})
    return Kernels(
        Launcher(prepare_kernel, prepare, **PREPARE_OPTIONS),
        Launcher(attend_kernel, attend, num_warps=plan.warps, maxnreg=plan.registers),
        Launcher(merge_kernel, merge, **early),
    )


@dataclass(frozen=True, eq=False, slots=True)
class Work:
    """How a step's work is shared out, the same for all layers with as many tokens in each tier.

    Attributes:
        flat, rows: KV heads of the whole batch, and query rows of each.
        places: Positions whose scores of the mean there is room for.
        workspace: Elements of float32 that the workspace takes.
        floats: Of them before those that are two of float16 each, in which `halves` begins, at a multiple of 16 bytes.
        rotated_at, state_at, factor_at, ticket_at: Where their parts begin.
        turning, scoring: Programs of `prepare_kernel` that rotate queries, and that score the mean.
        row_blocks: Of the latter, for the rows at one position.
        each: Blocks of positions for one of them.
        sizes, columns: Of the segments, as `attend_kernel` takes them.
        splits: Places for parts of a row.
        coded: Some segments are not exact.
        grid: Of `attend_kernel`.
        own: Programs of `attend_kernel` that each multiprocessor gets, if not all at once, then as many as it holds.
        trait: What of these numbers decides which code is compiled.
    """

    flat: int
    rows: int
    places: int
    workspace: int
    floats: int
    rotated_at: int
    state_at: int
    factor_at: int
    ticket_at: int
    turning: int
    scoring: int
    row_blocks: int
    each: int
    sizes: tuple[tuple[int, int], ...]
    columns: tuple[int, ...]
    splits: int
    coded: bool
    grid: tuple[int, int, int]
    own: int
    trait: Any


@functools.lru_cache(maxsize=64)
def work_of(
    plan: Plan,
    flat: int,
    rows: int,
    scored: int,
    tokens: tuple[int, ...],
    rooms: tuple[int, ...],
    columns: tuple[int, ...] | None = None,
) -> Work:
    """Work for `tokens` in each segment and the mean's scores at `scored` positions.

    With `columns`, those of the table of totals, tokens are counted on the device, and are here the most there may be.
    """
    read = sum(cost * size for cost, size in zip(plan.costs, tokens, strict=True))
    held = resident(plan.warps, plan.registers)
    shares = _shares(flat * plan.row_blocks, read // SHARE_BYTES, held * plan.processors)
    splits = shares + len(tokens) - 1
    row_blocks, parts = -(-flat * plan.rows_pad // PREPARED), -(-scored // FINE)
    each = max(-(-parts * row_blocks // (PREPARE_RESIDENT * plan.processors)), 1)
    rotated_at = -(-flat * scored * plan.rows_pad // 8) * 8
    state_at = flat * splits * rows * plan.value_dim
    factor_at = state_at + flat * splits * rows * 2 + 2
    ticket_at = factor_at + flat * rows * 2
    floats, halves = -(-(ticket_at + plan.processors + 1) // 4) * 4, rotated_at + flat * rows * plan.dim
    sizes = tuple((2 * size + 3, 2 * room + 3) for size, room in zip(tokens, rooms, strict=True))
    return Work(
        flat=flat,
        rows=rows,
        places=scored,
        workspace=floats + -(-halves // 2),
        floats=floats,
        rotated_at=rotated_at,
        state_at=state_at,
        factor_at=factor_at,
        ticket_at=ticket_at,
        turning=-(-flat * rows // TURNED),
        scoring=row_blocks * -(-parts // each),
        row_blocks=row_blocks,
        each=each,
        sizes=sizes,
        columns=tuple(2 * column + 3 for column in columns or (0,) * len(tokens)),
        splits=splits,
        coded=plan.coded > 0,
        grid=(flat * plan.row_blocks, shares, 1),
        own=min(flat * plan.row_blocks * shares // plan.processors, held),
        trait=trait((rotated_at, state_at, factor_at, ticket_at, sizes)),
    )


def check_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:  # the kernel would read what lies at that address on its own
        raise ValueError(f"{name} must lie on {device}, as the query does, got {tensor.device}")


class Masking(NamedTuple):
    """Numbers of a mask: strides, 0 where it has one row or head for all, columns, and below what it hides."""

    strides: tuple[int, ...]
    columns: int
    lowest: float


UNMASKED = Masking((0, 0, 0, 0), 0, 0.0)


def _masking(mask: torch.Tensor) -> tuple[torch.Tensor, Masking]:
    """The mask for the kernel, and its numbers."""
    (batch, heads, queries, columns), steps = mask.shape, mask.stride()
    strides = (steps[0] if batch > 1 else 0, steps[1] if heads > 1 else 0, steps[2] if queries > 1 else 0, steps[3])
    if mask.dtype == torch.bool:
        return mask.view(torch.uint8), Masking(strides, columns, 0.0)
    return mask, Masking(strides, columns, torch.finfo(mask.dtype).min / 2)


def _held(segment: Segment) -> Held:
    _, keys, values, positions = segment
    tensors: tuple[torch.Tensor, ...] = (keys, values, positions)
    if isinstance(keys, Quantized):
        tensors = (keys.codes, values.codes, positions, keys.affine, values.affine)
    return Held(tensors, tuple([tensor.data_ptr() for tensor in tensors]))
