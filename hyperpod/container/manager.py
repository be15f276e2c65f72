"""CreateContainer to RemoveContainer, and what a sandbox's life does to its containers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
from dataclasses import replace

from hyperpod import failpoints
from hyperpod.agentclient.types import AgentContainerState, ContainerInfo
from hyperpod.container import layers, placement, process, signals
from hyperpod.container.live import LiveContainer
from hyperpod.container.logfile import log_path, open_log
from hyperpod.container.seccomp import SeccompProfiles
from hyperpod.container.stop import Stopper
from hyperpod.errors import (
    AlreadyExists,
    FailedPrecondition,
    HyperpodError,
    InvalidArgument,
    NotFound,
)
from hyperpod.image.store import ImageStore
from hyperpod.model.base import now_ns
from hyperpod.model.container import (
    OOM_CODE,
    START_ERROR_CODE,
    UNKNOWN_CODE,
    Container,
    ContainerConfig,
    ContainerRecord,
    ContainerState,
    ContainerStatus,
    Reason,
)
from hyperpod.model.images import Image
from hyperpod.model.sandbox import Kind, SandboxConfig
from hyperpod.model.security import LinuxResources, NamespaceMode, User
from hyperpod.sandbox.live import LiveSandbox
from hyperpod.sandbox.manager import SandboxManager
from hyperpod.sandbox.phases import Laps
from hyperpod.spec import limits, mounts
from hyperpod.spec.oci import build_spec
from hyperpod.store.index import IdIndex
from hyperpod.store.records import RecordStore
from hyperpod.tasks import Operations, TaskOwner, settle_all

log = logging.getLogger(__name__)

LOG_DRAIN = 10.0
"""Seconds that an exit waits for the container's last output to be in its log."""

EXITS_AT_ONCE = 2.0
"""Seconds that a reconnection waits for the exits that it has learnt of; usual logs are complete at once."""

KILL_ALL = 5.0
"""Seconds that stopping a sandbox gives its containers to die of SIGKILL before the VM goes."""


