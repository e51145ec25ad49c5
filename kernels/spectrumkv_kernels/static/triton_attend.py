"""Triton twin of `reference.attend`: the kernels of `tiered_attention`, which count tokens on the device.

So a captured graph attends to as many tokens as there are at each replay.
"""

import functools
from typing import NamedTuple

import torch

from ..attention.triton_attention import (
    FOLDED,
    Kernels,
    Work,
    check_device,
    kernels_of,
    launch,
    mask_kind,
    plan_of,
    tables,
    work_of,
)
from ..backend.launch_triton import Held
from ..codec.quantize import Quantized
from . import reference
from .layout import BASE, BLOCK, LENGTH, REFUSED, Layout
from .triton_append import prepared

COUNTED = (LENGTH, BASE, REFUSED, BLOCK)
"""Where the kernels find counts in a layer's state."""


class _Call(NamedTuple):
    """What is worked out once for layers of a layout, and queries alike.

    Attributes:
        kernels, work: How it is launched.
        centred: The mean takes part in scores.
        recent: Tokens that decoding leaves in the tail; where it tiers nothing, as many as there may be.
        order: Places of the arenas in the order of the kernel's segments.
        segments: First bytes of each segment's tensors in the buffer, as the kernel takes them.
        totals, frame: First bytes of these.
    """

    kernels: Kernels
    work: Work
    centred: bool
    recent: int
    order: tuple[int, ...]
    segments: tuple[tuple[int, ...], ...]
    totals: int
    frame: int


@functools.lru_cache(maxsize=256)
def _call(
    layout: Layout,
    heads: int,
    dtype: torch.dtype,
    device: torch.device,
    mask: str,
    window: bool,
    softcap: bool,
    sinks: bool,
) -> _Call | None:
    """None where the kernels don't do this."""
    flat, rows, rooms = layout.batch * layout.kv_heads, heads // layout.kv_heads, layout.rooms
    order = _order(layout)
    bits = _widths(layout)
    plan = plan_of(rows, layout.key_dim, layout.value_dim, bits, dtype, device)
    if plan is None:
        return None
    codec, rotary = layout.codec, layout.rotary
    centred = codec.center and plan.coded > 0
    if mask == FOLDED and (not centred or softcap):
        mask = "bool"
    tokens = (*[rooms[i].tokens for i in order], layout.ring)
    scored = layout.capacity if centred else 0
    work = work_of(plan, flat, rows, scored, tokens, tokens, (*order, 0))
    kernels = kernels_of(
        plan, codec.symmetric, codec.balanced, codec.hadamard, centred, len(rotary.inv_freq), rotary.interleaved,
        (False,) * len(bits), (False,) * len(bits), mask, False, window, layout.ragged, softcap, sinks, COUNTED,
        layout.kv_heads,
    )  # fmt: skip
    starts = {name: start for name, _, _, start in layout.places}
    segments: list[tuple[int, ...]] = []
    for i in order:
        width = rooms[i].bits
        exact = (f"{width}.keys", f"{width}.values", f"{width}.positions")
        coded = (f"{width}.keys.codes", f"{width}.values.codes", exact[2],
                 f"{width}.keys.affine", f"{width}.values.affine")  # fmt: skip
        segments.append(tuple(starts[name] for name in (exact if width == 16 else coded)))
    # The tail has no positions: the kernel knows them.
    segments.append((starts["keys"], starts["values"], starts["totals"]))
    recent = layout.recent_window if layout.tiers else layout.capacity
    return _Call(kernels, work, centred, recent, order, tuple(segments), starts["totals"], starts["frame"])


def _order(layout: Layout) -> tuple[int, ...]:
    """The arenas as the kernel takes them: coded ones first."""
    return tuple(sorted(range(len(layout.rooms)), key=lambda i: layout.rooms[i].bits == 16))


def _widths(layout: Layout) -> tuple[int, ...]:
    """Bits of the arenas in that order, and of the tail."""
    return (*[layout.rooms[i].bits for i in _order(layout)], 16)


def prepare(buffer: torch.Tensor, layout: Layout) -> bool:
    """As `reference.prepare`: the tables of the rotation."""
    appends = prepared(layout, buffer.device) is not None
    if layout.codec.center and layout.tiers:
        tables(layout.capacity, layout.rotary, buffer.device)
    dims = layout.key_dim, layout.value_dim
    return appends and plan_of(1, *dims, _widths(layout), layout.dtype, buffer.device) is not None


def attend(
    query: torch.Tensor,
    buffer: torch.Tensor,
    state: torch.Tensor,
    layout: Layout,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `reference.attend`, up to the rounding of queries and weights to 11 bits for coded tokens.

    The host waits for nothing and reads no count, and a captured graph reads those of the time when it is replayed.
    """
    device, query = query.device, query.contiguous()
    call = _call(
        layout, query.shape[1], query.dtype, device, _kind(mask), window is not None and mask is None,
        softcap is not None, sinks is not None,
    )  # fmt: skip
    if call is None:
        return reference.attend(
            query, buffer, state, layout, scale=scale, mask=mask, window=window, softcap=softcap, sinks=sinks
        )
    check_device("buffer", buffer, device)
    check_device("state", state, device)
    first = buffer.data_ptr()
    return launch(
        call.kernels,
        call.work,
        query,
        Held(functools.partial(_segments, layout, call.order, buffer), _addresses(call.segments, first)),
        sizes=call.work.sizes,
        kv_heads=layout.kv_heads,
        value_dim=layout.value_dim,
        length=layout.capacity,
        scale=scale,
        frame=Held(functools.partial(_view, layout, buffer, "frame"), first + call.frame) if call.centred else None,
        rotary=layout.rotary,
        mask=mask,
        window=window,
        softcap=softcap,
        sinks=sinks,
        # Tensors begin at multiples of 16 bytes from the first one.
        traits=(call.work.trait, query.dtype, query.data_ptr() % 16, layout.dtype, first % 16, state.data_ptr() % 16),
        counts=state,
        totals=Held(functools.partial(_view, layout, buffer, "totals"), first + call.totals),
        recent=call.recent,
    )


def _kind(mask: torch.Tensor | None) -> str:
    kind = mask_kind(mask)
    return FOLDED if mask is not None and kind == "bool" and mask.shape[1] == 1 else kind


@functools.lru_cache(maxsize=1024)
def _addresses(starts: tuple[tuple[int, ...], ...], first: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(first + start for start in segment) for segment in starts)


def _segments(layout: Layout, order: tuple[int, ...], buffer: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], ...]:
    """The tensors of each segment, as the kernel takes them."""
    views = layout.views(buffer)
    segments: list[tuple[torch.Tensor, ...]] = []
    for i in order:
        _, keys, values, positions = views.arenas[i]
        if isinstance(keys, Quantized) and isinstance(values, Quantized):
            segments.append((keys.codes, values.codes, positions, keys.affine, values.affine))
        elif isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor):
            segments.append((keys, values, positions))
    return (*segments, (views.keys, views.values, views.totals))


def _view(layout: Layout, buffer: torch.Tensor, name: str) -> torch.Tensor:
    return getattr(layout.views(buffer), name)
