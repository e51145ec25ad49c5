"""Caches of prompts by their tokens: the longest prefix, never a wrong one, whatever becomes of the files."""

import contextlib
import errno
import functools
import json
import logging
import multiprocessing
import os
import random
import re
import socket
import stat
import subprocess
import sys
import time
import uuid
from pathlib import Path

import chat_prefix
import families
import pytest
import tiny
import torch
from families import prompt
from transformers import DynamicCache

from spectrumkv_hf import SpectrumCache, cache_argument
from spectrumkv_hf.transfer import prefix_store
from spectrumkv_hf.transfer.prefix_store import PrefixStore

TOKENS = 300
KEY = b"k" * 32
EXAMPLE = Path(chat_prefix.__file__)
WINDOWS = {"gemma3": 200, "mistral": 24}
"""Long enough for tokens to be tiered before they leave it, and short enough for nothing to be."""


@functools.cache
def model(family="llama"):
    return families.model(family, **({"sliding_window": WINDOWS[family]} if family in WINDOWS else {}))


def filled(ids, family="llama", policy="sink_protect", budget=0.3, **options):
    cache = SpectrumCache(model(family).config, policy, budget, **options)
    with torch.no_grad():
        model(family)(ids, **cache_argument(cache))
    return cache


def store(place, family="llama", policy="sink_protect", budget=0.3, **options):
    return PrefixStore(place, options.pop("model", model(family)), policy, budget, **options)


@pytest.fixture(params=["folder", "memory"])
def place(request, tmp_path):
    if request.param == "folder":
        return tmp_path / "store"
    pytest.importorskip("fsspec")
    return f"memory://{uuid.uuid4().hex}/prefixes"


def cropped(cache, tokens):
    """The bytes of a cache of which `tokens` are left."""
    if cache.get_seq_length() > tokens:
        cache.crop(tokens - cache.get_seq_length())
    return cache.serialize()


def entries(folder):
    return sorted(folder.glob("*.kv"))


# -- what is found ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [64, 65, 128, 200, 299])
def test_longest_prefix(place, shared):
    """Bit-equal to the stored cache, cropped, to the token."""
    ids = prompt(TOKENS)
    assert store(place).put(ids, filled(ids)) > 0
    other = prompt(TOKENS + 50, seed=5)
    other[0, :shared], other[0, shared] = ids[0, :shared], (ids[0, shared] + 1) % 90 + 3
    found = store(place).get(other)
    assert found.get_seq_length() == shared
    assert torch.equal(found.serialize(), cropped(filled(ids), shared))


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
@pytest.mark.parametrize("codec", ["spectrum", "spectrum2"])
def test_resumes_as_the_cache_would(place, family, codec):
    ids = prompt(TOKENS)
    store(place, family, codec=codec).put(ids, filled(ids, family, codec=codec))
    longer = torch.cat((ids, prompt(20, seed=3)), dim=1)
    found = store(place, family, codec=codec).get(longer)
    assert found.get_seq_length() == TOKENS

    def answer(cache):
        return model(family).generate(longer, **cache_argument(cache), max_new_tokens=8, do_sample=False)

    assert torch.equal(answer(found), answer(filled(ids, family, codec=codec)))


def test_one_token_is_left(place):
    """For `generate` to compute; also where the prompt is shorter than what is known."""
    ids = prompt(TOKENS)
    ours = store(place)
    ours.put(ids, filled(ids))
    for tokens, expected in ((TOKENS, TOKENS - 1), (129, 128), (128, 127), (65, 64), (64, None), (1, None), (0, None)):
        found = ours.get(ids[:, :tokens])
        assert (found and found.get_seq_length()) == expected
        if found:
            assert torch.equal(found.serialize(), cropped(filled(ids), expected))


def test_the_longest_of_several(place):
    """A conversation that grew, and one that branched off."""
    ids, ours = prompt(TOKENS), store(place)
    branch = torch.cat((ids[:, :130], prompt(100, seed=8)), dim=1)
    for each in (ids[:, :150], ids[:, :270], branch):
        ours.put(each, filled(each))
    for whole, tokens in ((ids, 270), (ids[:, :200], 199), (torch.cat((branch, ids), dim=1), 230)):
        found = ours.get(whole)
        assert found.get_seq_length() == tokens
    assert torch.equal(ours.get(torch.cat((ids[:, :150], branch), dim=1)).serialize(), filled(ids[:, :150]).serialize())


