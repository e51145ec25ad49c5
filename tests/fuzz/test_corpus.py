"""Inputs by which the fuzzer reached new code, and what it finds, stay handled; its harness works."""

from pathlib import Path
from time import process_time

import pytest
import torch
from wire_target import hostile, one_input, resealed, seeds, used

from spectrumkv_hf import SpectrumCache
from spectrumkv_hf.wire import WireError

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*"))


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_corpus(path):
    one_input(path.read_bytes())


@pytest.mark.parametrize("name", hostile())
def test_hostile(name):
    one_input(hostile()[name])


def test_a_budget_is_kept(monkeypatch):
    """The harness sees time and memory that bytes don't account for, and messages of any text."""
    data = seeds()["golden spectrum"]
    read = SpectrumCache.deserialize
    waste = []

    def memory(*args, **options):
        waste.append(torch.ones(40 << 18))  # 40 MiB
        return read(*args, **options)

    def time(*args, **options):
        began = process_time()
        while process_time() < began + 1.2:
            pass
        return read(*args, **options)

    def text(*args, **options):
        raise WireError("\x1b[31m")

    for fault in (memory, time, text):
        monkeypatch.setattr(SpectrumCache, "deserialize", fault)
        with pytest.raises(AssertionError):
            one_input(data)


@pytest.mark.parametrize("name", seeds())
def test_seeds_are_sound(name, monkeypatch):
    data = seeds()[name]
    assert resealed(data[1:]) == data[1:]
    if not name.startswith("request"):
        reached = []
        monkeypatch.setattr("wire_target.used", lambda cache: reached.append(used(cache)))
        one_input(data)
        assert reached
