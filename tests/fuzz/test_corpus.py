"""Inputs by which the fuzzer reached new code, and what it finds, stay handled; its harness works."""

from pathlib import Path

import pytest
from wire_target import one_input, resealed, seeds, used

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*"))


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_corpus(path):
    one_input(path.read_bytes())


@pytest.mark.parametrize("name", seeds())
def test_seeds_are_sound(name, monkeypatch):
    data = seeds()[name]
    assert resealed(data[1:]) == data[1:]
    if name != "request":
        reached = []
        monkeypatch.setattr("wire_target.used", lambda cache: reached.append(used(cache)))
        one_input(data)
        assert reached
