"""Lifting tokens of a received cache to a higher tier: the receiver requests, the sender answers with a patch.

The prefill side keeps an `ExactCopy`; the decode side makes a `request`, and applies the `ExactCopy.patch` that it
gets for it.

```python
copy = ExactCopy(cache)                                       # prefill side, before the prefill
frame = request(received, layer=3, tier="fp16", source="int4")  # decode side
received.apply_patch(copy.patch(frame))
```
"""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch

from spectrumkv_hf.policy import TIERS, Tier
from spectrumkv_hf.tiered.cache import TieredCache
from spectrumkv_hf.tiered.layer import SpectrumLayer
from spectrumkv_hf.tiered.store import Arena, TieredStore, owned, take
from spectrumkv_hf.wire.frame import ALIGNMENT, Buffer, FrameHeader, Kind, WireError, as_tensor, host_bytes
from spectrumkv_hf.wire.layer import TIER_BY_BITS, check_channels, read_side
from spectrumkv_hf.wire.mac import FrameMacs
from spectrumkv_hf.wire.payload import MAX_LENGTH, Fields, Payload, Tensors, read_payload
from spectrumkv_kernels import Quantized, encode

TARGETS = {tier.name: tier for tier in TIERS if any(0 < other.bits < tier.bits for other in TIERS)}
"""Where tokens can be lifted to: the tiers above a stored one."""
TOLD = 4
"""Bytes of a token's codes by which a request knows it again: its scales alone may be of a byte each."""


def request(
    cache: TieredCache,
    layer: int,
    tier: str,
    positions: Iterable[int] | torch.Tensor | None = None,
    source: str | None = None,
    key: bytes | None = None,
) -> torch.Tensor | None:
    """The frame that asks for tokens of one layer at a higher tier.

    Args:
        cache: Of the receiver.
        layer: Index of a tiered layer.
        tier: Where the tokens are to go, one of `TARGETS`: `"fp16"`, `"int8"`, `"int4"`, `"int3"` or `"int2"`.
        positions: Slots of the tokens, in all rows and heads; None: all. Those that already lie as high are left out.
        source: Only tokens of this tier, one below `tier`; `"dropped"` for those that a policy has dropped. None: all
            tiers below.
        key: 16 to 64 bytes, by which the request gets a MAC; None: it has none.

    Returns:
        uint8 `[bytes]`, or None where there is nothing to lift.

    Raises:
        ValueError: unknown or unsuitable tiers, positions out of range, a layer that is not tiered, a key that is none.
    """
    macs, target = FrameMacs(key), _target(tier)
    sources = [t for t in TIERS if t.bits < target.bits and source in (None, t.name)]
    if not sources:
        below = ", ".join(t.name for t in TIERS if t.bits < target.bits)
        raise ValueError(f"source is a tier below {tier!r}, one of {below}; got {source!r}")
    store = _tiered(cache, layer).store
    bits = store.tier_map(store.first_kept)[..., : store.tail_start - store.first_kept]
    wanted = torch.isin(bits, torch.tensor([t.bits for t in sources], device=bits.device))
    if positions is not None:
        chosen = torch.as_tensor(positions if isinstance(positions, torch.Tensor) else list(positions))
        chosen = chosen.to(bits.device, torch.int64)
        if chosen.numel() and (int(chosen.min()) < 0 or int(chosen.max()) >= store.length):
            raise ValueError(f"positions are from 0 to {store.length - 1}, got {chosen.tolist()}")
        asked = torch.zeros(store.length, dtype=torch.bool, device=bits.device)
        asked[chosen] = True
        wanted &= asked[store.first_kept : store.tail_start]
    if not bool(wanted.any()):
        return None
    tensors = {"wanted": pack_bits(wanted)}
    if target.bits < 16 and store.frame is not None:
        tensors["mean"] = store.frame
    base = _base(store, target, torch.nn.functional.pad(wanted, (store.first_kept, 0)))
    payload = Payload(_metadata(target, store.first_kept, wanted.shape[-1], base), tensors)
    return payload.frame(Kind.REQUEST, layer=layer, macs=macs)[1]


