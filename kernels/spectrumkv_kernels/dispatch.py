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
    "digest_sums": "checksum",
    "write_sums": "checksum",
    "tier_positions": "tier_map",
    "affine_flaws": "affine",
}
"""The module of each operation."""

COMPILED = ("tiered_attention", "digest_sums", "write_sums", "tier_positions", "affine_flaws")
"""What `cpp` implements; for other operations it stands for torch."""
WITHOUT_TRITON = ("tier_positions", "affine_flaws")
"""For these `triton` stands for torch."""

_unusable: set[str] = set()
"""Implementations that failed in this process, which is logged once for all operations."""


@functools.cache
def default_implementation(name: str, device_type: str) -> str:
    """The implementation of an operation for a type of device.

    Triton where there is a CUDA device and Triton is installed; C++ on a CPU where there is one that can be built,
    which the first call does; else torch, also where the other one fails to load, whatever the reason.
    """
    if device_type == "cuda" and name in OPERATIONS and importlib.util.find_spec("triton"):
        best = "triton"
    elif device_type == "cpu" and name in COMPILED:  # for others nothing is built
        best = "cpp"
    else:
        return "torch"
    if best not in _unusable:
        try:
            _load(name, best)
        except Exception as problem:
            _unusable.add(best)
            what = {"triton": "in Triton, for CUDA", "cpp": "in C++, for the CPU"}[best]
            logger.warning("SpectrumKV runs in plain torch, slower: kernels %s, can't be used (%s)", what, problem)
        else:
            if best == "cpp":
                logger.info("SpectrumKV runs %s on the CPU in compiled C++", name)
            return best
    return "torch"


def _compiled(name: str) -> None:
    """Builds the C++ of an operation unless it is there; OSError where that fails."""
    importlib.import_module(f"spectrumkv_kernels.{OPERATIONS[name]}_cpp").library()


@functools.cache
def _load(name: str, implementation: str) -> Callable[..., Any]:
    if implementation == "cpp" and name in COMPILED:
        _compiled(name)
    elif implementation == "cpp" or (implementation == "triton" and name in WITHOUT_TRITON):
        implementation = "torch"
    module = OPERATIONS[name]
    try:
        return getattr(importlib.import_module(f"spectrumkv_kernels.{module}{IMPLEMENTATIONS[implementation]}"), name)
    except Exception as error:  # an AttributeError, where another version of Triton lacks what a module uses
        kind = ModuleNotFoundError if isinstance(error, ModuleNotFoundError) else ImportError
        raise kind(f"the {implementation} implementation of {name} can't be loaded: {error}") from error


def operation(name: str, device: torch.device) -> Callable[..., Any]:
    """The function for operation `name` on `device`.

    `SPECTRUMKV_KERNELS` overrides the choice.

    Raises:
        ValueError: `SPECTRUMKV_KERNELS` names no implementation.
        ImportError: it names one that is not installed or doesn't run on what is.
        OSError: it names `cpp`, which can't be built here.
    """
    chosen = os.environ.get(VARIABLE) or default_implementation(name, device.type)
    if chosen not in IMPLEMENTATIONS:
        raise ValueError(f"{VARIABLE}={chosen!r} names no implementation: choose from {', '.join(IMPLEMENTATIONS)}")
    return _load(name, chosen)
