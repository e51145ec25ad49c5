"""What reads keep from step to step holds only while tokens come to the same tensors."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from test_store import ROTARY, layer
from test_store import tokens as on_cpu

from spectrumkv_hf.policy import INT4, INT8
from spectrumkv_hf.tiered.store import Arena
from spectrumkv_kernels import encode
from spectrumkv_kernels.backend.dispatch import VARIABLE
from spectrumkv_kernels.segment import Growing

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tokens(count, seed):
    return [t.to(DEVICE) for t in on_cpu(count, seed=seed)]


def feed(target, count, seed=0):
    """Add tokens, then let attention take note, as a model would."""
    target.update(*tokens(count, seed))
    queries = torch.randn(3, 4, count, 32, generator=torch.Generator().manual_seed(seed + 100)).to(DEVICE)
    target.attended(queries, target.dense_for(target.generation)[0], None, scale=0.2)


def lifted(target):
    """The first INT4 token of each row and head, in INT8."""
    store = target.store
    positions = store.arenas[INT4].positions[..., :1].contiguous()
    keys, values = (t[:, :, : store.tail_start].contiguous() for t in store.dense())
    arena = Arena(INT8, *encode(keys, values, positions, 8, store.codec, store.frame, ROTARY), positions)
    wanted = torch.zeros(keys.shape[:3], dtype=torch.bool, device=DEVICE).scatter_(2, positions.long(), True)
    target.lift(wanted, arena)


def through_the_cpu(target):
    """As offloading does it: other tensors of the same contents."""
    target.store.map(torch.clone)


CHANGES = {
    "token": lambda target: feed(target, 1, seed=11),
    "chunk_without_room": lambda target: target.update(*tokens(100, 12)),
    "chunk_that_is_tiered": lambda target: feed(target, 100, seed=13),
    "crop_the_tail": lambda target: target.crop(-5),
    "crop_and_go_on": lambda target: (target.crop(-5), target.update(*tokens(2, 14))),
    "crop_into_the_arenas": lambda target: target.crop(-80),
    "reorder": lambda target: target.reorder_cache([2, 0, 1]),
    "lift": lifted,
    "other_tensors": through_the_cpu,
    "adopt": lambda target: target.adopt(layer_with(100).store),
}


def layer_with(count):
    target = layer("sink_protect", 0.3)
    feed(target, count)
    feed(target, 1, seed=1)
    return target


def assert_read_is_right(target):
    query = torch.randn(3, 4, 1, 32, generator=torch.Generator().manual_seed(7)).to(DEVICE)
    with pytest.MonkeyPatch.context() as kernels:
        kernels.setenv(VARIABLE, "triton")
        out = target.read(query, None, 0.2)
    keys, values = (t.repeat_interleave(2, 1) for t in target.store.dense())
    expected = torch.softmax(query @ keys.mT * 0.2, -1) @ values
    assert (out - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize("change", CHANGES)
def test_a_read_after_a_change_sees_it(change):
    target = layer_with(203)
    assert_read_is_right(target)
    CHANGES[change](target)
    assert_read_is_right(target)
    feed(target, 1, seed=15)
    assert_read_is_right(target)


def test_steps_up_to_and_past_a_tiering():
    target = layer_with(203)
    before = target.store.tail_start
    for step in range(70):
        feed(target, 1, seed=20 + step)
        if step % 16 == 0 or target.store.tail_start > before:
            assert_read_is_right(target)
            before = target.store.tail_start
    assert before > 193


def test_it_is_kept_while_tokens_come_to_the_same_tensors():
    target = layer_with(203)
    kept = target.store.growing()
    for _ in range(3):
        feed(target, 1)
        assert target.store.growing() is kept
        assert [s.tokens for s in kept] == [s.tokens for s in target.store.segments()]
        for mine, theirs in zip(kept, target.store.segments(), strict=True):
            assert torch.equal(mine.positions, theirs.positions)
    target.crop(-1)
    assert target.store.growing() is kept
    target.reorder_cache([0, 1, 2])
    assert target.store.growing() is not kept


@pytest.mark.parametrize("change", ["chunk_without_room", "crop_into_the_arenas", "reorder", "lift", "other_tensors"])
def test_what_is_kept_keeps_no_tensor_alive_that_was_replaced(change):
    target = layer_with(203)
    assert_read_is_right(target)
    assert target.store.growing().known
    old = weakref.ref(target.store.arenas[INT4].keys.codes if change == "lift" else target.store.buffers[0])
    CHANGES[change](target)
    gc.collect()
    assert old() is None


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda target: pickle.loads(pickle.dumps(target))])
def test_a_copy_reads_its_own_tensors(clone):
    target = layer_with(203)
    assert_read_is_right(target)
    other = clone(target)
    feed(target, 1, seed=30)
    feed(other, 1, seed=31)
    assert_read_is_right(other)
    assert_read_is_right(target)


def test_growing_is_a_sequence_of_what_is_there():
    segments = layer_with(203).store.segments()
    grown = Growing(segments[:-1], segments[-1])
    grown.tokens = 4
    assert len(grown) == len(segments) and grown[-1].tokens == 4 and grown[:-1] == tuple(segments[:-1])
