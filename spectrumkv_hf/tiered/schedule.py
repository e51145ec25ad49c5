"""When tokens are tiered: the state of a layer's last update, and the ranking for which layers wait."""

from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, Protocol

import torch


class Layer(Protocol):
    """What the schedules here need of a `SpectrumLayer`."""

    layer_idx: int

    @property
    def tail_start(self) -> int: ...

    def compress(self, tokens: int, score: torch.Tensor) -> None: ...

    def confirm(self) -> None: ...

    def announce(self) -> None: ...


class Stage(Enum):
    """What is left to do for the tokens of an update."""

    UNSEEN = "no attention has taken note of them"
    DEFERRED = "attention has; they are tiered at the next update"
    SETTLED = "nothing"


@dataclass
class OpenUpdate:
    """A layer's last update.

    Attributes:
        tokens: That it added.
        read_from: Position of the first token that its attention reads.
        stage: What is left to do for it.
        scores: Attention that the tail's tokens got, float32 `[batch, kv_heads, tail_length]`; None where it is not
            known.
        query_power: Of its queries, as `query_power` gives it, where the codec balances keys.
    """

    tokens: int = 0
    read_from: int = 0
    stage: Stage = Stage.SETTLED
    scores: torch.Tensor | None = None
    query_power: torch.Tensor | None = None


class Confirmations:
    """The layer whose tiering is not confirmed yet.

    A layer is confirmed when the next one has been tiered. So the host never waits for work that it has only just given
    to the device, which would be idle then, and no more than one layer's exact tokens are held beside its codes.

    Attributes:
        last: Index of the last layer, which is confirmed at once: nothing is open behind a forward.
    """

    def __init__(self) -> None:
        self.last = -1
        self._waiting: Layer | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"last": self.last, "_waiting": None}

    def tiered(self, layer: Layer) -> None:
        """Take note of a layer that is to be confirmed, and confirm the one before it."""
        before, self._waiting = self._waiting, layer
        if before is not None and before is not layer:
            before.confirm()
        if layer.layer_idx >= self.last:
            self._waiting = None
            layer.confirm()


class Offer(NamedTuple):
    """Scores of a layer's tail from position `start` on, float32 `[batch, kv_heads, tokens]`."""

    layer: Layer
    start: int
    score: torch.Tensor


class SharedRanking:
    """One importance for all layers and heads (scope `token`): the mean of what the layers offer.

    Layers wait with tiering until the last of them has offered its scores, so the exact cache is whole until then.
    """

    def __init__(self) -> None:
        self._members = 0
        self._offers: dict[int, Offer] = {}
        self._total: torch.Tensor | None = None

    def join(self) -> None:
        """Wait for the offers of one layer more."""
        self._members += 1

    def offer(self, layer: Layer, score: torch.Tensor) -> None:
        """Add the scores of a layer's oldest tail tokens, `[batch, kv_heads, tokens]`, or replace what it offered."""
        self._offers[layer.layer_idx] = Offer(layer, layer.tail_start, score.nan_to_num(nan=0.0))
        if len(self._offers) == self._members:
            self.settle()

    def waits(self, layer: Layer) -> bool:
        """Whether a layer has offered scores by which it is not tiered yet."""
        return layer.layer_idx in self._offers

    def clear(self) -> None:
        """Forget all offers."""
        self._offers.clear()
        self._total = None

    def settle(self) -> None:
        """Tier every layer that has offered. After an error the others are still to be tiered, by the same ranking."""
        if self._total is None and self._offers:
            offers = list(self._offers.values())
            end = max(offer.start + offer.score.shape[-1] for offer in offers)
            total = offers[0].score.new_zeros(offers[0].score.shape[0], end)
            for _, start, score in offers:
                total[:, start : start + score.shape[-1]] += score.mean(1).to(total.device)
            self._total = total
        for index, (layer, start, score) in list(self._offers.items()):
            if layer.tail_start == start and self._total is not None:  # else an interrupt came behind its tiering
                shared = self._total[:, None, start : start + score.shape[-1]].to(score.device)
                layer.compress(score.shape[-1], shared.expand_as(score))
                layer.confirm()
            del self._offers[index]
            layer.announce()
        self._total = None
