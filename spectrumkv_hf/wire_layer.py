"""One layer of a cache as metadata and tensors, and back."""

import functools
from typing import Any

import numpy as np
import torch

from spectrumkv_hf.layer import DTYPES, SlidingSpectrumLayer, SpectrumLayer
from spectrumkv_hf.policy import DROPPED, TIERS, Tier
from spectrumkv_hf.store import Arena, TieredStore
from spectrumkv_hf.wire_frame import WireError
from spectrumkv_hf.wire_payload import Checks, Fields, Parts, Tensors
from spectrumkv_hf.wire_stock import STOCK, decode_stock, encode_stock
from spectrumkv_kernels import Quantized

TIER_BY_BITS = {tier.bits: tier for tier in TIERS if tier != DROPPED}
ABSENT = 3
"""Code in the tier map of a token that the layer does not hold."""


def kind_of(layer: Any) -> str:
    """The name under which a layer travels.

    Raises:
        WireError: it is of a class that doesn't.
    """
    name = type(layer).__name__
    if isinstance(layer, SpectrumLayer) or name in STOCK:
        return name
    raise WireError(
        f"layers of class {name} can't be serialised; those that can: SpectrumLayer, SlidingSpectrumLayer, "
        f"{', '.join(sorted(STOCK))}"
    )


def encode_layer(layer: Any, index: int) -> Parts:
    """Metadata and tensors of a layer, whose open tiering is finished first.

    Raises:
        WireError: the layer can't be serialised.
    """
    kind = kind_of(layer)
    try:
        metadata, tensors = _encode_tiered(layer) if isinstance(layer, SpectrumLayer) else encode_stock(layer)
    except WireError as error:
        raise WireError(f"layer {index}: {error}") from None
    return {"layer": index, "class": kind, **metadata}, tensors


def decode_layer(
    layer: Any,
    index: int,
    fields: Fields,
    tensors: dict[str, torch.Tensor],
    batch: int,
    length: int,
    later: Checks | None = None,
) -> Any:
    """Fill a fresh `layer` from what `encode_layer` made; it may be left half filled by an error.

    Args:
        layer: As the receiver's cache has built it.
        index: Its place.
        fields: The metadata.
        tensors: Kept, not copied, unless the layer writes into them.
        batch, length: What every layer of the cache has.
        later: Takes the checks of what tensors hold, to be settled by the caller; None: they are settled here.

    Raises:
        WireError: the metadata or tensors are unsound.
    """
    fields.equal("layer", index)
    fields.equal("class", kind_of(layer))
    held = Tensors(tensors, later)
    (_decode_tiered if isinstance(layer, SpectrumLayer) else decode_stock)(layer, fields, held, batch, length)
    fields.done()
    held.done()
    if later is None:
        held.checks.settle()


def _encode_tiered(layer: SpectrumLayer) -> Parts:
    window = {"window": layer.window, "record_past": getattr(layer, "record_past", False)}
    if not layer.is_initialized:
        return {"initialized": False, **window}, {}
    layer._settle()
    store = layer.store
    tensors: dict[str, torch.Tensor] = {}
    for tier, arena in store.arenas.items():
        tensors |= {f"{tier.name}.{name}": t for name, t in arena.tensors() if name != "positions"}
    tensors["tail.keys"], tensors["tail.values"] = store.tail
    if store.tail_start > store.first_kept and store.arenas:
        tensors["map"] = pack_map(_tier_codes(store, shared=layer.policy.scope != "head"))
    for name in ("mean", "pads"):
        if (tensor := getattr(store, name)) is not None:
            tensors[name] = tensor
    metadata = {
        "initialized": True,
        **window,
        "length": store.length,
        "tail_start": store.tail_start,
        "first_kept": store.first_kept,
        "drops": store.drops,
        "tiers": [tier.bits for tier in store.arenas],
    }
    return metadata, tensors


def _tier_codes(store: TieredStore, shared: bool) -> torch.Tensor:
    """Which arena holds a token, by its place, uint8 `[batch, kv_heads or 1, tokens]` from `first_kept` on."""
    size = store.tail_start - store.first_kept
    first = next(iter(store.arenas.values())).positions
    codes = torch.full((*first.shape[:2], 1 + size), ABSENT, dtype=torch.uint8, device=first.device)
    for code, arena in enumerate(store.arenas.values()):
        # What is not a place of the map goes into the first column.
        codes.scatter_(2, (arena.positions - (store.first_kept - 1)).clamp_(min=0).long(), code)
    codes = codes[..., 1:]
    if shared and bool((codes == codes[:, :1]).all()):
        codes = codes[:, :1]
    return codes


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


