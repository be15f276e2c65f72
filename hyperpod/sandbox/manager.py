"""RunPodSandbox to RemovePodSandbox: one owner of every sandbox's record, status and life."""

from __future__ import annotations

import asyncio
import logging
import secrets
import uuid
from pathlib import Path
from typing import Any

from hyperpod import __version__, failpoints
from hyperpod.agentclient.types import ContainerInfo
from hyperpod.config import Config
from hyperpod.errors import (
    AlreadyExists,
    FailedPrecondition,
    HyperpodError,
    NetworkError,
    ResourceExhausted,
)
from hyperpod.hypervisor.base import DomainEvent
from hyperpod.model.base import now_ns
from hyperpod.model.sandbox import (
    Artifact,
    Kind,
    PortMapping,
    Sandbox,
    SandboxConfig,
    SandboxPhase,
    SandboxRecord,
    SandboxStatus,
    VmSize,
)
from hyperpod.model.security import LinuxResources
from hyperpod.network import ports
from hyperpod.sandbox import artifacts
from hyperpod.sandbox.boot import VmBuilder
from hyperpod.sandbox.builder import SandboxBuilder
from hyperpod.sandbox.disks import LayerDisks, Layers
from hyperpod.sandbox.host import HostBuilder
from hyperpod.sandbox.live import LiveSandbox, SandboxListener
from hyperpod.sandbox.phases import Laps
from hyperpod.sandbox.userns import UserNamespaces
from hyperpod.spec import place, podnet
from hyperpod.spec.cgroup import parent_folder
from hyperpod.spec.resources import MIB, vm_size
from hyperpod.spec.userns import check_pod
from hyperpod.store.index import IdIndex
from hyperpod.store.records import RecordStore
from hyperpod.store.slots import FIRST_CID, Slots
from hyperpod.tasks import Operations, TaskOwner

log = logging.getLogger(__name__)


