"""Transformers' `QuantizedCache`: backends quanto, hqq and, in newer versions, fp8.

All tokens of the prefill are quantised at once, sinks too, in groups of 64 channels; later tokens are exact until 128
of them are there, and then the whole cache is quantised again (fp8: every token as it comes).
"""

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, QuantizedCache, cache_utils
from transformers.cache_utils import Cache

from spectrumkv_hf.evaluation.subjects.baselines.accounting import Counted, counted_memory
from spectrumkv_hf.evaluation.subjects.methods import Method
from spectrumkv_hf.support.extras import required
from spectrumkv_hf.tiered.memory import MemoryReport

BITS = {"quanto": (4, 2), "hqq": (4, 8, 2, 1), "fp8": (8,)}
"""What each backend takes, its default first. hqq 0.2.8 can't read back keys of 3 bits in these groups."""

GROUP = 64

AXIS = {"quanto": 0, "hqq": 1}
"""Transformers' documentation recommends these. Both put 64 neighbouring channels of a token and head into a group;
hqq's own default, 0, puts elements of 64 far tokens into one."""


class CountedQuantizedCache(Counted, QuantizedCache):
    """A `QuantizedCache` that knows how many tokens it was given.

    Attributes:
        together: Groups that the backend packs into a byte; it can't read back a number that is no multiple.
    """

    together = 1

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As of `QuantizedCache`.

        Raises:
            ValueError: the prompt's groups can't be packed.
        """
        groups = key_states.numel() // GROUP
        if layer_idx not in self.given and groups % self.together:
            raise ValueError(
                f"hqq packs {self.together} groups of {GROUP} into a byte and can't read back the {groups} of this "
                f"prompt's keys {tuple(key_states.shape)}: take another length, or axis 0 (hqq:BITS:0)"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class StockQuantized(Method):
    """A `QuantizedCache`.

    Args:
        backend: A key of `BITS`.
        bits: One of the backend's.
        axis: Of its groups; None: `AXIS`.
    """

    def __init__(self, spec: str, backend: str, bits: int, axis: int | None = None) -> None:
        super().__init__(spec)
        self.backend, self.bits, self.axis = backend, bits, axis

    def cache(self, model: PreTrainedModel) -> Cache:
        """An empty cache.

        Raises:
            ValueError: a layer of the model has no full attention, or this Transformers lacks the backend.
            ImportError: the backend's package is missing.
        """
        if self.backend == "fp8":
            if not hasattr(cache_utils, "Fp8QuantizedLayer"):
                raise ValueError(
                    f"Transformers {transformers.__version__} has no FP8 cache, 5.23 has; fp8_e4m3 is this package's"
                )
            return CountedQuantizedCache("fp8", model.config)
        required({"quanto": "optimum.quanto", "hqq": "hqq.core.quantize"}[self.backend], f"method {self.backend}")
        axis = AXIS[self.backend] if self.axis is None else self.axis
        cache = CountedQuantizedCache(
            self.backend, model.config, nbits=self.bits, axis_key=axis, axis_value=axis, q_group_size=GROUP
        )
        if self.backend == "hqq" and axis == 1:
            cache.together = 8 // self.bits
        return cache

    def memory(self, cache: Cache) -> MemoryReport:
        return counted_memory(cache, self.bits / 16)


def parse(spec: str, rest: str) -> StockQuantized:
    """`quanto[:BITS]`, `hqq[:BITS[:AXIS]]` or `fp8`.

    Raises:
        ValueError: the backend has no such width or axis.
    """
    backend = spec.partition(":")[0]
    if backend == "fp8" and rest:
        raise ValueError(f"method {spec!r}: fp8 takes nothing")
    width, colon, axis = rest.partition(":")
    if colon and (backend != "hqq" or axis not in ("0", "1")):
        raise ValueError(f"method {spec!r}: write quanto[:BITS] or hqq[:BITS[:AXIS]], an axis of 0 or 1")
    widths = {str(bits): bits for bits in BITS[backend]}
    if width and width not in widths:
        raise ValueError(f"method {spec!r}: {backend} takes {', '.join(widths)} bits, got {width!r}")
    return StockQuantized(spec, backend, widths[width] if width else BITS[backend][0], int(axis) if colon else None)