def test_ids_are_rows_or_lists(place):
    ids = prompt(TOKENS)
    ours = store(place)
    ours.put(ids[0], filled(ids))
    for each in (ids, ids[0], ids[0].tolist(), ids.to(torch.int32)):
        assert ours.get(each).get_seq_length() == TOKENS - 1


def test_far_back(place, monkeypatch):
    """Pointers are asked for in batches."""
    monkeypatch.setattr(prefix_store, "PROBES", 2)
    ids = prompt(TOKENS)
    store(place).put(ids[:, :70], filled(ids[:, :70]))
    assert store(place).get(torch.cat((ids[:, :70], prompt(900, seed=2)), dim=1)).get_seq_length() == 70


def test_unknown(place):
    ours = store(place)
    assert ours.get(prompt(TOKENS)) is None
    ours.put(prompt(TOKENS), filled(prompt(TOKENS)))
    assert ours.get(prompt(TOKENS, seed=1)) is None


@pytest.mark.parametrize("tokens", [0, 1, 63])
def test_less_than_a_block_is_not_stored(tmp_path, tokens):
    ours = store(tmp_path)
    cache = filled(prompt(tokens)) if tokens else SpectrumCache(model().config, "sink_protect", 0.3)
    assert ours.put(prompt(tokens), cache) == 0
    assert not list(tmp_path.iterdir())


def test_put_leaves_the_cache(place):
    ids = prompt(TOKENS)
    cache = filled(ids)
    store(place).put(ids, cache)
    assert torch.equal(cache.serialize(), filled(ids).serialize())


def test_after_generate(place):
    ids, ours = prompt(100), store(place)
    cache = SpectrumCache(model().config, "sink_protect", 0.3)
    output = model().generate(ids, **cache_argument(cache), max_new_tokens=40, do_sample=False)
    with pytest.raises(ValueError, match="holds 139, got 140.*output\\[:, :-1\\]"):
        ours.put(output, cache)
    ours.put(output[:, :-1], cache)
    assert ours.get(output).get_seq_length() == 139


@pytest.mark.parametrize(
    ("family", "policy"), [("qwen3_next", "sink_protect"), ("gemma3", "fp16"), ("mistral", "fp16")]
)
def test_layers_that_can_not_be_cropped(place, family, policy):
    """Recurrent states and windows that have moved on: all of the entry, or nothing."""
    budget = 1.0 if policy == "fp16" else 0.3
    ours, ids = store(place, family, policy, budget), prompt(TOKENS)
    for tokens in (TOKENS, 290):  # whose whole blocks are the same
        part = ids[:, :tokens]
        ours.put(part, filled(part, family, policy, budget))
    assert ours.get(ids[:, :289]) is None
    assert ours.get(torch.cat((ids[:, :280], prompt(80, seed=4)), dim=1)) is None
    for tokens, more in ((TOKENS, 1), (290, 1), (290, 50)):
        found = ours.get(torch.cat((ids[:, :tokens], prompt(more, seed=4)), dim=1))
        assert torch.equal(found.serialize(), filled(ids[:, :tokens], family, policy, budget).serialize())


def test_a_window_that_can_be_cropped_a_little(place):
    """As far as its tokens are kept; `crop` itself refuses what lies before."""
    ours, ids = store(place, "gemma3"), prompt(TOKENS)

    def grown():
        """Prefilled, and then decoded, in which the window does not move on at each token."""
        cache = filled(ids[:, :250], "gemma3")
        for at in range(250, TOKENS):
            with torch.no_grad():
                model("gemma3")(ids[:, at : at + 1], **cache_argument(cache))
        return cache

    cache = grown()
    least = cache.layers[0].store.first_kept + WINDOWS["gemma3"] - 1
    assert 192 < least < 256
    ours.put(ids, cache)
    for tokens in (64, 128, 192, 256, 280):
        with contextlib.nullcontext() if tokens >= least else pytest.raises(RuntimeError):
            grown().crop(tokens - TOKENS)
        found = ours.get(ids[:, : tokens + 1])
        assert (found and found.get_seq_length()) == (tokens if tokens >= least else None)
        if found:
            assert torch.equal(found.serialize(), cropped(grown(), tokens))


# -- whose it is ------------------------------------------------------------------------------------------------------


def changed(model):
    with torch.no_grad():
        next(model.parameters()).mul_(1.001)
    return model


