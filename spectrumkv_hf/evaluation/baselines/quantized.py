"""Transformers' `QuantizedCache`: backends quanto, hqq and, in newer versions, fp8.

All tokens of the prefill are quantised at once, sinks too, in groups of 64 channels; later tokens are exact until 128
of them are there, and then the whole cache is quantised again (fp8: every token as it comes).
"""

import transformers
from transformers import PreTrainedModel, QuantizedCache, cache_utils
from transformers.cache_utils import Cache

from spectrumkv_hf.evaluation.baselines.accounting import Counted, counted_memory, required
from spectrumkv_hf.evaluation.methods import Method
from spectrumkv_hf.memory import MemoryReport

BITS = {"quanto": (4, 2), "hqq": (4, 8, 3, 2, 1), "fp8": (8,)}
"""What each backend takes, its default first."""

AXIS = {"quanto": 0, "hqq": 1}
"""Transformers' documentation recommends these. Both put 64 neighbouring channels of a token and head into a group;
hqq's default, 0, would put elements of 64 far tokens into one."""


class CountedQuantizedCache(Counted, QuantizedCache):
    """A `QuantizedCache` that knows how many tokens it was given."""


class Quantized(Method):
    """A `QuantizedCache`.

    Args:
        backend: A key of `BITS`.
        bits: One of the backend's.
    """

    def __init__(self, spec: str, backend: str, bits: int) -> None:
        super().__init__(spec)
        self.backend, self.bits = backend, bits

    def cache(self, model: PreTrainedModel) -> Cache:
        """An empty cache.

        Raises:
            ValueError: a layer of the model has no full attention, or this Transformers lacks the backend.
            ImportError: the backend's package is missing.
        """
        if self.backend == "fp8":
            if not hasattr(cache_utils, "Fp8QuantizedLayer"):
                raise ValueError(
                    f"Transformers {transformers.__version__} has no FP8 cache, 5.23 has one; fp8_e4m3 is this package's"
                )
            return CountedQuantizedCache("fp8", model.config)
        if self.backend == "quanto":
            required("optimum.quanto", "pip install optimum-quanto")
        else:
            required("hqq.core.quantize", "pip install hqq")
        axis = AXIS[self.backend]
        return CountedQuantizedCache(self.backend, model.config, nbits=self.bits, axis_key=axis, axis_value=axis)

    def memory(self, cache: Cache) -> MemoryReport:
        return counted_memory(cache, self.bits / 16)


def parse(spec: str, rest: str) -> Quantized:
    """`quanto[:BITS]`, `hqq[:BITS]` or `fp8`.

    Raises:
        ValueError: the backend has no such width.
    """
    backend = spec.partition(":")[0]
    if backend == "fp8" and rest:
        raise ValueError(f"method {spec!r}: fp8 takes nothing")
    widths = {str(bits): bits for bits in BITS[backend]}
    if rest and rest not in widths:
        raise ValueError(f"method {spec!r}: {backend} takes {', '.join(widths)} bits, got {rest!r}")
    return Quantized(spec, backend, widths[rest] if rest else BITS[backend][0])
