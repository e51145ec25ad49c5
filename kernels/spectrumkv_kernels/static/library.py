"""The operations on layers of fixed capacity as PyTorch's own, which a compiled graph keeps as they are.

They are called as `append` and `attend` of this module, which finds them in the registry where `backend.namespace` puts
them. A layout goes by its number, because a graph holds tensors and numbers; numbers are those of this package.
"""

import torch

from ..backend.namespace import add_op_namespace_prefix
from . import operations
from .layout import layout_of


@torch.library.custom_op(add_op_namespace_prefix("append"), mutates_args=("buffer", "state"))
def append(buffer: torch.Tensor, state: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layout: int) -> None:
    operations.append(buffer, state, keys, values, layout_of(layout))


@torch.library.custom_op(add_op_namespace_prefix("attend"), mutates_args=())
def attend(
    query: torch.Tensor,
    buffer: torch.Tensor,
    state: torch.Tensor,
    layout: int,
    scale: float,
    mask: torch.Tensor | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    return operations.attend(
        query,
        buffer,
        state,
        layout_of(layout),
        scale=scale,
        mask=mask,
        window=window,
        softcap=softcap,
        sinks=sinks,
    )


@attend.register_fake
def _attend_fake(
    query: torch.Tensor,
    buffer: torch.Tensor,
    state: torch.Tensor,
    layout: int,
    scale: float,
    mask: torch.Tensor | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    batch, heads, queries, _ = query.shape
    return query.new_empty(batch, heads, queries, layout_of(layout).value_dim)
