"""Picks the implementation of an operation by device."""

import logging
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, Generic, ParamSpec, TypeVar

import torch

logger = logging.getLogger(__name__)

VARIABLE = "SPECTRUMKV_KERNELS"
"""Environment variable that forces one implementation."""
IMPLEMENTATIONS = ("torch", "triton", "cpp")
"""All have the signature of the one in torch, which specifies them."""

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Loader = Callable[[], Callable[..., Any]]

_operations: list["Operation[..., Any]"] = []
_unusable: set[str] = set()
"""Implementations that failed in this process, which is logged once for all operations."""


class Operation(Generic[Parameters, Result]):
    """A function with an implementation for each device. A call runs the one for the device of its first tensor.

    On a CUDA device that is Triton. On a CPU it is C++ where there is one that can be built, which the first call does.
    Everywhere else, and where the other one fails to load for whatever reason, it is the reference.
    `SPECTRUMKV_KERNELS` overrides the choice; an operation that lacks the implementation named there takes the
    reference.

    Args:
        reference: The implementation in plain PyTorch, which specifies the others.
        triton, cpp: Import and return another implementation, and build it where that is needed.
    """

    def __init__(
        self, reference: Callable[Parameters, Result], triton: Loader | None = None, cpp: Loader | None = None
    ) -> None:
        self.reference, self.__doc__, self.__name__ = reference, reference.__doc__, reference.__name__
        self._loaders = {name: load for name, load in (("triton", triton), ("cpp", cpp)) if load is not None}
        self._loaded: dict[str, Callable[Parameters, Result]] = {"torch": reference}
        self._best: dict[str, str] = {}
        _operations.append(self)

    def __repr__(self) -> str:
        return f"Operation({self.__name__}: {', '.join(('torch', *self._loaders))})"

    def __call__(self, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        return self.on(_device_type(args))(*args, **kwargs)

    def on(self, device_type: str) -> Callable[Parameters, Result]:
        """The implementation for a type of device, such as `"cuda"`.

        Raises:
            ValueError: `SPECTRUMKV_KERNELS` names no implementation.
            ImportError: it names one that can't be imported; ModuleNotFoundError where it is not installed.
            OSError: it names `cpp`, which can't be built here.
        """
        chosen = os.environ.get(VARIABLE) or self._best.get(device_type) or self._choose(device_type)
        if (found := self._loaded.get(chosen)) is not None:
            return found
        if chosen not in IMPLEMENTATIONS:
            raise ValueError(f"{VARIABLE}={chosen!r} names no implementation: choose from {', '.join(IMPLEMENTATIONS)}")
        return self.load(chosen)

    def load(self, implementation: str) -> Callable[Parameters, Result]:
        """An implementation by name, imported and built; the reference where the operation has none of that name.

        Raises:
            ImportError, OSError: as in `on`.
        """
        if implementation not in self._loaded:
            try:
                self._loaded[implementation] = self._loaders.get(implementation, lambda: self.reference)()
            except OSError:
                raise
            except Exception as problem:
                kind = type(problem) if isinstance(problem, ImportError) else ImportError
                what = f"the {implementation} implementation of {self.__name__} can't be loaded"
                raise kind(f"{what}: {_cause(problem)}") from problem
        return self._loaded[implementation]

    def forget(self) -> None:
        """Choose and load anew at the next call."""
        self._loaded = {"torch": self.reference}
        self._best.clear()

    def _choose(self, device_type: str) -> str:
        best = {"cuda": "triton", "cpu": "cpp"}.get(device_type)
        if best is not None and (best == "triton" or best in self._loaders):
            self._best[device_type] = best if self._usable(best) else "torch"
        else:
            self._best[device_type] = "torch"
        return self._best[device_type]

    def _usable(self, best: str) -> bool:
        if best in _unusable:
            return False
        try:
            for needed in _operations if best == "triton" else (self,):  # Triton serves all operations or none
                needed.load(best)
        except Exception as problem:
            _unusable.add(best)
            what = {"triton": "in Triton, for CUDA", "cpp": "in C++, for the CPU"}[best]
            logger.warning("SpectrumKV runs in plain torch, slower: kernels %s, can't be used (%s)", what, problem)
            return False
        if best == "cpp":
            logger.info("SpectrumKV runs %s on the CPU in compiled C++", self.__name__)
        return True


def operations() -> tuple[Operation[..., Any], ...]:
    """All operations."""
    return tuple(_operations)


def forget() -> None:
    """Forget which implementations were chosen, loaded, and found to be unusable."""
    _unusable.clear()
    for each in _operations:
        each.forget()


def _device_type(values: Iterable[Any]) -> str:
    """Of the first tensor among the positional arguments, also within tuples and lists."""
    for value in values:
        if isinstance(value, torch.Tensor):
            return value.device.type
        if isinstance(value, tuple | list) and (found := _device_type(value)):
            return found
    return ""


def _cause(problem: Exception) -> str:
    """Why an import failed, with the version of Triton where that is there."""
    version = getattr(sys.modules.get("triton"), "__version__", None)
    return f"{type(problem).__name__}: {problem}" + (f" (Triton {version})" if version else "")
