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
