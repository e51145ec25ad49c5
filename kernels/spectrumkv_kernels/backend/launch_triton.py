"""What the functions that launch Triton kernels share."""

import contextlib
import functools
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction

DIRECT = frozenset(("3.6.0",))
"""Versions of Triton on which its own launcher was called, on a GPU, as `launch` does: it has no promised interface."""


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: this makes it the tensor's."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def shared(positions: torch.Tensor) -> bool:
    """All rows and heads have the same positions, held once."""
    return positions.stride() == (0, 0, 1)


class Held(NamedTuple):
    """Tensors that a kernel takes as tuples, and their addresses in tuples alike.

    Attributes:
        tensors, addresses: Alike nested.
    """

    tensors: tuple[Any, ...]
    addresses: tuple[Any, ...]

    def data_ptr(self) -> tuple[Any, ...]:
        """The addresses, by the name that tensors have for theirs."""
        return self.addresses


_compiled: dict[Any, tuple[Any, Any, Any]] = {}


@functools.cache
def direct() -> bool:
    """Whether `launch` may call Triton's launcher itself: on the versions where that was tested."""
    return triton.__version__.partition("+")[0] in DIRECT


def trait(arg: Any) -> Any:
    """What of an argument decides which code is compiled, where its value does not."""
    kind = type(arg)
    if kind is int:
        return -(1 << 31) <= arg < 1 << 31
    if kind is tuple:
        return tuple(map(trait, arg))
    return kind if kind is float else (arg.dtype, arg.data_ptr() % 16)


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[Any, ...],
    numbers: tuple[Any, ...],
    constants: tuple[Any, ...],
    known: Any = None,
    **options: int,
) -> None:
    """`kernel[grid](*tensors, *numbers, *constants, **options)`, at a fraction of the time that Triton takes for it.

    Code that was compiled before is not looked up anew, Triton's hooks for profilers are not called, and the driver is
    not asked whether tensors lie on the device: the caller has to know. On versions of Triton that are not in `DIRECT`,
    and in its interpreter, it is that call, with the same results.

    Args:
        kernel: A function of `triton.jit` that specialises on no integer but by its size.
        grid: Programs.
        tensors: The first parameters, tensors or `Held`; the first of all is a tensor on the current device.
        numbers: Integers and floats, and tuples of them.
        constants: Values of the `tl.constexpr` parameters, which come last.
        known: `trait(tensors + numbers)`, or another value that differs where that does.
        options: Of the compiler.
    """
    if not direct() or not isinstance(kernel, JITFunction):  # the interpreter's functions are none
        _plain(kernel, grid, tensors, numbers, constants, options)
        return
    device = tensors[0].get_device()
    if known is None:
        known = trait((*tensors, *numbers))
    key = (kernel.fn, device, constants, tuple(options.values()), known)
    found = _compiled.get(key)
    if found is None:
        compiled = _plain(kernel, grid, tensors, numbers, constants, options)
        if compiled is not None:
            _compiled[key] = (compiled.run, compiled.function, compiled.packed_metadata)
        return
    run, function, metadata = found
    stream = driver.active.get_current_stream(device)
    addresses = [tensor.data_ptr() for tensor in tensors]
    run(*grid, stream, function, metadata, None, None, None, *addresses, *numbers, *constants)


def _plain(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[Any, ...],
    numbers: tuple[Any, ...],
    constants: tuple[Any, ...],
    options: dict[str, int],
) -> Any:
    """Triton's public way; returns the code that it ran."""
    given = [tensor.tensors if type(tensor) is Held else tensor for tensor in tensors]
    return kernel[grid](*given, *numbers, *constants, **options)
