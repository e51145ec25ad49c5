"""Files of caches: what `save` does with what is already there, and what `load` refuses."""

import multiprocessing
import os
import signal
import socket
import stat

import pytest
import torch
from pairs import start_method
from wire_forge import CONFIG, golden_cache

from spectrumkv_hf import SpectrumCache
from spectrumkv_hf.support.whole_file import whole_file, write_whole
from spectrumkv_hf.wire import WireError


@pytest.fixture(scope="module")
def cache():
    return golden_cache()


@pytest.fixture(scope="module")
def data(cache):
    return cache.serialize().numpy().tobytes()


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def listen(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def device(path):
    if os.geteuid():
        pytest.skip("only root can make a device")
    os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))


SPECIAL = {"named pipe": os.mkfifo, "folder": os.mkdir, "socket": listen, "device": device}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("linked", [False, True])
def test_what_is_no_file_stays(tmp_path, cache, kind, linked):
    """It is neither replaced nor waited for."""
    path = place = tmp_path / "cache"
    SPECIAL[kind](place)
    before = place.lstat()
    if linked:
        path = tmp_path / "link"
        path.symlink_to(place)
    names = sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match=f"a {kind}, no regular file: '{path}'"):
        cache.save(path)
    with pytest.raises(OSError, match="no regular file|No such device"):
        SpectrumCache.load(path, config=CONFIG)
    assert (place.lstat().st_ino, place.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert sorted(tmp_path.iterdir()) == names


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002, 0])
def test_permissions_of_a_new_file(tmp_path, cache, umask):
    old = os.umask(umask)
    try:
        cache.save(tmp_path / "cache")
    finally:
        os.umask(old)
    assert mode(tmp_path / "cache") == 0o666 & ~umask


@pytest.mark.parametrize("permissions", [0o600, 0o640, 0o664, 0o777])
def test_permissions_of_an_old_file(tmp_path, cache, data, permissions):
    path = tmp_path / "cache"
    path.write_bytes(b"old")
    path.chmod(permissions)
    cache.save(path)
    assert mode(path) == permissions
    assert path.read_bytes() == data


def test_links_are_followed(tmp_path, cache, data):
    """Those of files, of folders, and those that lead to nothing yet; others' hard links keep what they have."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "cache").write_bytes(b"old")
    os.link(folder / "cache", folder / "twin")
    (tmp_path / "first").symlink_to("second")
    (tmp_path / "second").symlink_to(folder / "cache")
    (tmp_path / "there").symlink_to(folder)
    (tmp_path / "new").symlink_to("folder/new")
    for link, target in (("first", "cache"), ("there/other", "other"), ("new", "new")):
        cache.save(tmp_path / link)
        assert (folder / target).read_bytes() == data and not (folder / target).is_symlink()
    assert {p.name for p in tmp_path.iterdir() if p.is_symlink()} == {"first", "second", "there", "new"}
    assert (folder / "twin").read_bytes() == b"old"
    assert {p.name for p in folder.iterdir()} == {"cache", "twin", "other", "new"}
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="loop"):
        cache.save(tmp_path / "loop")


def test_a_file_that_may_not_be_written(tmp_path, cache, monkeypatch):
    """Though its folder may, in which it could be replaced."""
    path = tmp_path / "cache"
    path.write_bytes(b"old")
    path.chmod(0o444)
    if os.geteuid() == 0:  # who may write anything
        monkeypatch.setattr(os, "access", lambda path, what: what != os.W_OK)
    with pytest.raises(PermissionError, match=f"Permission denied: '{path}'"):
        cache.save(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_long_names(tmp_path, cache, data):
    path = tmp_path / ("n" * 255)
    cache.save(path)
    assert path.read_bytes() == data


def test_errors_name_the_path_that_was_given(tmp_path, cache):
    for path in (tmp_path / "missing" / "cache", tmp_path / ("n" * 256)):
        with pytest.raises(OSError) as caught:
            cache.save(path)
        assert caught.value.filename == str(path)


def test_a_block_that_raises_leaves_nothing(tmp_path):
    path = tmp_path / "file"
    for before in ([], [path]):
        with pytest.raises(KeyboardInterrupt), whole_file(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt
        assert list(tmp_path.iterdir()) == before
        write_whole(path, "whole")
    assert path.read_text() == "whole"


@pytest.mark.parametrize("mmap", [True, False])
def test_both_ways_of_loading(tmp_path, cache, data, mmap):
    path = tmp_path / "cache"
    cache.save(path)
    loaded = SpectrumCache.load(path, config=CONFIG, mmap=mmap)
    assert loaded.serialize().numpy().tobytes() == data
    cache.save(path)  # replaces the file, which a mapping outlives
    assert loaded.serialize().numpy().tobytes() == data
    path.write_bytes(data[:-1])
    with pytest.raises(WireError, match="truncated"):
        SpectrumCache.load(path, config=CONFIG, mmap=mmap)


def cut_while_in_use(path, again, mmap):
    loaded = SpectrumCache.load(path, config=CONFIG, mmap=mmap)
    os.truncate(path, 0)
    again.write_bytes(loaded.serialize().numpy().tobytes())


@pytest.mark.parametrize("mmap", [True, False])
def test_a_file_that_is_cut_while_in_use(tmp_path, cache, mmap):
    """Documented: a mapping ends the process then; what was read into memory does not care."""
    path, again = tmp_path / "cache", tmp_path / "again"
    cache.save(path)
    process = multiprocessing.get_context(start_method()).Process(target=cut_while_in_use, args=(path, again, mmap))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == (-signal.SIGBUS if mmap else 0)
    assert mmap or again.read_bytes() == golden_cache().serialize().numpy().tobytes()


def test_tensors_of_a_file_read_into_memory_are_aligned(tmp_path, cache):
    cache.save(tmp_path / "cache")
    loaded = SpectrumCache.load(tmp_path / "cache", config=CONFIG, mmap=False)
    tensors = [t for layer in loaded._tiered() for _, t in layer.store.tensors()]
    assert tensors and all(isinstance(t, torch.Tensor) and t.data_ptr() % t.itemsize == 0 for t in tensors)
