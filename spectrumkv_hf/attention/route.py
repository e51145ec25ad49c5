"""How attention reaches a compressed layer: the registered `spectrumkv` attention, and a route for all others."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from spectrumkv_hf.attention.handle import SpectrumHandle, StaticHandle
from spectrumkv_hf.attention.masks import causal_mask

NAME = "spectrumkv"
FUSED = (NAME, "sdpa")
"""Attention implementations whose function is known, so that reading the store directly means the same. The eager
functions of models differ; they get dequantised keys and values."""
UNKNOWN = frozenset(("position_bias", "cache", "output_attentions"))
"""Arguments that only the attention function itself can honour."""


def spectrumkv_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attn_implementation="spectrumkv"` on plain tensors: SDPA, or the model's eager function for what SDPA lacks.

    Handles never get here: the route in `install` takes them out before.
    """
    if kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is None:
        attention_mask = causal_mask(query, key.shape[2])
    if attention_mask.dtype == torch.bool:
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(
            ~attention_mask, torch.finfo(query.dtype).min
        )
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(NAME, spectrumkv_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # without it the mask is silently None


def install() -> None:
    """Route attention on handles to their layer, whatever the implementation; called when a cache is built.

    Only the one object that models ask for their attention function is touched, and calls on plain tensors pass
    through. Idempotent; `uninstall` undoes it.
    """
    if "get_interface" in vars(ALL_ATTENTION_FUNCTIONS):
        return
    stock = ALL_ATTENTION_FUNCTIONS.get_interface

    def get_interface(attn_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(_route, stock(attn_implementation, default), attn_implementation)

    ALL_ATTENTION_FUNCTIONS.get_interface = get_interface


def uninstall() -> None:
    """Undo `install`."""
    vars(ALL_ATTENTION_FUNCTIONS).pop("get_interface", None)


def _route(
    stock: Callable[..., Any],
    name: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if isinstance(key, StaticHandle):
        return _on_static(stock, name, module, query, key, value, *args, **kwargs)
    if not isinstance(key, SpectrumHandle):
        if isinstance(kwargs.get("cache"), Cache):  # before 5.24 models pass on what they don't know, unused
            raise TypeError(
                f"Transformers {transformers.__version__} takes a cache as past_key_values=..., not as cache=..., "
                "which is its name from 5.24 on"
            )
        return stock(module, query, key, value, *args, **kwargs)
    return _on_handles(stock, name, module, query, key, value, *args, **kwargs)


def _unset(argument: Any) -> bool:
    return argument is None or argument is False


def _plain(mask: Any) -> bool:
    return mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 4)


def _readable(name: str, mask: Any, kwargs: dict[str, Any]) -> bool:
    """Whether reading the store directly means the same as what this attention would do."""
    return (
        name in FUSED
        and _plain(mask)
        and not kwargs.get("dropout")
        and kwargs.get("is_causal") is not False
        and (UNKNOWN.isdisjoint(kwargs) or all(_unset(kwargs.get(argument)) for argument in UNKNOWN))
    )


def _arguments(name: str, query: torch.Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What an attention does with the scores, by the names that layers take."""
    return {
        "scale": query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"],
        # Transformers 5.17 lets sdpa drop the softcap of Gemma-2; what reads the store must agree with the prefill.
        "softcap": None if name == "sdpa" else kwargs.get("softcap"),
        "sinks": kwargs.get("s_aux"),
    }


def _on_static(
    stock: Callable[..., Any],
    name: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: StaticHandle,
    value: Any,
    attention_mask: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A decode step, of which all can be traced: nothing is read from the device, and all shapes are fixed."""
    tracked = query.requires_grad and torch.is_grad_enabled()  # only the stock attention has gradients
    if query.shape[2] == 1 and not tracked and _readable(name, attention_mask, kwargs):
        out = key.layer.attend_step(query, attention_mask, **_arguments(name, query, kwargs))
        return out.transpose(1, 2).contiguous(), None
    return _on_handles(stock, name, module, query, *key.layer.handles(), attention_mask, **kwargs)


@torch.compiler.disable
def _on_handles(
    stock: Callable[..., Any],
    name: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: SpectrumHandle,
    value: torch.Tensor,
    attention_mask: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    layer = key.layer
    whole = isinstance(value, SpectrumHandle) and value.layer is layer and key.stage == value.stage == "heads"
    if not whole or key.repeats != 1 or not _plain(attention_mask) or query.shape[2] != layer.new_tokens:
        layer.note_route(False)
        plain = [t.dense() if isinstance(t, SpectrumHandle) else t for t in (key, value)]
        return stock(module, query, *plain, attention_mask, **kwargs)

    weights = None

    def on_dense(k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        nonlocal weights
        out, weights = stock(module, query, k, v, mask, **kwargs)
        return out.transpose(1, 2)

    readable = _readable(name, attention_mask, kwargs)
    layer.note_route(readable)
    out = layer.attend(
        key.generation, on_dense, query, attention_mask, fused=readable, **_arguments(name, query, kwargs)
    )
    return out.transpose(1, 2).contiguous(), weights
