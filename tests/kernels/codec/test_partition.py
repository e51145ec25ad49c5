"""Which tokens go to which tier, in plain PyTorch and in Triton."""

import pytest
import torch

from spectrumkv_kernels.codec import partition as reference
from spectrumkv_kernels.codec.quantize import sound

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


@BOTH
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [(64, 64), (10, 6), (24, None)])
def test_frames_are_fitted_by_tokens_that_are_sound(dims, dtype, padded, implementation, device):
    tokens, start, least = 75, 6, 4
    keys = randn(2, 3, tokens + 2, dims[0]).to(dtype)[:, :, :tokens]
    values = None if dims[1] is None else randn(2, tokens, 3, dims[1], seed=1).to(dtype).transpose(1, 2)
    keys[0, 1, 20, 3], keys[1, 2, 40, -1] = torch.nan, -torch.inf
    if dtype != torch.float16:
        keys[0, 0, 33, 0] = 65536.0  # what float16 does not hold
        keys[0, 0, 34, 0] = 65280.0  # of which bfloat16 has no nearer one
    if values is not None:
        values[1, 0, 50, 2] = torch.inf
    pads = torch.tensor([0, 9]) if padded else None
    place = lambda t: None if t is None else t.to(device)  # noqa: E731
    weights = implementation.fitting_weights(place(keys), place(values), start, least, place(pads)).cpu()
    expected = torch.ones(2, tokens, dtype=torch.bool)
    expected[0, 20] = expected[1, 40] = False
    if dtype != torch.float16:
        expected[0, 33] = False
    if values is not None:
        expected[1, 50] = False
    if padded:
        expected[1, : 9 + least - start] = False
    assert weights.dtype == torch.float32
    assert torch.equal(weights, expected.float())
    assert torch.equal(sound(keys) | ~expected, torch.ones_like(expected))
