"""When compressing before a transfer pays."""

import math

import pytest

from spectrumkv_hf import get_policy
from spectrumkv_hf.transfer.break_even import TransferCosts, choose_policy

COSTS = TransferCosts(fp16_bytes=100_000_000, ratio=0.5, prefill=4.0, compress=1.0, layers=20)


def test_break_even_of_a_cache_sent_whole():
    assert COSTS.break_even(streamed=False) == pytest.approx(50e6)
    assert COSTS.seconds(50e6, compressed=False, streamed=False) == pytest.approx(6.0)
    assert COSTS.seconds(50e6, compressed=True, streamed=False) == pytest.approx(6.0)


def test_streaming_hides_the_transfer_on_fast_links():
    """Behind prefill only a layer's share is left; on slow links prefill of the first layer comes before it all."""
    assert COSTS.seconds(1e9, compressed=False, streamed=True) == pytest.approx(4 + 0.1 / 20)
    assert COSTS.seconds(1e6, compressed=False, streamed=True) == pytest.approx(4 / 20 + 100)


@pytest.mark.parametrize("streamed", [False, True])
def test_policy_changes_at_the_break_even(streamed):
    policy, at = get_policy("greedy", 0.5), COSTS.break_even(streamed)
    assert choose_policy(at * 0.99, policy, COSTS, streamed) is policy
    assert choose_policy(at * 1.01, policy, COSTS, streamed).lossless
    for bandwidth in (at * 0.9, at * 1.1):
        exact, compressed = (COSTS.seconds(bandwidth, c, streamed) for c in (False, True))
        assert (compressed < exact) == (bandwidth < at)


def test_extremes():
    free = TransferCosts(fp16_bytes=10, ratio=0.5, prefill=1.0, compress=0.0, layers=2)
    assert free.break_even(streamed=False) == math.inf
    useless = TransferCosts(fp16_bytes=10, ratio=1.1, prefill=1.0, compress=0.1, layers=2)
    assert choose_policy(1.0, get_policy("greedy"), useless).lossless
    with pytest.raises(ValueError, match="bandwidth is a positive number"):
        choose_policy(0.0, get_policy("greedy"), COSTS)
    with pytest.raises(ValueError, match="prefill is positive"):
        TransferCosts(fp16_bytes=10, ratio=0.5, prefill=0.0, compress=0.1, layers=2)