def host_boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class SandboxManager:
    """All sandboxes of this daemon. Public coroutines raise hyperpod errors only."""

    def __init__(
        self,
        config: Config,
        store: RecordStore[SandboxRecord, SandboxStatus],
        vms: VmBuilder,
        hosts: HostBuilder,
        owner: TaskOwner,
        *,
        boot_id: str,
    ) -> None:
        self.config, self.store, self.owner, self.boot_id = config, store, owner, boot_id
        self.vms, self.hosts = vms, hosts
        self._builders: dict[Kind, SandboxBuilder] = {Kind.VM: vms, Kind.HOST: hosts}
        self.networks, self.cgroups = vms.networks, vms.cgroups
        self.userns = UserNamespaces(config.vm)
        self.slots = Slots(min(config.sandbox_slots, config.vm.uid_count))
        self.index: IdIndex[LiveSandbox] = IdIndex("sandbox")
        self._names: dict[str, str] = {}
        self._operations = Operations(owner)
        self._listener: SandboxListener | None = None
        vms.hypervisor.subscribe(self._on_domain_event)

    def listen(self, listener: SandboxListener) -> None:
        self._listener = listener

    @property
    def listener(self) -> SandboxListener:
        assert self._listener is not None, "the composition root sets the listener"
        return self._listener

    def builder(self, sandbox: LiveSandbox) -> SandboxBuilder:
        """The one for its kind of place."""
        return self._builders[sandbox.record.kind]

    # -- queries ------------------------------------------------------------------------------------------

    def get(self, ident: str) -> Sandbox:
        """By id or unique prefix. Raises NotFound."""
        return self.index.get(ident).view()

    def live(self, ident: str) -> LiveSandbox:
        return self.index.get(ident)

    def need_room(self, ident: str, wanted: LinuxResources) -> None:
        """Whether a ready sandbox's VM can give this much to its containers. Raises FailedPrecondition."""
        sandbox = self.index.get(ident)
        sandbox.need_ready()
        if sandbox.record.kind is Kind.HOST:  # its cgroup is the limit, and the kubelet's to change
            return
        have = sandbox.record.size.memory_mib - self.config.vm.guest_base_mib
        if (mib := -(-wanted.memory_limit // MIB)) > have:
            raise FailedPrecondition(
                f"sandbox {sandbox.short}: its virtual machine has {have} MiB for containers, {mib} MiB are "
                "wanted; a running one is not resized yet: make the pod anew"
            )

    def all(self) -> list[Sandbox]:
        return [s.view() for s in self.index.values() if s.status.phase is not SandboxPhase.CREATING]

    # -- run ----------------------------------------------------------------------------------------------

    async def run(self, config: SandboxConfig, handler: str) -> str:
        """Make a sandbox and return its id. A retry with the identical configuration joins the first."""
        kind = place.choose(handler, config.namespaces)
        await self._check_userns(config, kind)
        if kind is Kind.HOST:
            place.permit(config, self.config.host_pods)
            place.check_sysctls(config.sysctls, config.namespaces)
        key = config.metadata.key
        if (known := self._names.get(key)) is not None and (other := self.index.find(known)) is not None:
            if other.record.config != config or other.record.runtime_handler != handler:
                raise AlreadyExists(f"the name {key} is taken by sandbox {known} with another configuration")
            if other.ready:
                return known
            if other.status.phase is not SandboxPhase.CREATING:
                raise AlreadyExists(
                    f"the name {key} is taken by sandbox {known}, which is stopped; remove it first"
                )
        operation, request = f"run/{key}", (config, handler)
        if self._operations.request(operation) not in (None, request):
            raise AlreadyExists(
                f"the name {key} is taken by a sandbox that is being made with another configuration"
            )
        return await self._operations.run(operation, lambda: self._run(config, handler, kind), request)

    async def _check_userns(self, config: SandboxConfig, kind: Kind) -> None:
        """Raises InvalidArgument, FailedPrecondition."""
        check_pod(config.namespaces)
        if config.namespaces.userns is not None and (why := await self.userns.missing(kind)):
            where = "in a VM" if kind is Kind.VM else "on the host"
            raise FailedPrecondition(
                f"pod {config.metadata.name} asks for a user namespace (hostUsers: false), which a pod {where} "
                f"cannot have here: {why}"
            )

    async def _run(self, config: SandboxConfig, handler: str, kind: Kind) -> str:
        ports.need_unclaimed(podnet.host_ports(config), self._host_ports())
        record = self._record(config, handler, kind)
        ident = record.id
        sandbox = self.adopt(record, SandboxStatus())
        try:
            await self.store.create(ident, record, sandbox.status)
            failpoints.passing("sandbox.recorded")
            sandbox.settled = self.owner.spawn(f"settle/{sandbox.short}", self.store.settle(ident))
            built = await self.builder(sandbox).build(sandbox)
            await sandbox.on_disk()
        except Exception as exc:
            # A fault of our own, too: each of a kubelet's retries would leave one more VM.
            log.error("sandbox %s (%s) failed: %s", sandbox.short, config.metadata.key, exc)
            await self._roll_back(sandbox, str(exc))
            raise
        hello, phases = built.hello, built.phases
        facts = {
            "kernel": hello.kernel_release,
            "boot_id": hello.boot_id,
            "agent": hello.agent_version,
            "crun": hello.crun_version,
        }
        await self._set(
            sandbox,
            SandboxPhase.READY,
            timings=phases.seconds,
            guest_facts=facts,
            network=built.network,
        )
        failpoints.passing("sandbox.ready")
        self._watch(sandbox)
        log.info(
            "sandbox %s ready: %s",
            sandbox.short,
            " ".join(f"{k}={v:.3f}s" for k, v in phases.seconds.items()),
        )
        return ident

    def _record(self, config: SandboxConfig, handler: str, kind: Kind) -> SandboxRecord:
        """Raises FailedPrecondition, InvalidArgument, ResourceExhausted."""
        ident, settings = secrets.token_hex(32), self.config.vm
        own: dict[str, Any]
        if kind is Kind.VM:
            own = {
                "size": self._size(config),
                "kernel": artifacts.kernel(settings.kernel),
                "guest": artifacts.guest(settings.guest),
                "domain": f"hp-{ident[:12]}",
                "domain_uuid": str(uuid.UUID(hex=ident[:32], version=4)),
                "virtiofs": settings.virtiofs,
                "vsock": "kernel" if self.vms.hypervisor.facts().vhost_vsock else "vhost-user",
            }
        else:
            own = {
                "size": artifacts.host_size(),
                "kernel": artifacts.host_kernel(),
                "guest": Artifact(version=__version__, path=""),
                "domain": "",
                "domain_uuid": "",
                "vsock": "none",
            }
        slot = self.slots.take()
        return SandboxRecord(
            id=ident,
            config=config,
            runtime_handler=handler,
            kind=kind,
            created_at=now_ns(),
            host_boot_id=self.boot_id,
            slot=slot,
            uid=settings.uid_base + 1 + slot,
            gid=settings.uid_base,
            cid=FIRST_CID + slot,
            token=secrets.token_bytes(32),
            **own,
        )

    async def _roll_back(self, sandbox: LiveSandbox, why: str) -> None:
        """Undo a failed start. What cannot be undone keeps its record, as a sandbox that wants to be removed."""
        try:
            await self.builder(sandbox).tear_down(sandbox)
            await self.networks.detach(sandbox.id)
        except (HyperpodError, OSError) as exc:
            log.error("sandbox %s could not be undone: %s", sandbox.short, exc)
            await self._set(sandbox, SandboxPhase.STOPPING, message=why)
        else:
            await self._forget(sandbox)

    def _host_ports(self) -> list[tuple[str, tuple[PortMapping, ...]]]:
        """Of every pod whose network is not undone yet."""
        over = (SandboxPhase.STOPPED, SandboxPhase.REMOVING)
        return [
            (other.record.config.metadata.key, podnet.host_ports(other.record.config))
            for other in self.index.values()
            if other.status.phase not in over
        ]

    def _size(self, config: SandboxConfig) -> VmSize:
        vm, parent = self.config.vm, config.cgroup_parent
        emulated = self.vms.hypervisor.facts().accelerator == "tcg"
        one_at_most = emulated and artifacts.patches_itself(vm.kernel)
        return vm_size(
            config.resources,
            config.overhead,
            base_mib=vm.guest_base_mib,
            floor_mib=vm.memory_floor_mib,
            default_mib=vm.default_memory_mib,
            default_vcpus=vm.default_vcpus,
            max_vcpus=vm.max_vcpus,
            max_memory_mib=vm.max_memory_mib,
            host_memory_mib=artifacts.host_size().memory_mib,
            host_cpus=artifacts.host_size().vcpus,
            emulated=emulated,
            only_cpu="emulated, and its kernel patches itself" if one_at_most else "",
            # Where the kubelet sets a limit, it knows one of every container.
            bounded=not (parent and self.cgroups.is_unlimited(parent_folder(parent))),
        )

    def adopt(self, record: SandboxRecord, status: SandboxStatus) -> LiveSandbox:
        """Put a new or loaded sandbox into memory."""
        disks = Layers()
        if record.kind is Kind.VM:
            disks = LayerDisks(self.vms.hypervisor, record.domain, self.store.folder(record.id))
        sandbox = LiveSandbox(record, status, self.config.run_dir, disks)
        self.slots.claim(record.slot)
        self.index.add(record.id, sandbox)
        self._names[record.config.metadata.key] = record.id
        return sandbox

    # -- watching -----------------------------------------------------------------------------------------

    def _watch(self, sandbox: LiveSandbox) -> None:
        async def on_exit(info: ContainerInfo) -> None:
            self.listener.container_exited(sandbox, info)

        async def on_connected(_: object) -> None:
            await self.listener.connected(sandbox)

        sandbox.tasks = [
            self.owner.spawn(f"events/{sandbox.short}", sandbox.session.follow(on_exit, on_connected)),
            self.owner.spawn(f"shim/{sandbox.short}", self._keep_shim(sandbox)),
            self.owner.spawn(f"domain/{sandbox.short}", self._await_death(sandbox)),
            self.owner.spawn(f"helper/{sandbox.short}", self._await_helper(sandbox)),
        ]

    async def _keep_shim(self, sandbox: LiveSandbox) -> None:
        """Replace the shim when it dies; its sockets and rings are kept by the supervisor."""
        while True:
            if sandbox.shim is not None:
                await sandbox.shim.closed.wait()
                await sandbox.shim.close()
                sandbox.shim = None
                log.warning("sandbox %s: its shim died; replacing it", sandbox.short)
            try:
                await self.builder(sandbox).start_shim(sandbox, resume=True)
                await self.listener.connected(sandbox)
            except HyperpodError as exc:
                log.error("sandbox %s: no new shim: %s", sandbox.short, exc)
                await asyncio.sleep(1.0)

    async def _await_death(self, sandbox: LiveSandbox) -> None:
        await sandbox.gone.wait()
        if await self.cgroups.oom_kills(self.builder(sandbox).cgroup(sandbox)):
            sandbox.host_oom = True
            sandbox.gone_detail += "; the host killed it for want of memory: its pod's cgroup is too small"
        words = await self.builder(sandbox).last_words(sandbox)
        log.warning(
            "sandbox %s: its %s is gone: %s%s",
            sandbox.short,
            sandbox.record.kind.words,
            sandbox.gone_detail,
            f"; last lines:\n{words}" if words else "",
        )
        self.owner.spawn(f"stop-dead/{sandbox.short}", self.stop(sandbox.id))

    async def _await_helper(self, sandbox: LiveSandbox) -> None:
        sandbox.gone_detail = await self.builder(sandbox).death(sandbox)
        sandbox.gone.set()

    def _on_domain_event(self, event: DomainEvent) -> None:
        sandbox = self.index.find(event.sandbox_id) if event.sandbox_id else None
        if sandbox is not None and event.kind in ("stopped", "crashed"):
            if not sandbox.gone.is_set():  # else we destroy it, for the reason that is there
                sandbox.gone_detail = event.detail
            sandbox.gone.set()

    # -- stop and remove ----------------------------------------------------------------------------------

    async def stop(self, ident: str, why: str = "") -> None:
        """Idempotent; unknown ids are fine. `why`: its end, when nobody has asked for it."""
        if (sandbox := self.index.find(ident)) is None:
            return
        await self._operations.wait(f"run/{sandbox.record.config.metadata.key}")
        if self.index.find(sandbox.id) is None:
            return
        await self._operations.run(f"stop/{sandbox.id}", lambda: self._stop(sandbox, why))

    async def _stop(self, sandbox: LiveSandbox, why: str) -> None:
        if sandbox.status.phase in (SandboxPhase.STOPPED, SandboxPhase.REMOVING):
            return
        if why and not sandbox.gone.is_set():
            sandbox.gone_detail = why
        laps, was_ready = Laps(), sandbox.ready
        sandbox.calls["StopPodSandbox"] = laps.seconds
        await self._set(sandbox, SandboxPhase.STOPPING, durable=False)
        failpoints.passing("sandbox.stopping")
        if was_ready and not sandbox.gone.is_set():
            await self.listener.sandbox_stopping(sandbox)
        await self._end_tasks(sandbox)
        laps("containers")
        detail = sandbox.gone_detail  # the VM's end that is told from here on is our doing, and no reason
        unplugged: asyncio.Task[None] | None = None
        if sandbox.record.kind is Kind.HOST:
            # Nothing of the plugins' is in use but by those who are being killed.
            unplugged = self.owner.spawn(f"unplug/{sandbox.short}", self.networks.detach(sandbox.id))
        try:
            await self.builder(sandbox).tear_down(sandbox)
            await self.listener.sandbox_stopped(sandbox, detail)
            laps("processes and folders")
        finally:
            if unplugged is not None:
                await asyncio.wait([unplugged])
        await (unplugged or self.networks.detach(sandbox.id))
        laps("network")
        await self._set(
            sandbox,
            SandboxPhase.STOPPED,
            network=None,
            stopped_at=now_ns(),
            message=detail or sandbox.status.message,
        )
        laps("record")
        failpoints.passing("sandbox.stopped")

    async def _end_tasks(self, sandbox: LiveSandbox) -> None:
        for task in sandbox.tasks:
            task.cancel()
        await asyncio.gather(*sandbox.tasks, return_exceptions=True)
        sandbox.tasks = []

    async def remove(self, ident: str) -> None:
        """Stops first when needed; unknown ids are fine."""
        if (sandbox := self.index.find(ident)) is None:
            return
        await self.stop(sandbox.id)
        if self.index.find(sandbox.id) is not None:
            await self._operations.run(f"remove/{sandbox.id}", lambda: self._remove(sandbox))

    async def _remove(self, sandbox: LiveSandbox) -> None:
        await self._set(sandbox, SandboxPhase.REMOVING, durable=False)
        failpoints.passing("sandbox.removing")
        await self.listener.sandbox_removing(sandbox)
        await self._forget(sandbox)

    async def _forget(self, sandbox: LiveSandbox) -> None:
        await self.store.delete(sandbox.id)
        self.index.discard(sandbox.id)
        self._names.pop(sandbox.record.config.metadata.key, None)
        self.slots.free(sandbox.record.slot)

    async def _set(
        self, sandbox: LiveSandbox, phase: SandboxPhase, *, durable: bool = True, **changes: object
    ) -> None:
        status = sandbox.status.to(phase, **changes)
        try:
            await self.store.update(sandbox.id, status, durable=durable)
        except ResourceExhausted as exc:
            if phase is SandboxPhase.READY:
                raise
            # What ends a pod makes room. Who finds the status of before, after a crash, ends it again.
            log.error("sandbox %s is %s, which is not on record: %s", sandbox.short, phase.value, exc)
        sandbox.status = status

    # -- recovery -----------------------------------------------------------------------------------------

    async def recover(self, sandbox: LiveSandbox, *, running: bool, why_not: str) -> None:
        """Bring one loaded sandbox to a state that matches the world; bounded by the caller."""
        sandbox.disks.load()
        phase = sandbox.status.phase
        if phase is SandboxPhase.CREATING:
            log.warning("sandbox %s was being made when the daemon ended; undoing it", sandbox.short)
            await self._roll_back(sandbox, "the daemon ended while it was being made")
        elif phase is SandboxPhase.REMOVING:
            await self.listener.sandbox_removing(sandbox)
            await self._forget(sandbox)
        elif phase is SandboxPhase.READY and running:
            await self._reconnect(sandbox)
        elif phase in (SandboxPhase.READY, SandboxPhase.STOPPING):
            sandbox.gone_detail = why_not
            sandbox.gone.set()
            await self.stop(sandbox.id)
        elif phase is SandboxPhase.STOPPED:
            # A full disk may have kept the ends of its containers off the record.
            await self.listener.sandbox_stopped(sandbox, "")

    async def _reconnect(self, sandbox: LiveSandbox) -> None:
        try:
            await self.builder(sandbox).connect_shim(sandbox)
        except HyperpodError:
            await self.builder(sandbox).start_shim(sandbox, resume=True)
        await sandbox.session.connect(asyncio.get_running_loop().time() + 5.0, claim=False)
        await self.listener.connected(sandbox)
        self._watch(sandbox)
        if sandbox.status.network is not None:
            # Its end comes before the network's: a plugin is not called twice at once for one pod.
            check = self.owner.spawn(f"network-check/{sandbox.short}", self._check_network(sandbox))
            sandbox.tasks.append(check)

    async def _check_network(self, sandbox: LiveSandbox) -> None:
        """After a restart, for the log only: plugins' CHECKs have faults of their own (Debian's bandwidth panics
        without a limit, its portmap errs with two address families)."""
        try:
            await self.networks.check(sandbox.id)
        except NetworkError as exc:
            log.info("sandbox %s: its network may not be as it was made: %s", sandbox.short, exc)

    async def detach(self) -> None:
        """The daemon ends, the pods go on: close connections, touch nothing else."""
        for sandbox in self.index.values():
            await self._end_tasks(sandbox)
            await sandbox.session.close()
            if sandbox.shim is not None:
                await sandbox.shim.close()
