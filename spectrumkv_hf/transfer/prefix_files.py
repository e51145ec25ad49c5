"""Where a `PrefixStore` keeps its files: a folder, or whatever fsspec reaches. A file appears whole or not at all."""

import errno
import os
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from spectrumkv_hf.support.extras import required
from spectrumkv_hf.support.folders import file_mode, open_folder
from spectrumkv_hf.support.whole_file import open_regular, replacing
from spectrumkv_hf.wire.frame import as_tensor

SMALL = 1024
"""Bytes at most of a file that is read whole by `read_small`."""
USED = ".used"


class File(NamedTuple):
    """A file by its name; `used`: when it was last written or touched, in seconds since 1970."""

    name: str
    size: int
    used: float


class Files(Protocol):
    """Files of one folder, by name. Whatever the storage raises becomes an `OSError`."""

    def read(self, name: str, size: int) -> torch.Tensor:
        """The first `size` bytes at most, uint8 `[bytes]`.

        Raises:
            FileNotFoundError: there is none.
        """
        ...

    def read_small(self, names: Sequence[str]) -> dict[str, bytes]:
        """The first `SMALL` bytes of those files that are there, asked for all at once where the storage can."""
        ...

    def write(self, name: str, parts: Sequence[bytes | memoryview]) -> None:
        """Make or replace a file."""

    def write_small(self, files: Mapping[str, bytes]) -> None:
        """Make or replace several, all at once where the storage can."""

    def remove(self, names: Iterable[str]) -> None:
        """Remove those that are there."""

    def touch(self, name: str) -> None:
        """Note that a file was used now."""

    def used(self, name: str) -> float:
        """When it was, in seconds since 1970."""
        ...

    def listing(self) -> list[File]:
        """All files."""
        ...


def files_at(place: str | os.PathLike[str], options: Mapping[str, Any] | None) -> Files:
    """The files of a folder or URL; `options` are for the file system of a URL.

    Raises:
        ImportError: fsspec, or its package for this kind of URL, is not installed.
        ValueError: a kind of URL that fsspec does not know, or options for a folder.
        OSError: the folder can't be made or written, or others can write into it.
    """
    text = os.fspath(place)
    for local in ("file://", "local://"):
        text = text.removeprefix(local)
    if "://" in text:
        return Remote(text, options or {})
    if options:
        raise ValueError(f"storage_options are for URLs, got {sorted(options)} for the folder {text!r}")
    return Folder(text)


class Folder:
    """A folder of this machine, or one that it has mounted; see `folders.open_folder` for who may write into it.

    A file's time of modification is that of its last use.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        descriptor = open_folder(self.path)
        self._mode = file_mode(descriptor)
        os.close(descriptor)

    def __str__(self) -> str:
        return str(self.path)

    def read(self, name: str, size: int) -> torch.Tensor:
        # Not mapped: who may write into the folder could change what was checked, or end this process by a cut.
        with open_regular(self.path / name, follow=False) as file:
            size = min(size, os.fstat(file.fileno()).st_size)
            try:
                data = torch.empty(size, dtype=torch.uint8)
            except RuntimeError as problem:  # a sparse file takes no room, but its bytes do
                raise OSError(errno.ENOMEM, f"no memory for its {size} bytes", name) from problem
            return data[: file.readinto(data.numpy().data)]

    def read_small(self, names: Sequence[str]) -> dict[str, bytes]:
        found = {}
        for name in names:
            with suppress(FileNotFoundError):
                found[name] = self.read(name, SMALL).numpy().tobytes()
        return found

    def write(self, name: str, parts: Sequence[bytes | memoryview]) -> None:
        # What a loss of power leaves half written is refused by its check, so nobody has to wait for the disk.
        with replacing(self.path / name, self._mode, durable=False) as file:
            for part in parts:
                file.write(part)

    def write_small(self, files: Mapping[str, bytes]) -> None:
        for name, data in files.items():
            self.write(name, [data])

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            with suppress(FileNotFoundError):
                os.unlink(self.path / name)

    def touch(self, name: str) -> None:
        os.utime(self.path / name)

    def used(self, name: str) -> float:
        return os.stat(self.path / name, follow_symlinks=False).st_mtime

    def listing(self) -> list[File]:
        found = []
        with os.scandir(self.path) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    about = entry.stat(follow_symlinks=False)
                    found.append(File(entry.name, about.st_size, about.st_mtime))
        return found


class Remote:
    """Files behind a URL of fsspec. An object store shows an object when all of it is there.

    Objects can't be touched: an empty one beside a file, whose name ends in `.used`, is written anew instead.
    """

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        core = required("fsspec.core", f"a store at {url.partition('://')[0]}://")
        self.fs, root = core.url_to_fs(url, **options)
        self.root = root.rstrip("/")
        if any(character in self.root for character in "*?["):
            raise ValueError(f"a store's URL has none of *, ? and [, which fsspec takes for patterns, got {url!r}")

    def __str__(self) -> str:
        return self.fs.unstrip_protocol(self.root)

    def read(self, name: str, size: int) -> torch.Tensor:
        with _as_os_errors():
            return as_tensor(self.fs.cat_file(self._path(name), start=0, end=size))

    def read_small(self, names: Sequence[str]) -> dict[str, bytes]:
        with _as_os_errors():
            found = self.fs.cat([self._path(name) for name in names], on_error="return") if names else {}
            for data in found.values():
                if isinstance(data, Exception) and not isinstance(data, FileNotFoundError):
                    raise data
        there = {path: data for path, data in found.items() if not isinstance(data, Exception)}
        return {posixpath.basename(path): data[:SMALL] for path, data in there.items()}

    def write(self, name: str, parts: Sequence[bytes | memoryview]) -> None:
        self.write_small({name: b"".join(parts)})

    def write_small(self, files: Mapping[str, bytes]) -> None:
        with _as_os_errors():
            self.fs.pipe({self._path(name): data for name, data in files.items()})

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            for each in (name, name + USED):
                with _as_os_errors(), suppress(FileNotFoundError):
                    self.fs.rm_file(self._path(each))

    def touch(self, name: str) -> None:
        self.write(name + USED, [])

    def used(self, name: str) -> float:
        times = []
        for each in (name, name + USED):
            with _as_os_errors(), suppress(FileNotFoundError):
                times.append(self.fs.modified(self._path(each)).timestamp())
        if not times:
            raise FileNotFoundError(name)
        return max(times)

    def listing(self) -> list[File]:
        times = {}
        with _as_os_errors():
            self.fs.invalidate_cache()
            found = self.fs.find(self.root, maxdepth=1, detail=True)
            for path in found:
                with suppress(FileNotFoundError):  # gone meanwhile
                    times[path] = self.fs.modified(path).timestamp()
        return [
            File(posixpath.basename(path), found[path]["size"], max(used, times.get(path + USED, used)))
            for path, used in times.items()
            if path.removesuffix(USED) == path or path.removesuffix(USED) not in times
        ]

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """File systems have errors of their own."""
    try:
        yield
    except OSError:
        raise
    except Exception as problem:
        raise OSError(f"{type(problem).__name__}: {problem}") from problem
