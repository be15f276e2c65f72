"""How much each container has written: a project of ext4 per writable folder, whose usage the kernel keeps.

The scratch disk is made with project quota (hyperpod/hypervisor/scratch.py). All below a folder with a project
inherits it, so asking costs one system call however many files there are. Where there is no such file system (a
host agent, an older kernel) the folder is walked instead, up to a bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import logging
import os
import struct

from hyperpod.agent import linux
from hyperpod.agent.layout import Layout

log = logging.getLogger(__name__)

FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR = 0x801C581F, 0x401C5820
_XATTR = struct.Struct("IIIII8x")
"""struct fsxattr: flags, extent size, extents, project, copy-on-write extent size."""
_PROJECT_INHERIT = 0x200

MAX_WALK = 50_000
"""Entries looked at without quota: some 0.1 s on a host; what is beyond is not counted."""


class Quota:
    """Of the scratch disk."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._projects: dict[str, int] = {}
        self._numbers = itertools.count(1)
        # The projects of a host's own file systems are the host's business.
        self._usable = layout.guest

    def watch(self, container: str) -> None:
        """Make the container's folder, still empty, a project of its own."""
        path = self._layout.writable(container)
        os.makedirs(path, exist_ok=True)
        if not self._usable:
            return
        number = next(self._numbers)
        try:
            _set_project(path, number)
        except OSError as exc:
            log.warning("no project quota: %s; folders are walked instead", exc.strerror)
            self._usable = False
        else:
            self._projects[container] = number

    def forget(self, container: str) -> None:
        self._projects.pop(container, None)

    async def usage(self, container: str) -> tuple[int, int] | None:
        """Bytes and inodes; None when it cannot be told."""
        number = self._projects.get(container)
        with contextlib.suppress(OSError):
            if number is not None:
                return self._ask(number)
            return await asyncio.to_thread(walk, self._layout.writable(container))
        return None

    def _ask(self, number: int) -> tuple[int, int]:
        folder = os.open(self._layout.scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return linux.project_usage(folder, number)
        finally:
            os.close(folder)


def _set_project(path: str, number: int) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        flags, extent, extents, _, cow = _XATTR.unpack(
            fcntl.ioctl(folder, FS_IOC_FSGETXATTR, bytes(_XATTR.size))
        )
        new = _XATTR.pack(flags | _PROJECT_INHERIT, extent, extents, number, cow)
        fcntl.ioctl(folder, FS_IOC_FSSETXATTR, new)
    finally:
        os.close(folder)


def walk(path: str, most: int = MAX_WALK) -> tuple[int, int]:
    """Bytes on disk and inodes of a folder and all below it, of at most `most` entries. Raises OSError when it is
    not there. Containers write below it: whatever depth, changes and names there are, it comes to an end."""
    used, inodes, left = os.lstat(path).st_blocks * 512, 1, most
    pending = [path]
    while pending and left > 0:
        with contextlib.suppress(OSError), os.scandir(pending.pop()) as entries:
            for entry in itertools.islice(entries, left):
                left -= 1
                with contextlib.suppress(OSError):
                    used += entry.stat(follow_symlinks=False).st_blocks * 512
                    inodes += 1
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
    return used, inodes
