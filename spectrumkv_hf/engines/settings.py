"""A block codec from the plain settings of an engine's configuration file."""

from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from spectrumkv_hf.engines.blocks import BlockCodec
from spectrumkv_hf.policy import POLICIES, get_policy
from spectrumkv_hf.policy.importance import READS_QUERIES
from spectrumkv_hf.tiered.identity import layer_configs, model_identity
from spectrumkv_hf.tiered.rope import rotary_of
from spectrumkv_kernels import CODECS, Rotary

ATTENTION_TYPES = ("full_attention", "sliding_attention", "chunked_attention")


@dataclass(frozen=True)
class ModelShape:
    """What of a model's config an engine's blocks need; all empty for a model that is not known.

    Attributes:
        kv_heads: Of the whole model; None where layers differ.
        head_dim: Channels of keys and values; None where layers differ.
        rotaries: The rotation of each layer with keys and values.
        layers: The indices of these layers in the model.
        identity: As in `model_identity`.
    """

    kv_heads: int | None = None
    head_dim: int | None = None
    rotaries: tuple[Rotary, ...] = (Rotary(),)
    layers: tuple[int, ...] = ()
    identity: dict[str, Any] = field(default_factory=dict)


def model_shape(model: str | PreTrainedConfig | None) -> ModelShape:
    """Read a model's config.

    Args:
        model: A folder or name that `AutoConfig.from_pretrained` takes, a config, or None.
    """
    if model is None:
        return ModelShape()
    config = AutoConfig.from_pretrained(model) if isinstance(model, str) else model
    config = config.get_text_config(decoder=True)
    layers = layer_configs(config)
    kinds = getattr(config, "layer_types", None) or [None] * len(layers)
    indices = [i for i, kind in enumerate(kinds) if kind is None or kind in ATTENTION_TYPES]
    attention = [layers[i] for i in indices] or layers[:1]
    heads = {getattr(c, "num_key_value_heads", None) or getattr(c, "num_attention_heads", None) for c in attention}
    dims = {_head_dim(c) for c in attention}
    return ModelShape(
        heads.pop() if len(heads) == 1 else None,
        dims.pop() if len(dims) == 1 else None,
        tuple(rotary_of(layers[i], kinds[i]) for i in indices) or (Rotary(),),
        tuple(indices),
        model_identity(config),
    )


def _head_dim(config: PreTrainedConfig) -> int | None:
    heads = getattr(config, "num_attention_heads", None)
    return getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)


def block_codec(
    shape: ModelShape,
    policy: str = "sink_protect",
    budget: float | None = None,
    codec: str = "spectrum",
    identity: object = None,
    **options: object,
) -> BlockCodec:
    """The codec of these settings.

    Args:
        shape: Of the model.
        policy: Name of a policy.
        budget: Its budget; None: the policy's own.
        codec: `spectrum` or `absmax`.
        identity: Whatever else tells blobs apart, as JSON can hold it.
        options: Further fields of the policy, such as `sinks`, `importance`, `scope`.

    Raises:
        ValueError: an unknown name, a value out of range, or a policy that an engine's blocks can't follow.
        TypeError: an unknown option.
    """
    if codec not in CODECS:
        raise ValueError(f"unknown codec {codec!r}: choose from {', '.join(CODECS)}")
    if policy in POLICIES and POLICIES[policy].importance in READS_QUERIES:
        options.setdefault("importance", "kv_norm")
    options.setdefault("recent_window", 0)
    chosen = get_policy(policy, budget, **options)
    return BlockCodec(chosen, CODECS[codec], shape.rotaries, {"model": shape.identity, "more": identity})
