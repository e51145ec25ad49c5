"""How unequally attention falls on the tokens of a context."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def gini(values: torch.Tensor) -> torch.Tensor:
    """Gini coefficient of the last dimension: 0 where all are equal (or 0), `1 - 1/n` where one of `n` has everything.

    Args:
        values: 0 or more, `[..., n]`.
    """
    ordered = values.double().sort(dim=-1).values
    n = ordered.shape[-1]
    rank = torch.arange(1, n + 1, device=values.device)
    total = ordered.sum(-1)
    unequal = 2 * (rank * ordered).sum(-1) / (n * total) - (n + 1) / n
    return unequal.where(total > 0, 0.0)


@torch.inference_mode()
def attention_mass(model: PreTrainedModel, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """Attention that every token receives from all queries, by layer, float32 `[heads, tokens]`.

    Computed with the eager attention of the model, a layer's probabilities at a time, `heads * tokens**2` of them.

    Args:
        model: In eval mode.
        ids: `[1, tokens]`, on the model's device.

    Raises:
        ValueError: the model's attention shows no probabilities.
    """
    mass: dict[int, torch.Tensor] = {}

    def take(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if isinstance(weights, torch.Tensor) and weights.dim() == 4:
                mass[layer] = weights[0].float().sum(-2)

        return hook

    modules = [
        module for module in model.get_decoder().modules() if isinstance(getattr(module, "layer_idx", None), int)
    ]
    handles = [module.register_forward_hook(take(module.layer_idx)) for module in modules]
    try:
        with _eager(model):
            model.get_decoder()(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if not mass:
        raise ValueError(f"the attention of {type(model).__name__} shows no probabilities")
    return mass


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