OTHERS = {
    "salt": {"salt": "tenant"},
    "adapter": {"adapter": "lora"},
    "empty adapter": {"adapter": ""},
    "budget": {"budget": 0.5},
    "policy": {"policy": "greedy"},
    "option": {"recent_window": 32},
    "codec": {"codec": "absmax"},
    "family": {"family": "qwen2"},
    "weights": {"model": changed(families.model("llama"))},
    "dtype": {"model": families.model("llama").to(torch.bfloat16)},
    "config only": {"model": families.config("llama")},
}


@pytest.mark.parametrize("other", OTHERS)
def test_others_do_not_find_it(place, other):
    ids = prompt(TOKENS)
    store(place).put(ids, filled(ids))
    assert store(place, **OTHERS[other]).get(ids) is None
    assert store(place).get(ids) is not None


def test_a_model_that_changes(place):
    """The weights count as they are when prompts are stored and asked for."""
    own, ids = families.model("llama"), prompt(TOKENS)
    ours = store(place, model=own)
    ours.put(ids, filled(ids))
    changed(own)
    assert ours.get(ids) is None


def test_by_config(place):
    ids = prompt(TOKENS)
    config = families.config("llama")
    store(place, model=config).put(ids, filled(ids))
    assert store(place, model=config).get(ids) is not None


@pytest.mark.parametrize(
    ("cache", "error", "message"),
    [
        (lambda: DynamicCache(config=model().config), TypeError, "takes a SpectrumCache, got DynamicCache"),
        (lambda: filled(prompt(TOKENS, batch=2)), ValueError, "a batch of one, got a cache of 2 rows"),
        (lambda: filled(prompt(TOKENS - 1)), ValueError, "holds 299, got 300"),
        (lambda: filled(prompt(TOKENS), budget=0.5), ValueError, "the store is for .* got"),
        (lambda: filled(prompt(TOKENS), codec="absmax"), ValueError, "codec 'spectrum2', got .* 'absmax'"),
        (lambda: filled(prompt(TOKENS), family="qwen3"), ValueError, "another model"),
        (
            lambda: filled(prompt(TOKENS), model=changed(families.model("llama"))),
            ValueError,
            "other weights",
        ),
    ],
    ids=["dynamic", "batch", "length", "budget", "codec", "model", "weights"],
)
def test_put_refuses(tmp_path, cache, error, message):
    with pytest.raises(error, match=message):
        store(tmp_path).put(prompt(TOKENS), cache())
    assert not list(tmp_path.iterdir())


