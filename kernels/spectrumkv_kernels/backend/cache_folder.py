"""The folder for what later processes read again: compiled code, the probe's verdicts. One rule for all of it.

It is `$XDG_CACHE_HOME/spectrumkv`, or `~/.cache/spectrumkv` where the variable is unset or not absolute (as its
specification has it), and has a folder inside for each kind of file. `~` is `$HOME`, or what the user database says
where that is unset.

* Created with mode 0700, as are those above it that are missing.
* Used only if it, the folder inside and each file in it belong to the process's effective user and nobody else may
  write them. So whatever is in it was put there by that user (or by root, against whom nothing helps).
* Neither the folder nor what is in it may be a symbolic link. Those above it may, and may lie on any file system:
  `HOME` often is a link. Somebody who may write *above* the folder (`XDG_CACHE_HOME=/tmp`) can take it away or occupy
  its name, but not give it contents: it is opened first and checked then, and files are reached through the open one.
* Root creates nothing inside a folder of another user (`sudo` may keep `HOME`): that user could not use it, and could
  move it.

Whatever is not so, and a folder that can't be written or doesn't exist and can't be made, is an `OSError`, whose text
names the folder and the reason. Callers do without the folder then.
"""

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

NAME = "spectrumkv"


class Untrusted(OSError):
    """A folder or file that another user could have made or changed."""


def location(kind: str) -> Path:
    """Where files of a kind lie; nothing is created or checked.

    Raises:
        OSError: the user has no home folder.
    """
    base = os.environ.get("XDG_CACHE_HOME") or ""
    if not os.path.isabs(base):
        home = os.path.expanduser("~")
        if not os.path.isabs(home):
            raise OSError("no absolute path in XDG_CACHE_HOME or HOME, where a cache folder could lie")
        base = os.path.join(home, ".cache")
    return Path(base) / NAME / kind


class Folder:
    """An open folder that was checked. Files in it are named without a path."""

    def __init__(self, path: Path, handle: int) -> None:
        self.path = path
        self.handle = handle

    def names(self) -> list[str]:
        """Of the files in it, sorted."""
        return sorted(os.listdir(self.handle))

    def read(self, name: str) -> bytes:
        """A file's contents.

        Raises:
            OSError: there is none, it can't be read, or it is `Untrusted`.
        """
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO must not wait for a writer
        handle = _checked(os.open(name, flags, dir_fd=self.handle), self.path / name, stat.S_ISREG)
        with os.fdopen(handle, "rb") as file:
            return file.read()

    def write(self, name: str, data: bytes) -> None:
        """Give a file these contents: whole and under its name, or not at all, also where the machine stops."""
        draft = f".{name}.{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(draft, flags, 0o600, dir_fd=self.handle)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, name, src_dir_fd=self.handle, dst_dir_fd=self.handle)
        except BaseException:
            self.remove(draft)
            raise
        with contextlib.suppress(OSError):  # some file systems can't
            os.fsync(self.handle)

    def remove(self, name: str) -> None:
        """Remove a file; nothing happens where that can't be done."""
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self.handle)

    def path_of(self, name: str) -> str:
        """A path to a file in the folder that was checked, for those who take no handle, while the folder is open.

        On Linux it leads through the handle, and so there whatever happens to the folder's own path.
        """
        through = f"/proc/self/fd/{self.handle}"
        return os.path.join(through if os.path.isdir(through) else self.path, name)


@contextlib.contextmanager
def opened(kind: str, create: bool = True) -> Iterator[Folder]:
    """The folder for files of a kind, open and checked by the rule above.

    Args:
        kind: Its name inside the folder for all.
        create: Make what is missing of it.

    Raises:
        FileNotFoundError: it is not there, and `create` is False.
        OSError: it can't be used: `Untrusted`, or as the system says.
    """
    path = location(kind)
    if not hasattr(os, "geteuid") or os.open not in os.supports_dir_fd:
        raise OSError(f"{path} is not used: this system has no owners and modes to check")
    with contextlib.ExitStack() as stack:
        if create:
            _make(path.parent)
        handle = _open(path.parent, None)
        stack.callback(os.close, handle)
        if create:
            with contextlib.suppress(FileExistsError):
                os.mkdir(kind, 0o700, dir_fd=handle)
        handle = _open(path, handle)
        stack.callback(os.close, handle)
        yield Folder(path, handle)


def _make(path: Path) -> None:
    missing = []
    while not os.path.lexists(path):
        missing.append(path)
        path = path.parent
    if missing and os.geteuid() == 0 and (owner := path.stat().st_uid) != 0:
        raise Untrusted(f"{missing[-1]} is not created: {path} belongs to user {owner}, and this process is root's")
    for folder in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process was faster
            folder.mkdir(mode=0o700)


def _open(path: Path, parent: int | None) -> int:
    """A handle of a folder, checked; `parent` is that of the folder it lies in, if that was."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        handle = os.open(path if parent is None else path.name, flags, dir_fd=parent)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR) and path.is_symlink():
            raise Untrusted(f"{path} is a symbolic link") from None
        raise type(error)(error.errno, error.strerror, str(path)) from None
    return _checked(handle, path, stat.S_ISDIR)


def _checked(handle: int, path: Path, is_kind: Callable[[int], bool]) -> int:
    """The handle, which is closed where its file or folder is not to be trusted."""
    try:
        _check(os.fstat(handle), path, is_kind)
    except Untrusted:
        os.close(handle)
        raise
    return handle


def _check(found: os.stat_result, path: Path, is_kind: Callable[[int], bool]) -> None:
    if not is_kind(found.st_mode):
        raise Untrusted(f"{path} is something else than a file")
    if found.st_uid != os.geteuid():
        raise Untrusted(f"{path} belongs to user {found.st_uid}, and this process is user {os.geteuid()}'s")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(found.st_mode)
        raise Untrusted(f"other users may write {path} (mode {mode:o}): `chmod go-w` it if all in it is yours")
