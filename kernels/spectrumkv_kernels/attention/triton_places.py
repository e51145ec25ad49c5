"""Which program does what."""

import triton
import triton.language as tl
from triton.language.extra.cuda import smid

from .triton_dot import PACKED as COMPILED


@triton.jit
def processor_of(number):
    """The multiprocessor of the `number`th program; the interpreter gives them out in turn."""
    return smid() if COMPILED else number


@triton.jit
def place_of(tickets, processor, many, own, PROCESSORS: tl.constexpr):
    """A place in `[0, many)` for this program: each of `many` gets another.

    Each of the `PROCESSORS` has `own` places, one after another, and what is left lies behind, for whoever comes later.
    `tickets`, int32 `[PROCESSORS + 1]`, count who came, from 0 on. Where a multiprocessor gets fewer programs than it
    has places, as when it is not free, the last programs of others look for these.
    """
    at = processor % PROCESSORS
    room = own
    ticket = tl.atomic_add(tickets + at, 1, sem="relaxed")
    if ticket >= room:
        at = tl.maximum(at, PROCESSORS)
        room = many - PROCESSORS * own
        ticket = tl.atomic_add(tickets + at, 1, sem="relaxed")
    while ticket >= room:
        lane = tl.arange(0, triton.next_power_of_2(PROCESSORS))
        taken = tl.load(tickets + lane, mask=lane < PROCESSORS, other=2147483647, volatile=True)
        at = tl.argmin(taken, axis=0)
        room = own
        ticket = tl.atomic_add(tickets + at, 1, sem="relaxed")
    return at * own + ticket