def test_put_refuses_padding(tmp_path):
    ids, mask = families.left_padded([200])
    ids = torch.cat((torch.zeros(1, 10, dtype=ids.dtype), ids), dim=1)
    mask = torch.cat((torch.zeros(1, 10, dtype=mask.dtype), mask), dim=1)
    cache = SpectrumCache(model().config, "sink_protect", 0.3)
    with torch.no_grad():
        model()(ids, attention_mask=mask, **cache_argument(cache))
    with pytest.raises(ValueError, match="padding"):
        store(tmp_path).put(ids, cache)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (prompt(100, batch=2), ValueError, r"\[tokens\] or \[1, tokens\], got the shape \[2, 100\]"),
        (torch.tensor(3), ValueError, "got the shape"),
        (torch.rand(100), TypeError, "whole numbers, got torch.float32"),
        (torch.ones(100, dtype=torch.bool), TypeError, "whole numbers, got torch.bool"),
        ([-1] * 100, ValueError, "0 to 2"),
        ([1 << 31] * 100, ValueError, "0 to 2"),
        ("a prompt", TypeError, "whole numbers"),
    ],
)
def test_wrong_ids(tmp_path, ids, error, message):
    with pytest.raises(error, match=message):
        store(tmp_path).get(ids)
    with pytest.raises(error, match=message):
        store(tmp_path).put(ids, filled(prompt(100)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"key": b"short"}, ValueError, "16 to 64 bytes, or None, got 5 bytes"),
        ({"key": "text" * 10}, ValueError, "got str"),
        ({"max_bytes": 0}, ValueError, "max_bytes is a number of bytes"),
        ({"max_age": 0}, ValueError, "max_age is a number of seconds"),
        ({"max_age": float("nan")}, ValueError, "max_age is a number of seconds"),
        ({"salt": b"x"}, TypeError, "salt is text"),
        ({"adapter": 3}, TypeError, "adapter is text or None"),
        ({"model": object()}, TypeError, "config is a model's config"),
        ({"policy": "best"}, ValueError, "unknown policy"),
        ({"storage_options": {"anon": True}}, ValueError, "storage_options are for URLs"),
    ],
)
def test_wrong_arguments(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        store(tmp_path / "made", **options)
    assert not (tmp_path / "made").exists()


def test_wrong_urls():
    pytest.importorskip("fsspec")
    with pytest.raises(ValueError, match="nowhere"):
        store("nowhere://x")
    with pytest.raises(ValueError, match="patterns"):
        store("memory://a*")


def test_folder_and_files_are_for_their_user(tmp_path):
    ids = prompt(TOKENS)
    for folder, folders, files in ((tmp_path / "made", 0o700, 0o600), (tmp_path / "shared", 0o770, 0o660)):
        if folders != 0o700:
            folder.mkdir()
            folder.chmod(folders)
        store(folder).put(ids, filled(ids))
        assert stat.S_IMODE(folder.stat().st_mode) == folders
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {files}
    tmp_path.chmod(0o1777)
    with pytest.raises(PermissionError, match="everyone can write into"):
        store(tmp_path)


def test_file_urls_are_folders(tmp_path):
    ids = prompt(TOKENS)
    store(f"file://{tmp_path}").put(ids, filled(ids))
    assert store(tmp_path).get(ids) is not None


# -- damage -----------------------------------------------------------------------------------------------------------


def right(found, ids):
    """Whether what `get` gave is a miss, or right."""
    return found is None or torch.equal(found.serialize(), cropped(filled(ids), found.get_seq_length()))


@pytest.fixture
def damaged(tmp_path):
    """Stores a prompt, and gives a function that asks for it after its entry was given other bytes."""
    ids = prompt(TOKENS)
    store(tmp_path, key=None).put(ids, filled(ids))
    (path,) = entries(tmp_path)
    sound = path.read_bytes()
    pointers = {each: each.read_bytes() for each in tmp_path.glob("*.at")}
    ours = store(tmp_path)

    def ask(data):
        for each, content in pointers.items():
            each.write_bytes(content)
        path.write_bytes(data)
        return ours.get(ids)

    assert ask(sound) is not None
    return ask, path, sound


def test_flips(damaged):
    """A miss at every byte of the head, and at random ones of all that follows."""
    ask, path, sound = damaged
    rng = random.Random(0)
    ends = [128, 128 + 4 * TOKENS, 128 + 4 * TOKENS + 80, len(sound)]  # head, ids, their padding, stream
    places = [*range(128), *(rng.randrange(a, b) for a, b in zip(ends, ends[1:], strict=False) for _ in range(60))]
    for at in places:
        data = bytearray(sound)
        data[at] ^= 1 << rng.randrange(8)
        assert ask(bytes(data)) is None, at
        assert path.exists() == (24 <= at < 32), at  # damage is removed; what says another key is not


def test_cuts(damaged):
    ask, path, sound = damaged
    rng = random.Random(1)
    for size in [0, 1, 127, 128, 129, len(sound) - 1, *(rng.randrange(len(sound)) for _ in range(40))]:
        assert ask(sound[:size]) is None, size
        assert not path.exists()
    for more in (b"\0", sound):
        assert ask(sound + more) is None
    assert ask(bytes(len(sound))) is None and ask(rng.randbytes(len(sound))) is None


def test_a_file_that_only_claims_its_size(damaged):
    """It is not read."""
    ask, path, sound = damaged
    assert ask(sound) is not None
    os.truncate(path, 1 << 40)
    assert store(path.parent).get(prompt(TOKENS)) is None


def test_more_than_there_is_memory(damaged, caplog):
    """With a head that says so, too."""
    ask, path, sound = damaged
    assert ask(sound) is not None
    path.write_bytes(sound[:16] + (1 << 40).to_bytes(8, "little") + sound[24:])
    os.truncate(path, (1 << 40) + 10000)
    assert store(path.parent).get(prompt(TOKENS)) is None and "no memory" in caplog.text
    assert store(path.parent, max_bytes=10**9).get(prompt(TOKENS)) is None and "more than max_bytes" in caplog.text


@pytest.mark.parametrize(
    "data", [b"", b"x", b"\xff" * 5000, b"0" * 32 + b".300.0", b"../../etc/passwd.300.0", b"\n" * 99]
)
def test_pointers_of_others(tmp_path, data):
    ids = prompt(TOKENS)
    ours = store(tmp_path)
    ours.put(ids, filled(ids))
    for path in tmp_path.glob("*.at"):
        path.write_bytes(data)
    assert ours.get(ids) is None
    ours.put(ids, filled(ids))
    assert ours.get(ids).get_seq_length() == TOKENS - 1


def test_swapped_entries(tmp_path, caplog):
    """What is sound under its own name is refused under another; a forged pointer leads to no wrong tokens."""
    ids, other = prompt(TOKENS), prompt(TOKENS, seed=1)
    ours = store(tmp_path)
    ours.put(ids, filled(ids))
    (first,) = entries(tmp_path)
    ours.put(other, filled(other))
    (second,) = set(entries(tmp_path)) - {first}
    for pointer in tmp_path.glob("*.at"):
        pointer.write_text(second.stem)
    assert right(ours.get(ids), ids) and ours.get(ids) is None
    assert "its pointer says" in caplog.text
    ours.put(other, filled(other))
    second.rename(first)
    ours._point(
        prefix_store.Chain(ours._start(), ids[0].to(torch.int32)).links, prefix_store.EntryName.parse(first.stem)
    )
    assert ours.get(ids) is None and "another entry's" in caplog.text and not first.exists()


def test_vanished(tmp_path):
    """What leads nowhere is removed, and a shorter prefix is found."""
    ids, ours = prompt(TOKENS), store(tmp_path)
    ours.put(ids[:, :100], filled(ids[:, :100]))
    (first,) = entries(tmp_path)
    ours.put(ids, filled(ids))
    for path in set(entries(tmp_path)) - {first}:
        path.unlink()
    assert ours.get(ids).get_seq_length() == 100
    assert len(list(tmp_path.glob("*.at"))) == 1
    assert first.stem in next(tmp_path.glob("*.at")).read_text()


@pytest.mark.parametrize("plant", [os.mkfifo, os.mkdir, lambda path: path.symlink_to(path.with_name("other"))])
def test_what_is_no_file(tmp_path, plant):
    ids, ours = prompt(TOKENS), store(tmp_path)
    ours.put(ids, filled(ids))
    (path,) = entries(tmp_path)
    path.rename(path.with_name("other"))
    plant(path)
    assert ours.get(ids) is None


def test_said_once(tmp_path, caplog):
    ids = prompt(TOKENS)
    store(tmp_path, key=KEY).put(ids, filled(ids))
    ours = store(tmp_path)
    for _ in range(3):
        assert ours.get(ids) is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "the store has no key" in caplog.text


def test_storage_that_fails(place, monkeypatch):
    """`get` is a miss, `put` says so."""
    ids, ours = prompt(TOKENS), store(place)
    ours.put(ids, filled(ids))

    def fail(*_, **__):
        raise PermissionError("no")

    for name in ("read", "read_small"):
        with monkeypatch.context() as patch:
            patch.setattr(ours._files, name, fail)
            assert ours.get(ids) is None
    with monkeypatch.context() as patch:
        patch.setattr(ours._files, "touch", fail)
        assert ours.get(ids) is not None
        patch.setattr(ours._files, "write", fail)
        with pytest.raises(PermissionError):
            ours.put(ids, filled(ids))


def test_a_full_disk_keeps_nothing(place, monkeypatch):
    """Not even an entry whose pointers had no room."""
    ids, ours = prompt(TOKENS), store(place)
    write_small = type(ours._files).write_small

    def full(self, files):
        if any(name.endswith(".at") for name in files):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_small(self, files)

    with monkeypatch.context() as patch:
        patch.setattr(type(ours._files), "write_small", full)
        with pytest.raises(OSError, match="No space left"):
            ours.put(ids, filled(ids))
    assert not ours._files.listing()
    assert ours.put(ids, filled(ids)) and ours.get(ids) is not None


def test_errors_of_file_systems_are_os_errors(monkeypatch):
    pytest.importorskip("fsspec")
    ours = store(f"memory://{uuid.uuid4().hex}")

    def fail(*_, **__):
        raise RuntimeError("session expired")

    # Of one object, and so of all; fsspec keeps one file system for all stores of a kind.
    monkeypatch.setattr(type(ours._files.fs), "cat_file", fail)
    assert ours.get(prompt(TOKENS)) is None
    with pytest.raises(OSError, match="RuntimeError: session expired"):
        ours.put(prompt(TOKENS), filled(prompt(TOKENS)))


# -- key --------------------------------------------------------------------------------------------------------------


def test_key(place):
    ids = prompt(TOKENS)
    store(place, key=KEY).put(ids, filled(ids))
    assert torch.equal(store(place, key=KEY).get(ids).serialize(), cropped(filled(ids), TOKENS - 1))
    for other in (None, b"x" * 32, KEY + b"\0"):
        assert store(place, key=other).get(ids) is None
    assert store(place, key=KEY).get(ids) is not None  # it was refused, not removed


def test_a_mac_is_required(place, caplog):
    ids = prompt(TOKENS)
    store(place).put(ids, filled(ids))
    assert store(place, key=KEY).get(ids) is None
    assert re.search("is refused: it has no MAC", caplog.text)


def test_forged(tmp_path, caplog):
    """Who has no key can change no byte, nor give an entry another name, not even with all checksums right."""
    ids, other = prompt(TOKENS), prompt(TOKENS, seed=1)
    store(tmp_path / "keyed", key=KEY).put(ids, filled(ids))
    store(tmp_path / "plain").put(ids, filled(ids, budget=0.3))
    (keyed,), (plain,) = entries(tmp_path / "keyed"), entries(tmp_path / "plain")
    forged = bytearray(plain.read_bytes())
    forged[24:32] = keyed.read_bytes()[24:32]  # claims the key
    sound = keyed.read_bytes()
    keyed.write_bytes(forged)
    assert store(tmp_path / "keyed", key=KEY).get(ids) is None
    assert "its MAC is wrong" in caplog.text and not keyed.exists()
    keyed.write_bytes(sound)
    store(tmp_path / "keyed", key=KEY).put(other, filled(other))
    (renamed,) = set(entries(tmp_path / "keyed")) - {keyed}
    renamed.write_bytes(sound)
    assert store(tmp_path / "keyed", key=KEY).get(other) is None


# -- bounds -----------------------------------------------------------------------------------------------------------


def bytes_of(ours):
    return sum(file.size for file in ours._files.listing())


def aged(ours, seconds):
    """Make all files seem older."""
    for path in ours._files.path.iterdir():
        os.utime(path, (time.time() - seconds, path.stat().st_mtime - seconds))


def test_least_recently_used_goes_first(tmp_path):
    prompts = [prompt(TOKENS, seed=seed) for seed in range(4)]
    size = store(tmp_path / "one").put(prompts[0], filled(prompts[0]))
    ours = store(tmp_path / "all", max_bytes=int(3.5 * size))
    for ids in prompts[:3]:
        ours.put(ids, filled(ids))
        aged(ours, 10)
    assert ours.get(prompts[0]) is not None
    aged(ours, 10)
    ours.put(prompts[3], filled(prompts[3]))
    assert [ours.get(ids) is not None for ids in prompts] == [True, False, True, True]
    assert bytes_of(ours) <= ours.max_bytes
    assert len(list((tmp_path / "all").iterdir())) == 3 * (1 + TOKENS // 64)


def test_eviction_leaves_what_others_share(place):
    """Of two prompts with one beginning the other is found after one is gone, at every length."""
    ids, ours = prompt(TOKENS), store(place)
    branch = torch.cat((ids[:, :130], prompt(100, seed=8)), dim=1)
    ours.put(branch, filled(branch))
    ours.put(ids, filled(ids))
    name = next(
        n for file in ours._files.listing() if (n := prefix_store.EntryName.parse(file.name[:-3])) and n.tokens > 230
    )
    ours._remove(name, ours._links(name))
    assert ours.get(ids).get_seq_length() == 130
    assert torch.equal(ours.get(ids[:, :80]).serialize(), cropped(filled(branch), 79))


def test_a_prompt_beyond_the_bound(place, caplog):
    ids = prompt(TOKENS)
    ours = store(place, max_bytes=1000)
    assert ours.put(ids, filled(ids)) == 0 and ours.get(ids) is None
    assert "max_bytes is 1000" in caplog.text and not bytes_of(ours)


def test_age(place, monkeypatch):
    ids, other = prompt(TOKENS), prompt(TOKENS, seed=1)
    ours = store(place, max_age=100)
    now = time.time()
    ours.put(ids, filled(ids))
    monkeypatch.setattr(prefix_store.time, "time", lambda: now + 90)
    assert ours.get(ids) is not None
    monkeypatch.setattr(prefix_store.time, "time", lambda: now + 120)
    assert ours.get(ids) is None
    ours.put(ids, filled(ids))
    monkeypatch.setattr(prefix_store.time, "time", lambda: now + 240)
    ours.put(other, filled(other))
    monkeypatch.undo()
    assert store(place).get(ids) is None


def test_what_ended_processes_leave(tmp_path):
    """Files half written, and pointers without an entry."""
    ids, ours = prompt(TOKENS), store(tmp_path, max_bytes=10**9)
    ours.put(ids, filled(ids))
    fresh, old = tmp_path / f".{'a' * 32}.part", tmp_path / f".{'b' * 32}.part"
    for path in (fresh, old):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    for path in entries(tmp_path):
        path.unlink()
    ours.prune()
    assert [*tmp_path.iterdir()] == [fresh]


def test_files_of_others_stay(tmp_path):
    ids, ours = prompt(TOKENS), store(tmp_path, max_bytes=10**6)
    (tmp_path / "notes.txt").write_bytes(bytes(2 * 10**6))
    ours.put(ids, filled(ids))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_used_again_by_url():
    """Objects can't be touched; what says that they were used goes with them."""
    pytest.importorskip("fsspec")
    prompts = [prompt(TOKENS, seed=seed) for seed in range(3)]
    place = f"memory://{uuid.uuid4().hex}"
    size = store(place).put(prompts[0], filled(prompts[0]))
    ours = store(place, max_bytes=int(2.5 * size))
    ours.put(prompts[1], filled(prompts[1]))
    assert ours.get(prompts[0]) is not None
    ours.put(prompts[2], filled(prompts[2]))
    assert [ours.get(ids) is not None for ids in prompts] == [True, False, True]
    names = {path.rpartition("/")[2] for path in ours._files.fs.find(ours._files.root)}
    assert len([name for name in names if name.endswith(".kv")]) == len([n for n in names if n.endswith(".used")]) == 2


# -- processes --------------------------------------------------------------------------------------------------------

WORKERS, ROUNDS = 3, 12


def work(folder, worker, max_bytes):
    """Put and get prompts that share beginnings; raises where something is wrong."""
    torch.set_num_threads(1)
    ours = store(folder, max_bytes=max_bytes, key=KEY)
    beginning, rng = prompt(100), random.Random(worker)
    right, hits = {}, 0
    for _ in range(ROUNDS):
        ids = torch.cat((beginning, prompt(60, seed=rng.randrange(4))), dim=1)
        seed = tuple(ids[0].tolist())
        if seed not in right:
            right[seed] = filled(ids)
        ours.put(ids, right[seed])
        found = ours.get(torch.cat((ids, prompt(5)), dim=1))
        if found is not None and found.get_seq_length() == 160:
            hits += 1
            assert torch.equal(found.serialize(), right[seed].serialize())
        elif found is not None:
            assert found.get_seq_length() >= 64
    return hits


def reported(connection, *arguments):
    try:
        connection.send(work(*arguments))
    except BaseException as problem:
        connection.send(repr(problem))


@pytest.mark.parametrize("room", [100.0, 2.5], ids=["unbounded", "evicting"])
def test_processes(tmp_path, room, caplog):
    """Nothing raises, nothing is wrong, and all is within the bound at the end."""
    ids = torch.cat((prompt(100), prompt(60, seed=0)), dim=1)
    size = store(tmp_path / "one", key=KEY).put(ids, filled(ids))
    max_bytes = int(room * size)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["families", "spectrumkv_hf.transfer", "transformers.masking_utils"])
    started = []
    for worker in range(WORKERS):
        ours, theirs = context.Pipe()
        process = context.Process(target=reported, args=(theirs, tmp_path / "all", worker, max_bytes), daemon=True)
        process.start()
        started.append((process, ours))
    hits = []
    for process, connection in started:
        assert connection.poll(120), "a process hangs"
        hits.append(connection.recv())
        process.join()
    assert all(isinstance(each, int) for each in hits), hits
    after = store(tmp_path / "all", max_bytes=max_bytes, key=KEY)
    if room > 10:
        assert hits == [ROUNDS] * WORKERS
        assert after.get(torch.cat((ids, prompt(5)), dim=1)).get_seq_length() == 160
    else:
        assert sum(hits) > 0
        after.prune()
        assert bytes_of(after) <= max_bytes
    assert not list((tmp_path / "all").glob("*.part"))


# -- the example ------------------------------------------------------------------------------------------------------


def run_example(monkeypatch, capfd, *arguments):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments])
    chat_prefix.main()
    return capfd.readouterr().out


