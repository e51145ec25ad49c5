"""Which tests of Triton kernels run in the interpreter, where a case takes about a second; how work is shared out."""

from collections import Counter

import pytest
import torch

EVERY = {
    "test_masks": 4,
    "test_window_and_softcap": 2,
    "test_frames_and_one_byte_scales": 3,
    "test_options_with_frames": 2,
    "test_widths": 2,
    "test_counts_around_tiles_of_few_bits": 2,
    "test_dense_where_every_position_has_a_token": 2,
    "test_dense_with_dropped_tokens": 2,
    "test_repeated_calls_are_bit_equal": 3,
    "test_many_splits_of_the_keys": 2,
}
"""Tests of many cases of one kind: the interpreter runs every n-th of them, a GPU and `make test-slow` all."""


@pytest.hookimpl(tryfirst=True)  # before the marker is looked for
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    seen: Counter[tuple[str, str]] = Counter()
    for item in items:
        name = getattr(item, "originalname", item.name)
        if item.path.stem.endswith("_triton") and name in EVERY:
            if seen[item.path.stem, name] % EVERY[name]:
                item.add_marker(pytest.mark.slow)
            seen[item.path.stem, name] += 1


@pytest.fixture
def processors(monkeypatch):
    """Sets how many multiprocessors the attention shares its work out to."""
    attention_triton = pytest.importorskip("spectrumkv_kernels.attention.triton_attention")
    functions = attention_triton.plan_of, attention_triton.work_of

    def forget():
        for function in functions:
            function.cache_clear()

    forget()
    yield lambda count: monkeypatch.setattr(attention_triton, "_multiprocessors", lambda device: count)
    forget()
