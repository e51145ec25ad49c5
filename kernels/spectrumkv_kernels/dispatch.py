"""Picks the implementation of an operation by device."""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger(__name__)

VARIABLE = "SPECTRUMKV_KERNELS"
"""Environment variable that forces one implementation."""

IMPLEMENTATIONS = {"torch": "", "triton": "_triton", "cpp": "_cpp"}
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

COMPILED = ("tiered_attention",)
"""What `cpp` implements; for other operations it stands for torch."""


@functools.cache
def default_implementation(device_type: str) -> str:
    """The implementation for a type of device.

    Triton where there is a CUDA device and Triton is installed; C++ on a CPU where it can be built, which the first
    call does; else torch.
    """
    if device_type == "cuda" and importlib.util.find_spec("triton"):
        return "triton"
    if device_type == "cpu":
        try:
            _compiled()
        except OSError as problem:
            logger.warning("SpectrumKV reads caches in plain torch, which is slower: no compiled kernels (%s)", problem)
        else:
            logger.info("SpectrumKV reads caches on the CPU with its compiled C++ kernels")
            return "cpp"
    return "torch"


def _compiled() -> None:
    """Builds the C++ kernels unless they are there; OSError where that fails."""
    from spectrumkv_kernels import attention_cpp

    attention_cpp.library()


@functools.cache
def _load(name: str, implementation: str) -> Callable[..., Any]:
    if implementation == "cpp" and name in COMPILED:
        _compiled()
    elif implementation == "cpp":
        implementation = "torch"
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
        OSError: it names `cpp`, which can't be built here.
    """
    chosen = os.environ.get(VARIABLE)
    if not chosen:
        # Not asked for what is not compiled, so that nothing is built before it is needed.
        alike = device.type == "cpu" and name not in COMPILED
        chosen = "torch" if alike else default_implementation(device.type)
    if chosen not in IMPLEMENTATIONS:
        raise ValueError(f"{VARIABLE}={chosen!r} names no implementation: choose from {', '.join(IMPLEMENTATIONS)}")
    return _load(name, chosen)
