"""Triton twins of `codec.reference`: what writes codes."""

# mypy: allow-untyped-defs

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .. import segment
from ..backend.launch_triton import Held, cdiv, launch, on_device, strides_of
from ..rotation.rotary import Rotary
from ..rotation.triton_hadamard import hadamard, join_quarters
from ..rotation.triton_rotary import rotated_mean
from ..segment import Segment, contiguous_rows
from . import reference as twin
from .quantize import Quantized
from .reference import Codec
from .triton_codec import fits, frame_numbers, load_scale, rotation_of, widths_of
from .triton_quantize import store_codes

TIERS = 5
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
    x, inside, positions, mean, scale, table, codes, scales, zeros, places,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, HADAMARD: tl.constexpr,
    PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Quantise the keys or values that begin at `x`, `[tokens, 1]`, and store them in `places`, where `inside`.

    Args:
        mean, scale: Of the frame, or None. `EACH` channel has a scale, or all of them share one.

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
    return store_codes(hadamard(y, BLOCK), codes, scales, zeros, places, inside, BLOCK**-0.5, DIM, BITS)


@triton.jit
def _encode_tokens(
    x, stride, source, positions, mean, scale, table, codes, scales, flags, places, inside,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, ZEROS: tl.constexpr, HADAMARD: tl.constexpr,
    PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Store the keys or values `source` of one row, which begins at `x`, in these places; exact ones are copied.

    The first flag becomes 1 where no code stands for one of them.
    """
    x += source.to(tl.int64)[:, None] * stride
    if BITS == 16:
        channels = tl.arange(0, WIDTH)
        there = inside[:, None] & (channels < DIM)[None, :]
        exact = tl.load(x + channels[None, :], mask=there, other=0.0)
        tl.store(codes + places[:, None] * DIM + channels[None, :], exact, mask=there)
    else:
        zeros = scales + 1 if ZEROS else None
        gone = encode_rows(
            x, inside, positions, mean, scale, table, codes, scales, zeros, places,
            DIM, WIDTH, BITS, HADAMARD, PAIRS, INTERLEAVED, EACH,
        )  # fmt: skip
        if flags is not None:
            tl.store(flags, 1, mask=tl.max((gone & inside).to(tl.int32), 0) > 0)


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
    segments,  # of each tier: keys, their scales, values, their scales, positions
    count0, count1, count2, count3, count4,
    room0, room1, room2, room3, room4,  # tokens from row to row
    start, heads, order_row,
    key_batch, key_head, key_token, value_batch, value_head, value_token,
    KEY_DIM: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    BITS: tl.constexpr,  # of each tier
    PLACES: tl.constexpr,  # of each tier, how its positions are stored: "plain", "packed" or "none"
    ZEROS: tl.constexpr,  # scales have a zero beside them
    HADAMARD: tl.constexpr, FRAME: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of tokens of all tiers x batch x heads, keys and values."""
    counts = (count0, count1, count2, count3, count4)
    rooms = (room0, room1, room2, room3, room4)
    all_blocks = 0
    for i in tl.static_range(len(BITS)):
        all_blocks += tl.cdiv(tl.cdiv(counts[i], TILE) * TILE, TOKENS)
    block = tl.program_id(0) % all_blocks
    row = (tl.program_id(0) // all_blocks).to(tl.int64)
    batch, head = row // heads, row % heads
    order += row * order_row
    if frame is not None:
        frame += row * FRAME
    FITTED: tl.constexpr = FRAME > KEY_DIM
    for i in tl.static_range(len(BITS)):
        n = counts[i]
        blocks = tl.cdiv(tl.cdiv(n, TILE) * TILE, TOKENS)
        if (block >= 0) & (block < blocks):
            key_codes, key_scales, value_codes, value_scales, places = segments[i]
            token = block * TOKENS + tl.arange(0, TOKENS)
            inside = token < n
            source = token
            at = token
            if (table is not None) | (start is not None) | (PLACES[i] != "none"):
                at = tl.load(order + token, mask=inside, other=0 if start is None else start)
            if start is not None:
                source = at - start
            there = row * rooms[i] + token
            if tl.program_id(1) == 0:
                if PLACES[i] == "plain":
                    tl.store(places + there, at, mask=inside)
                elif PLACES[i] == "packed":
                    packed = places + row * tl.cdiv(n, TILE) * (START + TILE)
                    _pack_positions(order, at, packed, flags + (1 + i), token, inside, n)
                _encode_tokens(
                    keys + batch * key_batch + head * key_head, key_token, source, at, frame,
                    frame + KEY_DIM if FITTED else None, table, key_codes, key_scales, flags, there, inside,
                    KEY_DIM, KEY_WIDTH, BITS[i], ZEROS, HADAMARD, PAIRS, INTERLEAVED, True,
                )  # fmt: skip
            else:
                _encode_tokens(
                    values + batch * value_batch + head * value_head, value_token, source, at,
                    frame + 2 * KEY_DIM if FITTED else None, frame + (2 * KEY_DIM + VALUE_DIM) if FITTED else None,
                    None, value_codes, value_scales, flags, there, inside,
                    VALUE_DIM, VALUE_WIDTH, BITS[i], ZEROS, HADAMARD, 0, False, False,
                )  # fmt: skip
        block -= blocks
        order += n


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
    if not fits(rotary, bits, keys, values):
        return twin.encode(keys, values, positions, bits, codec, frame, rotary, start)
    k, v = (_codes(positions.shape, side, bits, codec) for side in (keys, values))
    where = Segment(bits, k, v, positions)  # the last is not written to
    positions = positions.contiguous()
    _store(keys, values, positions, [positions.shape[-1]], [where], ["none"], codec, frame, rotary, start, None)
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
    rooms = [there is None or rows_apart(there) is not None for there in out]
    known = keys.dtype == values.dtype and all(fits(rotary, width, keys, values) for width in {8, *bits} - {16})
    if not known or len(bits) > TIERS or not all(rooms):
        return twin.encode_tiers(
            keys, values, order, counts, bits, codec, frame, rotary, start, flags, out, packs
        )  # fmt: skip
    segments = []
    for width, count, there, packed in zip(bits, counts, out, packs, strict=True):
        if there is None:
            shape = (cdiv(count, segment.TILE), segment.START + segment.TILE) if packed else (count,)
            kind = torch.uint8 if packed else torch.int32
            places = torch.empty(*order.shape[:2], *shape, dtype=kind, device=order.device)
            rows = *order.shape[:2], count
            k, v = (
                side.new_empty(*rows, side.shape[3]) if width == 16 else _codes(rows, side, width, codec)
                for side in (keys, values)
            )
            there = Segment(width, k, v, places)
        segments.append(there)
    if sum(counts):
        stored = ["packed" if packed else "plain" for packed in packs]
        _store(keys, values, order, counts, segments, stored, codec, frame, rotary, start, flags)
    return segments


def _codes(rows: tuple[int, ...], like: torch.Tensor, bits: int, codec: Codec) -> Quantized:
    """Room for codes of vectors like these, in `[batch, kv_heads, tokens]`."""
    numbers, dtype = codec.affine
    codes = torch.empty(*rows, like.shape[-1] * bits // 8, dtype=torch.uint8, device=like.device)
    return Quantized(codes, torch.empty(*rows, numbers, dtype=dtype, device=like.device))


def _store(
    keys: torch.Tensor,
    values: torch.Tensor,
    order: torch.Tensor,
    counts: Sequence[int],
    segments: Sequence[Segment],
    places: Sequence[str],
    codec: Codec,
    frame: torch.Tensor | None,
    rotary: Rotary,
    start: int | None,
    flags: torch.Tensor | None,
) -> None:
    """Store tokens in segments; arguments as the kernel's and those of `encode_tiers`."""
    batch, heads, tokens = order.shape
    keys, values = contiguous_rows(keys), contiguous_rows(values)
    table, rotation = rotation_of(rotary, frame is not None, keys.device)
    sizes = widths_of(keys.shape[-1], values.shape[-1])
    tensors = tuple(map(_targets, segments))
    blocks = sum(cdiv(cdiv(n, segment.TILE) * segment.TILE, sizes["TOKENS"]) for n in counts)
    rooms = [rows_apart(s) if how == "plain" else n for s, n, how in zip(segments, counts, places, strict=True)]
    none = [0] * (TIERS - len(counts))
    numbers = {
        **dict(zip(COUNTS, (*counts, *none), strict=True)),
        **dict(zip(ROOMS, (*rooms, *none), strict=True)),
        "start": start,
        "heads": heads,
        "order_row": tokens,
        **strides_of("key", keys.stride()[:3]),
        **strides_of("value", values.stride()[:3]),
    }
    modes = {
        "BITS": tuple(s.bits for s in segments),
        "PLACES": tuple(places),
        "ZEROS": codec.affine[0] == 2,
        "HADAMARD": codec.hadamard,
        "FRAME": frame_numbers(frame),
    }
    with on_device(keys):
        launch(
            _encode_kernel,
            (blocks * batch * heads, 2),
            {
                "keys": keys,
                "values": values,
                "order": order.contiguous(),
                "frame": None if frame is None else frame.contiguous(),
                "table": table,
                "flags": None if flags is None else flags.view(torch.uint8),
                "segments": Held(tensors, tuple(tuple(t.data_ptr() for t in each) for each in tensors)),
            },
            numbers,
            {**sizes, **modes, **rotation},
        )


def _targets(segment: Segment) -> tuple[torch.Tensor, ...]:
    """Tensors of a segment as the kernel takes them; exact tokens stand in the place of the scales that they lack."""
    sides = ((s, s) if isinstance(s, torch.Tensor) else s for s in (segment.keys, segment.values))
    return (*(tensor for side in sides for tensor in side), segment.positions)


def rows_apart(segment: Segment) -> int | None:
    """How many tokens the rows of a segment are apart from one another, the same in all its tensors; None where rows
    are not in order, or tokens not beside one another."""
    rooms = set()
    for tensor in segment.tensors():
        tensor = tensor.unsqueeze(-1) if tensor.dim() == 3 else tensor
        (_, heads, _, numbers), (batch, head, token, number) = tensor.shape, tensor.stride()
        room, rest = divmod(head, numbers)
        beside = (token == numbers or tensor.shape[2] == 1) and (number == 1 or numbers == 1)
        rooms.add(room if beside and not rest and (batch == heads * head or tensor.shape[0] == 1) else None)
    return rooms.pop() if len(rooms) == 1 else None
