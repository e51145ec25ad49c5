"""Layers that hold more, or other, than the keys and values of self-attention."""

from typing import Any

import torch
from transformers.cache_utils import (
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from spectrumkv_hf.tiered.layer import SpectrumLayer
from spectrumkv_hf.tiered.sliding_layer import SlidingSpectrumLayer


class CrossAttentionLayer(DynamicLayer):
    """Exact keys and values of another sequence than the text, such as Mllama's images: it has a length of its own."""


class LinearStates(SpectrumLayer):
    """Adds a linear attention's states, Transformers' own and exact, to a layer's tiered keys and values.

    A subclass also inherits from Transformers' layer of that kind, so that `Cache` takes it for one; whatever both
    parts have is done to both here.

    Args:
        number_of_states: Convolutional and recurrent states each.
        kwargs: As in the tiered layer.
    """

    number_of_states: int
    conv_states: dict[int, torch.Tensor | None]
    recurrent_states: dict[int, torch.Tensor | None]

    def __init__(self, *args: Any, number_of_states: int = 1, **kwargs: Any) -> None:
        self.number_of_states = number_of_states
        super().__init__(*args, **kwargs)

    def reset(self) -> None:
        """Forget all tokens and states."""
        recording = getattr(self, "record_past", False)
        LinearAttentionLayer.__init__(self, number_of_states=self.number_of_states)
        self.record_past = recording
        super().reset()

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Set up for keys and values, given by position, or for states, given by name."""
        if args:
            super().lazy_initialization(*args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Recurrent states can't go back."""
        return bool(LinearAttentionCacheLayerMixin.is_croppable.fget(self))

    def activate_past_recording(self) -> None:
        """Keep what `crop` may need."""
        self.record_past = True

    def announce(self) -> None:
        """Nothing: where states follow attention, the layer is not final yet."""

    def states(self) -> list[torch.Tensor]:
        """The tensors of the linear attention."""
        both = [*self.conv_states.values(), *self.recurrent_states.values()]
        return [state for state in both if state is not None]

    def _mapped_states(self, function: Any) -> tuple[dict[int, torch.Tensor | None], dict[int, torch.Tensor | None]]:
        conv, recurrent = (
            {i: None if state is None else function(state) for i, state in states.items()}
            for states in (self.conv_states, self.recurrent_states)
        )
        return conv, recurrent

    def crop(self, tokens_to_remove: int) -> None:
        """As in Transformers' layer: remove the last tokens, which the states must have recorded."""
        if self.states() and not self.record_past:
            LinearAttentionLayer.crop(self, tokens_to_remove)  # says that it can't
        super().crop(tokens_to_remove)
        if self.states():
            LinearAttentionLayer.crop(self, tokens_to_remove)

    def _map(self, function: Any) -> None:
        mapped = self._mapped_states(function)  # before anything is changed
        super()._map(function)
        self.conv_states, self.recurrent_states = mapped

    def offload(self) -> None:
        """Move the tensors to the CPU."""
        super().offload()
        self.conv_states, self.recurrent_states = self._mapped_states(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the tensors back to the layer's device."""
        super().prefetch()
        states = self._mapped_states(lambda t: t.to(self.device, non_blocking=True))
        self.conv_states, self.recurrent_states = states


class HybridSpectrumLayer(LinearStates, LinearAttentionAndFullAttentionLayer):
    """Full attention in tiers beside a linear attention (Falcon-H1, Zamba)."""


class HybridSlidingSpectrumLayer(LinearStates, SlidingSpectrumLayer, LinearAttentionAndSlidingWindowAttentionLayer):
    """Sliding-window attention in tiers beside a linear attention (Inkling)."""
