"""Every operation on a tiered layer equals the same operation on its dequantised contents, exactly."""

import copy
import pickle

import pytest
import torch

from spectrumkv_hf.policy import FP16, INT4, INT8, get_policy
from spectrumkv_hf.tiered.layer import SpectrumLayer
from spectrumkv_hf.tiered.sliding_layer import SlidingSpectrumLayer
from spectrumkv_kernels import CODECS, Rotary

ROTARY = Rotary(tuple((1e4 ** -(torch.arange(0, 32, 2) / 32)).tolist()))
POLICIES = {
    "fp16": ("fp16", None),
    "sink_protect": ("sink_protect", 0.3),
    "balanced": ("balanced", 0.5),
    "greedy_above_half": ("greedy", 0.7),
    "two_tier_dropping": ("two_tier", 0.3),
    "drop_window": ("drop_window", 0.5),
    "uniform_int4": ("uniform_int4", None),
}


def layer(policy="sink_protect", budget=None, window=None, codec="spectrum", **options):
    kwargs = {"policy": get_policy(policy, budget, recent_window=10, **options), "codec": CODECS[codec]}
    kwargs["rotary"] = ROTARY
    return SpectrumLayer(**kwargs) if window is None else SlidingSpectrumLayer(window, **kwargs)


def tokens(count, batch=3, seed=0, heads=2, dim=32):
    """Keys with a constant part before RoPE, and values."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, heads, count, dim, generator=generator)
    keys = keys + ROTARY.rotate(torch.full((dim,), 3.0), torch.arange(count))
    return keys, torch.randn(batch, heads, count, dim, generator=generator)


def feed(target, count, batch=3, seed=0, mask=None):
    """Add tokens, then let attention take note, as a model would."""
    keys, values = tokens(count, batch, seed)
    target.update(keys, values)
    queries = torch.randn(batch, 4, count, 32, generator=torch.Generator().manual_seed(seed + 100))
    seen = target.dense_for(target.generation)[0]
    target.attended(queries, seen, mask, scale=32**-0.5)
    return keys, values


def filled(policy, budget, window=None):
    target = layer(policy, budget, window)
    feed(target, 203)
    for step in range(3):
        feed(target, 1, seed=step + 1)
    return target


@pytest.fixture(params=POLICIES)
def target(request):
    return filled(*POLICIES[request.param])


def assert_same(target, keys, values):
    assert torch.equal(target.store.dense()[0], keys)
    assert torch.equal(target.store.dense()[1], values)
    assert target.get_seq_length() == keys.shape[2]


def test_contents_are_close_to_what_was_put_in():
    target = layer("sink_protect", 0.3)
    keys, values = feed(target, 203)
    bits = target.tier_map()
    for tier, error in ((FP16, 0.0), (INT8, 0.01), (INT4, 0.15)):
        where = bits == tier.bits
        assert where.any()
        for got, put in ((target.store.dense()[0], keys), (target.store.dense()[1], values)):
            assert (got - put)[where].abs().max() <= error * put[where].abs().max()


def test_counts_and_pinned_tokens():
    target = layer("sink_protect", 0.3)
    feed(target, 203)
    bits = target.tier_map()
    tiered = 203 - 10
    int8 = int((tiered - 4) / 5)
    for head in bits.flatten(0, 1):
        assert (head[:4] == 16).all()
        assert (head[-10:] == 16).all()
        assert [(head[4:-10] == n).sum().item() for n in (16, 8, 4)] == [0, int8, tiered - 4 - int8]


def test_higher_scores_get_more_bits():
    target = layer("greedy", 0.3)
    target.update(*tokens(203))
    score = torch.rand(3, 2, 193)
    target.store.confirm(target.store.tier(193, target.policy, score))
    bits = target.tier_map()[..., 4:193]
    for scores, tier in zip(score[..., 4:].flatten(0, 1), bits.flatten(0, 1), strict=True):
        assert scores[tier == 8].min() > scores[tier == 4].max()


@pytest.mark.parametrize("index", [[2, 0, 0], [1, 1, 1], [0, 1, 2]])
def test_reorder(target, index):
    keys, values = target.store.dense()
    index = torch.tensor(index)
    target.reorder_cache(index)
    assert_same(target, keys[index], values[index])


def test_select_and_repeat(target):
    keys, values = target.store.dense()
    target.batch_select_indices(torch.tensor([2, 1]))
    assert_same(target, keys[[2, 1]], values[[2, 1]])
    target.batch_repeat_interleave(2)
    assert_same(target, keys[[2, 2, 1, 1]], values[[2, 2, 1, 1]])


@pytest.mark.parametrize("removed", [0, 1, 2, 12, 13, 14, 50, 150, 202, 205, 206, 300])
def test_crop_any_number(target, removed):
    """13 tokens lie in the tail, so the numbers cross its border and run down to nothing."""
    keys, values = target.store.dense()
    target.crop(-removed)
    left = max(206 - removed, 0)
    assert_same(target, keys[:, :, :left], values[:, :, :left])


def test_crop_by_a_tensor(target):
    """Transformers 5.17 passes one; it must not become the layer's length, which is added to in place."""
    for _ in range(2):
        target.crop(torch.tensor(-20))
        feed(target, 1)
    assert target.get_seq_length() == 206 - 2 * 19
    assert target.store.dense()[0].shape[2] == 168
    assert isinstance(target.get_seq_length(), int)


