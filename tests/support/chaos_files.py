"""Seeded faults of files, below a directory that carries frames and below a store of prefixes."""

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from chaos import Died, Plan, altered

from spectrumkv_hf.support import folders, whole_file
from spectrumkv_hf.transfer import directory, prefix_files

FAULTS = {
    "create": ("full", "die"),
    "write": ("full", "cut", "flip", "die"),
    "replace": ("full", "vanish", "duplicate", "die"),
    "open": ("vanish", "broken", "die"),
    "read": ("broken", "cut", "flip", "die"),
    "unlink": ("broken", "die"),
}
"""Operations on files, how each can fail. `cut` writes or reads half and says nothing, `full` writes half and fails."""
OF_STORES = FAULTS | {"touch": ("broken", "die"), "list": ("broken", "die"), "listed": ("vanish", "die")}
"""And those that only a store has: `listed` is what lies between listing a file and looking at it."""


class FaultyOs:
    """Stands in for the module `os` where the product uses files. A thread stands for a process, which may die."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._dead = plan, set[threading.Thread]()
        self.supports_fd = os.supports_fd

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def due(self, operation: str, able: bool = True) -> str | None:
        self._live()
        kind = self._plan.due(operation, able)
        if kind == "die":
            self._dead.add(threading.current_thread())
            raise Died
        if kind in ("full", "broken") and operation not in ("write", "read"):
            fail(kind)
        return kind

    def _live(self) -> None:
        if threading.current_thread() in self._dead:
            raise Died

    def flipped(self, operation: str, data: bytes) -> bytes:
        return self._plan.flipped(operation, data)

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & os.O_CREAT:
            self.due("create")
            return os.open(path, flags, mode, dir_fd=dir_fd)
        self._live()
        handle = os.open(path, flags, mode, dir_fd=dir_fd)  # a file that is not there yet is no operation
        if flags & os.O_DIRECTORY or str(path).endswith(".lock"):
            return handle
        try:
            if self.due("open") == "vanish":
                os.unlink(path, dir_fd=dir_fd)
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        except BaseException:
            os.close(handle)
            raise
        return handle

    def fdopen(self, handle: int, mode: str) -> Any:
        return FaultyFile(os.fdopen(handle, mode), self)

    def replace(self, source: Any, target: Any, **folders: Any) -> None:
        kind = self.due("replace")
        if kind == "vanish":
            os.unlink(source, dir_fd=folders.get("src_dir_fd"))
            return
        os.replace(source, target, **folders)
        if kind == "duplicate":
            duplicate(str(target), folders.get("dst_dir_fd"))

    def unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        self.due("unlink")
        os.unlink(path, dir_fd=dir_fd)

    def utime(self, path: Any) -> None:
        self.due("touch")
        os.utime(path)

    @contextmanager
    def scandir(self, path: Any) -> Iterator[Any]:
        self.due("list")
        with os.scandir(path) as entries:
            yield (self._listed(entry) for entry in entries)

    def _listed(self, entry: Any) -> Any:
        if self.due("listed") == "vanish":
            os.unlink(entry.path)
        return entry


class FaultyFile:
    """A file in which reads and writes suffer."""

    def __init__(self, file: Any, faulty: FaultyOs) -> None:
        self._file, self._os = file, faulty

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "FaultyFile":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def write(self, data: Any) -> None:
        whole = bytes(data)
        kind = self._os.due("write", len(whole) > 0)
        if kind in ("full", "cut"):
            self._file.write(whole[: len(whole) // 2])
            if kind == "full":
                fail(kind)
        else:
            self._file.write(self._os.flipped("write", whole) if kind == "flip" else whole)

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        kind = self._os.due("read", len(data) > 0)
        if kind == "broken":
            fail(kind)
        if kind == "cut":
            return data[: len(data) // 2]
        return self._os.flipped("read", data) if kind == "flip" else data

    def readinto(self, memory: memoryview) -> int:
        data = self.read(len(memory))
        memory[: len(data)] = data
        return len(data)


def fail(kind: str) -> None:
    number = errno.ENOSPC if kind == "full" else errno.EIO
    raise OSError(number, os.strerror(number))


def duplicate(name: str, folder: int | None) -> None:
    """A file appears under another name too: that of the next frame or reply, or of another file of the store."""
    stem, dash, number = name.rpartition("-")
    if folder is not None and dash:
        twin = f"/proc/self/fd/{folder}/{stem}-{int(number) + 1}"
        shutil.copyfile(f"/proc/self/fd/{folder}/{name}", twin)
        return
    path = Path(name)
    for other in sorted(path.parent.glob(f"*{path.suffix}")):
        if other != path:
            shutil.copyfile(path, other)
            return


@contextmanager
def faulty_files(plan: Plan) -> Iterator[None]:
    """Files of directories that carry frames, and of stores, suffer by a plan."""
    with pytest.MonkeyPatch.context() as patch:
        faulty = FaultyOs(plan)
        for module in (whole_file, directory, prefix_files, folders):
            patch.setattr(module, "os", faulty)
        yield


OF_URLS = {
    "read": ("vanish", "broken", "cut", "flip", "die"),
    "write": ("full", "vanish", "cut", "flip", "die"),
    "unlink": ("broken", "die"),
    "look": ("vanish", "broken", "die"),
    "list": ("broken", "die"),
}
"""Operations of a file system of fsspec and how each can fail."""


@contextmanager
def faulty_memory(plan: Plan) -> Iterator[None]:
    """The file system in memory of fsspec, below all others' methods, suffers by a plan."""
    kind_of = pytest.importorskip("fsspec.implementations.memory").MemoryFileSystem
    sound = {name: getattr(kind_of, name) for name in ("cat_file", "pipe_file", "rm_file", "modified", "find")}
    dead = False

    def due(operation: str, able: bool = True) -> str | None:
        nonlocal dead
        kind = None if dead else plan.due(operation, able)
        dead = dead or kind == "die"
        if dead:
            raise Died
        if kind == "broken":
            raise RuntimeError("session expired")
        if kind == "full":
            fail(kind)
        return kind

    def cat_file(self: Any, path: str, **limits: Any) -> bytes:
        data = sound["cat_file"](self, path, **limits)
        kind = due("read", len(data) > 0)
        if kind == "vanish":
            sound["rm_file"](self, path)
            raise FileNotFoundError(path)
        return altered(plan, "read", kind, data)

    def pipe_file(self: Any, path: str, value: bytes, **options: Any) -> None:
        kind = due("write", len(value) > 0)
        if kind != "vanish":
            sound["pipe_file"](self, path, altered(plan, "write", kind, value), **options)

    def rm_file(self: Any, path: str) -> None:
        due("unlink")
        sound["rm_file"](self, path)

    def modified(self: Any, path: str) -> Any:
        when = sound["modified"](self, path)
        if due("look") == "vanish":
            sound["rm_file"](self, path)
            raise FileNotFoundError(path)
        return when

    def find(self: Any, path: str, **options: Any) -> Any:
        due("list")
        return sound["find"](self, path, **options)

    with pytest.MonkeyPatch.context() as patch:
        for each in (cat_file, pipe_file, rm_file, modified, find):
            patch.setattr(kind_of, each.__name__, each)
        yield


def left_in(folder: Path) -> list[str]:
    """Files of frames, replies and drafts that lie in a folder."""
    with suppress(FileNotFoundError):
        return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")
    return []
