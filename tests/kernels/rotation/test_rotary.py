import pytest
import torch
from reference import error, frequencies, rotated, rotations

from spectrumkv_kernels import Rotary
from spectrumkv_kernels.backend.tensor_cache import keep_longest
from spectrumkv_kernels.rotation import rotary as rotary_module
from spectrumkv_kernels.rotation.rotary import LARGEST_TABLE

PAIRING = pytest.mark.parametrize("interleaved", [False, True], ids=["half_split", "interleaved"])
CHANNELS = pytest.mark.parametrize(
    ("channels", "pairs"), [(16, 8), (2, 1), (20, 3), (80, 10), (7, 2)], ids=lambda n: str(n)
)
POSITIONS = torch.tensor([0, 1, 2, 63, 77, 2047, 2048, 4097, 131071, 200000])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@PAIRING
@CHANNELS
def test_rotate_equals_rotation_matrix(channels, pairs, interleaved):
    rotary = Rotary(frequencies(pairs), interleaved)
    x = randn(2, 3, len(POSITIONS), channels)
    turned = rotary.rotate(x, POSITIONS)
    expected = rotated(rotary, x, POSITIONS)
    assert turned.dtype == torch.float32
    assert error(turned, expected) < 2e-7
    assert torch.allclose(turned.double(), expected, rtol=0, atol=2e-6)  # every position, the last included
    assert torch.equal(turned[..., 2 * pairs :], x[..., 2 * pairs :])


@PAIRING
@CHANNELS
def test_inverse_undoes(channels, pairs, interleaved):
    rotary = Rotary(frequencies(pairs), interleaved)
    x = randn(2, 3, len(POSITIONS), channels)
    assert error(rotary.rotate(rotary.rotate(x, POSITIONS), POSITIONS, inverse=True), x) < 2e-7
    transposed = rotations(rotary, POSITIONS, channels).transpose(-1, -2)
    expected = (transposed @ x.double().unsqueeze(-1)).squeeze(-1)
    assert error(rotary.rotate(x, POSITIONS, inverse=True), expected) < 2e-7


@PAIRING
def test_few_positions_far_ahead(interleaved, monkeypatch):
    """No table is made for them, and the bits are those of the table."""
    made, table = [], rotary_module._table.__wrapped__
    monkeypatch.setattr(rotary_module, "_table", keep_longest(2048)(lambda *args: made.append(args[0]) or table(*args)))
    rotary = Rotary(frequencies(64, theta=1e4 + interleaved), interleaved)
    positions = torch.arange(LARGEST_TABLE - 100, LARGEST_TABLE + 300)
    x, query, mean = randn(400, 128), randn(2, 3, 128, seed=1), randn(2, 128, seed=2)
    length, start = int(positions[-1]) + 1, int(positions[0])
    turned, scores = rotary.rotate(x, positions), rotary.scores(query, mean, length, start)
    assert not made
    everywhere = rotary.rotate(x[-1:], torch.arange(length))  # as many positions as a table has
    assert made == [2 * LARGEST_TABLE]
    assert torch.equal(turned[-1], everywhere[-1])
    assert torch.equal(rotary.rotate(x[-1:], positions), everywhere[start:])
    assert error(scores, rotary.scores(query, mean, length)[..., start:]) < 1e-6
    rotary.rotate(x, torch.full((400,), (1 << 24) - 1))
    assert made == [2 * LARGEST_TABLE]


@PAIRING
def test_whole_head(interleaved):
    rotary = Rotary(frequencies(64, theta=1e6), interleaved)
    x, positions = randn(3, 128), torch.tensor([1, 100, 3000])
    assert error(rotary.rotate(x, positions), rotated(rotary, x, positions)) < 2e-7


@PAIRING
def test_negative_positions_count_as_zero(interleaved):
    rotary = Rotary(frequencies(4), interleaved)
    x = randn(2, 3, 3, 10)
    positions = torch.tensor([-1, -70000, 5], dtype=torch.int32)
    assert torch.equal(rotary.rotate(x, positions), rotary.rotate(x, torch.tensor([0, 0, 5])))
    assert error(rotary.rotate(x, positions)[..., :2, :], x[..., :2, :]) < 1e-7


