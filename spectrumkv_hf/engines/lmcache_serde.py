"""LMCache's chunks in tiers: a serde for its multiprocess server, and the plugin that loads it. See docs/engines.md.

Importing this module registers the serde `spectrum`. LMCache has no entry point for that, but imports the module of a
`plugin` adapter before it looks up the adapter's serde: `SpectrumL2Adapter` is such a plugin, and stands for the
adapter that is wanted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple
from typing import Any

import torch
from lmcache.logging import init_logger
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.l2_adapters import create_l2_adapter
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.distributed.l2_adapters.config import get_l2_adapter_config_class
from lmcache.v1.distributed.serde.async_processor import AsyncSerdeProcessor
from lmcache.v1.distributed.serde.base import Deserializer, SerdeProcessor, Serializer
from lmcache.v1.distributed.serde.factory import get_registered_serde_types, register_serde_factory
from lmcache.v1.memory_management import MemoryObj

from spectrumkv_hf.engines.blocks import FLOATS, BlockCodec, KVSpec, Part, RawSpec, Spec
from spectrumkv_hf.engines.layouts import ChunkLayout
from spectrumkv_hf.engines.settings import block_codec, model_shape

logger = init_logger(__name__)

SERDE = "spectrum"
"""The serde's `type` in LMCache's configuration."""


class ChunkCodec:
    """Compresses the tensors of a chunk that are keys and values, and copies the others: recurrent states, MLA latents,
    integers of an engine with an FP8 cache. All of it travels under one checksum.

    Args:
        blocks: Compresses.
        layout: Says which tensors are keys and values, and where in them.
    """

    def __init__(self, blocks: BlockCodec, layout: ChunkLayout) -> None:
        self.blocks, self.layout = blocks, layout
        self._told: set[tuple[torch.Size, torch.dtype]] = set()

    def specs(self, shapes: Sequence[torch.Size], dtypes: Sequence[torch.dtype]) -> list[Spec]:
        """What becomes of tensors of these shapes."""
        return [self._spec(torch.Size(shape), dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]

    def _spec(self, shape: torch.Size, dtype: torch.dtype) -> Spec:
        layout = self.layout
        if dtype in FLOATS and layout.holds(shape):
            return KVSpec(shape[-3], layout.kv_heads, shape[-2], layout.head_dim, dtype)
        if (shape, dtype) not in self._told:
            self._told.add((shape, dtype))
            logger.warning("Not compressed: %s of shape %s is no chunk of %s", dtype, tuple(shape), layout)
        return RawSpec(shape.numel() * dtype.itemsize)

    def compress(self, chunk: MemoryObj, key: ObjectKey | None, out: torch.Tensor) -> None:
        """Write a chunk's blob into `out`, uint8 of just its size."""
        tensors = tensors_of(chunk)
        parts: list[Part] = [
            self.layout.split(tensor) if isinstance(spec, KVSpec) else tensor
            for tensor, spec in zip(tensors, self.specs(chunk.get_shapes(), chunk.get_dtypes()), strict=True)
        ]
        self.blocks.compress(parts, name_of(key), out)

    def restore(self, blob: torch.Tensor, key: ObjectKey | None, chunk: MemoryObj) -> None:
        """Fill a chunk from its blob; not touched where that is refused.

        Raises:
            WireError: as in `BlockCodec.restore`.
        """
        tensors = tensors_of(chunk)
        parts = self.blocks.restore(blob, self.specs(chunk.get_shapes(), chunk.get_dtypes()), name_of(key))
        for tensor, part in zip(tensors, parts, strict=True):
            if isinstance(part, torch.Tensor):
                tensor.copy_(part.view(tensor.dtype).view(tensor.shape))
            else:
                self.layout.merge(*part, out=tensor)


def tensors_of(chunk: MemoryObj) -> list[torch.Tensor]:
    """All tensors of a chunk; `chunk.tensor` is wrong where there is more than one.

    Raises:
        ValueError: the chunk has been freed.
    """
    tensors = [chunk.get_tensor(index) for index in range(len(chunk.get_shapes()))]
    if any(tensor is None for tensor in tensors):
        raise ValueError("a chunk without memory")
    return [tensor for tensor in tensors if tensor is not None]


def name_of(key: ObjectKey | None) -> str:
    """Everything in a key, so that a blob that lies under another is refused; LMCache up to 0.5.2 gives none."""
    if key is None:
        return ""
    return "@".join(field.hex() if isinstance(field, bytes) else str(field) for field in astuple(key))


