"""Triton twins of `codec.reference`: what writes codes."""

# mypy: allow-untyped-defs

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .. import segment
from ..backend.launch_triton import Held, Launcher, Series, alignments, cdiv, on_device, strides_of
from ..backend.tensor_cache import keep
from ..rotation.rotary import Rotary
from ..rotation.triton_hadamard import hadamard, join_quarters
from ..rotation.triton_rotary import rotated_mean, turns
from ..segment import Segment, contiguous_rows
from . import reference as twin
from .quantize import Quantized
from .reference import Codec
from .triton_codec import fits, frame_numbers, load_scale, widths_of
from .triton_quantize import store_codes

TIERS = 6
"""Most tiers of one launch."""
COUNTS, ROOMS = ([f"{name}{tier}" for tier in range(TIERS)] for name in ("count", "room"))
TILE, START = tl.constexpr(segment.TILE), tl.constexpr(segment.START)


@triton.jit
def load_residual(
    x, inside, positions, mean, scale, table, channels,
    DIM: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """These channels of tokens that begin at `x`, less those of `R(t) mean` and divided by the scale.

    float32 `[tokens, channels]`; mean and scale may be None.
    """
    y = tl.load(x + channels[None, :], mask=inside[:, None] & (channels < DIM)[None, :], other=0.0).to(tl.float32)
    if mean is not None:
        y -= rotated_mean(mean, table, positions, channels, DIM, PAIRS, INTERLEAVED)
    if scale is not None:
        y /= load_scale(scale, channels, DIM, EACH)
    return y


@triton.jit
def encode_rows(
    x, inside, positions, mean, scale, table, codes, scales, zeros, places, bits,
    DIM: tl.constexpr, WIDTH: tl.constexpr, WIDTHS: tl.constexpr, HADAMARD: tl.constexpr,
    PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Quantise the keys or values that begin at `x`, `[tokens, 1]`, and store them in `places`, where `inside`.

    Args:
        mean, scale: Of the frame, or None. `EACH` channel has a scale, or all of them share one.
        bits: Of the codes, one of `WIDTHS`.

    Returns:
        Which tokens no code stands for, bool `[tokens]`.
    """
    if WIDTH == DIM and WIDTH >= 32:
        part = tl.arange(0, WIDTH // 4)
        y0 = load_residual(x, inside, positions, mean, scale, table, part, DIM, PAIRS, INTERLEAVED, EACH)
        part += WIDTH // 4
        y1 = load_residual(x, inside, positions, mean, scale, table, part, DIM, PAIRS, INTERLEAVED, EACH)
        part += WIDTH // 4
        y2 = load_residual(x, inside, positions, mean, scale, table, part, DIM, PAIRS, INTERLEAVED, EACH)
        part += WIDTH // 4
        y3 = load_residual(x, inside, positions, mean, scale, table, part, DIM, PAIRS, INTERLEAVED, EACH)
        y = join_quarters(y0, y1, y2, y3)
    else:
        channels = tl.arange(0, WIDTH)
        y = load_residual(x, inside, positions, mean, scale, table, channels, DIM, PAIRS, INTERLEAVED, EACH)
    BLOCK: tl.constexpr = DIM & -DIM if HADAMARD else 1
    return store_codes(hadamard(y, BLOCK), codes, scales, zeros, places, inside, bits, BLOCK**-0.5, DIM, WIDTHS)


@triton.jit
def copy_rows(x, out, places, inside, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Store exact keys or values that begin at `x`, `[tokens, 1]`, in these places, where `inside`."""
    channels = tl.arange(0, WIDTH)[None, :]
    there = inside[:, None] & (channels < DIM)
    tl.store(out + places[:, None] * DIM + channels, tl.load(x + channels, mask=there, other=0.0), mask=there)


@triton.jit
def _pack_positions(order, positions, packed, flag, token, inside, n):
    """Positions of these tokens of a row, as `pack_positions` stores them; the flag becomes 1 where it can't."""
    place = token % TILE
    before = tl.load(order + token - 1, mask=inside & (place > 0), other=0)
    step = tl.where(inside & (place > 0), positions - before, 0)
    packed += (token // TILE) * (START + TILE)
    tl.store(packed + START + place, (step & 255).to(tl.uint8), mask=token < tl.cdiv(n, TILE) * TILE)
    begins = inside & (place == 0)
    for byte in tl.static_range(START):
        tl.store(packed + byte, ((positions >> (8 * byte)) & 255).to(tl.uint8), mask=begins)
    wrong = (step < 0) | (step > 255) | (begins & (positions < 0))
    tl.store(flag, 1, mask=tl.max(wrong.to(tl.int32), 0) > 0)


@triton.jit(do_not_specialize=[*COUNTS, *ROOMS, "start", "order_row"])
def _encode_kernel(
    keys, values, order, frame, table, flags,
    segments,  # of each tier, exact ones first: keys, their scales, values, their scales, positions
    count0, count1, count2, count3, count4, count5,
    room0, room1, room2, room3, room4, room5,  # tokens from row to row
    start, heads, order_row,
    key_batch, key_head, key_token, value_batch, value_head, value_token,
    KEY_DIM: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    BITS: tl.constexpr,  # of each tier
    PLACES: tl.constexpr,  # of each tier, how its positions are stored: "plain", "packed" or "none"
    ZEROS: tl.constexpr,  # scales have a zero beside them
    WIDTHS: tl.constexpr,  # of those that are coded
    HADAMARD: tl.constexpr, FRAME: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of tokens of all tiers x batch x heads, keys and values."""
    counts = (count0, count1, count2, count3, count4, count5)
    rooms = (room0, room1, room2, room3, room4, room5)
    all_blocks = 0
    for i in tl.static_range(len(BITS)):
        all_blocks += tl.cdiv(tl.cdiv(counts[i], TILE) * TILE, TOKENS)
    left = tl.program_id(0) % all_blocks
    row = (tl.program_id(0) // all_blocks).to(tl.int64)
    batch, head = row // heads, row % heads
    of_keys = tl.program_id(1) == 0

    # Which tier the program serves, and which of its blocks.
    tier, block, n, room, bits, before, behind = 0, 0, 0, 0, 0, 0, 0
    for i in tl.static_range(len(BITS)):
        blocks = tl.cdiv(tl.cdiv(counts[i], TILE) * TILE, TOKENS)
        here = (left >= 0) & (left < blocks)
        tier = tl.where(here, i, tier)
        bits = tl.where(here, BITS[i], bits)
        block = tl.where(here, left, block)
        n = tl.where(here, counts[i], n)
        room = tl.where(here, rooms[i], room)
        before = tl.where(here, behind, before)
        left -= blocks
        behind += counts[i]

    order += row * order_row + before
    token = block * TOKENS + tl.arange(0, TOKENS)
    inside = token < n
    source = token
    at = token
    if (table is not None) | (start is not None):
        at = tl.load(order + token, mask=inside, other=0 if start is None else start)
    if start is not None:
        source = at - start
    there = row * room + token
    x_keys = keys + batch * key_batch + head * key_head + source.to(tl.int64)[:, None] * key_token
    x_values = values + batch * value_batch + head * value_head + source.to(tl.int64)[:, None] * value_token
    for i in tl.static_range(len(BITS)):
        if (tier == i) & of_keys:
            if PLACES[i] == "plain":
                tl.store(segments[i][4] + there, at, mask=inside)
            elif PLACES[i] == "packed":
                packed = segments[i][4] + row * tl.cdiv(n, TILE) * (START + TILE)
                _pack_positions(order, at, packed, flags + (1 + i), token, inside, n)
        if BITS[i] == 16:  # noqa: SIM102  # one condition is for the compiler, the other for the device
            if tier == i:
                if of_keys:
                    copy_rows(x_keys, segments[i][0], there, inside, KEY_DIM, KEY_WIDTH)
                else:
                    copy_rows(x_values, segments[i][2], there, inside, VALUE_DIM, VALUE_WIDTH)
    if len(WIDTHS):
        # The coded tiers run the same code; only where they store to is theirs.
        FIRST: tl.constexpr = len(BITS) - len(WIDTHS)
        _, key_scales, _, value_scales, _ = segments[FIRST]
        key_codes, value_codes = segments[FIRST][0], segments[FIRST][2]
        for i in tl.static_range(FIRST + 1, len(BITS)):
            key_codes = tl.where(tier == i, segments[i][0], key_codes)
            key_scales = tl.where(tier == i, segments[i][1], key_scales)
            value_codes = tl.where(tier == i, segments[i][2], value_codes)
            value_scales = tl.where(tier == i, segments[i][3], value_scales)
        FITTED: tl.constexpr = FRAME > KEY_DIM
        if frame is not None:
            frame += row * FRAME
        if bits < 16:
            if of_keys:
                gone = encode_rows(
                    x_keys, inside, at, frame, frame + KEY_DIM if FITTED else None, table, key_codes, key_scales,
                    key_scales + 1 if ZEROS else None, there, bits,
                    KEY_DIM, KEY_WIDTH, WIDTHS, HADAMARD, PAIRS, INTERLEAVED, True,
                )  # fmt: skip
            else:
                gone = encode_rows(
                    x_values, inside, at, frame + 2 * KEY_DIM if FITTED else None,
                    frame + (2 * KEY_DIM + VALUE_DIM) if FITTED else None, None, value_codes, value_scales,
                    value_scales + 1 if ZEROS else None, there, bits,
                    VALUE_DIM, VALUE_WIDTH, WIDTHS, HADAMARD, 0, False, False,
                )  # fmt: skip
            if flags is not None:
                tl.store(flags, 1, mask=tl.max((gone & inside).to(tl.int32), 0) > 0)


def encode(
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    bits: int,
    codec: Codec,
    frame: torch.Tensor | None,
    rotary: Rotary,
    start: int | None = None,
) -> tuple[Quantized, Quantized]:
    """As `codec.encode`. Reads the tokens once."""
    if bits < codec.least_bits or not fits(rotary, bits, keys, values):
        return twin.encode(keys, values, positions, bits, codec, frame, rotary, start)
    k, v = (_codes(positions.shape, side.shape[-1], bits, codec.affine, side.device) for side in (keys, values))
    where = Segment(bits, k, v, positions)  # the last is not written to
    positions = positions.contiguous()
    counts = [positions.shape[-1]]
    _store(keys, values, positions, counts, [where], counts, ("none",), codec, frame, rotary, start, None)
    return k, v


def encode_tiers(
    keys: torch.Tensor,
    values: torch.Tensor,
    order: torch.Tensor,
    counts: Sequence[int],
    bits: Sequence[int],
    codec: Codec,
    frame: torch.Tensor | None,
    rotary: Rotary,
    start: int,
    flags: torch.Tensor,
    out: Sequence[Segment | None],
    packs: Sequence[bool],
) -> list[Segment]:
    """As `codec.encode_tiers`, in one launch."""
    rooms = [n if there is None else rows_apart(there) for n, there in zip(counts, out, strict=True)]
    known = keys.dtype == values.dtype and None not in rooms and min(bits, default=16) >= codec.least_bits
    if not known or not _known(rotary, tuple(bits), keys.shape[-1], values.shape[-1], keys.dtype):
        return twin.encode_tiers(
            keys, values, order, counts, bits, codec, frame, rotary, start, flags, out, packs
        )  # fmt: skip
    dims, segments = (keys.shape[-1], values.shape[-1]), []
    rows, dtype, affine, device = order.shape[:2], keys.dtype, codec.affine, order.device
    for width, count, there, packed in zip(bits, counts, out, packs, strict=True):
        if there is None:
            make = _room if count else _nothing
            there = make((*rows, count), width, dims, dtype, affine, packed, device)
        segments.append(there)
    if sum(counts):
        stored = tuple(["packed" if packed else "plain" for packed in packs])
        _store(keys, values, order, counts, segments, rooms, stored, codec, frame, rotary, start, flags)
    return segments


@functools.lru_cache(maxsize=64)
def _known(rotary: Rotary, bits: tuple[int, ...], key_dim: int, value_dim: int, dtype: torch.dtype) -> bool:
    """Whether one launch can store tiers of these widths."""
    sides = [torch.empty(0, dim, dtype=dtype, device="meta") for dim in (key_dim, value_dim)]
    return all(fits(rotary, b, *sides) for b in {8, *bits} - {16}) and len(bits) <= TIERS and 16 not in bits[1:]


def _codes(
    rows: tuple[int, ...], dim: int, bits: int, affine: tuple[int, torch.dtype], device: torch.device
) -> Quantized:
    """Room for codes of vectors of `dim` channels, in `[batch, kv_heads, tokens]`."""
    numbers, dtype = affine
    codes = torch.empty(*rows, dim * bits // 8, dtype=torch.uint8, device=device)
    return Quantized(codes, torch.empty(*rows, numbers, dtype=dtype, device=device))


def _room(
    rows: tuple[int, ...],
    bits: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    affine: tuple[int, torch.dtype],
    packed: bool,
    device: torch.device,
) -> Segment:
    """Room for tokens of a tier, in `[batch, kv_heads, tokens]`.

    Args:
        dims, dtype: Of exact keys and values.
        affine: As `Codec.affine`.
        packed: Positions are.
    """
    k, v = [
        torch.empty(*rows, dim, dtype=dtype, device=device) if bits == 16 else _codes(rows, dim, bits, affine, device)
        for dim in dims
    ]
    if packed:
        tiles = cdiv(rows[-1], segment.TILE)
        places = torch.empty(*rows[:-1], tiles, segment.START + segment.TILE, dtype=torch.uint8, device=device)
    else:
        places = torch.empty(*rows, dtype=torch.int32, device=device)
    return Segment(bits, k, v, places)


_nothing = keep(64)(_room)
"""For tiers that take no tokens, of which every layer of a plan has some."""


def _store(
    keys: torch.Tensor,
    values: torch.Tensor,
    order: torch.Tensor,
    counts: Sequence[int],
    segments: Sequence[Segment],
    rooms: Sequence[int | None],
    places: tuple[str, ...],
    codec: Codec,
    frame: torch.Tensor | None,
    rotary: Rotary,
    start: int | None,
    flags: torch.Tensor | None,
) -> None:
    """Store tokens in segments; arguments as the kernel's and those of `encode_tiers`."""
    keys, values, order = contiguous_rows(keys), contiguous_rows(values), order.contiguous()
    frame = None if frame is None else frame.contiguous()
    launches = _launches(
        tuple(keys.shape), values.shape[-1], (*keys.stride()[:3], *values.stride()[:3]), (keys.dtype, values.dtype),
        order.shape[-1], tuple(counts), tuple(rooms), tuple([s.bits for s in segments]), places, codec,
        frame_numbers(frame), rotary, start, flags is None,
    )  # fmt: skip
    table = turns(rotary, keys.device) if frame is not None and rotary.inv_freq else None
    tensors = tuple(map(_targets, segments))
    addresses = tuple([tuple([t.data_ptr() for t in each]) for each in tensors])
    own = keys, values, order, frame, table, None if flags is None else flags.view(torch.uint8)
    known = alignments(own), tuple([tuple([address % 16 for address in each]) for each in addresses])
    with on_device(keys):
        launches([(*own, Held(tensors, addresses))], known)


@functools.lru_cache(maxsize=256)  # layers of a plan have their own counts
def _launches(
    shape: tuple[int, ...],
    value_dim: int,
    strides: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    tokens: int,
    counts: tuple[int, ...],
    rooms: tuple[int | None, ...],
    bits: tuple[int, ...],
    places: tuple[str, ...],
    codec: Codec,
    numbers: int,
    rotary: Rotary,
    start: int | None,
    unflagged: bool,
) -> Series:
    """The launch of `_store`.

    Args:
        shape, value_dim, strides, dtypes: Of keys and values.
        tokens: In a row of `order`.
        numbers: Of a row's frame.
        unflagged: There are no flags.
    """
    batch, heads, _, key_dim = shape
    sizes = widths_of(key_dim, value_dim)
    blocks = sum(cdiv(cdiv(n, segment.TILE) * segment.TILE, sizes["TOKENS"]) for n in counts)
    none = [0] * (TIERS - len(counts))
    lengths = {
        **dict(zip(COUNTS, (*counts, *none), strict=True)),
        **dict(zip(ROOMS, (*rooms, *none), strict=True)),
        "start": start,
        "heads": heads,
        "order_row": tokens,
        **strides_of("key", strides[:3]),
        **strides_of("value", strides[3:]),
    }
    modes = {
        "BITS": bits,
        "PLACES": places,
        "ZEROS": codec.affine[0] == 2,
        "WIDTHS": tuple(width for width in bits if width < 16),
        "HADAMARD": codec.hadamard,
        "FRAME": numbers,
        "PAIRS": len(rotary.inv_freq) if numbers else 0,
        "INTERLEAVED": rotary.interleaved,
    }
    tensors = ("keys", "values", "order", "frame", "table", "flags", "segments")
    launcher = Launcher(_encode_kernel, {**sizes, **modes})
    return Series([(launcher, (blocks * batch * heads, 2, 1), tensors, lengths)])


def _targets(segment: Segment) -> tuple[torch.Tensor, ...]:
    """Tensors of a segment as the kernel takes them; exact tokens stand in the place of the scales that they lack."""
    _, keys, values, positions = segment
    if isinstance(keys, torch.Tensor):
        return keys, keys, values, values, positions
    return (*keys, *values, positions)


def rows_apart(segment: Segment) -> int | None:
    """How many tokens the rows of a segment are apart from one another, the same in all its tensors; None where rows
    are not in order, or tokens not beside one another."""
    return _rows_apart(tuple([(tuple(tensor.shape), tensor.stride()) for tensor in segment.tensors()]))


@functools.lru_cache(maxsize=256)
def _rows_apart(laid_out: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]) -> int | None:
    """`rows_apart` by the tensors' shapes and strides."""
    rooms = set()
    for shape, strides in laid_out:
        numbers = shape[3] if len(shape) == 4 else 1
        room, rest = divmod(strides[1], numbers)
        beside = (strides[2] == numbers or shape[2] == 1) and (strides[-1] == 1 or numbers == 1)
        ordered = strides[0] == shape[1] * strides[1] or shape[0] == 1
        rooms.add(room if beside and ordered and not rest else None)
    return rooms.pop() if len(rooms) == 1 else None