def test_crop_then_go_on(target):
    """After cuts into the arenas rows and heads hold different numbers of each tier."""
    keys, values = target.store.dense()
    target.crop(-77)
    more = feed(target, 1, seed=50)
    assert_same(target, torch.cat((keys[:, :, :129], more[0]), 2), torch.cat((values[:, :, :129], more[1]), 2))
    for step in range(80):  # until new tokens are tiered
        feed(target, 1, seed=60 + step)
    assert torch.equal(target.store.dense()[0][:, :, :129], keys[:, :, :129])
    before = target.store.dense()[0]
    target.crop(-100)
    assert torch.equal(target.store.dense()[0], before[:, :, :-100])
    target.reorder_cache(torch.tensor([1, 2, 0]))
    assert torch.equal(target.store.dense()[0], before[[1, 2, 0], :, :-100])


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_equal_and_apart(target, clone):
    keys, values = target.store.dense()
    other = clone(target)
    assert_same(other, keys, values)
    feed(target, 1, seed=9)
    target.crop(-20)
    assert_same(other, keys, values)
    feed(other, 1, seed=9)
    assert other.get_seq_length() == 207


def test_reset_forgets_everything(target):
    target.reset()
    assert target.get_seq_length() == 0
    assert target.keys is None
    keys, _ = feed(target, 40, batch=2)
    assert torch.equal(target.store.dense()[0], keys)


def test_tokens_are_quantised_once():
    target = layer("sink_protect", 0.3)
    feed(target, 203)
    keys = target.store.dense()[0][:, :, :193]
    for step in range(200):
        feed(target, 1, seed=step)
    assert torch.equal(target.store.dense()[0][:, :, :193], keys)
    assert target.store.tail_length <= 10 + 64


@pytest.mark.parametrize("codec", CODECS)
def test_chunks_keep_the_documented_counts(codec):
    target = layer("sink_protect", 0.3, codec=codec)
    for chunk, count in enumerate((90, 100, 1, 120, 77)):
        feed(target, count, seed=chunk)
    bits = target.tier_map()[..., : target.store.tail_start]
    expected = target.policy.counts(target.store.tail_start)
    for head in bits.flatten(0, 1):
        assert {n: (head == n).sum().item() for n in (16, 8, 4)} == {t.bits: n for t, n in expected.items()}


def test_padded_rows_get_the_tiers_of_unpadded_ones():
    """Each row's real tokens are tiered as if the row were alone; padding only fills arenas up."""
    lengths = (203, 150, 120)
    longest = max(lengths)
    keys, values = tokens(longest)
    queries = torch.randn(3, 4, longest, 32)
    positions = torch.arange(longest)
    mask = (positions[:, None] >= positions).repeat(3, 1, 1, 1)
    for row, length in enumerate(lengths):
        mask[row, :, :, : longest - length] = False
    together = layer("sink_protect", 0.3)
    together.update(keys, values)
    together.attended(queries, keys, mask, scale=32**-0.5)
    for row, length in enumerate(lengths):
        alone = layer("sink_protect", 0.3)
        part = slice(longest - length, longest)
        alone.update(keys[row : row + 1, :, part], values[row : row + 1, :, part])
        alone.attended(queries[row : row + 1, :, part], keys[row : row + 1, :, part], None, scale=32**-0.5)
        assert torch.equal(together.tier_map()[row, :, part], alone.tier_map()[0])
        # The slots are shifted, so means and residuals differ in the last bits and a code in a million may flip.
        for got, expected in ((together.keys, alone.keys), (together.values, alone.values)):
            flipped = (got[row, :, part] - expected[0]).abs() > 1e-4
            assert flipped.float().mean() < 1e-3


