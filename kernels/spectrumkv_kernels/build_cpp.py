"""Builds the C++ sources of this folder with the system's compiler, once for each machine, and loads them."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
"""Tried in this order, after `$CXX`."""
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC",
)  # fmt: skip
"""Not -ffast-math: masks are infinities, and linked with it a library changes how the whole process rounds."""
TIMEOUT = 120
"""Seconds that a compiler may take."""


def load(name: str) -> ctypes.CDLL:
    """The library of `name`.cpp, built unless an earlier process has done so.

    It lies in `$XDG_CACHE_HOME/spectrumkv` (`~/.cache/spectrumkv`), named after the sources, the compiler, its flags
    and the processor. Processes may build it at the same time: each moves a whole file to its place.

    Raises:
        OSError: there is no compiler, none of them could build it, or the folder can't be written.
    """
    problems = []
    for compiler in compilers():
        try:
            path = _cached(name, compiler)
            if path.exists():
                try:
                    return ctypes.CDLL(str(path))
                except OSError:
                    pass  # damaged, or of another system: built anew
            _build(name, compiler, path)
            return ctypes.CDLL(str(path))
        except subprocess.CalledProcessError as error:
            problems.append(f"{compiler}: {_last_line(error.stderr)}")
        except (OSError, subprocess.TimeoutExpired) as error:
            problems.append(f"{compiler}: {error}")
    raise OSError("; ".join(problems) or f"no C++ compiler: $CXX, {', '.join(COMPILERS)}")


def compilers() -> list[str]:
    """Paths of those there are, once each: `c++` is mostly a name of one of the others."""
    given = os.environ.get("CXX")
    found = [path for compiler in ([given] if given else []) + [*COMPILERS] if (path := shutil.which(compiler))]
    return list({os.path.realpath(path): path for path in reversed(found)}.values())[::-1]


def _cached(name: str, compiler: str) -> Path:
    about = [_version(compiler), " ".join(FLAGS), _processor()]
    about += [source.read_text() for source in (FOLDER / f"{name}.cpp", *sorted(FOLDER.glob("*.h")))]
    key = hashlib.sha256("\0".join(about).encode()).hexdigest()[:16]
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(caches) / "spectrumkv" / f"{name}-{key}.so"


@functools.cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=TIMEOUT).stdout


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    named = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "\n".join(sorted({line for line in lines if line.startswith(named)}))


def _build(name: str, compiler: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        command = [compiler, *FLAGS, str(FOLDER / f"{name}.cpp"), "-o", draft]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT)
        os.replace(draft, path)
    finally:
        Path(draft).unlink(missing_ok=True)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if "error" in line] or text.splitlines()
    return lines[-1] if lines else "failed"
