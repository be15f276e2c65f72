"""The verbs on containers: create, start, update, stop, remove, and the rotation of their logs."""

from __future__ import annotations

import contextlib
import json
import os
import secrets

from hyperpod import failpoints
from hyperpod.container import placement, process
from hyperpod.container.create import Creator
from hyperpod.container.known import KnownContainers
from hyperpod.container.live import LiveContainer
from hyperpod.container.lives import ContainerLives
from hyperpod.container.logfile import open_log
from hyperpod.container.seccomp import SeccompProfiles
from hyperpod.container.stop import Stopper
from hyperpod.errors import FailedPrecondition, HyperpodError, Unavailable
from hyperpod.model.base import now_ns
from hyperpod.model.container import START_ERROR_CODE, ContainerConfig, ContainerState, Reason
from hyperpod.model.security import LinuxResources
from hyperpod.sandbox.phases import Laps
from hyperpod.spec import limits
from hyperpod.tasks import Operations, TaskOwner


class ContainerManager:
    """All containers of this daemon. Public coroutines raise hyperpod errors only."""

    def __init__(self, known: KnownContainers, seccomp: SeccompProfiles, owner: TaskOwner) -> None:
        self.known = known
        self.lives = ContainerLives(known, self.remove, owner)
        self._operations = Operations(owner)
        self._creator = Creator(known, seccomp, self._operations, owner)
        self._stopper = Stopper(known.sandboxes, self.lives.vm_unresponsive)

    async def create(self, sandbox_id: str, config: ContainerConfig) -> str:
        """Prepare a container and return its id; a retry with the identical configuration joins."""
        return await self._creator.create(sandbox_id, config)

    # -- start --------------------------------------------------------------------------------------------

    async def start(self, ident: str) -> None:
        """Run a created container. A failure leaves it EXITED with reason StartError and code 128."""
        container = self.known.index.get(ident)
        await self._operations.run(f"start/{container.id}", lambda: self._start(container))

    async def _start(self, container: LiveContainer) -> None:
        async with container.lock:
            if container.state is not ContainerState.CREATED or container.status.removing:
                raise FailedPrecondition(
                    f"container {container.short} is {container.state.value}, not created"
                )
            sandbox = self.known.sandboxes.live(container.sandbox_id)
            sandbox.need_ready()
            laps = Laps()
            sandbox.calls["StartContainer"] = laps.seconds
            failpoints.passing("container.started")
            await self.known.need_log(container, sandbox)
            laps("log")
            try:
                pid = await sandbox.session.repeatable(lambda agent: agent.start_container(container.id))
            except HyperpodError as failure:
                argv = process.arguments(container.record.config, container.record.image_config)
                exc = process.start_failure(argv, failure)
                now = now_ns()
                await self.known.finish(
                    container, START_ERROR_CODE, Reason.START_ERROR, str(exc), now, started_at=now
                )
                raise exc from failure
            laps("agent and crun")
            if not container.status.finished_at:
                await self.known.set(container, started_at=container.status.started_at or now_ns(), pid=pid)
            laps("record")
            failpoints.passing("container.running")

    # -- update -------------------------------------------------------------------------------------------

    async def update(self, ident: str, resources: LinuxResources) -> None:
        """New limits; what is unset in them stays. Raises FailedPrecondition for one that has ended."""
        container = self.known.index.get(ident)
        name = f"update/{container.id}/{secrets.token_hex(4)}"  # none joins: each has limits of its own
        await self._operations.run(name, lambda: self._update(container, resources))

    async def _update(self, container: LiveContainer, resources: LinuxResources) -> None:
        async with container.lock:
            if container.state is ContainerState.EXITED or container.status.removing:
                raise FailedPrecondition(f"container {container.short} has ended")
            sandbox = self.known.sandboxes.live(container.sandbox_id)
            sandbox.need_ready()
            merged = limits.merge(container.resources, resources)
            merged = limits.fit("linux", merged, placement.room(sandbox.record))
            wanted = json.dumps(limits.oci(merged)).encode()
            await sandbox.session.repeatable(lambda agent: agent.update_container(container.id, wanted))
            failpoints.passing("container.updated")
            await self.known.set(container, resources=merged)

    # -- stop and remove ----------------------------------------------------------------------------------

    async def stop(self, ident: str, timeout: int) -> None:
        """Stop signal, then SIGKILL after `timeout` seconds (0: at once); unknown ids are fine."""
        if (container := self.known.index.find(ident)) is None:
            return
        if container.state is ContainerState.CREATED:
            await self._operations.wait(f"start/{container.id}")
        if container.state is ContainerState.RUNNING:
            await self._stopper.stop(container, timeout)

    async def remove(self, ident: str) -> None:
        """Kills first when needed; unknown ids are fine."""
        if (container := self.known.index.find(ident)) is None:
            return
        await self.stop(container.id, 0)
        await self._operations.run(f"remove/{container.id}", lambda: self._remove(container))

    async def _remove(self, container: LiveContainer) -> None:
        async with container.lock:
            if self.known.index.find(container.id) is None:
                return
            await self.known.set(container, durable=False, removing=True)
            failpoints.passing("container.removing")
            await self.known.end_log_begin(container)
            sandbox = self.known.sandboxes.index.find(container.sandbox_id)
            if sandbox is not None and sandbox.ready:
                try:
                    await sandbox.session.repeatable(lambda agent: agent.remove_container(container.id))
                except Unavailable:
                    if sandbox.ready:  # else its place is being ended, and it with that
                        raise
                with contextlib.suppress(HyperpodError):
                    await sandbox.need_shim().log_stop(container.id)
            await self.known.release(container, sandbox)
            await self.known.forget(container)

    # -- logs ---------------------------------------------------------------------------------------------

    async def reopen_log(self, ident: str) -> None:
        """After a rotation: the writes after this call go to a new file at the old path."""
        container = self.known.index.get(ident)
        if container.state is not ContainerState.RUNNING:
            raise FailedPrecondition(f"container {container.short} is {container.state.value}, not running")
        if not container.record.log_path:
            raise FailedPrecondition(f"container {container.short} has no log_path")
        fd = open_log(container.record.log_path)
        try:
            await self.known.sandboxes.live(container.sandbox_id).need_shim().log_reopen(container.id, fd)
        finally:
            os.close(fd)
