"""What the daemon knows of its containers, in memory and on record, and what they hold of sandboxes and images."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os

from hyperpod import failpoints
from hyperpod.container.live import LiveContainer
from hyperpod.container.logfile import open_log
from hyperpod.errors import HyperpodError, NotFound, ResourceExhausted
from hyperpod.image.store import ImageStore
from hyperpod.model.container import Container, ContainerRecord, ContainerStatus, Reason
from hyperpod.sandbox.live import LiveSandbox
from hyperpod.sandbox.manager import SandboxManager
from hyperpod.store.index import IdIndex
from hyperpod.store.records import RecordStore

log = logging.getLogger(__name__)


class KnownContainers:
    """All of this daemon. Coroutines raise hyperpod errors only."""

    def __init__(
        self,
        store: RecordStore[ContainerRecord, ContainerStatus],
        sandboxes: SandboxManager,
        images: ImageStore,
    ) -> None:
        self.store, self.sandboxes, self.images = store, sandboxes, images
        self.index: IdIndex[LiveContainer] = IdIndex("container")
        self.names: dict[tuple[str, str, int], str] = {}
        """LiveContainer.name_key -> id."""

    # -- queries ------------------------------------------------------------------------------------------

    def get(self, ident: str) -> Container:
        """By id or unique prefix. Raises NotFound."""
        return self.index.get(ident).view()

    def all(self) -> list[LiveContainer]:
        """What is announced: not those that are still being created. To be read only.

        No views: of a thousand containers, once a second, they cost the loop milliseconds."""
        return [c for c in self.index.values() if c.status.prepared or c.status.finished_at]

    def of(self, sandbox_id: str) -> list[LiveContainer]:
        """All of a sandbox, announced or not."""
        return [c for c in self.index.values() if c.sandbox_id == sandbox_id]

    # -- memory and record --------------------------------------------------------------------------------

    def add(self, container: LiveContainer) -> None:
        self.index.add(container.id, container)
        self.names[container.name_key] = container.id

    async def set(self, container: LiveContainer, *, durable: bool = True, **changes: object) -> None:
        """Known in memory at once, and recorded when this returns; of a container that is gone, nothing is kept.

        An exit is told by one task while another removes: writes must not meet each other or the removal."""
        container.status = container.status.next(**changes)
        async with container.writing:
            if self.index.find(container.id) is container:
                try:
                    await self.store.update(container.id, container.status, durable=durable)
                except ResourceExhausted as exc:
                    if not (container.status.finished_at or container.status.removing):
                        raise
                    # What makes room must not want for it; an end is a fact that the next daemon learns anew.
                    log.error("container %s: its end is not on record: %s", container.short, exc)

    async def finish(
        self, container: LiveContainer, code: int, reason: Reason, message: str, at: int, *, started_at: int
    ) -> None:
        """Its end, told once; times are nanoseconds."""
        if container.status.finished_at:
            return
        try:
            await self.set(
                container,
                exit_code=code,
                reason=reason.value,
                message=message[:4096],
                finished_at=at,
                started_at=started_at,
                pid=0,
            )
        finally:  # a broken disk keeps no one waiting
            container.exited.set()
        log.info("container %s exited: code %d, %s", container.short, code, reason.value)

    async def forget(self, container: LiveContainer) -> None:
        """Delete its record, free its name."""
        async with container.writing:
            await self.store.delete(container.id)
            self.index.discard(container.id)
        if self.names.get(container.name_key) == container.id:
            del self.names[container.name_key]

    async def adopt(self, record: ContainerRecord, status: ContainerStatus) -> None:
        """Put a loaded container into memory; its sandbox is there already."""
        container = LiveContainer(record, status)
        self.add(container)
        sandbox = self.sandboxes.index.find(record.sandbox_id)
        if sandbox is None:
            await self.forget(container)
            return
        if not sandbox.ready:
            return
        sandbox.disks.adopt(record.all_layers, record.id)
        for image_id in record.image_ids:
            try:
                self.images.lease(image_id, record.id)
            except NotFound as exc:
                log.warning("container %s: its image is gone: %s", container.short, exc)

    # -- what a container holds ---------------------------------------------------------------------------

    async def start_log(self, container: LiveContainer, sandbox: LiveSandbox) -> None:
        """Its output goes into its log from here on, or from where a shim before left off."""
        await self.log_to(container, sandbox, open_log_of(container))

    async def log_to(self, container: LiveContainer, sandbox: LiveSandbox, fd: int | None) -> None:
        """As `start_log`; closes `fd`, the open log."""
        tty = container.record.config.tty
        try:
            await sandbox.of_any_shim(lambda shim: shim.log_start(container.id, tty=tty, fd=fd))
        finally:
            if fd is not None:
                os.close(fd)

    async def need_log(self, container: LiveContainer, sandbox: LiveSandbox) -> None:
        """What CreateContainer began is through, or is begun anew; raises what hinders it."""
        if (begun := container.logging) is None:
            return
        await asyncio.wait([begun])
        if begun.cancelled() or begun.exception() is not None:
            await self.start_log(container, sandbox)
        container.logging = None

    async def end_log_begin(self, container: LiveContainer) -> None:
        """Before its log is stopped: what waits for a shim would begin it afterwards."""
        if (begun := container.logging) is not None:
            begun.cancel()
            await asyncio.wait([begun])

    async def release(
        self, container: LiveContainer, sandbox: LiveSandbox | None, *, agent_answers: bool = True
    ) -> None:
        """Give mounts and layers back: umount in the guest, detach from the VM, drop the lease."""
        if sandbox is not None:
            if container.record.config.mounts:
                await self.sandboxes.builder(sandbox).unmount(sandbox, container.id)
                failpoints.passing("container.unmounted")
            unused = sandbox.disks.unused_after(container.id)
            forgotten = agent_answers and sandbox.ready
            if forgotten and unused:
                try:
                    await sandbox.session.repeatable(lambda agent: agent.forget_layers(unused))
                except HyperpodError as exc:
                    # A disk that goes from under its mount would be what the next container of the image gets.
                    log.warning("sandbox %s: layers stay mounted: %s", sandbox.short, exc)
                    forgotten = False
            await sandbox.disks.release(container.id, detach=forgotten)
        self.images.release(container.id)

    async def discard(self, container: LiveContainer, sandbox: LiveSandbox) -> None:
        """Undo a create that failed, whatever else fails: nobody sees it, and its name is wanted for the next try.

        What the guest has is told to go, if it listens; else that is found at the next connection."""
        answers = False
        if sandbox.ready:
            with contextlib.suppress(HyperpodError):
                await sandbox.session.repeatable(lambda agent: agent.remove_container(container.id))
                answers = True
        await self.end_log_begin(container)
        with contextlib.suppress(HyperpodError):
            await sandbox.need_shim().log_stop(container.id)
        try:
            await self.release(container, sandbox, agent_answers=answers)
        except (HyperpodError, OSError) as exc:
            log.error("container %s: not all that it had is given back: %s", container.short, exc)
        await self.forget(container)


def open_log_of(container: LiveContainer) -> int | None:
    """The caller closes it; None is one without a log. Raises InvalidArgument."""
    return open_log(container.record.log_path) if container.record.log_path else None
