"""What several containers of a pod mount alike lies once in its share, for all of them.

In a guest each mount of the share has inodes of its own: of a volume that lay in it once for each container, the
sockets and FIFOs would join nobody, locks would hold against nobody, and mappings of one file would differ. So the
mount lies in the share's folder COMMON, under a name that says what it is, and at each container's place there is a
symbolic link to it. It goes with the last link.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from hyperpod.spec.share import COMMON


@contextlib.contextmanager
def locked(share: Path) -> Iterator[int]:
    """Nobody else adds links or takes mounts away meanwhile; gives a descriptor of the share. Never held while a
    file system of the host is waited for."""
    fd = os.open(share, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        os.close(fd)


def name(mount_id: int, status: os.stat_result, flags: str) -> str:
    """The same for the same file or folder, seen through the same mount of the host and with the same flags. Its
    numbers are not given to another as long as it is mounted."""
    return f"{mount_id}-{status.st_dev:x}-{status.st_ino:x}{flags}"


def empty(folder: int, kept: Collection[str] = ()) -> None:
    """Remove links and mount points, which unmounts the latter in other namespaces (binds.release)."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name not in kept:
                remove = os.rmdir if entry.is_dir(follow_symlinks=False) else os.unlink
                remove(entry.name, dir_fd=folder)


def sweep(share: int) -> None:
    """Unmount what no link leads to any more, and remove the folder with the last one. The lock must be held.

    Also what a crash has left between a link and its mount."""
    try:
        common = os.open(COMMON, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=share)
    except FileNotFoundError:
        return
    try:
        empty(common, _linked(share))
    finally:
        os.close(common)
    try:
        os.rmdir(COMMON, dir_fd=share)
    except OSError as exc:
        if exc.errno not in (errno.ENOTEMPTY, errno.ENOENT):
            raise


def _linked(share: int) -> set[str]:
    """Names that containers' links lead to."""
    found = set()
    for folder in os.listdir(share):
        if folder == COMMON:
            continue
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=share)
            try:
                for entry in os.scandir(fd):
                    if entry.is_symlink():
                        found.add(os.readlink(entry.name, dir_fd=fd).rpartition("/")[2])
            finally:
                os.close(fd)
    return found
