"""Blocks of tokens as one blob whose size is known beforehand, and back.

An engine shows keys, values and positions, but no queries, and often wants to know a blob's size before its contents.
So tokens are ranked by norms or position, and the policy's counts fix the size. A blob is one frame of the wire format,
see docs/wire-format.md: header and payload are checksummed, and it is refused unless it was written with the same
settings, for the same model, for tensors of the same shapes, under the same key.
"""

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spectrumkv_hf.policy import DROPPED, FP16, Policy, Tier, increments
from spectrumkv_hf.policy.importance import READS_QUERIES, importance
from spectrumkv_hf.tiered.store import Arena, TieredStore
from spectrumkv_hf.wire.frame import ALIGNMENT, Buffer, FrameHeader, Kind, WireError, as_tensor
from spectrumkv_hf.wire.layer import read_map, read_side
from spectrumkv_hf.wire.mac import check_key_id
from spectrumkv_hf.wire.payload import Payload, Tensors, read_payload
from spectrumkv_kernels import Codec, Rotary, map_bits, map_width, pack_map, tier_positions

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""Types of keys and values that can be compressed."""

Part = tuple[torch.Tensor, torch.Tensor] | torch.Tensor
"""Keys and values to compress, `[layers, kv_heads, tokens, head_dim]` each, or a tensor to copy as it is."""


@dataclass(frozen=True)
class KVSpec:
    """Shape and dtype of keys and of values that are compressed."""

    layers: int
    kv_heads: int
    tokens: int
    head_dim: int
    dtype: torch.dtype


@dataclass(frozen=True)
class RawSpec:
    """What is copied."""

    nbytes: int


Spec = KVSpec | RawSpec
Description = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shapes and dtypes of tensors by name."""


def spec_of(part: Part) -> Spec:
    """What a part looks like to someone who has not got it.

    Raises:
        ValueError: keys and values of different or unfit shapes or types.
    """
    if isinstance(part, torch.Tensor):
        return RawSpec(part.nbytes)
    keys, values = part
    if keys.shape != values.shape or keys.dtype != values.dtype or keys.dim() != 4 or keys.dtype not in FLOATS:
        raise ValueError(
            "keys and values are [layers, kv_heads, tokens, head_dim] each, of one floating-point type, got "
            f"{keys.dtype} of {tuple(keys.shape)} and {values.dtype} of {tuple(values.shape)}"
        )
    layers, kv_heads, tokens, head_dim = keys.shape
    return KVSpec(layers, kv_heads, tokens, head_dim, keys.dtype)


