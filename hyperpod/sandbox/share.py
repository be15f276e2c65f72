"""A sandbox's virtio-fs share over its life: started with the VM or at the first mount, ended with the VM.

The file server belongs to the VM as QEMU does: there is no state to hand over to another one (vhost-user-fs in QEMU
7.2 and virtiofsd cannot migrate), so its death is the end of the pod. How mounts get into it: hyperpod.share.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from hyperpod.errors import FailedPrecondition, HyperpodError
from hyperpod.hypervisor.base import Hypervisor
from hyperpod.sandbox.live import LiveSandbox
from hyperpod.sandbox.threads import MountThreads, mounting, process_end
from hyperpod.share import binds
from hyperpod.share.virtiofsd import PACKAGE, FileServer, Program, program
from hyperpod.spec.mounts import HostBind

log = logging.getLogger(__name__)

VM_FIRST = 2.0
"""Seconds that the end of a file server waits for the end of its VM to be told, which would explain it."""


class Shares:
    """The shares of all sandboxes. Coroutines raise hyperpod errors only."""

    def __init__(self, hypervisor: Hypervisor) -> None:
        self._hypervisor = hypervisor
        self._program: Program | None = None
        self._threads = MountThreads()

    # -- the VM's life ------------------------------------------------------------------------------------

    async def start(self, sandbox: LiveSandbox, cgroups: Sequence[str]) -> None:
        """A file server that waits for QEMU. Raises FailedPrecondition when the program is not installed."""
        if self._program is None:
            self._program = await asyncio.to_thread(program)
        if self._program is None:
            raise FailedPrecondition(
                f'virtiofsd is not installed: it is in {PACKAGE}; or set vm.virtiofs = "off" to do without mounts'
            )
        record = sandbox.record
        await asyncio.to_thread(sandbox.files.start, self._program, record.uid, record.gid, cgroups)
        sandbox.files_started.set()

    async def uncover(self, sandbox: LiveSandbox) -> None:
        """Once QEMU has connected: see FileServer.uncover."""
        await asyncio.to_thread(sandbox.files.uncover)

    async def end(self, sandbox: LiveSandbox) -> None:
        """Safe to repeat. All mounts go with it."""
        await asyncio.to_thread(sandbox.files.end)

    async def sweep(self, folder: Path) -> None:
        """End the file server of a sandbox that nobody knows."""
        try:
            await asyncio.to_thread(FileServer(folder).end)
        except HyperpodError as exc:
            log.error("%s is left behind: %s", folder, exc)

    async def death(self, sandbox: LiveSandbox) -> str:
        """Waits for the end of the file server, as long as its VM has not ended; says what it said last."""
        if not sandbox.files.folder.exists():
            await sandbox.files_started.wait()
        sandbox.files.listen()
        if pid := sandbox.files.pid():
            await process_end(pid)
            sandbox.files.reap()
        try:
            async with asyncio.timeout(VM_FIRST):
                await sandbox.gone.wait()
            await asyncio.Event().wait()  # the VM's end is told already
        except TimeoutError:
            pass
        return f"its file server, virtiofsd, ended{sandbox.files.last_words()}"

    # -- containers ---------------------------------------------------------------------------------------

    async def bind(
        self,
        sandbox: LiveSandbox,
        wanted: Sequence[HostBind],
        cgroups: Callable[[], Awaitable[Sequence[str]]],
    ) -> list[str]:
        """Put a container's mounts into the share; see binds.bind. The caller calls `release` whatever comes."""
        async with sandbox.files_lock:
            await self._ensure(sandbox, cgroups)
        namespace = await asyncio.to_thread(sandbox.files.namespace)
        target = binds.Target(namespace, sandbox.files.share, ids=sandbox.record.config.namespaces.userns)
        cancelled = threading.Event()
        return await self._threads.run(
            lambda: binds.bind(target, wanted, cancelled),
            mounting(wanted),
            cancelled,
        )

    async def release(self, sandbox: LiveSandbox, container_id: str) -> None:
        """Take a container's mounts out; fine when there are none."""
        try:
            await asyncio.to_thread(binds.release, sandbox.files.share, container_id)
        except OSError as exc:
            log.error("container %s: mount points stay until the pod ends: %s", container_id[:12], exc)

    async def _ensure(self, sandbox: LiveSandbox, cgroups: Callable[[], Awaitable[Sequence[str]]]) -> None:
        mode = sandbox.record.virtiofs
        if mode == "off":
            raise FailedPrecondition(
                f"sandbox {sandbox.short} was made without a file server: set vm.virtiofs to boot or demand, and "
                "make the pod anew"
            )
        if mode == "demand":
            if not sandbox.files.folder.exists():
                try:
                    await self.start(sandbox, await cgroups())
                except HyperpodError:
                    await self.end(sandbox)  # or the next container would find half of one
                    raise
            await self._hypervisor.attach_share(sandbox.record.domain, str(sandbox.files.socket))
            await self.uncover(sandbox)
