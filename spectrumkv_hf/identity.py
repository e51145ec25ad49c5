"""What of a model's config its cache depends on, so that bytes of one model are not read into another."""

from typing import Any

from transformers import PreTrainedConfig

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


def model_identity(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a text config that shape its cache, as JSON has them; those that are missing or None left out.

    Weights are not among them: two models of one architecture have one identity. Nor is the dtype, which a config
    need not know; every tensor says its own.
    """
    found = {name: getattr(config, name, None) for name in FIELDS}
    return {name: _plain(value) for name, value in found.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(v) for key, v in sorted(value.items(), key=lambda item: str(item[0])) if v is not None}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, bool | int | float) else str(value)
