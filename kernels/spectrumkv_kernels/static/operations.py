"""The operations on layers of fixed capacity with their implementations."""

from collections.abc import Callable
from typing import Any

from ..backend.dispatch import Operation
from . import reference


def _triton_prepare() -> Callable[..., Any]:
    from . import triton_attend

    return triton_attend.prepare


def _triton_append() -> Callable[..., Any]:
    from . import triton_append

    return triton_append.append


def _triton_attend() -> Callable[..., Any]:
    from . import triton_attend

    return triton_attend.attend


prepare = Operation(reference.prepare, triton=_triton_prepare)
append = Operation(reference.append, triton=_triton_append)
attend = Operation(reference.attend, triton=_triton_attend)
