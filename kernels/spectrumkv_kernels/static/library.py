"""The operations on layers of fixed capacity as PyTorch's own, which a compiled graph keeps as they are.

They are called as `append` and `attend` of this module, which finds them in the registry where `backend.namespace` puts
them. A layout goes by its number, because a graph holds tensors and numbers; numbers are those of this package.

`append_by_host` and `attend_by_host` are the same for layouts of which `prepare` says that steps can't be captured:
a CUDA graph ends before them, and another one begins behind.
"""

import torch

from ..backend.namespace import add_op_namespace_prefix
from . import operations
from .layout import layout_of


def _append(buffer: torch.Tensor, state: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layout: int) -> None:
    operations.append(buffer, state, keys, values, layout_of(layout))


def _attend(
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


BY_HOST = (torch.Tag.cudagraph_unsafe,)
CHANGED = ("buffer", "state")
append = torch.library.custom_op(add_op_namespace_prefix("append"), _append, mutates_args=CHANGED)
attend = torch.library.custom_op(add_op_namespace_prefix("attend"), _attend, mutates_args=())
append_by_host = torch.library.custom_op(
    add_op_namespace_prefix("append_by_host"), _append, mutates_args=CHANGED, tags=BY_HOST
)
attend_by_host = torch.library.custom_op(
    add_op_namespace_prefix("attend_by_host"), _attend, mutates_args=(), tags=BY_HOST
)
for _operation in (attend, attend_by_host):
    _operation.register_fake(_attend_fake)
