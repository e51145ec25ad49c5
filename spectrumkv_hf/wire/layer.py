"""One layer of a cache as metadata and tensors, and back."""

from typing import Any

import torch

from spectrumkv_hf.policy import DROPPED, TIERS, Tier
from spectrumkv_hf.tiered.layer import DTYPES, SpectrumLayer
from spectrumkv_hf.tiered.mixed_layers import CrossAttentionLayer
from spectrumkv_hf.tiered.sliding_layer import SlidingSpectrumLayer
from spectrumkv_hf.tiered.store import Arena, TieredStore
from spectrumkv_hf.wire.frame import WireError, shown
from spectrumkv_hf.wire.payload import Checks, Fields, Parts, Tensors, check_expansion
from spectrumkv_hf.wire.stock import STOCK, decode_linear, decode_stock, encode_linear, encode_stock, is_linear
from spectrumkv_kernels import Codec, Quantized, divisor, map_bits, map_width, pack_map, tier_positions

TIER_BY_BITS = {tier.bits: tier for tier in TIERS if tier != DROPPED}


def kind_of(layer: Any) -> str:
    """The name under which a layer travels.

    Raises:
        WireError: it is of a class that doesn't.
    """
    name = type(_plain(layer)).__name__
    if isinstance(layer, SpectrumLayer) or name in STOCK:
        return name
    raise WireError(
        f"layers of class {name} can't be serialised; those that can: SpectrumLayer, SlidingSpectrumLayer, "
        f"HybridSpectrumLayer, HybridSlidingSpectrumLayer, {', '.join(sorted(STOCK))}"
    )


def _plain(layer: Any) -> Any:
    """A layer as it is in a cache that grows, which is how it travels."""
    return layer.as_growing() if isinstance(layer, SlidingSpectrumLayer) else layer


def encode_layer(layer: Any, index: int) -> Parts:
    """Metadata and tensors of a layer, whose open tiering is finished first.

    Raises:
        WireError: the layer can't be serialised.
    """
    kind, layer = kind_of(layer), _plain(layer)
    try:
        metadata, tensors = _encode_tiered(layer) if isinstance(layer, SpectrumLayer) else encode_stock(layer)
        if isinstance(layer, SpectrumLayer) and is_linear(layer):
            states, more = encode_linear(layer)
            metadata, tensors = {**metadata, **states}, {**tensors, **more}
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
    held = Tensors(tensors, later)
    kind = fields.take("class", str)
    if kind == "SpectrumLayer" and isinstance(layer, CrossAttentionLayer):
        _decode_empty(fields)
    elif kind != kind_of(layer):
        raise WireError(f"field 'class' is {shown(kind)}, expected {kind_of(layer)!r}")
    elif isinstance(layer, SpectrumLayer):
        _decode_tiered(layer, fields, held, batch, length)
        if is_linear(layer):
            decode_linear(layer, fields, held, batch)
    else:
        decode_stock(layer, fields, held, batch, length)
    fields.done()
    held.done()
    if later is None:
        held.checks.settle()


def _decode_empty(fields: Fields) -> None:
    """A layer for cross-attention without tokens, as caches had it that took such layers for tiered ones."""
    fields.equal("initialized", False)
    fields.equal("window", None)
    fields.equal("record_past", False)


def _encode_tiered(layer: SpectrumLayer) -> Parts:
    window = {"window": layer.window, "record_past": getattr(layer, "record_past", False)}
    if not layer.is_initialized:
        return {"initialized": False, **window}, {}
    layer.settle()
    store = layer.store
    tensors: dict[str, torch.Tensor] = {}
    for tier, arena in store.arenas.items():
        tensors |= {f"{tier.name}.{name}": t for name, t in arena.tensors() if name != "positions"}
    tensors["tail.keys"], tensors["tail.values"] = store.tail
    if store.tail_start > store.first_kept and store.arenas:
        bits = map_bits(len(store.arenas))
        tensors["map"] = pack_map(_tier_codes(store, bits, shared=layer.policy.scope != "head"), bits)
    for name, tensor in (("mean", store.frame), ("pads", store.pads)):
        if tensor is not None:
            tensors[name] = tensor
    _check_expansion(store.tail, store.length - store.first_kept, sum(t.nbytes for t in tensors.values()))
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


