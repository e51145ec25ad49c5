"""The operations on layers of fixed capacity as PyTorch's own, which a compiled graph keeps as they are.

`torch.ops.spectrumkv.append` and `.attend`. A layout goes by its number, because a graph holds tensors and numbers.
"""

import torch

from . import operations
from .layout import layout_of


@torch.library.custom_op("spectrumkv::append", mutates_args=("buffer", "state"))
def append(buffer: torch.Tensor, state: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layout: int) -> None:
    operations.append(buffer, state, keys, values, layout_of(layout))


@torch.library.custom_op("spectrumkv::attend", mutates_args=())
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
