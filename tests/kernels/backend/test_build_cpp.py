import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from spectrumkv_kernels import affine_flaws, decode, digest_sums, tier_positions, tiered_attention, write_sums
from spectrumkv_kernels.attention import cpp as attention_cpp
from spectrumkv_kernels.backend import build_cpp, dispatch
from spectrumkv_kernels.wire import cpp_affine as affine_cpp
from spectrumkv_kernels.wire import cpp_checksum as checksum_cpp
from spectrumkv_kernels.wire import cpp_tier_map as tier_map_cpp

COMPILED = (affine_flaws, digest_sums, tier_positions, tiered_attention, write_sums)
ROOT = Path(__file__).resolve().parents[3]
MODULES = (affine_cpp, attention_cpp, checksum_cpp, tier_map_cpp)

needs_compiler = pytest.mark.skipif(not build_cpp.compilers(), reason="no C++ compiler")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and nothing remembered from other tests."""
    libraries = [module.library for module in MODULES]
    remembered = (build_cpp._version, *libraries)
    for function in remembered:
        function.cache_clear()
    dispatch.forget()
    monkeypatch.setattr(build_cpp, "_tried", build_cpp._Tried())
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "spectrumkv" / "compiled"
    for function in remembered:
        function.cache_clear()
    dispatch.forget()


@pytest.fixture
def source(cache, tmp_path, monkeypatch):
    """A small source in the place of the real one."""
    path = tmp_path / "small.cpp"
    path.write_text('extern "C" int answer() { return 42; }')
    return path


def answer(source):
    return build_cpp.load(source, ["answer"]).answer()


@pytest.fixture
def builds(monkeypatch):
    """Of what, each time."""
    seen, real = [], build_cpp._built
    monkeypatch.setattr(build_cpp, "_built", lambda *args: (seen.append(args[3].stem), real(*args))[1])
    return seen


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("PATH", "")


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_default_on_a_cpu(cache, caplog):
    with caplog.at_level(logging.INFO, "spectrumkv_kernels"):
        for _ in range(3):
            assert tiered_attention.on("cpu") is attention_cpp.tiered_attention
    assert len(caplog.records) == 1 and "C++" in caplog.text
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("why", ["none", "fails", "hangs", "folder", "untrusted", "noexec", "no function"])
def test_torch_where_nothing_can_be_built(cache, caplog, monkeypatch, no_compiler, tmp_path, why):
    """One line in the log for all operations, and nothing is tried twice."""
    if why in ("fails", "hangs", "no function"):
        text = {
            "fails": "echo it: error: no such luck >&2; exit 1",
            "hangs": "while :; do :; done",
            "no function": "while [ $# -gt 1 ]; do shift; done; echo it is no library > $1",
        }
        monkeypatch.setenv("CXX", script(tmp_path / "c++", f'[ "$1" = --version ] && exit\n{text[why]}'))
        monkeypatch.setattr(build_cpp, "SECONDS", 0.3 if why == "hangs" else 5)
    if why == "folder":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    if why == "untrusted":
        cache.mkdir(parents=True)
        cache.chmod(0o777)
    if why == "noexec":
        monkeypatch.setattr(os, "fstatvfs", lambda handle: SimpleNamespace(f_flag=os.ST_NOEXEC))
    with caplog.at_level(logging.INFO, "spectrumkv_kernels"):
        for operation in 2 * COMPILED:
            assert operation.on("cpu") is operation.reference
            monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("tried again"))
    assert len(caplog.records) == 1 and "plain torch" in caplog.text
    reason = {
        "none": "no C++ compiler",
        "fails": "no such luck",
        "hangs": "killed",
        "folder": str(tmp_path / "file"),
        "untrusted": f"other users may write {cache}",
        "noexec": "noexec",
        "no function": "invalid ELF header|file too short|slice is not valid",
    }
    assert any(each in caplog.text for each in reason[why].split("|"))
    assert not cache.exists() or not list(cache.iterdir())
    monkeypatch.setenv(dispatch.VARIABLE, "cpp")
    with pytest.raises(OSError):
        tier_positions.on("cpu")


def test_forced_where_nothing_can_be_built(cache, monkeypatch, no_compiler):
    monkeypatch.setenv(dispatch.VARIABLE, "cpp")
    for operation in COMPILED:
        with pytest.raises(OSError, match="no C\\+\\+ compiler"):
            operation.on("cpu")
    assert decode.on("cpu") is decode.reference


def test_nothing_is_built_before_it_is_needed(cache, monkeypatch):
    for module in MODULES:
        monkeypatch.setattr(module, "library", lambda: pytest.fail("built"))
    for operation in set(dispatch.operations()) - set(COMPILED):
        operation.on("cpu")


@needs_compiler
def test_built_once(source, cache, builds):
    assert [answer(source), answer(source)] == [42, 42] and builds == ["small"]
    (file,) = cache.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600 and cache.stat().st_mode & 0o777 == 0o700


@needs_compiler
@pytest.mark.parametrize("change", ["source", "header", "flags", "processor", "compiler"])
def test_built_anew_after_a_change(source, cache, monkeypatch, change):
    answer(source)
    if change == "source":
        source.write_text('extern "C" int answer() { return 43; }')
        assert answer(source) == 43
    elif change == "header":
        source.with_name("small_parts.h").write_text("// more")
    elif change == "flags":
        monkeypatch.setattr(build_cpp, "FLAGS", (*build_cpp.FLAGS, "-g"))
    elif change == "processor":
        monkeypatch.setattr(build_cpp, "_processor", lambda: "another")
    else:
        monkeypatch.setattr(build_cpp, "_version", lambda compiler: "another")
    answer(source)
    assert len(list(cache.glob("small-*.so"))) == 2


def damaged(data):
    """Each as a machine that stopped, or a disk, may leave it. The loader maps most of them, and calls crash."""
    middle = len(data) // 2
    return {
        "empty": b"",
        "cut": data[:middle],
        "zeros": data[:4096] + bytes(len(data) - 4096),
        "one bit": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "longer": data + b"\0",
    }


@needs_compiler
@pytest.mark.parametrize("how", damaged(bytes(5000)))
def test_a_damaged_library_is_built_anew(source, cache, builds, how, tmp_path):
    assert answer(source) == 42
    (file,) = cache.iterdir()
    data = file.read_bytes()
    bad = damaged(data)[how]
    copy = cache.with_name("moved")  # the old one is mapped: another process damages a file by writing it anew
    cache.rename(copy)
    cache.mkdir(0o700)
    file.write_bytes(bad)
    file.chmod(0o600)
    assert answer(source) == 42 and builds == ["small", "small"]
    assert [path.read_bytes() for path in cache.iterdir()] == [data]


@needs_compiler
@pytest.mark.parametrize("how", ["others may write it", "of another user", "a link"])
def test_a_library_that_somebody_else_may_have_put_there(source, cache, builds, how, tmp_path):
    """The right name and checksum prove nothing about who made it."""
    assert answer(source) == 42
    (file,) = cache.iterdir()
    if how == "others may write it":
        file.chmod(0o666)
    elif how == "a link":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    elif os.geteuid():
        pytest.skip("only root can give files to another user")
    else:
        os.chown(file, 54321, -1)
    assert answer(source) == 42 and builds == ["small", "small"]
    assert file.lstat().st_uid == os.geteuid() and file.lstat().st_mode & 0o777 == 0o600
    assert answer(source) == 42 and builds == ["small", "small"]


@needs_compiler
def test_nothing_is_loaded_from_the_working_directory(source, tmp_path, monkeypatch):
    """Where a relative `XDG_CACHE_HOME` would lead."""
    assert answer(source) == 42
    (tmp_path / "cache").rename(tmp_path / "here")
    (made,) = (tmp_path / "here" / "spectrumkv" / "compiled").iterdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    made.unlink()
    assert answer(source) == 42
    assert not list(made.parent.iterdir())
    assert len(list((tmp_path / "home" / ".cache" / "spectrumkv" / "compiled").iterdir())) == 1


@needs_compiler
def test_a_library_without_the_function_is_built_once(source, cache, builds):
    """As a tool that tidies up libraries could leave it: the checksum fits what is there."""
    answer(source)
    (file,) = cache.iterdir()
    prefix = file.name[: file.name.rindex("-") + 1]
    source.write_text('extern "C" int another() { return 42; }')
    subprocess.run([build_cpp.compilers()[0], *build_cpp.FLAGS, source, "-o", file], check=True)
    file.chmod(0o600)
    file.rename(file.with_name(build_cpp._file(prefix, file.read_bytes())))
    source.write_text('extern "C" int answer() { return 42; }')
    assert answer(source) == 42 and builds == ["small", "small"]
    assert [path.name for path in cache.iterdir()] == [file.name]


@needs_compiler
def test_a_source_without_the_function(source, cache, builds, monkeypatch):
    monkeypatch.setattr(build_cpp, "COMPILERS", ("c++",))
    monkeypatch.delenv("CXX", raising=False)
    for _ in range(2):
        with pytest.raises(OSError, match="has no function other, another"):
            build_cpp.load(source, ["answer", "other", "another"])
    assert builds == ["small"] and not list(cache.iterdir())


@needs_compiler
def test_a_library_that_this_system_can_not_load_stays(source, cache, builds):
    """A home that machines share: theirs needs another libc."""
    answer(source)
    (file,) = cache.iterdir()
    prefix = file.name[: file.name.rindex("-") + 1]
    file.unlink()
    theirs = cache / build_cpp._file(prefix, b"\x7fELF of another kind")
    theirs.write_bytes(b"\x7fELF of another kind")
    theirs.chmod(0o600)
    assert answer(source) == 42 == answer(source) and builds == ["small", "small"]
    assert theirs.exists() and file.exists()


def running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def hanging(monkeypatch, no_compiler, tmp_path):
    """Two compilers that wait for ever for what they have started, and the file with the numbers of both."""
    if not os.path.isdir("/proc/self"):
        pytest.skip("there is no list of processes")
    pids, sleep = tmp_path / "pids", shutil.which("sleep", path=os.defpath)
    text = f'[ "$1" = --version ] && exit\n{sleep} 1000 &\necho $$ $! >> {pids}\nwait'
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("CXX", script(tmp_path / "mine", text))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    script(tmp_path / "bin" / "g++", text)
    assert len(build_cpp.compilers()) == 2
    return pids


def test_compilers_that_hang_are_killed_with_their_children(cache, hanging, monkeypatch):
    monkeypatch.setattr(build_cpp, "SECONDS", 1.0)
    start = time.monotonic()
    for operation in COMPILED:
        assert operation.on("cpu") is operation.reference
    assert time.monotonic() - start < 5
    started = hanging.read_text().split()
    assert len(started) >= 2 and not any(map(running, started))


def test_a_compiler_is_killed_where_the_build_is_interrupted(cache, hanging, monkeypatch):
    def interrupt():
        while not hanging.exists() or not hanging.read_text().endswith("\n"):
            time.sleep(0.01)
        os.kill(os.getpid(), 2)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what waits behind without one
    try:
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            tier_positions.on("cpu")
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    started = hanging.read_text().split()
    assert len(started) == 2 and not any(map(running, started))
    assert build_cpp._tried.problem is None


@needs_compiler
def test_the_next_compiler_where_one_fails(source, cache, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", script(tmp_path / "mine", "exit 1"))
    assert len(build_cpp.compilers()) > 1 and build_cpp.compilers()[0] == str(tmp_path / "mine")
    assert answer(source) == 42


@needs_compiler
def test_processes_that_build_at_once(source, cache):
    code = (
        "import sys; from pathlib import Path; from spectrumkv_kernels.backend import build_cpp; "
        "print('ready', flush=True); sys.stdin.read(1); "
        f"print(build_cpp.load(Path({str(source)!r}), ['answer']).answer())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write(".")
        process.stdin.flush()
    assert [process.communicate()[0].strip() for process in both] == ["42", "42"]
    assert [path.suffix for path in cache.iterdir()] == [".so"]


def test_compilers_under_two_names_count_once(monkeypatch, tmp_path):
    script(tmp_path / "g++", "")
    (tmp_path / "c++").symlink_to("g++")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "g++")
    assert build_cpp.compilers() == [shutil.which("g++")]
    monkeypatch.delenv("CXX")
    assert build_cpp.compilers() == [str(tmp_path / "c++")]
