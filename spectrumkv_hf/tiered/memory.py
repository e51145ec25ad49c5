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
        exact: Bytes that the model's own exact cache, a `DynamicCache`, would hold of the same tokens, in the dtype of
            their keys and values (of a sliding layer, the tokens in its window). Stock layers count as they are.
        fp16: The same at two bytes an element, which differs where the model is float32.
        nominal_ratio: Mean nominal cost of the tokens (FP16 1, INT8 1/2, INT4 1/4), the tail as FP16.
        parts: The stored bytes by tier and part, `int8.keys.codes`, `tail.values`, `mean`, ...; `uncompressed` is what
            stock Transformers layers hold.
        times_smaller: `exact / stored`, what compressing gained; 1 for an empty cache.
        actual_ratio: `stored / fp16`, with scales, zero points, means and positions: what compares codecs whatever the
            model's dtype. Exact tokens of a float32 model take four bytes an element and so count double.
        tiered_ratio: The same of the tokens that have their tier, without the exact tail and what waits in it, exact
            numbers at two bytes each: what the budget of `calibrated` binds.
    """

    stored: int
    exact: int
    fp16: int
    nominal_ratio: float
    parts: dict[str, int] = field(default_factory=dict)
    tiered_ratio: float = 0.0

    @property
    def times_smaller(self) -> float:
        return self.exact / self.stored if self.stored else 1.0

    @property
    def actual_ratio(self) -> float:
        return self.stored / self.fp16 if self.fp16 else 0.0

    def headline(self) -> str:
        """What compressing gained, in a few words."""
        if not self.stored:
            return "empty"
        times = self.times_smaller
        compared = f"{times:.2f} times smaller than" if times >= 1 else f"{1 / times:.2f} times"
        return f"{compared} the exact cache ({_mib(self.exact)} -> {_mib(self.stored)})"

    def __str__(self) -> str:
        ratios = f"  nominal ratio {self.nominal_ratio:.3f}, actual {self.actual_ratio:.3f} of two bytes an element"
        parts = (f"  {name:<22}{_mib(size)}" for name, size in self.parts.items())
        return "\n".join((self.headline(), ratios, *parts))


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the unique storages behind the tensors."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
