"""Which tokens go to which tier, in plain PyTorch and in Triton."""

import pytest
import torch

from spectrumkv_kernels.codec import partition as reference

triton_partition = pytest.importorskip("spectrumkv_kernels.codec.triton_partition")

BOTH = pytest.mark.parametrize("implementation", [reference, triton_partition], ids=["torch", "triton"])


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@BOTH
@pytest.mark.parametrize(
    ("tokens", "counts"),
    [
        (41, [4, 0, 37, 0, 0, 0]),
        (1, [0, 1]),
        (1024, [1000, 24]),
        (1025, [3, 5, 7, 11, 13, 986]),
        (2500, [0, 0, 0, 0, 0, 2500]),
        (70, [10, 10, 10, 10, 10, 10, 10]),
        (70, [10, 10, 10, 10, 10, 10, 5, 5]),
        (4099, [11, 4088]),
    ],
)
def test_each_tier_takes_the_best_that_are_left(tokens, counts, implementation, device):
    score = randn(2, 3, tokens).mul(3).round().to(device)  # with many alike
    order = implementation.partition(score, counts, 100)
    assert (order.dtype, order.shape) == (torch.int32, score.shape)
    found = order.split(counts, dim=-1)
    for row in range(2):
        for head in range(3):
            # By the definition: Python's sort is stable.
            ranked = sorted(range(tokens), key=lambda i: -float(score[row, head, i]))
            for count, part in zip(counts, found, strict=True):
                taken, ranked = ranked[:count], ranked[count:]
                assert part[row, head].tolist() == [100 + i for i in sorted(taken)]


@BOTH
@pytest.mark.parametrize("tokens", [50, 4100])
def test_tokens_at_the_start_come_first_and_nan_counts_as_zero(tokens, implementation, device):
    score = torch.arange(tokens, dtype=torch.float32).expand(1, 2, -1).to(device)
    score = score.where(score != tokens - 1, torch.nan).contiguous()
    score[0, 1, 7], score[0, 1, 9] = torch.inf, -torch.inf
    order = implementation.partition(score, [4, 2, tokens - 8, 2], 0, 3)
    expected = [[0, 1, 2, tokens - 2], [tokens - 4, tokens - 3]], [[0, 1, 2, 7], [tokens - 3, tokens - 2]]
    for head in range(2):
        assert [part.tolist() for part in order[0, head].split([4, 2, tokens - 8, 2])[:2]] == expected[head]
    # The first of the two zeros and the one that stands for NaN, which is later than the sink of score 0.
    assert order[0, 0, -2:].tolist() == [3, tokens - 1]
    assert order[0, 1, -2:].tolist() == [9, tokens - 1]
