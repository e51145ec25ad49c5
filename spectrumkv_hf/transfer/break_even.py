"""Whether compressing a cache before it is sent pays, by the link's speed and what prefill and compression cost."""

import math
from dataclasses import dataclass

from spectrumkv_hf.policy import Lossless, Policy


@dataclass(frozen=True, kw_only=True)
class TransferCosts:
    """What a prompt's prefill costs on the sending machine, measured. Policy, length and machine change it.

    Attributes:
        fp16_bytes: Of the exact cache.
        ratio: Bytes sent after compression over `fp16_bytes` (`MemoryReport.actual_ratio`).
        prefill: Seconds of the forward without compression.
        compress: Seconds that compression adds to it.
        layers: Frames in which a streamed cache goes.
    """

    fp16_bytes: int
    ratio: float
    prefill: float
    compress: float
    layers: int

    def __post_init__(self) -> None:
        for name in ("fp16_bytes", "ratio", "prefill", "layers"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is positive, got {getattr(self, name)!r}")
        if not self.compress >= 0:
            raise ValueError(f"compress is 0 or more seconds, got {self.compress!r}")

    def seconds(self, bandwidth: float, compressed: bool, streamed: bool) -> float:
        """From the start of prefill until the receiver has the cache, over a link of `bandwidth` bytes per second.

        Sent whole: prefill, then transfer. Streamed: the last layer leaves when prefill ends, or, where the link is
        slower than prefill, the first leaves after its share of prefill and the others queue behind it.
        """
        compute = self.prefill + (self.compress if compressed else 0.0)
        transfer = self.fp16_bytes * (self.ratio if compressed else 1.0) / bandwidth
        if not streamed:
            return compute + transfer
        return max(compute + transfer / self.layers, compute / self.layers + transfer)

    def break_even(self, streamed: bool) -> float:
        """Bytes per second above which sending the exact cache is faster; infinite where it never is, 0 where always.

        Sent whole, `(1 - ratio) * fp16_bytes / compress`.
        """
        if self.ratio >= 1:
            return 0.0
        if not self.compress:
            return math.inf

        def gain(bandwidth: float) -> float:
            return self.seconds(bandwidth, False, streamed) - self.seconds(bandwidth, True, streamed)

        low, high = 1e-3, 1e18  # `gain` falls from one to the other
        for _ in range(200):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if gain(middle) > 0 else (low, middle)
        return low


def choose_policy(bandwidth: float, policy: Policy, costs: TransferCosts, streamed: bool = True) -> Policy:
    """The policy for a cache that is to be sent: the given one where the link is slow enough for it, else lossless.

    Args:
        bandwidth: Of the link, bytes per second; `TransferReport.bandwidth` of a cache that was sent whole.
        policy: What compresses.
        costs: Of this policy.
        streamed: Sent by a `CacheSender`, not whole.

    Raises:
        ValueError: `bandwidth` is not positive.
    """
    if not bandwidth > 0:
        raise ValueError(f"bandwidth is a positive number of bytes per second, got {bandwidth!r}")
    return policy if bandwidth < costs.break_even(streamed) else Lossless()
