"""Folders that processes share, and who else may write into them."""

import os
import stat
from pathlib import Path


def open_folder(path: str | os.PathLike[str]) -> int:
    """Descriptor of a folder into which only its owner, or those whom the owner lets, can write.

    One that is missing is made, for this user alone (0700), and so are those above it. One that is there must belong to
    this user or to root, or to someone who shares it with a group of this user by letting the group write. Others must
    not be able to write into it, even with the sticky bit: whoever can is able to plant frames, and links.

    Raises:
        PermissionError: such a folder can't be trusted; the message says why.
        OSError: it can't be made or opened, or is no folder.
    """
    path = Path(path)
    for parent in [*reversed(path.parents), path]:
        if not parent.exists():
            parent.mkdir(mode=0o700, exist_ok=True)
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _check(os.fstat(folder), path)
    except BaseException:
        os.close(folder)
        raise
    return folder


def _check(found: os.stat_result, path: Path) -> None:
    mode = stat.S_IMODE(found.st_mode)
    if mode & stat.S_IWOTH:
        raise PermissionError(f"everyone can write into {path} (mode {mode:04o}): take another folder, or chmod o-w it")
    shared = mode & stat.S_IWGRP and found.st_gid in {os.getegid(), *os.getgroups()}
    if found.st_uid not in (os.geteuid(), 0) and not shared:
        raise PermissionError(
            f"{path} belongs to user {found.st_uid}, not to this one ({os.geteuid()}), and to no group of this one "
            "that may write into it: take another folder"
        )


def file_mode(folder: int) -> int:
    """Permissions of files in a folder: 0600, and what its group may do with the folder itself."""
    return 0o600 | stat.S_IMODE(os.fstat(folder).st_mode) & 0o060
