"""Files that appear whole or not at all."""

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from typing import BinaryIO

NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
OLD_FILE = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write, which replaces the one at `path` when the block ends; where it raises, nothing has happened.

    A symbolic link stays: the file that it leads to is replaced. The new file has the old one's permissions, or those
    that the umask leaves of 0666; it belongs to whoever writes it, and other hard links keep the old contents.

    Raises:
        OSError: it can't be written, or there is something that is no regular file: a folder, a device, a pipe.
    """
    mode = None
    with suppress(FileNotFoundError):
        # By the system, so that its rules for links of other users in a shared folder hold.
        mode = regular(os.stat(path), path).st_mode
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
    with replacing(os.path.realpath(path), mode) as file:
        yield file


@contextmanager
def replacing(
    path: str | os.PathLike[str], mode: int | None = None, folder: int | None = None, durable: bool = True
) -> Iterator[BinaryIO]:
    """`whole_file` for a path that is known: what is there is replaced, be it what it may, a folder excepted.

    Args:
        path: Of the file.
        mode: Its permissions; None: those that the umask leaves of 0666.
        folder: Descriptor of the folder that `path` is a name in; None: `path` leads to the file by itself.
        durable: Wait until the disk has it, so that it is whole even after a loss of power.
    """
    parent, _ = os.path.split(path)
    temporary = os.path.join(parent, f".{secrets.token_hex(16)}.part")  # that nobody can have put there
    try:
        handle = os.open(temporary, NEW_FILE, 0o666 if mode is None else 0o600, dir_fd=folder)
    except OSError as problem:
        problem.filename = os.fspath(path)  # the one that the caller knows
        raise
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            if mode is not None:
                os.chmod(handle if os.chmod in os.supports_fd else temporary, mode & 0o777)
            if durable:
                os.fsync(handle)
        os.replace(temporary, path, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise


def write_whole(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Replace the file at `path` by `data`, text as UTF-8; see `whole_file`."""
    with whole_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def open_regular(path: str | os.PathLike[str], folder: int | None = None, follow: bool = True) -> BufferedReader:
    """A regular file to read.

    Args:
        path: Of the file.
        folder: As in `replacing`.
        follow: Whether it may be a symbolic link.

    Raises:
        OSError: there is none, or something else, whose opening might wait for ever or do something.
    """
    flags = OLD_FILE if follow else OLD_FILE | getattr(os, "O_NOFOLLOW", 0)
    handle = os.open(path, flags, dir_fd=folder)
    try:
        regular(os.fstat(handle), path)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def regular(found: os.stat_result, path: str | os.PathLike[str]) -> os.stat_result:
    """What was `found` at `path`, if it is a regular file.

    Raises:
        OSError: it is something else.
    """
    if stat.S_ISREG(found.st_mode):
        return found
    number = errno.EISDIR if stat.S_ISDIR(found.st_mode) else errno.EINVAL
    raise OSError(number, f"a {_kind(found.st_mode)}, no regular file", os.fspath(path))


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket", stat.S_IFLNK: "link"}
    return kinds.get(stat.S_IFMT(mode), "device")
