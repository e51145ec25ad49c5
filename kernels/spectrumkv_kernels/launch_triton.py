"""What the functions that launch Triton kernels share."""

import contextlib
from typing import Any

import torch
from triton.runtime.jit import JITFunction


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: this makes it the tensor's."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def shared(positions: torch.Tensor) -> bool:
    """All rows and heads have the same positions, held once."""
    return positions.stride() == (0, 0, 1)


_compiled: dict[Any, Any] = {}


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
    args: tuple[Any, ...],
    constants: tuple[Any, ...],
    known: Any = None,
    **options: int,
) -> None:
    """`kernel[grid](*args, *constants, **options)`, at a fraction of the time that Triton takes to find its code again.

    Args:
        kernel: A function of `triton.jit` that specialises on no integer but by its size.
        grid: Programs.
        args: Tensors, the first of them on the current device, numbers and tuples of them.
        constants: Values of the `tl.constexpr` parameters, which come last.
        known: `trait(args)`, or another value that differs where that does.
        options: Of the compiler.
    """
    if not isinstance(kernel, JITFunction):  # Triton's interpreter
        kernel[grid](*args, *constants, **options)
        return
    device = args[0].get_device()
    key = (kernel.fn, device, constants, tuple(options.values()), trait(args) if known is None else known)
    found = _compiled.get(key)
    if found is not None:
        found[grid](*args, *constants)
    elif (compiled := kernel[grid](*args, *constants, **options)) is not None:
        _compiled[key] = compiled
