"""Picks the implementation of an operation by device."""

import os
from collections.abc import Callable
from typing import Any

import torch

from spectrumkv_kernels import attention, codec, scores

VARIABLE = "SPECTRUMKV_KERNELS"
"""Environment variable that forces one implementation."""

IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {
    "torch": {
        "encode": codec.encode,
        "decode": codec.decode,
        "tiered_attention": attention.tiered_attention,
        "attention_scores": scores.attention_scores,
    },
}
"""Operations by implementation. All implementations of an operation have the signature of the one in torch."""

DEFAULT_BY_DEVICE = {"cpu": "torch"}
"""Implementation for a type of device; `torch` for those not named."""


def operation(name: str, device: torch.device) -> Callable[..., Any]:
    """The function for operation `name` on `device`.

    `SPECTRUMKV_KERNELS` overrides the choice. An operation that the chosen implementation lacks falls back to torch.

    Raises:
        ValueError: `SPECTRUMKV_KERNELS` names no implementation.
    """
    chosen = os.environ.get(VARIABLE) or DEFAULT_BY_DEVICE.get(device.type, "torch")
    if chosen not in IMPLEMENTATIONS:
        raise ValueError(f"{VARIABLE}={chosen!r} names no implementation: choose from {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[chosen].get(name) or IMPLEMENTATIONS["torch"][name]