def _check_expansion(tail: tuple[torch.Tensor, torch.Tensor], tokens: int, nbytes: int) -> None:
    """`check_expansion` of a layer with such a tail."""
    keys, values = tail
    rows = max(keys.shape[0], 1) * max(keys.shape[1], 1)
    check_expansion(rows, tokens, keys.shape[3] + values.shape[3], nbytes)


def _tier_codes(store: TieredStore, bits: int, shared: bool) -> torch.Tensor:
    """Which arena holds a token, by its place, uint8 `[batch, kv_heads or 1, tokens]` from `first_kept` on.

    Tokens that the layer does not hold have the largest code of `bits`.
    """
    size = store.tail_start - store.first_kept
    first = store.tail[0]
    codes = torch.full((*first.shape[:2], 1 + size), 2**bits - 1, dtype=torch.uint8, device=first.device)
    for code, arena in enumerate(store.arenas.values()):
        # What is not a place of the map goes into the first column.
        codes.scatter_(2, (arena.positions - (store.first_kept - 1)).clamp_(min=0).long(), code)
    codes = codes[..., 1:]
    if shared and bool((codes == codes[:, :1]).all()):
        codes = codes[:, :1]
    return codes


def read_map(held: Tensors, name: str, rows: tuple[int, int | None], size: int, bits: int) -> torch.Tensor:
    """A packed tier map of `size` tokens, uint8 `[*rows, map_width]`; its padding is refused unless it is 0."""
    packed = held.take(name, (*rows, map_width(size, bits)), torch.uint8)
    if used := size * bits % 8:
        held.checks.refuse(packed[..., -1] >> used != 0, "bits after the tier map's last token are not 0")
    return packed


def _decode_tiered(layer: SpectrumLayer, fields: Fields, held: Tensors, batch: int, length: int) -> None:
    window = fields.take("window", int, type(None))
    if window != layer.window:
        raise WireError(f"a window of {window}, where the config has {layer.window}")
    record_past = fields.take("record_past", bool)
    if record_past and not hasattr(layer, "record_past"):
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
    for tier in layer.policy.tiers:  # those to come, too
        check_channels("tail.keys", tier, key_dim)
        check_channels("tail.values", tier, value_dim)
    if not heads or not value_dim or key_dim < max(2 * len(layer.rotary.inv_freq), 1):
        raise WireError(f"{heads} KV heads, {key_dim} channels in keys and {value_dim} in values, not this model's")

    _check_expansion((keys, values), length - first_kept, held.nbytes)
    sides: dict[Tier, tuple[Any, Any]] = {}
    for tier in tiers:
        n = None
        both = []
        for name, like in (("keys", keys), ("values", values)):
            side, n = read_side(held, f"{tier.name}.{name}", tier, like, n, codec)
            both.append(side)
        sides[tier] = (both[0], both[1])
    stored = [keys_of_tier for keys_of_tier, _ in sides.values()]
    positions, counts = _positions(held, (batch, heads), tail_start - first_kept, first_kept, stored, drops)
    arenas = [Arena(tier, k, v, where) for (tier, (k, v)), where in zip(sides.items(), positions, strict=True)]
    coding = pads = None
    if "mean" in held or (codec.center and any(tier.bits < 16 for tier in tiers)):
        if not codec.center:
            raise WireError(f"codec {codec.name!r} has no mean")
        coding = held.frame("mean", (batch, heads), codec, key_dim, value_dim)
    if "pads" in held:
        pads = held.take("pads", (batch,), torch.int64)
        if batch:
            for number in pads.aminmax():
                held.checks.expect(number, lambda n: 0 <= n <= length, f"paddings are not from 0 to {length}")
    store = TieredStore.assemble(
        keys, values, codec, layer.rotary, length=length, arenas=arenas, tail_start=tail_start,
        first_kept=first_kept, frame=coding, pads=pads, drops=drops,
    )  # fmt: skip
    if counts is not None:
        _check_counts(store, held.checks, counts, [arena.positions.shape[-1] for arena in arenas])
    layer.adopt(store)
    if record_past:
        layer.activate_past_recording()