@pytest.mark.parametrize("policy", ["fp16", "sink_protect"])
def test_chat_goes_on_in_a_new_process(tmp_path, monkeypatch, capfd, policy):
    """The second process runs for itself here, and finds what the first one stored; with a key, by that key only.

    The first one is another process where nothing is compressed; that what it stored can be read does not depend on it.
    """
    monkeypatch.setenv(chat_prefix.KEY, KEY.hex())
    options = ["--model", tiny.save(tmp_path / "model"), "--store", str(tmp_path / "store"), "--tokens", "200"]
    options += ["--policy", policy, "--rounds", "2", "--max-new-tokens", "4", "--device", "cpu"]
    first = [*options, "--process", "1"]
    if policy == "fp16":
        done = subprocess.run([sys.executable, str(EXAMPLE), *first], capture_output=True, text=True)
        assert done.returncode == 0 and "200 tokens" in done.stdout, done.stderr
    else:
        assert "200 tokens" in run_example(monkeypatch, capfd, *first)
    report = tmp_path / "report.json"
    out = run_example(monkeypatch, capfd, *options, "--process", "2", "--json", str(report))
    assert "cold prefill" in out and "resumed" in out and "torch" in out
    found = json.loads(report.read_text())
    assert [len(each) for each in found["seconds"].values()] == [2, 2]
    if policy == "fp16":
        assert found["answers"]["cold prefill"] == found["answers"]["resumed"]
    monkeypatch.delenv(chat_prefix.KEY)
    with pytest.raises(RuntimeError, match="was not found"):
        run_example(monkeypatch, capfd, *options, "--process", "2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "63"], "--tokens is 64 or more"),
        (["--process", "2"], "--process needs a --store"),
        (["--json", "no/such/file"], "there is no folder"),
    ],
)
def test_wrong_arguments_of_the_example(arguments, message, monkeypatch, capfd):
    with pytest.raises(SystemExit, match="2"):
        run_example(monkeypatch, capfd, *arguments)
    assert message in capfd.readouterr().err