class ExactCopy:
    """Exact keys and values of a cache's tiered layers, kept aside while the cache itself is compressed.

    It takes the memory of an uncompressed cache, until `clear`.

    Args:
        cache: Empty. All tokens that it gets from now on are kept.
    """

    def __init__(self, cache: TieredCache) -> None:
        self._layers = {i: layer for i, layer in enumerate(cache.layers) if isinstance(layer, SpectrumLayer)}
        if any(layer.get_seq_length() for layer in self._layers.values()):
            raise ValueError("the cache already holds tokens: make its ExactCopy before the prefill")
        self._held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._removers = [layer.on_update.add(self._take) for layer in self._layers.values()]

    def _take(self, index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        if index in self._held:
            old = self._held[index]
            self._held[index] = torch.cat((old[0], keys), dim=2), torch.cat((old[1], values), dim=2)
        else:
            self._held[index] = owned(keys), owned(values)

    @property
    def nbytes(self) -> int:
        """Bytes that it keeps."""
        return sum(keys.nbytes + values.nbytes for keys, values in self._held.values())

    def stop(self) -> None:
        """Keep no further tokens, those of decoding on the sender's side for instance."""
        for remove in self._removers:
            remove()

    def clear(self) -> None:
        """`stop`, and free what is kept."""
        self.stop()
        self._held.clear()

    def patch(self, frame: Buffer, key: bytes | None = None) -> torch.Tensor:
        """The patch frame that answers a request, uint8 `[bytes]`; with a key both have a MAC.

        FP16 tokens travel as they are. Others travel as whole codes, coded as the receiver's are: their scale is
        rounded by itself, so they are no refinement of lower codes by a fixed number of bits.

        Raises:
            WireError: the request is damaged, or asks for what isn't here.
            KeyRefused, one of them: there is a key and no MAC of it, or no key and a MAC.
            ValueError: the key is none.
        """
        header, fields, tensors = _read(frame, Kind.REQUEST, key)
        index, held = header.layer, Tensors(tensors)
        if index not in self._held:
            raise WireError(f"a request for layer {index}; exact tokens are here of {sorted(self._held)}")
        layer, (keys, values) = self._layers[index], self._held[index]
        batch, heads, length, dim = keys.shape
        target, start, size, base = _take_metadata(fields, length)
        wanted = _wanted(held, batch, heads, size)
        coding = None
        if layer.codec.center and target.bits < 16:
            coding = held.frame("mean", (batch, heads), layer.codec, dim, values.shape[3]).to(keys.device)
        held.done()
        check_channels("keys", target, dim)
        check_channels("values", target, values.shape[3])
        held.checks.settle()
        positions = _places(wanted.to(keys.device), start)
        sides = _encode(layer, target, keys, values, positions, coding)
        parts = {"wanted": tensors["wanted"].to(keys.device)}
        parts |= {name: t for name, t in Arena(target, *sides, positions).tensors() if name != "positions"}
        payload = Payload(_metadata(target, start, size, base), parts)
        return payload.frame(Kind.PATCH, layer=index, macs=FrameMacs(key))[1]


def apply(cache: TieredCache, frame: Buffer, key: bytes | None = None) -> None:
    """Lift the tokens of a patch; see `SpectrumCache.apply_patch`."""
    header, fields, tensors = _read(frame, Kind.PATCH, key)
    try:
        layer = _tiered(cache, header.layer)
    except ValueError as error:
        raise WireError(str(error)) from None
    store = layer.store
    held = Tensors({name: tensor.to(store.device) for name, tensor in tensors.items()})
    target, start, size, base = _take_metadata(fields, store.tail_start)
    keys, values = store.tail
    batch, heads = keys.shape[:2]
    wanted = _wanted(held, batch, heads, size)
    positions = _places(wanted, start)
    k, n = read_side(held, "keys", target, keys, positions.shape[2], layer.codec)
    v, n = read_side(held, "values", target, values, n, layer.codec)
    held.done()
    held.checks.settle()
    everywhere = torch.zeros(batch, heads, store.tail_start, dtype=torch.bool, device=store.device)
    everywhere[..., start : start + size] = wanted
    if bool(everywhere[..., : store.first_kept].any()) or base != _base(store, target, everywhere):
        raise WireError(f"layer {header.layer}: the tokens have changed since the patch was requested")
    layer.lift(everywhere, Arena(target, k, v, positions))


# -- what requests and patches share ----------------------------------------------------------------------------------


def _target(name: str) -> Tier:
    if name not in TARGETS:
        raise ValueError(f"tokens are lifted to {', '.join(TARGETS)}; got {name!r}")
    return TARGETS[name]


def _tiered(cache: TieredCache, index: int) -> SpectrumLayer:
    cache.check_whole()
    layer = cache.layers[index] if 0 <= index < len(cache.layers) else None
    if not isinstance(layer, SpectrumLayer) or not layer.is_initialized:
        raise ValueError(f"layer {index} is no tiered layer that holds tokens")
    layer.settle()
    return layer


def _metadata(target: Tier, start: int, tokens: int, base: str) -> dict[str, Any]:
    return {"tier": target.bits, "start": start, "tokens": tokens, "base": base}


def _take_metadata(fields: Fields, length: int) -> tuple[Tier, int, int, str]:
    """Target tier, first position, tokens and base digest."""
    bits = fields.integer("tier", 0, 16)
    tier = TIER_BY_BITS.get(bits)
    if tier is None or tier.name not in TARGETS:
        raise WireError(f"tokens are not lifted to {bits} bits")
    start = fields.integer("start", 0, min(length, MAX_LENGTH))
    size = fields.integer("tokens", 0, length - start)
    base = fields.take("base", str)
    fields.done()
    return tier, start, size, base


def _wanted(held: Tensors, batch: int, heads: int, size: int) -> torch.Tensor:
    """The tokens of a request or patch, bool `[batch, kv_heads, size]`."""
    bits = unpack_bits(held.take("wanted", (batch, heads, -(-size // 8)), torch.uint8))
    held.checks.refuse(bits[..., size:], "bits after the last token are not 0")
    return bits[..., :size]


def _places(wanted: torch.Tensor, start: int) -> torch.Tensor:
    """Positions of the wanted tokens, int32 `[batch, kv_heads, n]`, ascending behind -1 in rows with fewer."""
    counts = wanted.sum(-1, keepdim=True)
    n = int(counts.max()) if counts.numel() else 0
    positions = torch.full((*wanted.shape[:2], n), -1, dtype=torch.int32, device=wanted.device)
    filled = torch.arange(n, device=wanted.device) >= n - counts
    positions[filled] = (wanted.nonzero()[:, -1] + start).to(torch.int32)
    return positions


def _encode(
    layer: SpectrumLayer,
    target: Tier,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    coding: torch.Tensor | None,
) -> tuple[torch.Tensor | Quantized, torch.Tensor | Quantized]:
    index, empty = positions.clamp(min=0).long(), (positions < 0).unsqueeze(-1)
    keys, values = (take(t, index).masked_fill(empty, 0) for t in (keys, values))
    if target.bits == 16:
        return keys, values
    return encode(keys, values, positions, target.bits, layer.codec, coding, layer.rotary)


def _base(store: TieredStore, target: Tier, wanted: torch.Tensor) -> str:
    """Digest of where and what the tokens `wanted`, bool `[batch, kv_heads, tokens]` from position 0, are now.

    So a patch is refused whose tokens are others by now. Other tokens of the layer may have changed.
    """
    state = hashlib.blake2b(host_bytes(wanted.nonzero().flatten().view(torch.uint8)), digest_size=8)
    for tier, arena in store.arenas.items():
        arena = arena.unpacked()
        chosen = (arena.places >= 0) & wanted.gather(2, arena.places.clamp(min=0).long())
        if not bool(chosen.any()):
            continue
        state.update(tier.name.encode() if tier.bits < target.bits else b"there already")
        for name, tensor in arena.tensors():
            if name == "positions" or name.endswith(".affine"):
                state.update(host_bytes(tensor[chosen].view(torch.uint8)))
            elif name.endswith(".codes"):
                state.update(host_bytes(tensor[..., :TOLD][chosen]))
    return state.hexdigest()


def _read(frame: Buffer, kind: Kind, key: bytes | None) -> tuple[FrameHeader, Fields, dict[str, torch.Tensor]]:
    data, macs = as_tensor(frame), FrameMacs(key)
    header = FrameHeader.parse(data)
    if header.kind != kind:
        raise WireError(f"a frame of kind {header.kind.name}, expected {kind.name}")
    payload = data[FrameHeader.SIZE :]
    if payload.data_ptr() % ALIGNMENT or payload.storage_offset() % 8:
        payload = payload.clone()
    try:
        return header, *read_payload(header, macs.check(header, payload))
    except WireError as error:
        raise type(error)(f"{kind.name.lower()} for layer {header.layer}: {error}") from None


def pack_bits(flags: torch.Tensor) -> torch.Tensor:
    """Eight flags a byte, the first in the lowest bit: bool `[..., n]` to uint8 `[..., ceil(n / 8)]`."""
    size = flags.shape[-1]
    whole = torch.zeros(*flags.shape[:-1], -(-size // 8) * 8, dtype=torch.uint8, device=flags.device)
    whole[..., :size] = flags
    eight = whole.unflatten(-1, (-1, 8)) << torch.arange(8, dtype=torch.uint8, device=flags.device)
    return eight.sum(-1, dtype=torch.uint8)


def unpack_bits(packed: torch.Tensor) -> torch.Tensor:
    """The flags of `pack_bits`, padding included, bool `[..., 8 * bytes]`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> shifts & 1).flatten(-2).bool()