@functools.lru_cache(maxsize=8)
def _codes_of_bytes(device: torch.device) -> torch.Tensor:
    """The four codes of each byte, as the bytes of an int32 `[256]`."""
    byte = torch.arange(256, dtype=torch.int32)
    return (byte & 3 | (byte & 12) << 6 | (byte & 48) << 12 | (byte & 192) << 18).to(device)


def read_map(held: Tensors, name: str, rows: tuple[int, int | None], size: int) -> torch.Tensor:
    """The codes of a packed tier map of `size` tokens, uint8 `[*rows, size]`; its padding is refused unless it is 0."""
    codes = unpack_map(held.take(name, (*rows, -(-size // 4)), torch.uint8))
    if size % 4:
        held.checks.refuse(codes[..., size:] != 0, "bits after the tier map's last token are not 0")
    return codes[..., :size]


def _decode_tiered(layer: SpectrumLayer, fields: Fields, held: Tensors, batch: int, length: int) -> None:
    window = fields.take("window", int, type(None))
    if window != layer.window:
        raise WireError(f"a window of {window}, where the config has {layer.window}")
    record_past = fields.take("record_past", bool)
    if record_past and not isinstance(layer, SlidingSpectrumLayer):
        raise WireError("a layer without a window records no past")
    if not fields.take("initialized", bool):
        return
    fields.equal("length", length)
    tail_start = fields.integer("tail_start", 0, length)
    first_kept = fields.integer("first_kept", 0, tail_start)
    if first_kept and first_kept > (length - window + 1 if window else 0):
        raise WireError(f"tokens before {first_kept} are gone, which the next query will see")
    drops = fields.take("drops", bool)
    tiers = _tiers(fields)
    lossless, codec = layer.policy.lossless, layer.codec
    if lossless and (tiers or drops or tail_start):
        raise WireError("a lossless policy keeps no tiers")

    tail = (batch, None, length - tail_start, None)
    keys = held.take("tail.keys", tail, *DTYPES)
    heads, key_dim = keys.shape[1], keys.shape[3]
    values = held.take("tail.values", (batch, heads, length - tail_start, None), *DTYPES)
    value_dim = values.shape[3]
    if not lossless and (key_dim % 2 or value_dim % 2):
        raise WireError(f"head_dim must be even, got {key_dim} for keys and {value_dim} for values")
    if not heads or not value_dim or key_dim < max(2 * len(layer.rotary.inv_freq), 1):
        raise WireError(f"{heads} KV heads, {key_dim} channels in keys and {value_dim} in values, not this model's")

    layer.lazy_initialization(keys[:, :, :0], values[:, :, :0])
    store = layer.store
    store.adopt_tail(keys, values)
    store.length, store.tail_start, store.first_kept, store.drops = length, tail_start, first_kept, drops
    if isinstance(layer, SlidingSpectrumLayer):
        layer.record_past = record_past
    sides: dict[Tier, tuple[Any, Any]] = {}
    for tier in tiers:
        n = None
        both = []
        for name, like in (("keys", keys), ("values", values)):
            side, n = read_side(held, f"{tier.name}.{name}", tier, like, n, codec.symmetric)
            both.append(side)
        sides[tier] = (both[0], both[1])
    positions = _positions(held, layer, tail_start - first_kept, first_kept, heads, [s[0] for s in sides.values()])
    for (tier, (k, v)), where in zip(sides.items(), positions, strict=True):
        store.arenas[tier] = Arena(tier, k, v, where)
    if "mean" in held or (codec.center and any(tier.bits < 16 for tier in tiers)):
        if not codec.center:
            raise WireError(f"codec {codec.name!r} has no mean")
        store.mean = held.floats("mean", (batch, heads, key_dim), torch.float32)
    if "pads" in held:
        store.pads = held.take("pads", (batch,), torch.int64)
        if batch:
            for number in store.pads.aminmax():
                held.checks.expect(number, lambda n: 0 <= n <= length, f"paddings are not from 0 to {length}")


def _tiers(fields: Fields) -> list[Tier]:
    bits = fields.take("tiers", list)
    known = [tier.bits for tier in TIERS if tier.bits in TIER_BY_BITS]
    if not all(type(n) is int for n in bits) or bits != [n for n in known if n in bits]:
        raise WireError(f"tiers are some of {known} in this order, got {str(bits)[:80]}")
    return [TIER_BY_BITS[n] for n in bits]


def read_side(
    held: Tensors, name: str, tier: Tier, like: torch.Tensor, size: int | None, symmetric: bool
) -> tuple[torch.Tensor | Quantized, int]:
    """Keys or values of an arena of `size` tokens, for a tail `like`, and that size."""
    batch, heads, _, dim = like.shape
    if tier.bits == 16:
        exact = held.take(name, (batch, heads, size, dim), like.dtype)
        return exact, exact.shape[2]
    codes = held.take(f"{name}.codes", (batch, heads, size, dim * tier.bits // 8), torch.uint8)
    affine = held.floats(f"{name}.affine", (*codes.shape[:3], 1 if symmetric else 2), torch.float16)
    if affine.numel():
        message = f"tensor {name + '.affine'!r} has scales below 0"
        if symmetric:
            held.checks.expect(affine.amin(), lambda least: least >= 0, message)
        else:  # a scale is the lower half of a word; its bits are above those of -0 where it is negative
            words = (affine.clone() if affine.data_ptr() % 4 else affine).view(torch.int32)
            held.checks.expect((words & 0xFFFF).amax(), lambda bits: bits <= 0x8000, message)
    return Quantized(codes, affine), codes.shape[2]


def _positions(
    held: Tensors, layer: SpectrumLayer, size: int, start: int, heads: int, sides: list[torch.Tensor | Quantized]
) -> list[torch.Tensor]:
    """Positions of each arena's tokens, int32 `[batch, kv_heads, tokens]`, from the tier map."""
    store = layer.store
    batch = store.batch_size
    if not sides or not size:
        if sides:
            raise WireError("tiers without tokens")
        if size and batch and not store.drops:
            raise WireError(f"{size} tokens before the tail have no tier")
        return []
    codes = read_map(held, "map", (batch, None), size)
    if codes.shape[1] not in (1, heads):
        raise WireError(f"the tier map is for {codes.shape[1]} heads; the layer has {heads}")
    sizes = [(side.codes if isinstance(side, Quantized) else side).shape[2] for side in sides]
    if codes.is_cpu:  # NumPy takes a tenth of PyTorch's time to compare bytes
        seen = [torch.from_numpy(codes.numpy() == code) for code in range(len(sides))]
        counts = [mask.sum(-1) for mask in seen]
    else:
        seen = [(codes == code).cumsum(-1) for code in range(len(sides))]
        counts = [ranks[..., -1] for ranks in seen]
    checks = held.checks
    if batch:
        if len(sides) < ABSENT or not store.drops:  # else every code is one
            known = sum(counts[1:], counts[0]) + ((codes == ABSENT).sum(-1) if store.drops else 0)
            checks.expect(known.amin(), lambda least: least == size, "tokens of the tier map are in no tier")
        for n, count in zip(sizes, counts, strict=True):
            _check_count(layer.store, checks, count, n)
    if codes.is_cpu:
        checks.settle()  # what follows relies on them
    find = _find if codes.is_cpu else _find_unseen
    found = [find(tokens, count, n, start) for n, tokens, count in zip(sizes, seen, counts, strict=True)]
    return [positions.expand(-1, heads, -1).contiguous() for positions in found]


def _check_count(store: TieredStore, checks: Checks, count: torch.Tensor, size: int) -> None:
    """Refuse more than `size` tokens in a row of a tier; rows with fewer make the store ragged."""

    def note(least: int) -> None:
        store.ragged |= least < size

    least, most = count.aminmax()
    checks.expect(most, lambda number: number <= size, "the tier map gives a tier more tokens than it has")
    checks.ask(least, note)


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
    """`_find` of the mask whose running sum is `ranks`, for devices: the host need not know how many True there are."""
    wanted = torch.arange(1 - size, 1, device=ranks.device) + count.unsqueeze(-1)  # the first of them, the second, ...
    return (torch.searchsorted(ranks, wanted, out_int32=True) + start).masked_fill_(wanted < 1, -1)
