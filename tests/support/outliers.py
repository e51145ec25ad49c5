"""A small model, and the same function with huge constants in the keys of a layer."""

import copy

import torch
from families import model

SCALE = 2.0**12
"""A power of two, so that scaling by it and back changes no bit."""


def healthy(layers=3):
    """A Qwen2 model whose first rotary pair of every KV head holds a small constant and nothing else of the token."""
    m = copy.deepcopy(model("qwen2", "sdpa", num_hidden_layers=layers))
    with torch.no_grad():
        for layer in m.model.layers:
            layer.self_attn.q_proj.weight.mul_(4)  # so that errors of keys show
            k = layer.self_attn.k_proj
            for channel in pair(m, k):
                k.weight[channel] = 0
                k.bias[channel] = 0.5
    return m


def with_outliers(m, layer):
    """The same function with these constants `SCALE` times as large in a layer, and queries as much smaller there.

    Both channels of a rotary pair are scaled alike, so the factors commute with the rotation and cancel in every
    product of a query and a key.
    """
    m = copy.deepcopy(m)
    attention = m.model.layers[layer].self_attn
    with torch.no_grad():
        for projection, factor in ((attention.k_proj, SCALE), (attention.q_proj, 1 / SCALE)):
            for channel in pair(m, projection):
                projection.weight[channel] *= factor
                projection.bias[channel] *= factor
    return m


def pair(m, projection):
    """The channels of the first rotary pair in every head of a projection."""
    dim = m.config.hidden_size // m.config.num_attention_heads
    heads = projection.weight.shape[0] // dim
    return [head * dim + at for head in range(heads) for at in (0, dim // 2)]
