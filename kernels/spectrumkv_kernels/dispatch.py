"""Picks the implementation of an operation by device."""

import functools
import importlib
import logging
import os
import sys
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

    Triton for a CUDA device; C++ on a CPU where there is one that can be built,
    which the first call does; else torch, also where the other one fails to load, whatever the reason.
    """
    if device_type == "cuda" and name in OPERATIONS:
        best = "triton"
    elif device_type == "cpu" and name in COMPILED:  # for others nothing is built
        best = "cpp"
    else:
        return "torch"
    if best not in _unusable:
        try:
            for needed in OPERATIONS if best == "triton" else (name,):  # Triton serves all operations or none
                _load(needed, best)
        except Exception as problem:
            _unusable.add(best)
            what = {"triton": "in Triton, for CUDA", "cpp": "in C++, for the CPU"}[best]
            logger.warning("SpectrumKV runs in plain torch, slower: kernels %s, can't be used (%s)", what, problem)
        else:
            if best == "cpp":
                logger.info("SpectrumKV runs %s on the CPU in compiled C++", name)
            return best
    return "torch"


def _cause(problem: Exception) -> str:
    """Why an import failed, with the version of Triton where that is there."""
    version = getattr(sys.modules.get("triton"), "__version__", None)
    return f"{type(problem).__name__}: {problem}" + (f" (Triton {version})" if version else "")


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
    except Exception as problem:
        kind = type(problem) if isinstance(problem, ImportError) else ImportError
        raise kind(f"the {implementation} implementation of {name} can't be loaded: {_cause(problem)}") from problem


def operation(name: str, device: torch.device) -> Callable[..., Any]:
    """The function for operation `name` on `device`.

    `SPECTRUMKV_KERNELS` overrides the choice.

    Raises:
        ValueError: `SPECTRUMKV_KERNELS` names no implementation.
        ImportError: it names one that can't be imported; ModuleNotFoundError where it is not installed.
        OSError: it names `cpp`, which can't be built here.
    """
    chosen = os.environ.get(VARIABLE) or default_implementation(name, device.type)
    if chosen not in IMPLEMENTATIONS:
        raise ValueError(f"{VARIABLE}={chosen!r} names no implementation: choose from {', '.join(IMPLEMENTATIONS)}")
    return _load(name, chosen)
