"""Errors and interrupts in the middle of an operation: nothing is half applied, or the cache refuses to go on."""

import copy
import sys
import zlib
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from families import left_padded, model, prompt
from test_store import ROTARY, layer, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from spectrumkv_hf import SpectrumCache
from spectrumkv_hf.tiered.store import TieredStore
from spectrumkv_hf.wire import ExactCopy, request
from spectrumkv_kernels import CODECS

SCALE = 32**-0.5


class FailAt(TorchDispatchMode):
    """Raises at the operation of a number, counted from 0, as one does whose result finds no memory."""

    def __init__(self, number):
        super().__init__()
        self.left = number

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.left == 0:
            raise torch.OutOfMemoryError(f"no memory for {func}")
        self.left -= 1
        return func(*args, **(kwargs or {}))


def attend(target, count, seed, mask=None):
    """What a model does with one layer in a forward."""
    keys, values = tokens(count, seed=seed)
    target.update(keys, values)
    queries = torch.randn(3, 4, count, 32, generator=torch.Generator().manual_seed(seed + 100))
    target.attended(queries, target.dense_for(target.generation)[0], mask, scale=SCALE)


def prefilled(policy="sink_protect", budget=0.3, window=None, **options):
    target = layer(policy, budget, window, **options)
    attend(target, 203, 0)
    return target


def waiting(policy="sink_protect", budget=0.3, window=None):
    """A layer of which the next token makes 64 others due."""
    target = prefilled(policy, budget, window)
    for step in range(64 - 1):
        attend(target, 1, 1 + step)
    assert target.store.tail_length == 64 + 10 - 1
    attend(target, 1, 90)
    return target


def padded():
    target = layer("sink_protect", 0.3)
    mask = torch.ones(3, 1, 203, 203, dtype=torch.bool).tril()
    for row, pads in enumerate((0, 9, 40)):
        mask[row, :, :, :pads] = False
    attend(target, 203, 0, mask)
    return target


OPERATIONS = {
    "prefill": (lambda: layer("sink_protect", 0.3), lambda t: attend(t, 203, 0)),
    "prefill_dropping": (lambda: layer("two_tier", 0.3), lambda t: attend(t, 203, 0)),
    "prefill_window": (lambda: layer("sink_protect", 0.3, 100), lambda t: attend(t, 203, 0)),
    "chunk": (prefilled, lambda t: attend(t, 150, 5)),
    "chunk_of_padded_rows": (padded, lambda t: attend(t, 150, 5)),
    "decode": (prefilled, lambda t: attend(t, 1, 5)),
    "decode_and_tier": (waiting, lambda t: attend(t, 1, 5)),
    "decode_and_tier_window": (lambda: waiting(window=150), lambda t: attend(t, 1, 5)),
    "crop_into_the_arenas": (prefilled, lambda t: t.crop(-100)),
    "crop_the_tail": (prefilled, lambda t: t.crop(-5)),
    "crop_to_nothing": (prefilled, lambda t: t.crop(-203)),
    "reorder": (prefilled, lambda t: t.reorder_cache([2, 0, 0])),
    "select": (prefilled, lambda t: t.batch_select_indices((1,))),
    "repeat": (prefilled, lambda t: t.batch_repeat_interleave(2)),
}


@contextmanager
def recorded(states):
    """Notes every state of every store; each of them is one that a failure may leave behind."""
    plain = TieredStore.__setattr__

    def record(store, name, value):
        plain(store, name, value)
        if name == "_now":
            states.append(store.dense() if value.length else None)

    TieredStore.__setattr__ = record
    try:
        yield
    finally:
        del TieredStore.__setattr__


def contents(target):
    return target.store.dense() if target.get_seq_length() else None


def same(one, other):
    if one is None or other is None:
        return one is other
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_failure_at_an_allocation_leaves_a_layer_sound(name, every, monkeypatch):
    """After it the layer holds what it held before, or after one of the operation's whole steps, bit for bit."""
    monkeypatch.setenv("SPECTRUMKV_KERNELS", "torch")  # whose every operation is seen
    make, operation = OPERATIONS[name]
    fresh = make()
    steps = [contents(fresh)]
    whole = copy.deepcopy(fresh)
    with recorded(steps):
        operation(whole)
    number = first = zlib.crc32(name.encode()) % every  # operations have many steps in common
    while True:
        target = copy.deepcopy(fresh)
        try:
            with FailAt(number):
                operation(target)
        except torch.OutOfMemoryError:
            number += every
        else:
            break
        if target.is_initialized:
            target.store.check_integrity()
        held = contents(target)
        assert any(same(held, step) for step in steps)
        # What is left open is made good at the next update; no token is lost or held twice.
        length = target.get_seq_length()
        rows = target.store.batch_size if target.is_initialized else 3
        new = [t[:rows] for t in tokens(1, batch=max(rows, 3), seed=77)]
        target.update(*new)
        target.store.check_integrity()
        assert target.get_seq_length() == length + 1
    assert number > first or name == "crop_the_tail"  # which needs no memory
    assert same(contents(target), contents(whole))
    assert (target.tier_map() == whole.tier_map()).all()


