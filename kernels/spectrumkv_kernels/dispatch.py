"""Picks the implementation of an operation by device."""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

VARIABLE = "SPECTRUMKV_KERNELS"
"""Environment variable that forces one implementation."""

IMPLEMENTATIONS = {"torch": "", "triton": "_triton"}
"""Implementations, by the suffix of their modules. All have the signature of the one in torch, which specifies it."""

OPERATIONS = {
    "key_mean": "codec",
    "encode": "codec",
    "decode": "codec",
    "dense": "codec",
    "tiered_attention": "attention",
    "attention_scores": "scores",
}
"""The module of each operation."""


@functools.cache
def default_implementation(device_type: str) -> str:
    """The implementation for a type of device: Triton where there is a CUDA device and Triton is installed."""
    return "triton" if device_type == "cuda" and importlib.util.find_spec("triton") else "torch"


@functools.cache
def _load(name: str, implementation: str) -> Callable[..., Any]:
    module = OPERATIONS[name]
    try:
        return getattr(importlib.import_module(f"spectrumkv_kernels.{module}{IMPLEMENTATIONS[implementation]}"), name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"the {implementation} implementation of {name} can't be loaded: {error}") from error


def operation(name: str, device: torch.device) -> Callable[..., Any]:
    """The function for operation `name` on `device`.

    `SPECTRUMKV_KERNELS` overrides the choice.

    Raises:
        ValueError: `SPECTRUMKV_KERNELS` names no implementation.
        ModuleNotFoundError: it names one that is not installed.
    """
    chosen = os.environ.get(VARIABLE) or default_implementation(device.type)
    if chosen not in IMPLEMENTATIONS:
        raise ValueError(f"{VARIABLE}={chosen!r} names no implementation: choose from {', '.join(IMPLEMENTATIONS)}")
    return _load(name, chosen)