class SpectrumSerializer(Serializer):
    """Chunk to blob. See `lmcache.v1.distributed.serde.base.Serializer`."""

    def __init__(self, codec: ChunkCodec) -> None:
        self.codec = codec

    def serialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey | None = None) -> int:
        out = _bytes_of(dst)
        self.codec.compress(src, key, out)
        return len(out)

    def estimate_serialized_size(self, layout_desc: MemoryLayoutDesc) -> int:
        """Exact: LMCache asks the storage for as many bytes as this when it loads, and takes fewer for a miss."""
        return self.codec.blocks.size(self.codec.specs(layout_desc.shapes, layout_desc.dtypes))


class SpectrumDeserializer(Deserializer):
    """Blob to chunk; what it raises becomes a miss. See `lmcache.v1.distributed.serde.base.Deserializer`."""

    def __init__(self, codec: ChunkCodec) -> None:
        self.codec = codec

    def deserialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey | None = None) -> None:
        self.codec.restore(_bytes_of(src), key, dst)


def _bytes_of(buffer: MemoryObj) -> torch.Tensor:
    if buffer.tensor is None:
        raise ValueError("a buffer without memory")
    return buffer.tensor.view(torch.uint8).flatten()


def chunk_codec(
    layout: str,
    model: str | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    tensor_parallel: int = 1,
    block_size: int | None = None,
    revision: str = "",
    **options: Any,
) -> ChunkCodec:
    """The codec of a serde's settings.

    Args:
        layout: Where the engine keeps a token, see `layouts`: `per_token` or `vllm_cpu`. There is no default, because
            the wrong one compresses scrambled keys and goes unnoticed.
        model: Folder or name of the model, of which the config is read: its heads, its rotation, its identity.
        kv_heads: KV heads in a chunk; None: the model's by `tensor_parallel`.
        head_dim: Channels of a key and of a value; None: the model's.
        tensor_parallel: Workers that share the KV heads.
        block_size: Tokens in a block of the engine, for `vllm_cpu`.
        revision: Whatever tells these weights from others of the same shape and name.
        options: As in `block_codec`: `policy`, `budget`, `codec`, `sinks`, `importance`, ...

    Raises:
        ValueError, TypeError: settings that are unknown, missing or out of range.
    """
    if type(tensor_parallel) is not int or tensor_parallel < 1:
        raise ValueError(f"tensor_parallel is a positive integer, got {tensor_parallel!r}")
    shape = model_shape(model)
    if kv_heads is None and shape.kv_heads is not None:
        kv_heads = max(shape.kv_heads // tensor_parallel, 1)
    head_dim = shape.head_dim if head_dim is None else head_dim
    if kv_heads is None or head_dim is None:
        differ = "layers of this model differ in them" if shape.identity else "nothing in a chunk says what they are"
        raise ValueError(f"give {'' if shape.identity else 'model, or '}kv_heads and head_dim: {differ}")
    where = ChunkLayout(kv_heads, head_dim, layout, block_size)
    if head_dim % 2:
        raise ValueError(f"head_dim must be even, got {head_dim}")
    return ChunkCodec(block_codec(shape, identity=[asdict(where), revision], **options), where)


def spectrum_serde(settings: Mapping[str, Any]) -> SerdeProcessor:
    """What `"serde": {"type": "spectrum", ...}` makes, of the other settings there: those of `chunk_codec` and
    `max_workers`, threads that compress."""
    options = dict(settings)
    workers = options.pop("max_workers", 1)
    if type(workers) is not int or workers < 1:
        raise ValueError(f"max_workers is a positive integer, got {workers!r}")
    if "layout" not in options:
        raise ValueError("the serde 'spectrum' needs layout: 'per_token' or 'vllm_cpu'")
    codec = chunk_codec(**options)
    return AsyncSerdeProcessor(SpectrumSerializer(codec), SpectrumDeserializer(codec), max_workers=workers)


class SpectrumL2Adapter(L2AdapterInterface):
    """Makes the adapter that its parameters describe, as `--l2-adapter` would: `{"type": "fs", "base_path": ...}`."""

    def __new__(cls, params: Mapping[str, Any], l1_memory_desc: Any = None) -> L2AdapterInterface:
        if "type" not in params:
            raise ValueError(f"adapter_params need a type, that of the adapter to use, got {dict(params)!r}")
        if "serde" in params:
            raise ValueError("serde stands beside adapter_params, not in them")
        config = get_l2_adapter_config_class(params["type"]).from_dict(dict(params))
        return create_l2_adapter(config, l1_memory_desc)


if SERDE not in get_registered_serde_types():
    register_serde_factory(SERDE, spectrum_serde)
