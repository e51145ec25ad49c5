"""Seeded faults between the two ends of a transfer; `chaos_files` has those of files.

A plan names the operations that are to fail, by kind of operation and number, and counts what really failed. Wrappers
of the transports ask it at each operation.
"""

import os
import queue
import random
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from spectrumkv_hf import SpectrumCache
from spectrumkv_hf.transfer import CacheReceiver, TransferError, send_cache
from spectrumkv_hf.transfer.transport import HEAD_BYTES, TransportError, stalled

FAULTS = {
    "send": ("drop", "cut", "flip", "stall", "duplicate", "reorder", "full", "die"),
    "head": ("cut", "flip", "stall", "die"),
    "payload": ("cut", "flip", "stall", "die"),
    "answer": ("drop", "cut", "flip", "stall", "duplicate", "reorder", "die"),
    "hear": ("drop", "cut", "flip", "stall", "duplicate", "reorder", "die"),
}
"""Operations of transports and how each can fail. A receiver answers a frame, and a sender hears the answer."""
PATIENCE = 30.0
"""Seconds of a transfer that is to succeed, on a busy machine too."""

_counting = threading.Lock()


class Fault(NamedTuple):
    """What befalls operation `at`, counted from 0, of its kind."""

    operation: str
    at: int
    kind: str


class Died(BaseException):
    """A process that ends here: nothing catches it, and it does nothing more."""


class Plan:
    """Which operations fail, and how.

    Args:
        faults: One at most for each operation.
        seed: Of what else is random: which bit is flipped.

    Attributes:
        happened: Faults that were really injected, by operation and kind.
        counts: Operations, by their kind.
        overtime: By how many seconds a transport exceeded a timeout.
    """

    def __init__(self, faults: Iterable[Fault] = (), seed: int = 0) -> None:
        self._faults = {(fault.operation, fault.at): fault.kind for fault in faults}
        self._seed = seed
        self.happened: Counter[tuple[str, str]] = Counter()
        self.counts: Counter[str] = Counter()
        self.overtime = 0.0

    def due(self, operation: str, able: bool = True) -> str | None:
        """What is to befall this operation now; None: nothing, or it is not `able` to fail."""
        with _counting:
            at = self.counts[operation]
            self.counts[operation] += 1
            kind = self._faults.get((operation, at)) if able else None
            if kind is not None:
                self.happened[operation, kind] += 1
            return kind

    def random(self, operation: str) -> random.Random:
        """For the fault of the operation that was counted last."""
        return random.Random(f"{self._seed} {operation} {self.counts[operation]}")

    def flipped(self, operation: str, data: bytes) -> bytes:
        """A copy with one bit flipped."""
        changed, rng = bytearray(data), self.random(operation)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed)


def each_fault(counts: Mapping[str, int], kinds: Mapping[str, Iterable[str]]) -> list[Fault]:
    """Every kind of fault at every one of so many operations."""
    return [Fault(op, at, kind) for op, count in counts.items() for at in range(count) for kind in kinds[op]]


def mixture(rng: random.Random, faults: list[Fault], most: int = 4) -> list[Fault]:
    """Some of these faults."""
    return rng.sample(faults, rng.randint(1, most))


# -- wrappers ---------------------------------------------------------------------------------------------------------


class ChaosEnd:
    """What both wrappers have: the transport, the plan and the end of the process."""

    def __init__(self, inner: Any, plan: Plan) -> None:
        self.inner, self.peer, self._plan, self._dead = inner, inner.peer, plan, False

    def _due(self, operation: str, timeout: float) -> str | None:
        if self._dead:
            raise Died
        kind = self._plan.due(operation)
        if kind == "stall":
            time.sleep(1.5 * timeout)
        elif kind == "die":
            self.inner.close()
            self._dead = True
            raise Died
        elif kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return kind

    def _pass(self, method: str, *arguments: Any) -> Any:
        """Call the transport's method, whose last argument is its timeout, and note by how much it was exceeded."""
        began = time.monotonic()
        try:
            return getattr(self.inner, method)(*arguments)
        finally:
            self._plan.overtime = max(self._plan.overtime, time.monotonic() - began - arguments[-1])

    def close(self) -> None:
        self.inner.close()


