"""What a sandbox's life does to its containers: exits, reconnections, its end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from hyperpod import failpoints
from hyperpod.agentclient.types import AgentContainerState, ContainerInfo
from hyperpod.container.known import KnownContainers
from hyperpod.container.live import LiveContainer
from hyperpod.errors import FailedPrecondition, HyperpodError, Unavailable
from hyperpod.model.base import now_ns
from hyperpod.model.container import OOM_CODE, UNKNOWN_CODE, ContainerState, Reason
from hyperpod.sandbox.live import LiveSandbox
from hyperpod.shimclient.client import LogEnd
from hyperpod.tasks import TaskOwner, bounded

log = logging.getLogger(__name__)

LOG_DRAIN = 10.0
"""Seconds that an exit waits for the container's last output to be in its log."""

EXITS_AT_ONCE = 2.0
"""Seconds that a reconnection waits for the exits that it has learnt of; usual logs are complete at once."""

STRAYS = 30.0
"""Seconds to end the containers that an agent has and should not."""

KILL_ALL = 5.0
"""Seconds that stopping a sandbox gives its containers to die of SIGKILL before the VM goes."""


class ContainerLives:
    """The SandboxListener of all sandboxes. `remove`: kill and remove the container of that id."""

    def __init__(
        self, known: KnownContainers, remove: Callable[[str], Awaitable[None]], owner: TaskOwner
    ) -> None:
        self._known, self._remove, self._owner = known, remove, owner
        self._deaf: set[str] = set()
        """Sandboxes whose guest let SIGKILL pass: asking it again would be time lost."""
        self._exits: dict[str, asyncio.Task[None]] = {}
        """Reports that wait for the end of a log, by container."""

    def container_exited(self, sandbox: LiveSandbox, info: ContainerInfo) -> asyncio.Task[None] | None:
        """The agent's report. A task each: one log that does not end must not hold back another container's exit.

        One at a time for a container: a guest may repeat itself a thousand times while its log is waited for."""
        container = self._known.index.find(info.id)
        if container is None or container.sandbox_id != sandbox.id or container.status.finished_at:
            return None
        if (task := self._exits.get(container.id)) is None:
            task = self._owner.spawn(f"exit/{container.short}", self._tell_exit(container, sandbox, info))
            self._exits[container.id] = task
            task.add_done_callback(lambda _: self._exits.pop(container.id, None))
        return task

    async def _tell_exit(self, container: LiveContainer, sandbox: LiveSandbox, info: ContainerInfo) -> None:
        """First the log is complete, then the exit is told."""
        try:
            result = await self._end_log(container, sandbox)
            if not result.complete or result.gap_bytes:
                log.warning("container %s: its log misses output: %s", container.short, result)
        except HyperpodError as exc:
            log.warning("container %s: end of log not confirmed: %s", container.short, exc)
        reason = (
            Reason.OOM_KILLED
            if info.oom_killed
            else Reason.COMPLETED
            if info.exit_code == 0
            else Reason.ERROR
        )
        started = container.status.started_at or container.record.created_at
        finished = min(max(info.finished_at_ns, started), now_ns())
        await self._known.finish(container, info.exit_code, reason, "", finished, started_at=started)
        failpoints.passing("container.exited")

    async def _end_log(self, container: LiveContainer, sandbox: LiveSandbox) -> LogEnd:
        """Wait for the last output. A shim that dies meanwhile has a successor, which goes on with the log."""
        try:
            return await sandbox.need_shim().log_finish(container.id, timeout=LOG_DRAIN)
        except (Unavailable, FailedPrecondition):
            if not sandbox.ready:
                raise
            await self._known.start_log(container, sandbox)
            return await sandbox.need_shim().log_finish(container.id, timeout=LOG_DRAIN)

    async def vm_unresponsive(self, container: LiveContainer, what: str) -> None:
        """The guest does not even deliver SIGKILL: the VM itself is stopped. `what` the container did is told of
        all of the pod's containers, which nobody has asked to stop."""
        ident, why = container.sandbox_id, f"container {container.short} {what}"
        log.error("sandbox %s: %s; stopping the whole sandbox", ident[:12], why)
        self._deaf.add(ident)
        await self._known.sandboxes.stop(ident, why)

    async def sandbox_stopping(self, sandbox: LiveSandbox) -> None:
        running = [c for c in self._known.of(sandbox.id) if c.state is ContainerState.RUNNING]
        if not running or sandbox.id in self._deaf:
            return
        try:
            async with asyncio.timeout(KILL_ALL):
                agent = await sandbox.session.client(timeout=2.0)
                await asyncio.gather(*(agent.signal_container(c.id, 9, all_processes=True) for c in running))
                await asyncio.gather(*(c.exited.wait() for c in running))
        except (TimeoutError, HyperpodError) as exc:
            log.warning("sandbox %s: containers outlive SIGKILL: %s", sandbox.short, exc or "timeout")

    async def sandbox_stopped(self, sandbox: LiveSandbox, detail: str) -> None:
        self._deaf.discard(sandbox.id)
        message = (
            f"the pod's {sandbox.record.kind.words} ended: {detail}" if detail else "the pod was stopped"
        )
        code, reason = (OOM_CODE, Reason.OOM_KILLED) if sandbox.host_oom else (UNKNOWN_CODE, Reason.UNKNOWN)
        for container in self._known.of(sandbox.id):
            if container.state is not ContainerState.EXITED:
                started = container.status.started_at or now_ns()
                await self._known.finish(container, code, reason, message, now_ns(), started_at=started)
            await self._known.release(container, sandbox)

    async def sandbox_removing(self, sandbox: LiveSandbox) -> None:
        for container in self._known.of(sandbox.id):
            await self._remove(container.id)

    async def connected(self, sandbox: LiveSandbox) -> None:
        """Agent and shim are there (again): logs flow, and what happened meanwhile is learnt."""
        for container in self._known.of(sandbox.id):
            # One that is being created may have begun its log with a shim that has died since.
            made = container.status.prepared or container.lock.locked()
            if made and not container.status.finished_at:
                try:
                    await self._known.start_log(container, sandbox)
                except HyperpodError as exc:
                    log.warning("container %s: its log does not flow: %s", container.short, exc)
        # Those that are being created or started report themselves.
        settled = [c for c in self._known.of(sandbox.id) if not c.lock.locked()]
        agent = await sandbox.session.client()
        known = {info.id: info for info in await agent.list_containers()}
        if strays := [info for info in known.values() if self._is_stray(sandbox, info)]:
            ending = bounded(self._end_strays(sandbox, strays), STRAYS, "ending what should not run")
            self._owner.spawn(f"strays/{sandbox.short}", ending)
        exits: set[asyncio.Task[None]] = set()
        for container in settled:
            info = known.get(container.id)
            if container.status.finished_at or container.status.removing or container.lock.locked():
                continue
            if not container.status.prepared:
                await self._known.discard(container, sandbox)
            elif info is None:
                await self._known.finish(
                    container, UNKNOWN_CODE, Reason.UNKNOWN, "the guest does not know it any more", now_ns(),
                    started_at=container.status.started_at or now_ns(),
                )  # fmt: skip
            elif info.exited:
                if (task := self.container_exited(sandbox, info)) is not None:
                    exits.add(task)
            elif info.state is AgentContainerState.RUNNING and not container.status.started_at:
                await self._known.set(container, started_at=min(info.started_at_ns, now_ns()), pid=info.pid)
        if exits:
            await asyncio.wait(exits, timeout=EXITS_AT_ONCE)

    def _is_stray(self, sandbox: LiveSandbox, info: ContainerInfo) -> bool:
        """Whether the agent has what is unknown here, or runs what has ended here: a record could not be read, or
        an answer was lost and another given in its place."""
        container = self._known.index.find(info.id)
        if container is None or container.sandbox_id != sandbox.id:
            return True
        return bool(container.status.finished_at) and info.state is AgentContainerState.RUNNING

    async def _end_strays(self, sandbox: LiveSandbox, strays: list[ContainerInfo]) -> None:
        """Nobody would ever stop them. Raises HyperpodError: the next connection is another try."""
        log.warning(
            "sandbox %s: ending %d containers that should not run, the first is %s",
            sandbox.short,
            len(strays),
            strays[0].id[:12],
        )
        agent = await sandbox.session.client()
        for info in strays:
            if self._known.index.find(info.id) is None:
                await agent.remove_container(info.id)
            else:
                await agent.signal_container(info.id, 9, all_processes=True)
