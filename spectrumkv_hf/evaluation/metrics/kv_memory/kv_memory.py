"""What caches occupy: stored bytes over those of exact caches of the same tokens.

Loaded by `evaluate.load`, which copies this file alone: it imports nothing of the package, and one module a line,
because `evaluate` finds imports with a pattern that reads single lines.
"""

import math

import datasets
import evaluate

DESCRIPTION = """
Bytes that KV caches store, beside those that exact caches of the same tokens would.
"""

INPUTS = """
Every example is one cache. `spectrumkv_hf.evaluation.metrics.cache_bytes` counts both numbers of any cache of
Transformers.

Args:
    stored: bytes that the cache keeps alive.
    exact: bytes of the keys and values of its tokens as the model computed them; or both in another unit, such as
        fractions of what two bytes an element would take.

Returns:
    stored, exact: totals over the caches.
    ratio: stored / exact.
    times_smaller: exact / stored.
    caches: how many there are.

Raises:
    ValueError: no caches, or a number that is not positive and finite, as that of a cache before its prefill.

Examples:
    >>> measurement = evaluate.load(path, module_type="measurement")
    >>> measurement.compute(stored=[256, 256], exact=[1024, 1024])["times_smaller"]
    4.0
"""


class KvMemory(evaluate.Measurement):
    """Bytes of caches, and how many times smaller they are than exact ones."""

    def _info(self) -> evaluate.MeasurementInfo:
        number = datasets.Value("float64")
        return evaluate.MeasurementInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"stored": number, "exact": number}),
        )

    def _compute(self, stored: list[float], exact: list[float]) -> dict[str, float | int]:
        if not stored:
            raise ValueError("kv_memory needs one cache or more, got none")
        for index, sizes in enumerate(zip(stored, exact, strict=True)):
            if not all(math.isfinite(size) and size > 0 for size in sizes):
                raise ValueError(
                    f"bytes are positive and finite, got stored {sizes[0]} and exact {sizes[1]} of cache {index}: "
                    "measure a cache after its prefill"
                )
        held, whole = math.fsum(stored), math.fsum(exact)
        return {
            "stored": held,
            "exact": whole,
            "ratio": held / whole,
            "times_smaller": whole / held,
            "caches": len(stored),
        }
