"""How Triton kernels are launched: all of them by a `Launcher`, with their arguments by name."""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction

DIRECT = frozenset(("3.6.0",))
"""Versions of Triton on which its own launcher was called on a GPU as `Launcher` does. It has no promised interface."""


def cdiv(number: int, by: int) -> int:
    """Rounded up. As `triton.cdiv`, which takes thirty times as long outside kernels."""
    return -(-number // by)


def next_power_of_2(number: int) -> int:
    """The least power of 2 that is no less than a positive number; see `cdiv`."""
    return 1 << (number - 1).bit_length()


_STAYS = contextlib.nullcontext()


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: this makes it the tensor's."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _STAYS
    return torch.cuda.device(tensor.device)


def strides_of(of: str, strides: Sequence[int]) -> dict[str, int]:
    """Strides of the first dimensions, by the names of a kernel's parameters."""
    return {f"{of}_{name}": stride for name, stride in zip(("batch", "head", "token"), strides, strict=False)}


def shared(positions: torch.Tensor) -> bool:
    """All rows and heads have the same positions, held once."""
    return positions.stride() == (0, 0, 1)


class Held(NamedTuple):
    """A tensor or tuples of tensors, as a kernel takes them, and the addresses in tuples alike.

    Attributes:
        tensors: Or a function that makes them, where they are not there yet: most launches need only the addresses.
        addresses: Nested as the tensors are.
    """

    tensors: torch.Tensor | tuple[Any, ...] | Callable[[], Any]
    addresses: Any

    def data_ptr(self) -> Any:
        """The addresses, by the name that tensors have for theirs."""
        return self.addresses

    def made(self) -> Any:
        """The tensors."""
        return self.tensors() if callable(self.tensors) else self.tensors


@functools.cache
def direct() -> bool:
    """Whether a `Launcher` may call Triton's launcher itself: on the versions where that was tested."""
    return triton.__version__.partition("+")[0] in DIRECT


def trait(arg: Any) -> Any:
    """What of an argument decides which code is compiled, where its value does not."""
    kind = type(arg)
    if kind is int:
        return -(1 << 31) <= arg < 1 << 31
    if kind is tuple:
        return tuple(map(trait, arg))
    if kind is Held:
        return trait(arg.made())
    return kind if kind is float else (arg.dtype, arg.data_ptr() % 16)


def special(arg: Any) -> Any:
    """`trait` of an argument, or None, for kernels that specialise on values: by whether it is 1 or divisible by 16."""
    if type(arg) is int:
        return (arg == 1) | (arg % 16 == 0) << 1 | (-(1 << 31) <= arg < 1 << 31) << 2  # one number is quickly compared
    return None if arg is None else trait(arg)


def alignments(tensors: Sequence[torch.Tensor | None]) -> tuple[int | None, ...]:
    """What of tensors decides which code is compiled, where their types are known."""
    return tuple([None if tensor is None else tensor.data_ptr() % 16 for tensor in tensors])


class Launcher:
    """A kernel with its constants. A call is `kernel[grid](**tensors, **numbers, **constants, **options)`.

    Arguments are given by name, in the order of the kernel's parameters. That is checked whenever Triton's public way
    is taken, so at the first launch in any case; here alone does an order stand for names.

    Args:
        kernel: A function of `triton.jit`.
        constants: Values of its `tl.constexpr` parameters, which come last.
        options: Of the compiler.
    """

    def __init__(self, kernel: Any, constants: Mapping[str, Any], **options: int) -> None:
        self._kernel, self._constants, self._options = kernel, constants, options
        self._values = tuple(constants.values())
        self._compiled: dict[Any, tuple[Any, Any, Any]] = {}

    def __call__(
        self, grid: tuple[int, ...], tensors: Mapping[str, Any], numbers: Mapping[str, Any], known: Any = None
    ) -> None:
        """Launch it, with `known` at a fraction of the time that Triton takes for that.

        Code that was compiled before is not looked up anew then, Triton's hooks for profilers are not called, and the
        driver is not asked whether tensors lie on the device: the caller has to know. Without, on versions of Triton
        that are not in `DIRECT`, and in its interpreter, Triton is called in its public way, with the same results.

        Args:
            grid: Programs; three numbers with `known`.
            tensors: The first parameters: tensors, None, tuples of them or `Held`. With `known` all are tensors, None
                or `Held`, and the first of all is a tensor on the current device.
            numbers: The next ones: integers and floats, None, and tuples of them.
            known: `trait` of the tensors and numbers, or another value that differs where that does, for a kernel that
                specialises on no integer but by its size.

        Raises:
            TypeError: the names are not those of the kernel's parameters, in their order.
        """
        if known is None or not direct() or not self.compiles:
            self._launch_publicly(grid, tensors, numbers)
            return
        values = tensors.values()
        device = next(iter(values)).get_device()
        ready = self.ready(grid, numbers, device, known)
        if ready is None:
            compiled = self._launch_publicly(grid, tensors, numbers)
            if compiled is not None:
                self._compiled[device, known] = (compiled.run, compiled.function, compiled.packed_metadata)
            return
        run, behind = ready
        run(*[None if tensor is None else tensor.data_ptr() for tensor in values], *behind)

    @property
    def compiles(self) -> bool:
        """Whether Triton compiles the kernel, which its interpreter does not."""
        return isinstance(self._kernel, JITFunction)

    def ready(
        self, grid: tuple[int, ...], numbers: Mapping[str, Any], device: int, known: Any
    ) -> tuple[Callable[..., None], tuple[Any, ...]] | None:
        """What launches code that was compiled before: called with the tensors' addresses and then the second value.

        On the current stream. None where there is none for what is `known`.
        """
        found = self._compiled.get((device, known))
        if found is None:
            return None
        run, function, metadata = found
        stream = driver.active.get_current_stream(device)
        first = functools.partial(run, *grid, stream, function, metadata, None, None, None)
        return first, (*numbers.values(), *self._values)

    def _launch_publicly(self, grid: tuple[int, ...], tensors: Mapping[str, Any], numbers: Mapping[str, Any]) -> Any:
        """By Triton's public way; returns the code that it ran."""
        given, kernel = [*tensors, *numbers, *self._constants], self._kernel
        if given != kernel.arg_names:
            name = kernel.fn.__name__
            raise TypeError(f"{name} takes {', '.join(kernel.arg_names)}; given were {', '.join(given)}")
        values = [tensor.made() if type(tensor) is Held else tensor for tensor in tensors.values()]
        return kernel[grid](*values, *numbers.values(), *self._values, **self._options)


Launch = tuple[Launcher, tuple[int, ...], tuple[str, ...], Mapping[str, Any]]
"""Of a `Series`: the launcher, the grid of three numbers, the names of its tensors and then those of the numbers that
come with each call, and the numbers that stay."""


class Series:
    """Launches of kernels one after the other, of which all but the tensors and few numbers is kept.

    Args:
        launches: In their order.
    """

    def __init__(self, launches: Sequence[Launch]) -> None:
        self._launches = launches
        self._compiles = all(launcher.compiles for launcher, *_ in launches)
        self._ready: dict[Any, list[Any]] = {}
        self._none = ((),) * len(launches)

    def __call__(
        self, tensors: Sequence[Sequence[Any]], known: Any, numbers: Sequence[tuple[Any, ...]] | None = None
    ) -> None:
        """Launch them all, as their launchers do.

        Args:
            tensors: Of each launch, in the order of the names; otherwise as `Launcher` takes them with `known`.
            known: As there, of all launches together.
            numbers: Of each launch those that come with the call, in the order of the names behind those of tensors.
        """
        numbers = self._none if numbers is None else numbers
        key = None
        if self._compiles and direct():
            device = tensors[0][0].get_device()
            key = device, driver.active.get_current_stream(device), known
            if (ready := self._ready.get(key)) is not None:
                for (run, behind), given, new in zip(ready, tensors, numbers, strict=True):
                    run(*[None if tensor is None else tensor.data_ptr() for tensor in given], *new, *behind)
                return
        for (launcher, grid, names, kept), given, new in zip(self._launches, tensors, numbers, strict=True):
            mine = dict(zip(names, (*given, *new), strict=True))
            of_tensors = {name: mine.pop(name) for name in names[: len(given)]}
            launcher(grid, of_tensors, {**mine, **kept}, known)
        if key is not None:
            made = [launcher.ready(grid, kept, device, known) for launcher, grid, _, kept in self._launches]
            if None not in made:
                self._ready[key] = made


class _Kept(NamedTuple):
    """A launcher with what is known of the numbers that it was given.

    Attributes:
        traits: `special` of numbers, by their values and types: layers with as many tokens have the same.
    """

    launcher: Launcher
    traits: dict[Any, Any]


KEPT_TRAITS = 256
"""Numbers for which a kernel's `special` is kept; then they are forgotten."""
_launchers: dict[Any, _Kept] = {}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Mapping[str, "torch.Tensor | Held | None"],
    numbers: Mapping[str, int | float | None],
    constants: Mapping[str, Any],
    **options: int,
) -> None:
    """Launch a kernel, which may specialise on numbers, by a `Launcher` that is kept for these constants and options.

    Args:
        tensors: On one device, the current one; the first of them is not None.
    """
    key = id(kernel), *constants.values(), *options.values()
    kept = _launchers.get(key)
    if kept is None:
        kept = _launchers[key] = _Kept(Launcher(kernel, constants, **options), {})
    values = tuple(numbers.values())
    same = *values, *map(type, values)  # 1 and 1.0 are equal, and not the same code
    traits = kept.traits.get(same)
    if traits is None:
        if len(kept.traits) >= KEPT_TRAITS:
            kept.traits.clear()
        traits = kept.traits[same] = tuple(map(special, values))
    known = traits, tuple([None if tensor is None else trait(tensor) for tensor in tensors.values()])
    kept.launcher((*grid, *(1,) * (3 - len(grid))), tensors, numbers, known)