class ContainerManager:
    """All containers of this daemon. Public coroutines raise hyperpod errors only."""

    def __init__(
        self,
        store: RecordStore[ContainerRecord, ContainerStatus],
        sandboxes: SandboxManager,
        images: ImageStore,
        seccomp: SeccompProfiles,
        owner: TaskOwner,
    ) -> None:
        self._seccomp = seccomp
        self.store, self.sandboxes, self.images, self.owner = store, sandboxes, images, owner
        self.index: IdIndex[LiveContainer] = IdIndex("container")
        self._names: dict[tuple[str, str, int], str] = {}
        self._making: dict[tuple[str, str, int], ContainerConfig] = {}
        """What is being created right now."""
        self._operations = Operations(owner)
        self._deaf: set[str] = set()
        """Sandboxes whose guest let SIGKILL pass: asking it again would be time lost."""
        self._stopper = Stopper(sandboxes, self.vm_unresponsive)

    # -- queries ------------------------------------------------------------------------------------------

    def get(self, ident: str) -> Container:
        """By id or unique prefix. Raises NotFound."""
        return self.index.get(ident).view()

    def all(self) -> list[LiveContainer]:
        """What is announced: not those that are still being created. To be read only.

        No views: of a thousand containers, once a second, they cost the loop milliseconds."""
        return [c for c in self.index.values() if c.status.prepared or c.status.finished_at]

    def of(self, sandbox_id: str) -> list[LiveContainer]:
        return [c for c in self.index.values() if c.sandbox_id == sandbox_id]

    # -- create -------------------------------------------------------------------------------------------

    async def create(self, sandbox_id: str, config: ContainerConfig, pod: SandboxConfig | None = None) -> str:
        """Prepare a container and return its id; a retry with the identical configuration joins."""
        sandbox = self.sandboxes.live(sandbox_id)
        sandbox.need_ready()
        key = (sandbox.id, config.metadata.name, config.metadata.attempt)
        if (making := self._making.get(key)) is not None:
            if making != config:
                raise AlreadyExists(
                    f"the name {config.metadata.name} attempt {key[2]} is taken by a container that is being "
                    "created with another configuration"
                )
        elif (known := self._names.get(key)) is not None:
            other = self.index.get(known)
            if other.record.config == config and other.state is ContainerState.CREATED:
                return known
            raise AlreadyExists(
                f"the name {config.metadata.name} attempt {key[2]} is taken by container {known}"
            )
        name = f"create/{sandbox.id}/{key[1]}/{key[2]}"
        self._making[key] = config

        async def create() -> str:
            try:
                return await self._create(sandbox, config)
            finally:
                self._making.pop(key, None)

        try:
            return await self._operations.run(name, create)
        finally:
            if not self._operations.running(name):  # it could not even begin
                self._making.pop(key, None)

    async def _create(self, sandbox: LiveSandbox, config: ContainerConfig) -> str:
        image = self.images.get(config.image)
        if image is None:
            raise NotFound(f"image {config.image[:200]!r} is not here; pull it first")
        ident, laps = secrets.token_hex(32), Laps()
        sandbox.calls["CreateContainer"] = laps.seconds
        record = self._record(ident, sandbox, config, image)
        resources = limits.fit("config.linux.resources", config.resources, placement.room(sandbox.record))
        placement.check(sandbox.record, config)
        self._check_security(sandbox, config)
        seccomp = await self._seccomp.of(config, sandbox.record.kernel.version)
        placed = placement.placed(sandbox, process.spec_input(record, seccomp), record)
        spec = build_spec(replace(placed, resources=resources))
        container = LiveContainer(record, ContainerStatus(resources=resources))
        laps("specification")
        async with container.lock:
            await self._prepare(container, sandbox, spec, laps)
        return ident

    async def _prepare(self, container: LiveContainer, sandbox: LiveSandbox, spec: bytes, laps: Laps) -> None:
        """Leases, record, disks, bundle in the guest, log; undone when one fails."""
        ident, record, config = container.id, container.record, container.record.config
        security = process.security(config, record.image_config)
        binds = mounts.host_binds(config.mounts, ident)
        logging_to: asyncio.Task[None] | None = None
        try:
            leased = layers.lease(record, self.images, on_host=sandbox.record.kind is Kind.HOST)
            await self.store.create(ident, record, container.status)
            self._add(container)
            failpoints.passing("container.recorded")
            # What is made for a container ends with the host at the latest: its record has time until it is told.
            settled = self.owner.spawn(f"settle/{container.short}", self.store.settle(ident))
            await sandbox.disks.attach(leased.files, ident)
            failpoints.passing("container.layers")
            submounts: list[str] = []
            if binds:
                submounts = await self.sandboxes.builder(sandbox).mount(sandbox, binds)
                failpoints.passing("container.mounted")
            laps("record, layers, mounts")
            agent = await sandbox.session.client()
            # Its streams are there as soon as the agent has heard of it, long before its root is mounted.
            logging_to = self.owner.spawn(f"log/{container.short}", self._start_log(container, sandbox))
            user = await agent.create_container(
                ident,
                oci_spec=spec,
                layers=leased.root_for_agent(),
                tty=config.tty,
                stdin=config.stdin,
                stdin_once=config.stdin_once,
                security=security,
                share=placement.share(sandbox.record, binds),
                submounts=submounts,
                image_volumes=leased.volumes_for_agent(),
            )
            laps("agent")
            scores = [
                c.record.config.resources.oom_score_adj
                for c in self.of(sandbox.id)
                if not c.status.finished_at
            ]
            await self.sandboxes.builder(sandbox).weigh(sandbox, min(scores, default=0))
            known = user and User(uid=user.uid, gid=user.gid, groups=user.groups)
            # Who finds it prepared and without a log, after a crash in between, starts that again.
            await settle_all(settled, logging_to, self._set(container, prepared=True, user=known))
            laps("record and log")
            failpoints.passing("container.prepared")
        except (HyperpodError, OSError):
            if logging_to is not None:  # or it would come after the end
                await asyncio.wait([logging_to])
            await self._discard(container, sandbox)
            raise

    def _check_security(self, sandbox: LiveSandbox, config: ContainerConfig) -> None:
        """What only pod and container together can tell. Raises InvalidArgument, NotFound, FailedPrecondition."""
        if config.privileged and not sandbox.record.config.privileged:
            raise InvalidArgument(
                "a privileged container needs a pod whose security context is privileged too"
            )
        if config.namespaces.pid is not NamespaceMode.TARGET:
            return
        if not config.namespaces.target_id:
            raise InvalidArgument("namespace_options.pid is TARGET and target_id is empty")
        target = self.index.get(config.namespaces.target_id)
        if target.sandbox_id != sandbox.id:
            raise InvalidArgument(f"target container {target.short} is in another pod")
        if target.state is not ContainerState.RUNNING:
            raise FailedPrecondition(f"target container {target.short} is {target.state.value}, not running")

    def _record(
        self, ident: str, sandbox: LiveSandbox, config: ContainerConfig, image: Image
    ) -> ContainerRecord:
        stop_signal = config.stop_signal or image.config.stop_signal or "SIGTERM"
        signals.number(stop_signal)
        return ContainerRecord(
            id=ident,
            sandbox_id=sandbox.id,
            config=config,
            image_id=image.id,
            image_ref=image.id,
            created_at=now_ns(),
            log_path=log_path(sandbox.record.config.log_directory, config.log_path),
            layers=tuple(layer.name for layer in image.layers),
            stop_signal=stop_signal,
            image_config=image.config,
            image_volumes=layers.resolve(config.mounts, self.images),
        )

    def _add(self, container: LiveContainer) -> None:
        self.index.add(container.id, container)
        self._names[container.name_key] = container.id

    async def _discard(self, container: LiveContainer, sandbox: LiveSandbox) -> None:
        """Undo a create that failed; what the guest has is told to go, if it listens."""
        with contextlib.suppress(HyperpodError):
            await (await sandbox.session.client(timeout=1.0)).remove_container(container.id)
        with contextlib.suppress(HyperpodError):
            await sandbox.need_shim().log_stop(container.id)
        await self._release(container, sandbox)
        await self._forget(container)

    async def _start_log(self, container: LiveContainer, sandbox: LiveSandbox) -> None:
        fd = open_log(container.record.log_path) if container.record.log_path else None
        try:
            await sandbox.need_shim().log_start(container.id, tty=container.record.config.tty, fd=fd)
        finally:
            if fd is not None:
                os.close(fd)

    # -- start --------------------------------------------------------------------------------------------

    async def start(self, ident: str) -> None:
        """Run a created container. A failure leaves it EXITED with reason StartError and code 128."""
        container = self.index.get(ident)
        await self._operations.run(f"start/{container.id}", lambda: self._start(container))

    async def _start(self, container: LiveContainer) -> None:
        async with container.lock:
            if container.state is not ContainerState.CREATED or container.status.removing:
                raise FailedPrecondition(
                    f"container {container.short} is {container.state.value}, not created"
                )
            sandbox = self.sandboxes.live(container.sandbox_id)
            sandbox.need_ready()
            laps = Laps()
            sandbox.calls["StartContainer"] = laps.seconds
            failpoints.passing("container.started")
            try:
                pid = await (await sandbox.session.client()).start_container(container.id)
            except HyperpodError as failure:
                argv = process.arguments(container.record.config, container.record.image_config)
                exc = process.start_failure(argv, failure)
                now = now_ns()
                await self._finish(
                    container, START_ERROR_CODE, Reason.START_ERROR, str(exc), now, started_at=now
                )
                raise exc from failure
            laps("agent and crun")
            if not container.status.finished_at:
                await self._set(container, started_at=container.status.started_at or now_ns(), pid=pid)
            laps("record")
            failpoints.passing("container.running")

    # -- update -------------------------------------------------------------------------------------------

    async def update(self, ident: str, resources: LinuxResources) -> None:
        """New limits; what is unset in them stays. Raises FailedPrecondition for one that has ended."""
        container = self.index.get(ident)
        name = f"update/{container.id}/{secrets.token_hex(4)}"  # none joins: each has limits of its own
        await self._operations.run(name, lambda: self._update(container, resources))

    async def _update(self, container: LiveContainer, resources: LinuxResources) -> None:
        async with container.lock:
            if container.state is ContainerState.EXITED or container.status.removing:
                raise FailedPrecondition(f"container {container.short} has ended")
            sandbox = self.sandboxes.live(container.sandbox_id)
            sandbox.need_ready()
            merged = limits.merge(container.resources, resources)
            merged = limits.fit("linux", merged, placement.room(sandbox.record))
            agent = await sandbox.session.client()
            await agent.update_container(container.id, json.dumps(limits.oci(merged)).encode())
            failpoints.passing("container.updated")
            await self._set(container, resources=merged)

    # -- exits --------------------------------------------------------------------------------------------

    async def container_exited(self, sandbox: LiveSandbox, info: ContainerInfo) -> None:
        """The agent's report: first the log is complete, then the exit is told."""
        container = self.index.find(info.id)
        if container is None or container.sandbox_id != sandbox.id or container.status.finished_at:
            return
        try:
            result = await sandbox.need_shim().log_finish(container.id, timeout=LOG_DRAIN)
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
        await self._finish(container, info.exit_code, reason, "", finished, started_at=started)
        failpoints.passing("container.exited")

    async def _finish(
        self, container: LiveContainer, code: int, reason: Reason, message: str, at: int, *, started_at: int
    ) -> None:
        if container.status.finished_at:
            return
        try:
            await self._set(
                container,
                exit_code=code,
                reason=reason.value,
                message=message[:4096],
                finished_at=at,
                started_at=started_at,
                pid=0,
            )
        finally:  # a full disk keeps no one waiting
            container.exited.set()
        log.info("container %s exited: code %d, %s", container.short, code, reason.value)

    # -- stop and remove ----------------------------------------------------------------------------------

    async def stop(self, ident: str, timeout: int) -> None:
        """Stop signal, then SIGKILL after `timeout` seconds (0: at once); unknown ids are fine."""
        if (container := self.index.find(ident)) is None:
            return
        if container.state is ContainerState.CREATED:
            await self._operations.wait(f"start/{container.id}")
        if container.state is ContainerState.RUNNING:
            await self._stopper.stop(container, timeout)

    async def vm_unresponsive(self, sandbox_id: str) -> None:
        """The guest does not even deliver SIGKILL: the VM itself is stopped."""
        log.error("sandbox %s: its guest does not react; stopping the VM", sandbox_id[:12])
        self._deaf.add(sandbox_id)
        await self.sandboxes.stop(sandbox_id)

    async def remove(self, ident: str) -> None:
        """Kills first when needed; unknown ids are fine."""
        if (container := self.index.find(ident)) is None:
            return
        await self.stop(container.id, 0)
        await self._operations.run(f"remove/{container.id}", lambda: self._remove(container))

    async def _remove(self, container: LiveContainer) -> None:
        async with container.lock:
            if self.index.find(container.id) is None:
                return
            await self._set(container, durable=False, removing=True)
            failpoints.passing("container.removing")
            sandbox = self.sandboxes.index.find(container.sandbox_id)
            if sandbox is not None and sandbox.ready:
                agent = await sandbox.session.client()
                await agent.remove_container(container.id)
                with contextlib.suppress(HyperpodError):
                    await sandbox.need_shim().log_stop(container.id)
            await self._release(container, sandbox)
            await self._forget(container)

    async def _release(self, container: LiveContainer, sandbox: LiveSandbox | None) -> None:
        """Give mounts and layers back: umount in the guest, detach from the VM, drop the lease."""
        if sandbox is not None:
            if container.record.config.mounts:
                await self.sandboxes.builder(sandbox).unmount(sandbox, container.id)
                failpoints.passing("container.unmounted")
            unused = sandbox.disks.unused_after(container.id)
            if sandbox.ready and unused:
                try:
                    await (await sandbox.session.client(timeout=1.0)).forget_layers(unused)
                except HyperpodError as exc:
                    log.warning("sandbox %s: layers stay mounted: %s", sandbox.short, exc)
            await sandbox.disks.release(container.id, detach=sandbox.ready)
        self.images.release(container.id)

    async def _forget(self, container: LiveContainer) -> None:
        async with container.writing:
            await self.store.delete(container.id)
            self.index.discard(container.id)
        if self._names.get(container.name_key) == container.id:
            del self._names[container.name_key]

    async def _set(self, container: LiveContainer, *, durable: bool = True, **changes: object) -> None:
        """Known in memory at once, and recorded when this returns; of a container that is gone, nothing is kept.

        An exit is told by one task while another removes: writes must not meet each other or the removal."""
        container.status = container.status.next(**changes)
        async with container.writing:
            if self.index.find(container.id) is container:
                await self.store.update(container.id, container.status, durable=durable)

    # -- logs ---------------------------------------------------------------------------------------------

    async def reopen_log(self, ident: str) -> None:
        """After a rotation: the writes after this call go to a new file at the old path."""
        container = self.index.get(ident)
        if container.state is not ContainerState.RUNNING:
            raise FailedPrecondition(f"container {container.short} is {container.state.value}, not running")
        if not container.record.log_path:
            raise FailedPrecondition(f"container {container.short} has no log_path")
        fd = open_log(container.record.log_path)
        try:
            await self.sandboxes.live(container.sandbox_id).need_shim().log_reopen(container.id, fd)
        finally:
            os.close(fd)

    # -- what the sandbox's life does (SandboxListener) ---------------------------------------------------

    async def sandbox_stopping(self, sandbox: LiveSandbox) -> None:
        running = [c for c in self.of(sandbox.id) if c.state is ContainerState.RUNNING]
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
        for container in self.of(sandbox.id):
            if container.state is not ContainerState.EXITED:
                started = container.status.started_at or now_ns()
                await self._finish(container, code, reason, message, now_ns(), started_at=started)
            await self._release(container, sandbox)

    async def sandbox_removing(self, sandbox: LiveSandbox) -> None:
        for container in self.of(sandbox.id):
            await self.remove(container.id)

    async def connected(self, sandbox: LiveSandbox) -> None:
        """Agent and shim are there (again): logs flow, and what happened meanwhile is learnt."""
        for container in self.of(sandbox.id):
            if container.status.prepared and not container.status.finished_at:
                try:
                    await self._start_log(container, sandbox)
                except HyperpodError as exc:
                    log.warning("container %s: its log does not flow: %s", container.short, exc)
        settled = [c for c in self.of(sandbox.id) if not c.lock.locked()]  # the others report themselves
        agent = await sandbox.session.client()
        known = {info.id: info for info in await agent.list_containers()}
        exits: list[asyncio.Task[None]] = []
        for container in settled:
            info = known.get(container.id)
            if container.status.finished_at or container.status.removing or container.lock.locked():
                continue
            if not container.status.prepared:
                await self._discard(container, sandbox)
            elif info is None:
                await self._finish(
                    container, UNKNOWN_CODE, Reason.UNKNOWN, "the guest does not know it any more", now_ns(),
                    started_at=container.status.started_at or now_ns(),
                )  # fmt: skip
            elif info.exited:
                # A task each: one container's log that does not end must not hold back the others, or the pod.
                exits.append(
                    self.owner.spawn(f"exit/{container.short}", self.container_exited(sandbox, info))
                )
            elif info.state is AgentContainerState.RUNNING and not container.status.started_at:
                await self._set(container, started_at=min(info.started_at_ns, now_ns()), pid=info.pid)
        if exits:
            await asyncio.wait(exits, timeout=EXITS_AT_ONCE)

    # -- recovery -----------------------------------------------------------------------------------------

    async def adopt(self, record: ContainerRecord, status: ContainerStatus) -> None:
        """Put a loaded container into memory; its sandbox is there already."""
        container = LiveContainer(record, status)
        self._add(container)
        sandbox = self.sandboxes.index.find(record.sandbox_id)
        if sandbox is None:
            await self._forget(container)
            return
        if not sandbox.ready:
            return
        sandbox.disks.adopt(record.all_layers, record.id)
        for image_id in record.image_ids:
            try:
                self.images.lease(image_id, record.id)
            except NotFound as exc:
                log.warning("container %s: its image is gone: %s", container.short, exc)
