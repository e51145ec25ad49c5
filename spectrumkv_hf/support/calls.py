"""The name under which models take a cache: `cache` from Transformers 5.24 on, `past_key_values` before."""

import functools
import inspect

import torch
from transformers import GenerationMixin
from transformers.cache_utils import Cache

NAMES = ("cache", "past_key_values")
"""The newer first: where a model takes both, the older one is there for old code and warns."""


def cache_argument(cache: Cache, model: torch.nn.Module | None = None) -> dict[str, Cache]:
    """A cache as the keyword argument that the installed Transformers has for it.

    `generate(**inputs, **cache_argument(cache))` works without a warning on every version that is supported. By hand
    it is `cache=cache` from Transformers 5.24 on and `past_key_values=cache` before; 5.24 still takes the older name,
    with a warning.

    Args:
        cache: Any cache of Transformers, such as a `SpectrumCache`.
        model: For a call of `model(...)` itself, whose code may come from elsewhere and have the other name; None: for
            `generate`, and for models of Transformers.
    """
    kind: type = GenerationMixin if model is None else type(model)
    return {_name(kind): cache}


@functools.cache
def _name(kind: type) -> str:
    """The argument of a class of models, or of `generate`; of wrappers that show no name, that of `generate`."""
    method = "prepare_inputs_for_generation" if kind is GenerationMixin else "forward"
    parameters = inspect.signature(getattr(kind, method)).parameters
    found = next((name for name in NAMES if name in parameters), None)
    return found or _name(GenerationMixin)