class ChaosSender(ChaosEnd):
    """A sending transport on which frames and answers suffer."""

    def __init__(self, inner: Any, plan: Plan) -> None:
        super().__init__(inner, plan)
        self._held: list[torch.Tensor] = []  # frames to be sent after the next one
        self._heard: deque[bytes] = deque()  # answers to be given again, or later

    def send(self, frame: torch.Tensor, timeout: float) -> None:
        kind = self._due("send", timeout)
        late, self._held = self._held, []
        frames = [frame]
        if kind == "full":
            self.inner.close()
            raise TransportError("no space left on the device")
        if kind == "cut":
            frames = [frame[: HEAD_BYTES + max((len(frame) - HEAD_BYTES) // 2, 1)]]
        elif kind == "flip":
            frames = [tensor(self._plan.flipped("send", frame.numpy().tobytes()))]
        elif kind == "duplicate":
            frames = [frame, frame]
        elif kind in ("drop", "reorder"):
            frames = []
            self._held = [frame] if kind == "reorder" else []
        for each in (*frames, *late):
            self._pass("send", each, timeout)

    def receive_reply(self, timeout: float) -> bytes:
        kind = self._due("hear", timeout)
        if self._heard:
            return self._heard.popleft()
        reply = self._pass("receive_reply", timeout)
        if kind == "drop":
            return self._pass("receive_reply", timeout)
        if kind == "duplicate":
            self._heard.append(reply)
        elif kind == "reorder":
            self._heard.append(reply)
            return self._pass("receive_reply", timeout)
        return altered(self._plan, "hear", kind, reply)


class ChaosReceiver(ChaosEnd):
    """A receiving transport on which what arrives, and answers, suffer."""

    def __init__(self, inner: Any, plan: Plan) -> None:
        super().__init__(inner, plan)
        self._held: list[bytes] = []

    def receive_head(self, timeout: float) -> bytes:
        kind = self._due("head", timeout)
        return altered(self._plan, "head", kind, self._pass("receive_head", timeout))

    def receive_payload(self, size: int, device: torch.device, timeout: float) -> torch.Tensor:
        kind = self._due("payload", timeout)
        payload = self._pass("receive_payload", size, device, timeout)
        if kind not in ("cut", "flip"):
            return payload
        return tensor(altered(self._plan, "payload", kind, payload.numpy().tobytes()))

    def reply(self, reply: bytes, timeout: float) -> None:
        kind = self._due("answer", timeout)
        late, self._held = self._held, []
        replies = [altered(self._plan, "answer", kind, reply)]
        if kind == "duplicate":
            replies *= 2
        elif kind in ("drop", "reorder"):
            replies, self._held = [], [reply] if kind == "reorder" else []
        for each in (*replies, *late):
            self._pass("reply", each, timeout)


def altered(plan: Plan, operation: str, kind: str | None, data: bytes) -> bytes:
    """The bytes after the fault, if it is one that changes them."""
    if kind == "flip":
        return plan.flipped(operation, data)
    return data[: len(data) // 2] if kind == "cut" else data


def tensor(data: bytes) -> torch.Tensor:
    """As uint8 `[bytes]`."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


# -- a transport in memory --------------------------------------------------------------------------------------------


class QueueEnd:
    """Both ends of a connection within this process, over two queues: what the protocol asks for, and nothing else."""

    def __init__(self, peer: str, incoming: queue.SimpleQueue, outgoing: queue.SimpleQueue) -> None:
        self.peer, self._incoming, self._outgoing = peer, incoming, outgoing
        self._closed_by = ""
        self._payload = torch.empty(0)

    def send(self, frame: torch.Tensor, timeout: float) -> None:
        self._put(frame.clone())

    def receive_reply(self, timeout: float) -> bytes:
        return self._get(timeout)

    def receive_head(self, timeout: float) -> bytes:
        frame = self._get(timeout)
        self._payload = frame[HEAD_BYTES:].clone()
        return frame[:HEAD_BYTES].numpy().tobytes()

    def receive_payload(self, size: int, device: torch.device, timeout: float) -> torch.Tensor:
        self._check_open()
        return self._payload

    def reply(self, reply: bytes, timeout: float) -> None:
        self._put(reply)

    def close(self) -> None:
        self._fail(f"this side closed the connection to {self.peer}")

    def _put(self, message: Any) -> None:
        self._check_open()
        self._outgoing.put(message)

    def _get(self, timeout: float) -> Any:
        self._check_open()
        try:
            message = self._incoming.get(timeout=timeout)
        except queue.Empty:
            raise self._fail(stalled(self.peer, timeout)) from None
        if message is None:
            raise self._fail(f"lost {self.peer}")
        return message

    def _check_open(self) -> None:
        if self._closed_by:
            raise TransportError(self._closed_by)

    def _fail(self, why: str) -> TransportError:
        if not self._closed_by:
            self._closed_by = why
            self._outgoing.put(None)
        return TransportError(self._closed_by)


def queue_ends() -> tuple[QueueEnd, QueueEnd]:
    """Sender and receiver."""
    there, back = queue.SimpleQueue[Any](), queue.SimpleQueue[Any]()
    return QueueEnd("the receiver", back, there), QueueEnd("the sender", there, back)


# -- what becomes of a transfer ---------------------------------------------------------------------------------------


@dataclass
class Side:
    """What one side came to: a result, or an error."""

    result: Any = None
    error: BaseException | None = None

    @property
    def usable(self) -> bool:
        """Whether it says that the connection serves another transfer."""
        return self.error is None or getattr(self.error, "group_usable", False)

    def bare(self) -> "Side":
        """What can be sent to another process; it holds nothing open."""
        if self.error is not None:
            self.error.__traceback__ = self.error.__cause__ = self.error.__context__ = None
        return Side(self.result if isinstance(self.result, bytes) else None, self.error)

    @classmethod
    def of(cls, act: Any) -> "Side":
        """What a function comes to."""
        try:
            return cls(result=act())
        except BaseException as problem:
            return cls(error=problem)


@dataclass
class Tally:
    """What a run came to.

    Attributes:
        cases: Transfers, or uses of a store, with faults.
        right: Those whose result was complete and bit-equal all the same.
        refused: Those that ended in the error which the documentation names, or in a miss.
        wrong: What must not be, in words: wrong results and errors that are not documented.
        hangs: Cases that went on beyond their time.
        left: What was left behind, in words.
        faults: Those injected, by operation and kind.
    """

    name: str
    cases: int = 0
    right: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    faults: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __str__(self) -> str:
        return (
            f"chaos, {self.name}: {self.cases} cases, {self.faults.total()} faults injected, {self.right} right, "
            f"{self.refused} refused, wrong answers {len(self.wrong)}, hangs {len(self.hangs)}, "
            f"left behind {len(self.left)}"
        )

    def check(self, kinds: Mapping[str, Iterable[str]], right: bool = True) -> None:
        """Nothing wrong, no hang, nothing left; every kind of fault, and errors, and `right` results where asked."""
        print(self)
        assert not self.wrong and not self.hangs and not self.left, [self.wrong[:5], self.hangs[:5], self.left[:5]]
        missing = [(op, kind) for op, each in kinds.items() for kind in each if not self.faults[op, kind]]
        assert not missing, missing
        assert self.refused and (self.right or not right)


def send_side(
    cache: SpectrumCache, transport: Any, timeout: float, in_flight: int = 2, key: bytes | None = None
) -> Side:
    """What sending comes to."""
    return Side.of(lambda: send_cache(cache, transport, timeout=timeout, in_flight=in_flight, key=key))


def receive_side(config: Any, transport: Any, timeout: float, key: bytes | None = None) -> Side:
    """What receiving comes to; the result is the cache's bytes."""
    receiver = CacheReceiver(transport, config, timeout=timeout, key=key)
    return Side.of(lambda: receiver.receive().serialize().numpy().tobytes())


def judge(tally: Tally, case: Any, plan: Plan, sent: Side, received: Side, expected: bytes) -> None:
    """Count a transfer by a plan; of a side that died there is nothing to say."""
    tally.cases += 1
    tally.faults += plan.happened
    for name, side in (("sender", sent), ("receiver", received)):
        if not isinstance(side.error, TransferError | Died | None):
            tally.wrong.append(f"{case}: the {name} raised {side.error!r}")
    if received.error is None and received.result != expected:
        tally.wrong.append(f"{case}: a wrong cache")
    if sent.error is None and received.error is None:
        tally.right += 1
        return
    tally.refused += 1
    # A receiver that fails to answer twice has answered once.
    if sent.error is None and ("answer", "duplicate") not in plan.happened:
        tally.wrong.append(f"{case}: the sender was told that all is there, the receiver raised {received.error!r}")


def twice(plan: Plan) -> bool:
    """Whether something came twice."""
    return any(kind == "duplicate" for _, kind in plan.happened)


def judge_next(tally: Tally, case: Any, plan: Plan, sent: Side, received: Side, expected: bytes) -> None:
    """Count the clean transfer after it over the same connection, of which both sides said that it serves.

    What came twice may lie unread there. Then the connection ends, and both sides say so.
    """
    if sent.error is None and received.result == expected:
        return
    if not twice(plan) or sent.usable or not isinstance(received.error, TransferError):
        tally.wrong.append(f"{case}, the transfer after it: {sent.error!r}, {received.error!r}")
