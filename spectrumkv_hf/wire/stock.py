"""Layers of Transformers' own classes as metadata and tensors, and back: exact contents."""

from collections.abc import Callable
from typing import Any

import torch

from spectrumkv_hf.tiered.layer import DTYPES
from spectrumkv_hf.wire.frame import WireError, shown
from spectrumkv_hf.wire.payload import MAX_LENGTH, Fields, Parts, Tensors

ATTENTION = {
    "CrossAttentionLayer",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
}
"""Layers of Transformers with keys and values."""
LINEAR = {
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
}
"""Layers of Transformers with recurrent states."""
EMPTY = {"DummyLayer"}
STOCK = ATTENTION | LINEAR | EMPTY

STATES = ("conv_states", "recurrent_states")
FLAGS = ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state")


def encode_stock(layer: Any) -> Parts:
    name = type(layer).__name__
    metadata: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    if name in ATTENTION:
        metadata["initialized"] = bool(layer.is_initialized)
        if layer.is_initialized:
            tensors = {"keys": layer.keys, "values": layer.values}
            metadata["length"] = int(layer.get_seq_length())
    if hasattr(layer, "record_past"):
        metadata["record_past"] = bool(layer.record_past)
    if name in LINEAR:
        states, more = encode_linear(layer)
        metadata, tensors = metadata | states, tensors | more
    return metadata, tensors


def is_linear(layer: Any) -> bool:
    """Whether a layer has a linear attention's states."""
    return hasattr(layer, "recurrent_states")


def encode_linear(layer: Any) -> Parts:
    """The states of a linear attention."""
    count = layer.number_of_states
    metadata: dict[str, Any] = {"states": count, "conv_kernel_size": [layer.conv_kernel_size[i] for i in range(count)]}
    tensors: dict[str, torch.Tensor] = {}
    for flag in FLAGS:
        metadata[flag] = [bool(getattr(layer, flag)[i]) for i in range(count)]
    for side in STATES:
        tensors |= {f"{side}.{i}": t for i, t in getattr(layer, side).items() if t is not None}
    return metadata, tensors


def decode_stock(layer: Any, fields: Fields, held: Tensors, batch: int, length: int) -> None:
    name = type(layer).__name__
    if name in ATTENTION and fields.take("initialized", bool):
        if name == "CrossAttentionLayer":
            length = fields.integer("length", 0, MAX_LENGTH)  # of another sequence than the text
        else:
            fields.equal("length", length)
        keys = held.take("keys", (batch, None, None, None), *DTYPES)
        values = held.take("values", (batch, None, keys.shape[2], None), *DTYPES)
        window = getattr(layer, "sliding_window", None)
        least = length if window is None else min(length, window - 1)
        if not least <= keys.shape[2] <= length:
            raise WireError(f"keys of {keys.shape[2]} tokens; the layer has {least} to {length}")
        if batch and keys.shape[2] and not keys.numel():
            raise WireError(f"{keys.shape[1]} KV heads of {keys.shape[3]} channels for {keys.shape[2]} tokens")
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        if window is not None:
            layer.cumulative_length = length
    if hasattr(layer, "record_past"):
        layer.record_past = fields.take("record_past", bool)
    if name in LINEAR:
        decode_linear(layer, fields, held, batch)


def decode_linear(layer: Any, fields: Fields, held: Tensors, batch: int) -> None:
    """Fill the states of a linear attention from what `encode_linear` made."""
    count = layer.number_of_states
    fields.equal("states", count)

    def listed(name: str, valid: Callable[[Any], bool]) -> dict[int, Any]:
        values = fields.take(name, list)
        if len(values) != count or not all(valid(v) for v in values):
            raise WireError(f"field {name!r} is {shown(values)}, no list of {count} of its kind")
        return dict(enumerate(values))

    sizes = listed("conv_kernel_size", lambda v: v is None or (type(v) is int and 0 < v < MAX_LENGTH))
    layer.conv_kernel_size = sizes
    for flag in FLAGS:
        setattr(layer, flag, listed(flag, lambda v: type(v) is bool))
    for side, flag in zip(STATES, FLAGS, strict=False):
        for i in range(count):
            tensor_name = f"{side}.{i}"
            if (tensor_name in held) != getattr(layer, flag)[i]:
                raise WireError(f"field {flag!r} and tensor {tensor_name!r} contradict each other")
            if tensor_name not in held:
                continue
            shape = (batch, *[None] * (held.rank(tensor_name) - 1))
            state = held.take(tensor_name, shape, *DTYPES).clone()  # the layer writes into it
            getattr(layer, side)[i] = state
            if layer.device is None:
                layer.dtype, layer.device = state.dtype, state.device
