"""Packed positions: tiles of 64 tokens, with a byte for the step to each."""

import pytest
import torch

from spectrumkv_kernels.segment import START, TILE, can_pack, pack_positions, packing_gains, unpack_positions


def ascending(tokens, most, seed=0, start=0):
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, most + 1, (2, 3, tokens), generator=generator, dtype=torch.int32)
    return steps.cumsum(-1, dtype=torch.int32) - 1 + start


@pytest.mark.parametrize("tokens", [18, 63, 64, 65, 127, 128, 129, 1000])
@pytest.mark.parametrize("most", [1, 2, 255])
def test_round_trip(tokens, most):
    positions = ascending(tokens, most, start=200_000)
    assert can_pack(positions) and packing_gains(tokens)
    packed = pack_positions(positions)
    assert (packed.dtype, packed.shape) == (torch.uint8, (2, 3, -(-tokens // TILE), START + TILE))
    assert packed.numel() < 4 * positions.numel()
    assert torch.equal(unpack_positions(packed, tokens), positions)


def test_layout():
    positions = torch.cat((torch.arange(70, 134), torch.tensor([1000, 1003]))).int().expand(1, 1, -1)
    first, second = pack_positions(positions)[0, 0].tolist()
    assert first == [70, 0, 0, 0, 0, *[1] * 63]
    assert second == [1000 & 255, 1000 >> 8, 0, 0, 0, 3, *[0] * 62]


@pytest.mark.parametrize("batch", [0, 1])
def test_nothing_to_pack(batch):
    assert not can_pack(torch.zeros(batch, 2, 0, dtype=torch.int32))
    assert not packing_gains(0) and not packing_gains(17)  # 68 bytes either way
    assert packing_gains(18) and packing_gains(65)


def test_what_does_not_fit_a_byte_stays_plain():
    positions = ascending(200, 3)
    positions[1, 2, 70:] += 256
    assert not can_pack(positions)
    positions[1, 2, 70:] -= 256
    positions[1, 2, 64:] += 10_000  # at the beginning of a tile a step may be of any size
    assert can_pack(positions)
    assert torch.equal(unpack_positions(pack_positions(positions), 200), positions)


def test_places_without_a_token_stay_plain():
    positions = ascending(200, 3)
    positions[0, 1, 0] = -1
    assert not can_pack(positions)