@dataclass(frozen=True)
class BlockCodec:
    """Compresses blocks of tokens.

    Positions count from 0 in each blob: a constant shift of them turns the mean of the keys, which the blob carries.

    Attributes:
        policy: Says how many tokens each tier takes. The first `sinks` of a blob rank first.
        codec: How a tier rounds.
        rotaries: The rotation of each layer; used in common where they are all the same, and one by one where a part
            has as many layers. Otherwise keys are centred on their plain mean.
        identity: What JSON can hold: the model and all else that changes what a blob means. Another's are refused.

    Raises:
        ValueError: a policy that reads queries, drops tokens or keeps a recent window.
    """

    policy: Policy
    codec: Codec
    rotaries: tuple[Rotary, ...] = (Rotary(),)
    identity: object = None

    def __post_init__(self) -> None:
        if self.policy.importance in READS_QUERIES and not self.policy.lossless:
            raise ValueError(
                "an engine shows no queries: importance is kv_norm, positional, recency or random, got "
                f"{self.policy.importance!r}"
            )
        if DROPPED in self.policy.counts(1 << 20):
            raise ValueError(
                f"policy {self.policy.name!r} at budget {self.policy.budget:g} drops tokens, whose place an engine "
                "would go on to attend to: choose a policy or budget that keeps all"
            )
        if self.policy.recent_window and not self.policy.lossless:
            raise ValueError(
                f"a blob may be any part of a sequence: recent_window is 0 here, got {self.policy.recent_window}"
            )

    @functools.cached_property
    def settings(self) -> str:
        """A hash of all of them."""
        return short_hash([repr(self.policy), self.codec.name, repr(self.rotaries), self.identity])

    def size(self, specs: Sequence[Spec]) -> int:
        """Bytes of the blob of such parts, exactly."""
        tensors = {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for name, (shape, dtype) in self._described(specs).items()
        }
        return Payload(self._metadata(specs, ""), tensors).frame_bytes

    def compress(self, parts: Sequence[Part], key: str = "", out: torch.Tensor | None = None) -> torch.Tensor:
        """The blob, uint8 `[size]` on the parts' device.

        Args:
            parts: Of one request or chunk; keys after RoPE.
            key: By which the blob will be asked for; it can't be restored under another.
            out: Write into this one, of just that size and aligned to 64 bytes.

        Raises:
            ValueError: keys or values that are not finite, unfit parts, or an `out` of another size.
        """
        specs = [spec_of(part) for part in parts]
        tensors: dict[str, torch.Tensor] = {}
        for index, (part, spec) in enumerate(zip(parts, specs, strict=True)):
            if isinstance(part, torch.Tensor):
                tensors[f"{index}.raw"] = part.contiguous().flatten().view(torch.uint8)
                continue
            assert isinstance(spec, KVSpec)
            for number, rotary, layers in self._stacks(spec):
                stack = self._encode(part[0][layers], part[1][layers], rotary)
                tensors |= {f"{index}.{number}.{name}": tensor for name, tensor in stack.items()}
        payload = Payload(self._metadata(specs, key), tensors)
        if out is None:
            device = next((t.device for t in tensors.values()), torch.device("cpu"))
            out = torch.empty(payload.frame_bytes, dtype=torch.uint8, device=device)
        elif len(as_tensor(out)) != payload.frame_bytes or out.data_ptr() % ALIGNMENT or out.storage_offset() % 8:
            raise ValueError(f"out is {payload.frame_bytes} bytes at a multiple of {ALIGNMENT}, got {len(out)} bytes")
        payload.write(out, Kind.BLOCKS, 0)
        return out

    def restore(self, blob: Buffer, specs: Sequence[Spec], key: str = "") -> list[Part]:
        """The parts of a blob; those that were copied as uint8 `[nbytes]`.

        Args:
            blob: All of it and nothing else.
            specs: What the parts must be.
            key: That it was written under.

        Raises:
            WireError: damage, another length, model, key, settings or shapes. Nothing of the blob is then to be used.
        """
        data = as_tensor(blob)
        header = FrameHeader.parse(data)
        check_key_id(header.key_id, None)
        if header.kind != Kind.BLOCKS or FrameHeader.SIZE + header.padded != len(data):
            raise WireError(
                f"a frame of kind {header.kind.name} and {FrameHeader.SIZE + header.padded} bytes in a buffer of "
                f"{len(data)}, expected BLOCKS that fill it"
            )
        payload = data[FrameHeader.SIZE :]
        if payload.data_ptr() % ALIGNMENT or payload.storage_offset() % 8:
            payload = payload.clone()
        fields, tensors = read_payload(header, payload)
        for name, expected in self._metadata(specs, key).items():
            fields.equal(name, expected)
        fields.done()
        held = Tensors(tensors)
        parts: list[Part] = []
        for index, spec in enumerate(specs):
            if isinstance(spec, RawSpec):
                parts.append(held.take(f"{index}.raw", (spec.nbytes,), torch.uint8))
                continue
            stacks = [
                self._decode(held, f"{index}.{number}.", spec, rotary, layers, data.device)
                for number, rotary, layers in self._stacks(spec)
            ]
            parts.append((torch.cat([k for k, _ in stacks]), torch.cat([v for _, v in stacks])))
        held.done()
        held.checks.settle()
        return parts

    # -- what the size follows from ----------------------------------------------------------------------------------

    def _metadata(self, specs: Sequence[Spec], key: str) -> dict[str, Any]:
        """Of constant length for the same specs: hashes stand for what has none."""
        described = [
            [spec.nbytes]
            if isinstance(spec, RawSpec)
            else [spec.layers, spec.kv_heads, spec.tokens, spec.head_dim, str(spec.dtype).removeprefix("torch.")]
            for spec in specs
        ]
        return {"settings": self.settings, "key": short_hash(key), "parts": described}

    def _stacks(self, spec: KVSpec) -> Iterator[tuple[int, Rotary, slice]]:
        """Neighbouring layers with one rotation: their number, it, and where they are."""
        rotaries = self.rotaries
        if len(set(rotaries)) == 1:
            rotaries = rotaries[:1] * spec.layers
        elif len(rotaries) != spec.layers:
            rotaries = (Rotary(),) * spec.layers
        if any(2 * len(rotary.inv_freq) > spec.head_dim for rotary in rotaries):  # no keys of this model
            rotaries = (Rotary(),) * spec.layers
        starts = [i for i in range(spec.layers) if i == 0 or rotaries[i] != rotaries[i - 1]]
        for number, (start, stop) in enumerate(zip(starts, [*starts[1:], spec.layers], strict=True)):
            yield number, rotaries[start], slice(start, stop)

    def _counts(self, tokens: int) -> dict[Tier, int]:
        return {tier: n for tier, n in increments(self.policy, 0, tokens).items() if n}

    def _centred(self, counts: dict[Tier, int]) -> bool:
        return self.codec.center and any(tier != FP16 for tier in counts)

    def _map_heads(self, heads: int) -> int:
        return heads if self.policy.scope == "head" else 1

    def _described(self, specs: Sequence[Spec]) -> Description:
        """Shapes and dtypes of the blob's tensors."""
        described: Description = {}
        for index, spec in enumerate(specs):
            if isinstance(spec, RawSpec):
                described[f"{index}.raw"] = (spec.nbytes,), torch.uint8
                continue
            counts = self._counts(spec.tokens)
            for number, _, layers in self._stacks(spec):
                prefix, rows = f"{index}.{number}.", (layers.stop - layers.start, spec.kv_heads)
                for tier, n in counts.items():
                    for side in (f"{prefix}{tier.name}.keys", f"{prefix}{tier.name}.values"):
                        if tier == FP16:
                            described[side] = (*rows, n, spec.head_dim), spec.dtype
                        else:
                            described[f"{side}.codes"] = (*rows, n, spec.head_dim * tier.bits // 8), torch.uint8
                            affine, kind = self.codec.affine
                            described[f"{side}.affine"] = (*rows, n, affine), kind
                if len(counts) > 1:
                    width = map_width(spec.tokens, map_bits(len(counts)))
                    described[f"{prefix}map"] = (rows[0], self._map_heads(rows[1]), width), torch.uint8
                if self._centred(counts):
                    size = self.codec.frame_size(spec.head_dim, spec.head_dim)
                    described[f"{prefix}mean"] = (*rows, size), torch.float32
        return described

    # -- layers of one rotation ---------------------------------------------------------------------------------------

    def _encode(self, keys: torch.Tensor, values: torch.Tensor, rotary: Rotary) -> dict[str, torch.Tensor]:
        """The tensors of some layers, which stand where a store has the rows of a batch."""
        tokens = keys.shape[2]
        counts = self._counts(tokens)
        score = importance(self.policy, None, keys, values, start=0, seen=tokens)
        if self.policy.scope == "token":
            score = score.mean(0, keepdim=True).expand_as(score)
        store = TieredStore.assemble(keys, values, self.codec, rotary, length=tokens)
        store.confirm(store.tier(tokens, self.policy, score))
        if {tier: len(arena) for tier, arena in store.arenas.items()} != counts:
            raise ValueError(
                "keys or values have NaN or infinity, or numbers beyond the scales of their codes: nothing stands for "
                "them"
            )
        tensors: dict[str, torch.Tensor] = {}
        codes = torch.empty(*keys.shape[:3], dtype=torch.uint8, device=keys.device)
        for code, arena in enumerate(store.arenas.values()):
            tensors |= {f"{arena.tier.name}.{name}": t for name, t in arena.tensors() if name != "positions"}
            codes.scatter_(2, arena.positions.long(), code)
        if len(counts) > 1:
            tensors["map"] = pack_map(codes[:, : self._map_heads(keys.shape[1])], map_bits(len(counts)))
        if self._centred(counts) and store.frame is not None:
            tensors["mean"] = store.frame
        return tensors

    def _decode(
        self, held: Tensors, prefix: str, spec: KVSpec, rotary: Rotary, layers: slice, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of what `_encode` made, `[layers, kv_heads, tokens, head_dim]`."""
        count, counts = layers.stop - layers.start, self._counts(spec.tokens)
        like = torch.empty(count, spec.kv_heads, 0, spec.head_dim, dtype=spec.dtype, device=device)
        sides = {
            tier: [
                read_side(held, f"{prefix}{tier.name}.{name}", tier, like, n, self.codec)[0]
                for name in ("keys", "values")
            ]
            for tier, n in counts.items()
        }
        coding = None
        if self._centred(counts):
            rows = count, spec.kv_heads
            coding = held.frame(f"{prefix}mean", rows, self.codec, spec.head_dim, spec.head_dim)
        positions = self._positions(held, prefix, spec, count, device)
        arenas = [
            Arena(tier, sides[tier][0], sides[tier][1], where) for tier, where in zip(counts, positions, strict=True)
        ]
        store = TieredStore.assemble(
            like, like, self.codec, rotary, length=spec.tokens, tail_start=spec.tokens, arenas=arenas, frame=coding
        )
        return store.dense()

    def _positions(
        self, held: Tensors, prefix: str, spec: KVSpec, layers: int, device: torch.device
    ) -> list[torch.Tensor]:
        """Where the tokens of each tier are, int32 `[layers, kv_heads, n]`."""
        sizes = list(self._counts(spec.tokens).values())
        rows = layers, self._map_heads(spec.kv_heads)
        if len(sizes) == 1:
            every = torch.arange(spec.tokens, dtype=torch.int32, device=device)
            return [every.expand(layers, spec.kv_heads, -1)]
        bits = map_bits(len(sizes))
        packed = read_map(held, f"{prefix}map", rows, spec.tokens, bits)
        positions, found = tier_positions(packed, spec.tokens, sizes, 0, bits)
        for code, n in enumerate(sizes):
            held.checks.refuse(found[..., code] != n, "the tier map has other counts than its policy")
        held.checks.settle()
        return [where.expand(-1, spec.kv_heads, -1) for where in positions]


def short_hash(value: Any) -> str:
    """32 hexadecimal digits for what JSON can hold."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