# -- S3 ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch):
    """A bucket of a server of this machine, and what leads to it."""
    for module in ("moto", "s3fs", "flask"):
        pytest.importorskip(module, reason=f"the test of s3:// needs {module}: pip install 'moto[server]' s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    options = {"endpoint_url": f"http://127.0.0.1:{port}", "skip_instance_cache": True}
    try:
        import s3fs

        until = time.monotonic() + 60
        while True:
            try:
                s3fs.S3FileSystem(**options).mkdir("caches")
                break
            except Exception:
                assert time.monotonic() < until, "the server does not answer"
                time.sleep(0.2)
        yield options
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
def test_s3(bucket, caplog):
    prompts = [prompt(TOKENS, seed=seed) for seed in range(3)]
    place, options = "s3://caches/prefixes", {"storage_options": bucket}
    ours = store(place, key=KEY, **options)
    size = ours.put(prompts[0], filled(prompts[0]))
    ours.put(prompts[0][:, :150], filled(prompts[0][:, :150]))
    longer = torch.cat((prompts[0], prompt(9, seed=9)), dim=1)
    assert torch.equal(store(place, key=KEY, **options).get(longer).serialize(), filled(prompts[0]).serialize())
    assert ours.get(prompts[0][:, :130]).get_seq_length() == 129
    assert ours.get(prompts[1]) is None and store(place, **options).get(longer) is None
    path = next(p for p in ours._files.fs.find("caches/prefixes") if ".300." in p and p.endswith(".kv"))
    data = bytearray(ours._files.fs.cat_file(path))
    data[-1000] ^= 1
    ours._files.fs.pipe_file(path, bytes(data))
    assert ours.get(longer).get_seq_length() == 150 and "its MAC is wrong" in caplog.text
    assert path.rpartition("/")[2] not in [file.name for file in ours._files.listing()]
    bounded = store(place, key=KEY, max_bytes=int(2.2 * size), max_age=3600, **options)
    for ids in prompts:
        time.sleep(1.1)  # times of objects are whole seconds
        bounded.put(ids, filled(ids))
    assert [bounded.get(ids) is not None for ids in prompts] == [False, True, True]
    assert bytes_of(bounded) <= bounded.max_bytes
