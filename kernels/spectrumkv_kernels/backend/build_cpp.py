"""Builds C++ sources with the system's compiler, once for each machine, and loads them."""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import cache_folder
from .cache_folder import Folder

logger = logging.getLogger(__name__)

COMPILERS = ("c++", "g++", "clang++")
"""Tried in this order, after `$CXX`."""
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC",
)  # fmt: skip
"""Not -ffast-math: masks are infinities, and linked with it a library changes how the whole process rounds."""
SECONDS = 60.0
"""What all compilers together may take in a process, for all libraries. It is some 3 s, where nothing is amiss."""
KIND = "compiled"
"""Of files, for `cache_folder`."""
Structures = Sequence[type[ctypes.Structure]]


class _Tried(NamedTuple):
    """What the compilers have done in this process."""

    seconds: float = 0.0
    problem: str | None = None


_tried = _Tried()


def load(source: Path, functions: Sequence[str], structures: Structures = ()) -> ctypes.CDLL:
    """The library of a source file, built unless an earlier process has done so.

    It lies in a folder as `cache_folder` has it, which no other user may write. Its name says what it was made of and
    from (source, compiler, flags, processor) and has a checksum of its contents, which is compared before a byte of it
    runs: that finds damage, and the folder's owner and mode keep strangers out. Files are written to disk before they
    get their names, and never change; processes may build at the same time.

    Whatever fails, fails for the rest of the process: nothing is tried again. Compilers get `SECONDS` in all, and are
    killed then with what they have started.

    Args:
        source: Of a name of its own; the headers beside it belong to it.
        functions: Names that the library must have. One that was found without them is built anew.
        structures: What is handed over to them, by names that the source has too. It exports a function
            `size_of_<name>` for each, with which the size here is compared.

    Raises:
        OSError: there is no compiler, none of them could build it, the folder can't be used, or a structure has another
            size in the source.
    """
    global _tried
    if _tried.problem is not None:
        raise OSError(_tried.problem)
    try:
        with cache_folder.opened(KIND) as folder:
            if os.fstatvfs(folder.handle).f_flag & getattr(os, "ST_NOEXEC", 0):
                raise OSError(f"{folder.path} lies where no code may be run from (it is mounted noexec)")
            return _load(folder, source, functions, structures)
    except OSError as error:
        _tried = _tried._replace(problem=str(error))
        raise


def _load(folder: Folder, source: Path, functions: Sequence[str], structures: Structures) -> ctypes.CDLL:
    needed = (*functions, *(f"size_of_{structure.__name__}" for structure in structures))
    problems = []
    for compiler in compilers():
        try:
            prefix = f"{source.stem}-{_key(source, compiler)}-"
            library = _stored(folder, prefix, needed) or _built(folder, prefix, needed, source, compiler)
            _check_sizes(library, source, structures)
            return library
        except OSError as error:
            problems.append(f"{compiler}: {error}")
    raise OSError("; ".join(problems) or f"no C++ compiler: $CXX, {', '.join(COMPILERS)}")


def _stored(folder: Folder, prefix: str, functions: Sequence[str]) -> ctypes.CDLL | None:
    """A library that was built before; several have the same prefix where a compiler gave several results."""
    for file in folder.names():
        if not (file.startswith(prefix) and file.endswith(".so")):
            continue
        try:
            if file != _file(prefix, folder.read(file)):
                folder.remove(file)
                raise OSError(f"{file} is damaged")
            return _linked(folder, file, functions)
        except OSError as problem:  # also one of a machine with other system libraries, which needs its own
            logger.info("the compiled %s is built anew: %s", prefix.partition("-")[0], problem)
    return None


def _built(folder: Folder, prefix: str, functions: Sequence[str], source: Path, compiler: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix="spectrumkv-") as place:
        out = Path(place, f"{source.stem}.so")
        _run(compiler, *FLAGS, str(source), "-o", str(out))
        data = out.read_bytes()
    file = _file(prefix, data)
    folder.write(file, data)
    try:
        return _linked(folder, file, functions)
    except OSError:
        folder.remove(file)
        raise


def _file(prefix: str, data: bytes) -> str:
    return f"{prefix}{hashlib.blake2b(data, digest_size=16).hexdigest()}.so"


def _linked(folder: Folder, file: str, functions: Sequence[str]) -> ctypes.CDLL:
    library = ctypes.CDLL(folder.path_of(file))
    missing = [function for function in functions if not hasattr(library, function)]
    if missing:
        folder.remove(file)
        raise OSError(f"{file} has no function {', '.join(missing)}")
    return library


def _check_sizes(library: ctypes.CDLL, source: Path, structures: Structures) -> None:
    """Compare structures with the library's: of other sizes, addresses would be taken for numbers."""
    for structure in structures:
        function = getattr(library, f"size_of_{structure.__name__}")
        function.restype = ctypes.c_int64
        if (theirs := function()) != (ours := ctypes.sizeof(structure)):
            raise OSError(f"{source.name} takes the structure {structure.__name__} in {theirs} bytes, not in {ours}")


def takes(library: ctypes.CDLL, functions: Mapping[str, Any], structure: type[ctypes.Structure]) -> ctypes.CDLL:
    """Declare what functions of a library return, each of which takes the address of one structure.

    All that a function is given has a name then, and `load` has compared the sizes.
    """
    for name, result in functions.items():
        function = getattr(library, name)
        function.argtypes, function.restype = (ctypes.POINTER(structure),), result
    return library


def compilers() -> list[str]:
    """Paths of those there are, once each: `c++` is mostly a name of one of the others."""
    given = os.environ.get("CXX")
    found = [path for compiler in ([given] if given else []) + [*COMPILERS] if (path := shutil.which(compiler))]
    return list({os.path.realpath(path): path for path in reversed(found)}.values())[::-1]


def _key(source: Path, compiler: str) -> str:
    about = [_version(compiler), " ".join(FLAGS), _processor()]
    about += [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]
    return hashlib.sha256("\0".join(about).encode()).hexdigest()[:16]


@functools.cache
def _version(compiler: str) -> str:
    return _run(compiler, "--version")


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    named = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "\n".join(sorted({line for line in lines if line.startswith(named)}))


def _run(*command: str) -> str:
    """What a compiler prints, within what is left of `SECONDS`.

    Raises:
        OSError: it fails, or takes longer; then it is killed with all that it has started.
    """
    global _tried
    started = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:  # a pipe may outlive who is killed
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, start_new_session=True
        )  # fmt: skip
        try:
            process.wait(SECONDS - _tried.seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"killed: compiling may take {SECONDS:g} s in all") from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            _tried = _tried._replace(seconds=_tried.seconds + time.monotonic() - started)
        if process.returncode:
            errors.seek(0)
            raise OSError(_last_line(errors.read().decode(errors="replace")))
        out.seek(0)
        return out.read().decode(errors="replace")


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if "error" in line] or text.splitlines()
    return lines[-1] if lines else "failed"