def _tiers(fields: Fields) -> list[Tier]:
    bits = fields.take("tiers", list)
    known = [tier.bits for tier in TIERS if tier.bits in TIER_BY_BITS]
    if not all(type(n) is int for n in bits) or bits != [n for n in known if n in bits]:
        raise WireError(f"tiers are some of {known} in this order, got {shown(bits)}")
    return [TIER_BY_BITS[n] for n in bits]


def read_side(
    held: Tensors, name: str, tier: Tier, like: torch.Tensor, size: int | None, codec: Codec
) -> tuple[torch.Tensor | Quantized, int]:
    """Keys or values of an arena of `size` tokens, for a tail `like`, and that size."""
    check_channels(name, tier, like.shape[3])
    batch, heads, _, dim = like.shape
    if tier.bits == 16:
        exact = held.take(name, (batch, heads, size, dim), like.dtype)
        return exact, exact.shape[2]
    codes = held.take(f"{name}.codes", (batch, heads, size, dim * tier.bits // 8), torch.uint8)
    affine = held.affine(f"{name}.affine", codes.shape[:3], codec)
    return Quantized(codes, affine), codes.shape[2]


def check_channels(name: str, tier: Tier, channels: int) -> None:
    """Refuse channels whose codes would not fill their bytes, as a `WireError`."""
    if tier.bits < 16 and channels % divisor(tier.bits):
        raise WireError(
            f"{name} has {channels} channels; codes of {tier.bits} bits need multiples of {divisor(tier.bits)}"
        )


def _positions(
    held: Tensors, rows: tuple[int, int], size: int, start: int, sides: list[torch.Tensor | Quantized], drops: bool
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Positions of each arena's tokens, int32 `[batch, kv_heads, tokens]`, from the tier map.

    Returns:
        They, and how many tokens have each code, `[batch, kv_heads or 1, codes]`, or None where there is nothing to
        check.
    """
    batch, heads = rows
    if not sides or not size:
        if sides:
            raise WireError("tiers without tokens")
        if size and batch and not drops:
            raise WireError(f"{size} tokens before the tail have no tier")
        return [], None
    bits = map_bits(len(sides))
    packed = read_map(held, "map", (batch, None), size, bits)
    if packed.shape[1] not in (1, heads):
        raise WireError(f"the tier map is for {packed.shape[1]} heads; the layer has {heads}")
    sizes = [(side.codes if isinstance(side, Quantized) else side).shape[2] for side in sides]
    if max(sizes) > size:
        raise WireError(f"a tier of {max(sizes)} tokens, where {size} are in tiers")
    found, counts = tier_positions(packed, size, sizes, start, bits)
    positions = found if packed.shape[1] == heads else [t.expand(-1, heads, -1).contiguous() for t in found]
    return positions, counts if batch else None


def _check_counts(store: TieredStore, checks: Checks, counts: torch.Tensor, sizes: list[int]) -> None:
    """Refuse codes of no tier, and more tokens in a row of a tier than it has; with fewer the store is ragged.

    Args:
        counts: Tokens of each code, `[batch, heads, codes]`.
        sizes: Tokens of each tier.
    """
    absent = counts.shape[-1] - 1 if store.drops else counts.shape[-1]

    def known(most: list[int]) -> bool:
        return not any(most[len(sizes) : absent])

    def fits(most: list[int]) -> bool:
        return all(n <= size for n, size in zip(most, sizes, strict=False))

    def note(least: list[int]) -> None:
        if any(n < size for n, size in zip(least, sizes, strict=False)):
            store.note_ragged()

    least, most = counts.flatten(0, 1).aminmax(dim=0)
    checks.expect(most, known, "tokens of the tier map are in no tier")
    checks.expect(most, fits, "the tier map gives a tier more tokens than it has")
    checks.ask(least, note)