def test_a_failure_at_every_allocation_of_a_patch_leaves_the_cache_as_it_was():
    m = model("llama", "sdpa")
    cache = SpectrumCache(m.config, budget=0.3, recent_window=10)
    exact = ExactCopy(cache)
    with torch.no_grad():
        m(prompt(200, batch=2), past_key_values=cache)
    patch = exact.patch(request(cache, 0, "int8"))
    before = cache.layers[0].store.dense()
    number = 0
    while True:
        target = copy.deepcopy(cache)
        try:
            with FailAt(number):
                target.apply_patch(patch)
        except torch.OutOfMemoryError:
            number += 1
        else:
            break
        target.layers[0].store.check_integrity()
        assert same(target.layers[0].store.dense(), before)
    assert number > 1
    assert not same(target.layers[0].store.dense(), before)


# -- a whole model ----------------------------------------------------------------------------------------------------


class InterruptAt:
    """Raises KeyboardInterrupt before a line of our code of a number, counted from 0."""

    def __init__(self, number):
        self.left = number
        self.raised = False

    def __enter__(self):
        sys.settrace(self._call)

    def __exit__(self, *_):
        sys.settrace(None)

    def _call(self, frame, event, arg):
        return self._line if "spectrumkv_hf" in frame.f_code.co_filename else None

    def _line(self, frame, event, arg):
        if event == "line" and not self.raised:
            if self.left == 0:
                self.raised = True
                raise KeyboardInterrupt
            self.left -= 1
        return self._line


def before_tiering(m, **options):
    """A cache of which the next token makes 64 others due in every layer."""
    cache = SpectrumCache(m.config, policy="sink_protect", budget=0.3, recent_window=10, **options)
    with torch.no_grad():
        m(prompt(200), past_key_values=cache)
        for step in range(64):
            m(prompt(1, seed=step + 1), past_key_values=cache)
    return cache


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scope", ["head", "token"])
def test_an_interrupt_at_any_line_of_a_forward_is_no_silent_damage(scope, every):
    m = model("llama", "sdpa")
    fresh = before_tiering(m, scope=scope)
    token, after = prompt(1, seed=500), prompt(1, seed=501)
    reference = copy.deepcopy(fresh)
    with torch.no_grad():
        first = m(token, past_key_values=reference).logits
        second = m(after, past_key_values=reference).logits
        outcomes = {"before": 0, "refused": 0, "after": 0}
        number = 0
        while True:
            cache = copy.deepcopy(fresh)
            tracer = InterruptAt(number)
            try:
                with tracer:
                    m(token, past_key_values=cache)
            except KeyboardInterrupt:
                pass
            if not tracer.raised:
                break
            number += every
            for held in cache.layers:
                held.store.check_integrity()
            lengths = {held.get_seq_length() for held in cache.layers}
            if lengths == {264}:
                outcomes["before"] += 1
                assert torch.equal(m(token, past_key_values=cache).logits, first)
            elif lengths == {265}:
                outcomes["after"] += 1
                got = m(after, past_key_values=cache).logits
                assert float((got - second).norm() / second.norm()) < 0.02
            else:
                outcomes["refused"] += 1
                with pytest.raises(RuntimeError, match="a forward was interrupted. Call reset"):
                    m(after, past_key_values=cache)
                cache.reset()
                again = SpectrumCache(m.config, policy="sink_protect", budget=0.3, recent_window=10, scope=scope)
                if number % 20 == 0:  # one in twenty is enough
                    pair = [m(prompt(70), past_key_values=each).logits for each in (cache, again)]
                    assert torch.equal(*pair)
    assert min(outcomes.values()) > 0


@pytest.mark.parametrize("operation", ["crop", "reorder_cache", "batch_select_indices", "batch_repeat_interleave"])
def test_a_batch_operation_that_fails_half_way_is_refused_until_reset(operation):
    m = model("llama", "sdpa")
    cache = SpectrumCache(m.config, budget=0.3, recent_window=10)
    with torch.no_grad():
        m(prompt(200, batch=2), past_key_values=cache)
    argument = {"crop": -100, "batch_repeat_interleave": 2}.get(operation, [1, 0])
    before = [held.store.dense() for held in cache.layers]
    number, refused = 0, 0
    while True:
        target = copy.deepcopy(cache)
        try:
            with FailAt(number):
                getattr(target, operation)(argument)
        except torch.OutOfMemoryError:
            number += 1
        else:
            break
        now = [held.store.dense() for held in target.layers]
        if all(map(same, now, before)):
            continue
        refused += 1
        uses = (partial(m, prompt(1, batch=2), past_key_values=target), target.serialize, partial(target.crop, -1))
        for use in uses:
            with pytest.raises(RuntimeError, match=f"{operation} ended before.*reset"), torch.no_grad():
                use()
        target.reset()
        with torch.no_grad():
            m(prompt(20), past_key_values=target)
    assert refused and number > refused


