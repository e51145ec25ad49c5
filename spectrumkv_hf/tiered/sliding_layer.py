"""Tiered layers with sliding-window attention."""

from collections.abc import Callable
from typing import Any

import torch

from spectrumkv_hf.tiered.layer import SpectrumLayer
from spectrumkv_hf.tiered.store import TAIL_STEP, TieredStore


class SlidingSpectrumLayer(SpectrumLayer):
    """A layer with sliding-window attention: tokens that left the window are freed, `TAIL_STEP` or more at a time.

    Args:
        sliding_window: Tokens that a query sees, itself included.
        growing: Makes the layer of Transformers that does the same in a cache that grows, where that one is not tiered.
        kwargs: As in `SpectrumLayer`.
    """

    is_sliding = True

    def __init__(self, sliding_window: int, growing: Callable[[], Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.growing = growing
        self.sliding_window = self.window = sliding_window
        self.record_past = False

    def activate_past_recording(self) -> None:
        """Keep what leaves the window until the next `crop`, so that it can be rolled back."""
        if self.is_initialized:
            self.settle()
        self.record_past = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what `update` will return for `query_length` new tokens."""
        offset = self._first_needed()
        return self.length - offset + query_length, offset

    def get_max_length(self) -> int:
        """The sliding window."""
        return self.sliding_window

    def as_growing(self) -> Any:
        """The layer that stands for this one in a cache that grows, of the same tokens; the tensors are views."""
        if self.growing is None:
            return self
        layer = self.growing()
        if self.is_initialized:
            self.settle()
            keys, values = self._visible()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values, layer.cumulative_length = keys, values, self.length
        if hasattr(layer, "record_past"):
            layer.record_past = self.record_past
        return layer

    def take_growing(self, layer: Any) -> None:
        """Hold the tokens of such a layer."""
        if not layer.is_initialized:
            return
        self.lazy_initialization(layer.keys[:, :, :0], layer.values[:, :, :0])
        length, start = int(layer.cumulative_length), int(layer.cumulative_length) - layer.keys.shape[2]
        held = {"length": length, "tail_start": start, "first_kept": start}
        self.adopt(TieredStore.assemble(layer.keys, layer.values, self.codec, self.rotary, **held))

    def _publish(self) -> None:
        if not self.record_past:  # else tokens that left the window may be asked for once more
            super()._publish()

    def _visible(self, start: int = 0) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return super()._visible(max(start, self._first_needed()))

    def _first_needed(self) -> int:
        """Position of the oldest token that the next query will see."""
        return max(self.length - self.sliding_window + 1, 0)

    def _tier(self, scores: torch.Tensor | None) -> None:
        if not self.record_past and self._due():
            # Over all tokens at hand, as in a layer without a window.
            self.store.settle_frame(self.policy.sinks, self._open.query_power)
            self.store.discard(self._first_needed())
            if scores is not None:
                scores = scores[..., scores.shape[-1] - self.store.tail_length :]
        super()._tier(scores)

    def crop(self, tokens_to_remove: int) -> None:
        """As in `SpectrumLayer`, and free what has left the window.

        Raises:
            RuntimeError: tokens that would be seen again are gone; call `activate_past_recording` before.
        """
        if self._store is None:
            return
        length = max(self.length - abs(int(tokens_to_remove)), 0)
        if max(length - self.sliding_window + 1, 0) < self.store.first_kept:
            raise RuntimeError(
                f"can't remove {abs(tokens_to_remove)} tokens: the sliding window of {self.sliding_window} has moved "
                "on and older tokens were freed. Call activate_past_recording() before the tokens are added."
            )
        super().crop(tokens_to_remove)
        if self.record_past:
            self.settle()
            if self._first_needed() - self.store.first_kept >= TAIL_STEP:
                self.store.discard(self._first_needed())
