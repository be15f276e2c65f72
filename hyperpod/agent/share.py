"""The host's folders and files for containers: one virtio-fs, mounted when the first container needs it.

A container's own lie below layout.share as spec/share.py says, and crun binds them from there. A folder is a mount
of its own here, which the kernel makes when it is first walked into, and whose end lets go of the host's files.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Sequence

from hyperpod.agent import linux
from hyperpod.agent.layout import Layout
from hyperpod.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument
from hyperpod.spec import share
from hyperpod.tasks import bounded

log = logging.getLogger(__name__)

DEVICE_TIMEOUT = 10.0
"""Seconds for a device that was just plugged to be seen."""

WALK_TIMEOUT = 10.0
RETRY = 0.01


class Share:
    """The mounted share, of which there is one."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._mounted = False
        self._lock = asyncio.Lock()

    async def use(self, tag: str, submounts: Sequence[str]) -> None:
        """Mount it if it is not, and walk into `submounts`: folders that several containers have, and mounts
        below a read-only one.

        Walked into here, and not in crun's mount namespace first, the former are one mount for all of them; the
        latter keep the flags that they have here.
        Raises FailedPrecondition when there is no such device, InvalidArgument.
        """
        if not self._layout.guest:
            raise InvalidArgument("a host agent has the host's files: it has no share")
        async with self._lock:
            if not self._mounted:
                await self._mount(tag)
                self._mounted = True
        if submounts:
            await self._patiently(lambda: self._walk(submounts))

    async def _patiently(self, work: Callable[[], None]) -> None:
        """What walks in the share waits for the host's files, which may be another machine's: not on our loop."""
        await bounded(asyncio.to_thread(work), WALK_TIMEOUT, "looking at the host's files")

    def _walk(self, submounts: Sequence[str]) -> None:
        for path in submounts:
            try:
                os.close(os.open(f"{self._layout.share}/{path}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            except OSError as exc:  # gone again on the host: then it is not there either
                log.info("submount %s: %s", path, exc.strerror)

    async def _mount(self, tag: str) -> None:
        target, loop = self._layout.share, asyncio.get_running_loop()
        os.makedirs(target, mode=0o711, exist_ok=True)
        deadline = loop.time() + DEVICE_TIMEOUT
        while True:
            try:
                # Without nosuid: a program on a volume runs as it would on the host's own mount of it.
                linux.mount(tag, target, "virtiofs", linux.MS_NODEV)
            except OSError as exc:
                if exc.errno != 22 or loop.time() > deadline:  # EINVAL: no device with that tag yet
                    raise FailedPrecondition(
                        f"virtio-fs {tag[:40]!r} does not mount: {exc.strerror}"
                    ) from exc
            else:
                return
            await asyncio.sleep(RETRY)

    async def drop(self, container: str) -> None:
        """Unmount what a container had, so that the host's files are let go of; nothing there is fine."""
        if self._mounted:
            try:
                await self._patiently(lambda: self._unmount(container))
            except DeadlineExceeded as exc:
                log.warning("container %s: its mounts stay: %s", container[:12], exc)

    def _unmount(self, container: str) -> None:
        mine = share.folder(container)
        folder = f"{self._layout.share}/{mine}"
        links = self._links(mine)
        others = self._links_of_others(mine) if links else set()
        names = []
        with contextlib.suppress(OSError):
            names = [f"{folder}/{name}" for name in os.listdir(folder) if name not in links]
        # Another container's mount has to stay: a second one of the same folder would have other inodes.
        names += [f"{folder}/{target}" for target in links.values() if target not in others]
        for name in names:
            with contextlib.suppress(OSError):  # a file, or a folder that nobody has walked into
                linux.umount(name, linux.MNT_DETACH)

    def _links(self, folder: str) -> dict[str, str]:
        """Of a container's folder: name to target, which is relative to the folder and the same for every one."""
        found: dict[str, str] = {}
        with contextlib.suppress(OSError), os.scandir(f"{self._layout.share}/{folder}") as entries:
            for entry in entries:
                if entry.is_symlink():
                    found[entry.name] = os.readlink(entry.path)
        return found

    def _links_of_others(self, mine: str) -> set[str]:
        folders = [name for name in os.listdir(self._layout.share) if name not in (mine, share.COMMON)]
        return {target for folder in folders for target in self._links(folder).values()}