def test_padding_longer_than_a_chunk():
    """A row may begin after the first tiering; its sinks are its own first tokens."""
    target = layer("sink_protect", 0.3)
    start, begins = 0, 150
    for chunk in (120, 110):
        keys, values = tokens(chunk, batch=2, seed=start)
        mask = (torch.arange(start, start + chunk)[:, None] >= torch.arange(start + chunk)).repeat(2, 1, 1, 1)
        mask[1, :, :, :begins] = False
        target.update(keys, values)
        seen = target.dense_for(target.generation)[0]
        target.attended(torch.randn(2, 4, chunk, 32), seen, mask, scale=32**-0.5)
        start += chunk
    bits = target.tier_map()
    assert (bits[1, :, begins : begins + 4] == 16).all()
    assert (bits[0, :, :4] == 16).all()
    expected = target.policy.counts(target.store.tail_start - begins)
    real = bits[1, :, begins : target.store.tail_start]
    for head in real:
        assert {n: (head == n).sum().item() for n in (16, 8, 4)} == {t.bits: n for t, n in expected.items()}
    # Both rows have the constant 3 in their keys before RoPE, whenever they begin.
    assert (target.store.frame[0] - 3).abs().mean() < 0.3
    offset = ROTARY.rotate(target.store.frame[1], torch.tensor([120]))  # its keys count from its chunk
    assert (offset - 3).abs().mean() < 0.5


def test_cropped_to_nothing_is_as_new(target):
    target.crop(-206)
    fresh = layer(target.policy.name, target.policy.budget)
    for seed in (3, 4):
        for used in (target, fresh):
            feed(used, 150, seed=seed)
    assert torch.equal(target.store.dense()[0], fresh.store.dense()[0])


class TestSliding:
    WINDOW = 160

    def test_contents_and_mask_sizes_are_those_of_the_stock_layer(self):
        from transformers.cache_utils import DynamicSlidingWindowLayer

        ours, stock = layer("greedy", 1.0, self.WINDOW), DynamicSlidingWindowLayer(self.WINDOW)
        for chunk, count in enumerate((50, 100, 30, 250, 1, 1, 70, 1)):
            assert ours.get_mask_sizes(count) == stock.get_mask_sizes(count)
            keys, values = tokens(count, seed=chunk)
            expected = stock.update(keys, values)
            ours.update(keys, values)
            got = ours.dense_for(ours.generation)
            assert torch.equal(got[0], expected[0])
            assert torch.equal(got[1], expected[1])
            ours.attended(torch.randn(3, 4, count, 32), got[0], None, scale=1.0)
            assert torch.equal(ours.keys, stock.keys)
            assert ours.get_seq_length() == stock.get_seq_length()

    @pytest.mark.parametrize(("policy", "budget"), [("sink_protect", 0.3), ("balanced", 0.5), ("two_tier", 0.3)])
    def test_what_left_the_window_is_freed(self, policy, budget):
        target = layer(policy, budget, self.WINDOW)
        feed(target, 400)
        sizes = []
        for step in range(300):
            feed(target, 1, seed=step)
            sizes.append(sum(t.numel() * t.element_size() for _, t in target.store.tensors()))
        held = sum(len(arena) for arena in target.store.arenas.values())
        assert held + target.store.tail_length <= self.WINDOW + 64 + 48  # a step's worth, and uneven heads
        assert max(sizes[150:]) <= 1.1 * max(sizes[:150])

    @pytest.mark.parametrize("removed", [0, 1, 5, 20, 63])
    def test_crop_with_the_past_recorded(self, removed):
        target = layer("sink_protect", 0.3, self.WINDOW)
        feed(target, 300)
        target.activate_past_recording()
        feed(target, 64, seed=1)
        all_keys = target.store.dense(target.store.first_kept)[0]
        target.crop(-removed)
        first = 364 - removed - self.WINDOW + 1
        expected = all_keys[:, :, first - (364 - all_keys.shape[2]) : all_keys.shape[2] - removed]
        assert torch.equal(target.keys, expected)

    def test_crop_without_a_record_is_refused(self):
        target = layer("sink_protect", 0.3, self.WINDOW)
        feed(target, 400)
        length, keys = target.get_seq_length(), target.keys
        with pytest.raises(RuntimeError, match="activate_past_recording"):
            target.crop(-5)
        assert target.get_seq_length() == length
        assert torch.equal(target.keys, keys)

    def test_batch_operations(self):
        target = filled("sink_protect", 0.3, self.WINDOW)
        keys = target.keys
        target.reorder_cache(torch.tensor([2, 2, 0]))
        assert torch.equal(target.keys, keys[[2, 2, 0]])


def test_a_key_that_is_a_view_keeps_no_larger_storage():
    qkv = torch.randn(3, 4, 50, 32)
    target = layer("fp16")
    target.update(qkv[:, :2], qkv[:, 2:])
    for _, tensor in target.store.tensors():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_int4_bytes_are_a_quarter():
    target = layer("uniform_int4")
    feed(target, 203)
    codes = target.store.arenas[INT4].keys.codes
    assert codes.dtype == torch.uint8
    assert codes.shape == (3, 2, 193, 16)
