"""What of a model its cache depends on, so that bytes of one model are not read into another: config and weights."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedConfig, PreTrainedModel

FIELDS = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_kv_heads",
    "head_dim",
    "num_kv_shared_layers",
    "layer_types",
    "sliding_window",
    "attention_chunk_size",
    "rope_parameters",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "v_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
)


def layer_configs(config: PreTrainedConfig) -> Sequence[PreTrainedConfig]:
    """The config of each layer: the text config itself where all layers are alike."""
    if getattr(config, "is_heterogeneous", False):
        return list(config.per_layer_config)
    return [config] * config.num_hidden_layers


def model_identity(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a text config that shape its cache, as JSON has them; those that are missing or None left out.

    A field in which layers differ (Gemma-4's `head_dim`) is the list of their values. Weights are not among them: two
    models of one architecture have one identity. Nor is the dtype, which a config need not know; every tensor says its
    own.
    """
    differing = getattr(config, "per_layer_attributes", None) or ()
    layers = layer_configs(config) if differing else ()
    found = {
        name: [getattr(layer, name, None) for layer in layers] if name in differing else getattr(config, name, None)
        for name in FIELDS
    }
    return {name: _plain(value) for name, value in found.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(v) for key, v in sorted(value.items(), key=lambda item: str(item[0])) if v is not None}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, bool | int | float) else str(value)


# -- weights ----------------------------------------------------------------------------------------------------------

MOST_SAMPLES = 1 << 16
"""Samples of a tensor's rows, and of its columns, at most."""
INCIDENTAL = ("_name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype", "architectures")
"""Fields of a config that say where a model comes from, not what it computes."""


def fingerprint(model: PreTrainedModel) -> str:
    """What identifies a model: its config, and of its weights one element of every row and of every column.

    So all of a vector is in it, whatever scales or shifts a row or a column shows, and a finetune, which moves all
    weights; a change of single elements need not. Weights that are not in memory count by name and shape only.
    """
    seen = hashlib.blake2b(digest_size=16)
    config = model.config.get_text_config(decoder=True).to_dict()
    config = {key: value for key, value in config.items() if key not in INCIDENTAL}
    seen.update(json.dumps([type(model).__name__, config], sort_keys=True, default=str).encode())
    _add_weights(seen, model)
    return seen.hexdigest()


_known: "WeakKeyDictionary[torch.nn.Module, tuple[bytes, str]]" = WeakKeyDictionary()


def weights_fingerprint(model: torch.nn.Module) -> str:
    """`fingerprint` of the weights alone, 32 hex digits: adapters, dtype and quantisation included, settings not.

    It is remembered for a model object until a tensor, its version, or the first element of one changes.
    """
    with torch.no_grad():
        state = hashlib.blake2b()
        first: list[torch.Tensor] = []
        for tensor in _tensors(model):
            version = 0 if tensor.is_inference() else tensor._version
            state.update(f"{tensor.data_ptr() if tensor.device.type != 'meta' else 0} {version}".encode())
            if tensor.device.type != "meta" and tensor.numel():
                first.append(tensor.detach()[(0,) * tensor.dim()].reshape(1).view(torch.uint8))
        for device in {tensor.device for tensor in first}:
            state.update(bytes(torch.cat([t for t in first if t.device == device]).tolist()))
    signature = state.digest()
    known = _known.get(model)
    if known is None or known[0] != signature:
        seen = hashlib.blake2b(digest_size=16)
        _add_weights(seen, model)
        known = _known[model] = signature, seen.hexdigest()
    return known[1]


def _tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    for value in (*model.parameters(), *model.buffers()):
        yield from _parts(value)


def _add_weights(seen: Any, model: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, value in model.state_dict().items():
            for tensor in _parts(value):
                seen.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                if tensor.device.type != "meta" and tensor.numel():
                    seen.update(_samples(tensor).cpu().contiguous().view(torch.uint8).numpy().tobytes())


def _parts(value: Any) -> Iterator[torch.Tensor]:
    """A tensor, or those that a quantised one is made of."""
    if hasattr(value, "__tensor_flatten__"):
        for part in value.__tensor_flatten__()[0]:
            yield from _parts(getattr(value, part))
    elif isinstance(value, torch.Tensor):
        yield value


def _samples(tensor: torch.Tensor) -> torch.Tensor:
    """One element of every row and of every column, fewer where there are many, `[samples]`."""
    matrix = tensor.detach().reshape(-1, tensor.shape[-1] if tensor.dim() > 1 else 1)
    rows, columns = matrix.shape
    row, column = (torch.arange(0, size, -(-size // MOST_SAMPLES), device=tensor.device) for size in (rows, columns))
    return torch.cat((matrix[row, row * 7919 % columns], matrix[column * 7919 % rows, column]))
