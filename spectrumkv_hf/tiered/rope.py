"""The rotary matrices of a Transformers model, from its config."""

import copy
import importlib

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from spectrumkv_kernels import Rotary

LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Types of RoPE whose frequencies change with the length of the sequence."""

HYBRID = {"hybrid": "full_attention", "hybrid_sliding": "sliding_attention"}
"""Attention types of hybrid layers, under which their RoPE may go."""


def rotary_of(config: PreTrainedConfig, layer_type: str | None = None) -> Rotary:
    """The rotation that a model's attention applies to keys.

    A wrong answer costs quality, never correctness, because encoding and decoding use the same one. So whatever can't
    be known gives the identity, with which keys are centred on their plain mean: models without RoPE, with
    frequencies that depend on the length, or of an unknown kind.

    Args:
        config: Text config of the model, or of the layer where layers differ (`identity.layer_configs`). Not changed.
        layer_type: Attention type of the layer, where the model has a RoPE for each (Gemma-3).
    """
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        return Rotary()
    if getattr(config, "use_mem_rope", None) is False:  # Zamba-2 has parameters and doesn't use them
        return Rotary()
    if layer_type is not None and layer_type not in parameters:
        layer_type = HYBRID.get(layer_type, layer_type)
    per_type = layer_type is not None and isinstance(parameters.get(layer_type), dict)
    if per_type:
        parameters = parameters[layer_type]
    kind = parameters.get("rope_type", "default")
    if "rope_theta" not in parameters or kind in LENGTH_DEPENDENT:
        return Rotary()
    if kind == "default":
        # Transformers computes the default inside each model; the formula is the same in all.
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        partial = parameters.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
        size = int(head_dim * partial)
        inv_freq = parameters["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float) / size)
    elif kind in ROPE_INIT_FUNCTIONS:
        options = {"layer_type": layer_type} if per_type else {}
        own = copy.copy(config)  # in which the function brings the parameters into shape
        own.rope_parameters = copy.deepcopy(config.rope_parameters)
        inv_freq, _ = ROPE_INIT_FUNCTIONS[kind](own, torch.device("cpu"), **options)
    else:
        return Rotary()
    return Rotary(tuple(inv_freq.tolist()), _interleaved(config))


def _interleaved(config: PreTrainedConfig) -> bool:
    """Whether the model rotates neighbouring channels, asked of the `rotate_half` in its own modeling file."""
    name = type(config).__module__.replace("configuration_", "modeling_")
    try:
        rotate_half = importlib.import_module(name).rotate_half
        return rotate_half(torch.arange(4.0)).tolist() == [-1.0, 0.0, -3.0, 2.0]
    except (ImportError, AttributeError, RuntimeError, TypeError):
        return False