def test_wrong_rows_change_nothing():
    m = model("llama", "sdpa")
    cache = SpectrumCache(m.config, budget=0.3, recent_window=10)
    with torch.no_grad():
        m(prompt(200, batch=2), past_key_values=cache)
        before = [held.store.dense() for held in cache.layers]
        for wrong in (lambda: cache.reorder_cache([0, 2]), lambda: cache.batch_select_indices([5])):
            with pytest.raises(IndexError):
                wrong()
        assert all(same(held.store.dense(), old) for held, old in zip(cache.layers, before, strict=True))
        m(prompt(1, batch=2), past_key_values=cache)


def test_a_callback_that_raises_leaves_a_cache_that_refuses():
    m = model("llama", "sdpa")
    cache = SpectrumCache(m.config, budget=0.3, recent_window=10)

    def fail(index):
        raise OSError("disk full")

    remove = cache.on_layer(fail)
    with torch.no_grad(), pytest.raises(OSError, match="disk full"):
        m(prompt(200), past_key_values=cache)
    remove()
    cache.layers[0].store.check_integrity()
    with torch.no_grad(), pytest.raises(RuntimeError, match="layer 0 holds 201 tokens, layer 1 would hold 1: .*reset"):
        m(prompt(1), past_key_values=cache)


def test_a_mask_for_another_number_of_tokens_is_refused():
    m = model("llama", "sdpa")
    cache = SpectrumCache(m.config, budget=0.3, recent_window=10)
    ids, mask = left_padded([200, 150])
    with torch.no_grad():
        m(ids, attention_mask=mask, past_key_values=cache)
        target = cache.layers[0]
        keys = torch.zeros(2, *target.store.buffers[0].shape[1:])[:, :, :1]
        k, v = target.update(keys, keys)
        query = torch.zeros(2, 4, 1, keys.shape[-1])
        with pytest.raises(ValueError, match="layer 0 has 201 tokens to attend to, the attention mask is for 200"):
            torch.nn.functional.scaled_dot_product_attention(query, k, v, torch.ones(2, 1, 1, 200, dtype=torch.bool))


# -- tokens that no code stands for -----------------------------------------------------------------------------------

BAD = {
    "nan": (torch.float32, float("nan")),
    "infinity": (torch.float32, float("-inf")),
    "beyond_float16": (torch.bfloat16, 1e5),
    "far_beyond": (torch.bfloat16, 3e38),
}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("policy", [("sink_protect", 0.3), ("greedy", 0.3), ("uniform_int4", None), ("two_tier", 0.3)])
@pytest.mark.parametrize("window", [None, 180], ids=["full", "window"])
def test_only_the_wrong_token_is_wrong(policy, kind, side, codec, window):
    dtype, number = BAD[kind]

    def stored(spoiled):
        target = layer(*policy, window, codec)
        keys, values = (t.to(dtype) for t in tokens(203))
        if spoiled:
            (keys if side == "key" else values)[1, 0, 120, 5] = number
        target.update(keys, values)
        target.settle()  # ranked without queries, which the token would spoil as it does in any cache
        target.store.check_integrity()
        return target, (keys, values)

    target, given = stored(True)
    healthy, _ = stored(False)
    first = target.store.first_kept
    bits = target.tier_map()
    exact = target.store.dense(first)[0 if side == "key" else 1][1, 0, 120 - first]
    put = given[0 if side == "key" else 1][1, 0, 120]
    if bits[1, 0, 120] == 16:
        assert torch.equal(exact.isfinite(), put.isfinite()) and torch.equal(exact[put.isfinite()], put[put.isfinite()])
    elif bits[1, 0, 120]:  # a scale that float16 has
        assert kind == "beyond_float16"
        assert (exact - put).abs().max() <= {8: 0.02, 4: 0.25}[int(bits[1, 0, 120])] * number
    for got, expected, put in zip(target.store.dense(first), healthy.store.dense(first), given, strict=True):
        put = put[:, :, first:]
        others = (bits[..., first:] > 0) & (healthy.tier_map()[..., first:] > 0)
        others[1, 0, 120 - first] = False
        error, usual = (got - put)[others].float().norm(), (expected - put)[others].float().norm()
        assert error <= 1.1 * usual  # NaN fails


def test_a_spoiled_token_that_left_the_window_leaves_nothing_behind():
    target = layer("uniform_int4", None, 150)
    keys, values = tokens(200)
    keys[:, :, 60, 3] = torch.nan
    target.update(keys, values)
    target.settle()
    for step in range(200):
        target.update(*tokens(1, seed=step))
        target.settle()
    target.store.check_integrity()
    assert target.keys.isfinite().all()
    assert ROTARY is target.rotary


def test_padding_that_is_not_finite_stays_out():
    target = layer("sink_protect", 0.3)
    keys, values = tokens(203)
    keys[1, :, :40] = torch.nan
    values[1, :, :40] = torch.inf
    target.update(keys, values)
    mask = torch.ones(3, 1, 203, 203, dtype=torch.bool).tril()
    mask[1, :, :, :40] = False
    target.attended(torch.randn(3, 4, 203, 32), target.dense_for(target.generation)[0], mask, scale=SCALE)
    target.store.check_integrity()
    assert target.keys[1, :, 40:].isfinite().all()
    assert (target.tier_map()[1, :, 44:150] < 16).any()
