"""Who is told of what happens to a layer."""

from collections.abc import Callable
from typing import Generic, ParamSpec

Told = ParamSpec("Told")


class Listeners(Generic[Told]):
    """Functions that are called one after another, in the order in which they were added; what one raises comes out.

    Attributes:
        some: Whether there are any; a plain attribute, which compilers can follow.

    A copy, as `deepcopy` and `pickle` make it, has none: who listens to a layer does not listen to its copies.
    """

    def __init__(self) -> None:
        self._all: dict[object, Callable[Told, None]] = {}
        self.some = False

    def add(self, listener: Callable[Told, None]) -> Callable[[], None]:
        """Call `listener` from now on.

        Returns:
            A function that ends this; it may be called more than once.
        """
        key = object()
        self._all[key] = listener
        self.some = True

        def remove() -> None:
            self._all.pop(key, None)
            self.some = bool(self._all)

        return remove

    def __call__(self, *args: Told.args, **kwargs: Told.kwargs) -> None:
        if not self._all:
            return
        for listener in tuple(self._all.values()):
            listener(*args, **kwargs)

    def __bool__(self) -> bool:
        return bool(self._all)

    def __reduce__(self) -> tuple[type["Listeners[Told]"], tuple[()]]:
        return type(self), ()
