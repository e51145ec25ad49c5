"""Tensors that are kept from call to call, such as tables which all layers and caches share.

Each function whose results are kept has a bound, and `clear_caches` forgets the results of all of them: a process that
has unloaded its model gets the memory back. `functools.cache` stays for what holds no tensor.
"""

import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

Result = TypeVar("Result")
Function = TypeVar("Function", bound=Callable[..., Any])

_clearers: list[Callable[[], None]] = []


def clear_caches() -> None:
    """Forget every tensor that the kernels keep between calls; what is needed again is made again.

    Not while CUDA graphs that were captured over these operations are still to be replayed: they read the tables.
    """
    for clear in _clearers:
        clear()


def keep(count: int) -> Callable[[Function], Function]:
    """Keep the last `count` results of a function of hashable arguments, as `functools.lru_cache` does."""

    def decorate(function: Function) -> Function:
        kept = functools.lru_cache(maxsize=count)(function)
        _clearers.append(kept.cache_clear)
        return kept  # type: ignore[return-value]  # it is called alike

    return decorate


def keep_longest(smallest: int, count: int = 16) -> Callable[[Callable[..., Result]], "Longest[Result]"]:
    """Keep of a function `table(length, *key)` the longest table of each key, which serves all shorter lengths.

    The function is called with `smallest`, or the power of two that `length` needs, so that a table which grows token
    by token is seldom made anew.

    Args:
        smallest: Length of a table at least.
        count: Keys that are kept; the one that came first goes first.
    """
    return lambda table: Longest(table, smallest, count)


class Longest(Generic[Result]):
    """A function as `keep_longest` makes it."""

    def __init__(self, table: Callable[..., Result], smallest: int, count: int) -> None:
        functools.update_wrapper(self, table)
        self._table, self._smallest, self._count = table, smallest, count
        self._kept: dict[Any, tuple[int, Result, bool]] = {}
        self._captured: dict[int, Result] = {}
        _clearers.append(self.cache_clear)

    def __call__(self, length: int, *key: Any) -> Result:
        known = self._kept.get(key)
        if known is None or known[0] < length:
            known = self._grown(length, key)
        if known[2] and torch.cuda.is_current_stream_capturing():
            # The graph has the table's address, and will read it there after a longer one has taken its place.
            self._captured[id(known[1])] = known[1]
        return known[1]

    def _grown(self, length: int, key: Any) -> tuple[int, Result, bool]:
        self._kept.pop(key, None)  # before the next one is made: the two need not be there at once
        while len(self._kept) >= self._count:
            del self._kept[next(iter(self._kept))]
        made = max(self._smallest, 1 << (length - 1).bit_length())
        on_cuda = any(isinstance(part, torch.device) and part.type == "cuda" for part in key)
        self._kept[key] = made, self._table(made, *key), on_cuda
        return self._kept[key]

    def cache_clear(self) -> None:
        """Forget all tables."""
        self._kept.clear()
        self._captured.clear()
