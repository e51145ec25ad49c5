"""What a cache occupies, counted from its tensors."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

FP16_BYTES = 2


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of a cache.

    Attributes:
        stored: All bytes that the cache keeps alive: whole storages, each counted once. Not among them is the table of
            cos and sin that all caches of a process share, `head_dim` float32 a position for each kind of RoPE.
        parts: The same by tier and part, `int8.keys.codes`, `tail.values`, `mean`, ...; `uncompressed` is what stock
            Transformers layers hold.
        fp16: Bytes of the same tokens at two bytes an element, what an uncompressed FP16 or BF16 cache would hold
            (of a sliding layer, the tokens in its window). Stock layers count as they are.
        nominal_ratio: Mean nominal cost of the tokens (FP16 1, INT8 1/2, INT4 1/4), the tail as FP16.
        actual_ratio: `stored / fp16`, with scales, zero points, means and positions. Exact tokens of a float32 model
            take four bytes an element and so count double.
    """

    stored: int
    fp16: int
    nominal_ratio: float
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def actual_ratio(self) -> float:
        return self.stored / self.fp16 if self.fp16 else 0.0

    def __str__(self) -> str:
        lines = [
            f"stored {_mib(self.stored)}, FP16 {_mib(self.fp16)}, "
            f"ratio {self.actual_ratio:.3f} actual, {self.nominal_ratio:.3f} nominal"
        ]
        lines += [f"  {name:<22}{_mib(size)}" for name, size in self.parts.items()]
        return "\n".join(lines)


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the unique storages behind the tensors."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