@PAIRING
def test_positions_of_each_row_and_head(interleaved):
    rotary = Rotary(frequencies(5), interleaved)
    x = randn(2, 3, 7, 12)
    positions = torch.randint(0, 3000, (2, 3, 7), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    assert error(rotary.rotate(x, positions), rotated(rotary, x, positions)) < 2e-7


@PAIRING
@pytest.mark.parametrize("pairs", [0, 4, 6])
def test_one_vector_at_every_position(pairs, interleaved):
    rotary = Rotary(frequencies(pairs), interleaved)
    x = randn(2, 3, 1, 12)
    positions = torch.randint(0, 3000, (2, 3, 7), generator=torch.Generator().manual_seed(2))
    turned = rotary.rotate(x, positions)
    assert error(turned, rotated(rotary, x.expand(2, 3, 7, 12), positions)) < 2e-7


@PAIRING
@pytest.mark.parametrize("pairs", [0, 4])
def test_no_tokens(pairs, interleaved):
    rotary = Rotary(frequencies(pairs), interleaved)
    assert rotary.rotate(randn(2, 3, 0, 12), torch.zeros(0, dtype=torch.int32)).shape == (2, 3, 0, 12)
    assert rotary.rotate(randn(2, 3, 1, 12), torch.zeros(2, 3, 0, dtype=torch.int32)).shape == (2, 3, 0, 12)


def test_no_frequencies_is_identity():
    x, positions = randn(2, 3, len(POSITIONS), 6), POSITIONS
    assert torch.equal(Rotary().rotate(x, positions), x)
    assert torch.equal(Rotary().rotate(x, positions, inverse=True), x)


@PAIRING
@pytest.mark.parametrize(("channels", "pairs"), [(16, 8), (20, 3), (6, 0)], ids=["whole", "partial", "none"])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000, 3000])
def test_scores(length, channels, pairs, interleaved):
    rotary = Rotary(frequencies(pairs), interleaved)
    matrices = rotations(rotary, torch.arange(length), channels)
    for shape, rows in (((), 1), ((1, 2), 3), ((3, 1), 5)):
        query, mean = randn(*shape, rows, channels, seed=length), 3 * randn(*shape, channels, seed=length + 1)
        expected = torch.einsum("...rc,tcd,...d->...rt", query.double(), matrices, mean.double())
        scores = rotary.scores(query, mean, length)
        assert scores.dtype == torch.float32
        assert error(scores, expected) < 1e-6
        # The last position by itself; one score may be what is left of terms that cancel, hence by their size.
        size = query.double().norm(dim=-1) * mean.double().norm(dim=-1, keepdim=True)
        assert ((scores[..., -1] - expected[..., -1]).abs() / size).max() < 1e-6


def test_table_grows_between_calls():
    """Frequencies that no other test has, so that the first table is the smallest."""
    rotary = Rotary((0.9, 0.31, 0.0007))
    query, mean = randn(2, 6), randn(6, seed=1)
    for length in (5, 2048, 2049, 5000, 7):
        matrices = rotations(rotary, torch.arange(length), 6)
        expected = torch.einsum("rc,tcd,d->rt", query.double(), matrices, mean.double())
        assert error(rotary.scores(query, mean, length), expected) < 1e-6


@PAIRING
def test_scores_agree_with_rotate(interleaved):
    rotary = Rotary(frequencies(6), interleaved)
    query, mean = randn(2, 3, 4, 14), randn(2, 3, 14, seed=1)
    turned = rotary.rotate(mean.unsqueeze(-2), torch.arange(100))
    assert error(rotary.scores(query, mean, 100), query.double() @ turned.double().transpose(-1, -2)) < 1e-6


@PAIRING
@pytest.mark.parametrize("step", [128, 256])
def test_steps_make_every_turn(step, interleaved):
    """A coarse angle and a fine one add up to that of the position; both are exact to float32."""
    rotary, length, device = Rotary(frequencies(8), interleaved), 70_000, torch.device("cpu")
    steps = rotary.steps(step, length, device)
    assert steps.dtype == torch.float32 and len(steps) >= step + -(-length // step)
    cos, sin = steps.double().chunk(2, dim=-1)
    turns = torch.complex(cos, sin)
    positions = torch.arange(length)
    angles = positions.double()[:, None] * torch.tensor(frequencies(8), dtype=torch.float64)
    found = turns[positions % step] * turns[step + positions // step]
    assert bool(((found - torch.polar(torch.ones(1, dtype=torch.float64), angles)).abs() < 2e-7).all())
    assert torch.equal(rotary.table(length, device)[: step + 1], torch.cat((steps[:step], steps[step + 1][None])))
