"""CreateContainer: checked against pod and image, recorded, prepared in the sandbox; undone when a step fails."""

from __future__ import annotations

import os
import secrets
from dataclasses import replace

from hyperpod import failpoints
from hyperpod.container import layers, placement, process, signals
from hyperpod.container.known import KnownContainers, open_log_of
from hyperpod.container.live import LiveContainer
from hyperpod.container.logfile import log_path
from hyperpod.container.seccomp import SeccompProfiles
from hyperpod.errors import AlreadyExists, FailedPrecondition, HyperpodError, InvalidArgument, NotFound
from hyperpod.image.catalog import known_as
from hyperpod.model.base import now_ns
from hyperpod.model.container import ContainerConfig, ContainerRecord, ContainerState, ContainerStatus
from hyperpod.model.images import Image
from hyperpod.model.sandbox import Kind
from hyperpod.model.security import NamespaceMode, User
from hyperpod.sandbox.live import LiveSandbox
from hyperpod.sandbox.phases import Laps
from hyperpod.spec import limits, mounts
from hyperpod.spec.oci import build_spec
from hyperpod.tasks import Operations, TaskOwner, settle_all


class Creator:
    """Makes containers. Raises hyperpod errors only."""

    def __init__(
        self, known: KnownContainers, seccomp: SeccompProfiles, operations: Operations, owner: TaskOwner
    ) -> None:
        self._known, self._seccomp, self._operations, self._owner = known, seccomp, operations, owner

    async def create(self, sandbox_id: str, config: ContainerConfig) -> str:
        """Prepare a container and return its id; a retry with the identical configuration joins."""
        sandbox = self._known.sandboxes.live(sandbox_id)
        sandbox.need_ready()
        key = (sandbox.id, config.metadata.name, config.metadata.attempt)
        operation = f"create/{sandbox.id}/{key[1]}/{key[2]}"
        if (making := self._operations.request(operation)) is not None:
            if making != config:
                raise AlreadyExists(
                    f"the name {config.metadata.name} attempt {key[2]} is taken by a container that is being "
                    "created with another configuration"
                )
        elif (known := self._known.names.get(key)) is not None:
            other = self._known.index.get(known)
            if other.record.config == config and other.state is ContainerState.CREATED:
                return known
            raise AlreadyExists(
                f"the name {config.metadata.name} attempt {key[2]} is taken by container {known}"
            )
        return await self._operations.run(operation, lambda: self._create(sandbox, config), config)

    async def _create(self, sandbox: LiveSandbox, config: ContainerConfig) -> str:
        image = self._known.images.get(config.image)
        if image is None:
            raise NotFound(f"image {config.image[:200]!r} is not here; pull it first")
        ident, laps = secrets.token_hex(32), Laps()
        sandbox.calls["CreateContainer"] = laps.seconds
        record = self._record(ident, sandbox, config, image)
        resources = limits.fit("config.linux.resources", config.resources, placement.room(sandbox.record))
        placement.check(sandbox.record, config)
        target = self._check_security(sandbox, config)
        seccomp = await self._seccomp.of(config, sandbox.record.kernel.version)
        placed = placement.placed(sandbox, process.spec_input(record, seccomp), record)
        spec = build_spec(replace(placed, resources=resources))
        container = LiveContainer(record, ContainerStatus(resources=resources))
        laps("specification")
        async with container.lock:
            await self._prepare(container, sandbox, spec, target, laps)
        return ident

    async def _prepare(
        self, container: LiveContainer, sandbox: LiveSandbox, spec: bytes, target: str, laps: Laps
    ) -> None:
        """Leases, record, disks, bundle in the guest, log; undone when one fails. `target`: id of the container
        whose processes it sees."""
        ident, record, config = container.id, container.record, container.record.config
        security = replace(process.security(config, record.image_config), pid_target=target)
        binds = mounts.host_binds(config.mounts, ident)
        log: int | None = None
        try:
            leased = layers.lease(record, self._known.images, on_host=sandbox.record.kind is Kind.HOST)
            await self._known.store.create(ident, record, container.status)
            self._known.add(container)
            failpoints.passing("container.recorded")
            # What is made for a container ends with the host at the latest: its record has time until it is told.
            settled = self._owner.spawn(f"settle/{container.short}", self._known.store.settle(ident))
            await sandbox.disks.attach(leased.files, ident)
            failpoints.passing("container.layers")
            submounts: list[str] = []
            if binds:
                submounts = await self._known.sandboxes.builder(sandbox).mount(sandbox, binds)
                failpoints.passing("container.mounted")
            laps("record, layers, mounts")
            log = open_log_of(container)
            user = await sandbox.session.repeatable(
                lambda agent: agent.create_container(
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
            )
            laps("agent")
            scores = [
                c.record.config.resources.oom_score_adj
                for c in self._known.of(sandbox.id)
                if not c.status.finished_at
            ]
            await self._known.sandboxes.builder(sandbox).weigh(sandbox, min(scores, default=0))
            known = user and User(uid=user.uid, gid=user.gid, groups=user.groups)
            recorded = self._owner.spawn(
                f"record/{container.short}", self._known.set(container, prepared=True, user=known)
            )
            # Not waited for: a container's first output comes after its start, and the shim's work would be in the
            # way of the agent's; and begun after the record, so that it goes on while that waits for the disk.
            # Who finds it prepared and without a log, after a crash, starts that again.
            container.logging = self._owner.spawn(
                f"log/{container.short}", self._known.log_to(container, sandbox, log)
            )
            log = None
            await settle_all(settled, recorded)
            laps("record")
            failpoints.passing("container.prepared")
        except (HyperpodError, OSError):
            await self._known.discard(container, sandbox)
            raise
        finally:
            if log is not None:
                os.close(log)

    def _check_security(self, sandbox: LiveSandbox, config: ContainerConfig) -> str:
        """What only pod and container together can tell; gives the id of the container named by TARGET, else "".

        Raises InvalidArgument, NotFound, FailedPrecondition."""
        if config.privileged and not sandbox.record.config.privileged:
            raise InvalidArgument(
                "a privileged container needs a pod whose security context is privileged too"
            )
        if config.namespaces.pid is not NamespaceMode.TARGET:
            return ""
        if not config.namespaces.target_id:
            raise InvalidArgument("namespace_options.pid is TARGET and target_id is empty")
        target = self._known.index.get(config.namespaces.target_id)
        if target.sandbox_id != sandbox.id:
            raise InvalidArgument(f"target container {target.short} is in another pod")
        if target.state is not ContainerState.RUNNING:
            raise FailedPrecondition(f"target container {target.short} is {target.state.value}, not running")
        return target.id

    def _record(
        self, ident: str, sandbox: LiveSandbox, config: ContainerConfig, image: Image
    ) -> ContainerRecord:
        stop_signal = config.stop_signal or image.config.stop_signal or "SIGTERM"
        signals.number(stop_signal)
        tag, digest = known_as(image, (config.user_specified_image, config.image))
        return ContainerRecord(
            id=ident,
            sandbox_id=sandbox.id,
            config=config,
            image_id=image.id,
            image_ref=digest or image.id,
            image_tag=tag,
            created_at=now_ns(),
            log_path=log_path(sandbox.record.config.log_directory, config.log_path),
            layers=tuple(layer.name for layer in image.layers),
            stop_signal=stop_signal,
            image_config=image.config,
            image_volumes=layers.resolve(config.mounts, self._known.images),
        )
