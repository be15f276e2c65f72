"""The steps that make a VM sandbox, each undone by the stack when a later one fails."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import os
import shutil
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hyperpod import failpoints
from hyperpod.agentclient.types import HelloInfo
from hyperpod.config import Config
from hyperpod.errors import BootError, DeadlineExceeded, HyperpodError
from hyperpod.hypervisor.base import Hypervisor
from hyperpod.hypervisor.scratch import ScratchDisks
from hyperpod.logs import printable
from hyperpod.model.base import now_ns
from hyperpod.model.network import PodNetwork
from hyperpod.model.sandbox import SandboxConfig
from hyperpod.network import hostdns
from hyperpod.sandbox.cgroup import SandboxCgroups, qemu_pid
from hyperpod.sandbox.live import LiveSandbox
from hyperpod.sandbox.network import PodNetworks
from hyperpod.sandbox.phases import Phases
from hyperpod.sandbox.share import Shares
from hyperpod.shimclient.client import ShimClient
from hyperpod.spec import podfiles
from hyperpod.spec.cgroup import sandbox_folder
from hyperpod.spec.domain import DomainSpec, Nic
from hyperpod.spec.mounts import HostBind
from hyperpod.supervisor.client import SupervisorClient

log = logging.getLogger(__name__)

SHIM_TIMEOUT = 20.0
"""Seconds for a shim to listen: a fork, plus what a loaded host adds."""

DESTROY_TIMEOUT = 30.0


DEFAULT_SYSCTLS = {"net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.ping_group_range": "0 2147483647"}
"""As other runtimes give them: a pod's ports and pings are its own affair. The pod's own settings win."""


HOSTNAME_LIMIT = 63
"""Bytes; the kernel takes 64, a DNS label 63 (RFC 1035 2.3.4)."""


def hostname(config: SandboxConfig) -> str:
    """The guest's host name: the one asked for, else the pod's name cut to a DNS label."""
    return config.hostname or config.metadata.name[:HOSTNAME_LIMIT].rstrip("-.") or "pod"


@dataclass(frozen=True)
class Built:
    """What a started VM has told and cost."""

    hello: HelloInfo
    phases: Phases
    network: PodNetwork


class VmBuilder:
    """Makes and unmakes the host-side things of one VM."""

    def __init__(
        self,
        config: Config,
        hypervisor: Hypervisor,
        supervisor: SupervisorClient,
        scratch: ScratchDisks,
        networks: PodNetworks,
        *,
        instance_id: str,
    ) -> None:
        self.config, self.hypervisor, self.supervisor = config, hypervisor, supervisor
        self.scratch, self.networks, self.instance_id = scratch, networks, instance_id
        self.cgroups = SandboxCgroups()
        self._boots = asyncio.Semaphore(config.vm.max_concurrent_boots or 2 * (os.cpu_count() or 1))
        self.shares = Shares(hypervisor)

    def scratch_path(self, sandbox: LiveSandbox) -> Path:
        return self.config.state_dir / "scratch" / f"{sandbox.id}.raw"

    async def build(self, sandbox: LiveSandbox) -> Built:
        """From a written record to an agent that answers.

        Raises BootError, NetworkError or InvalidArgument; the caller then tears down."""
        phases, record = Phases(), sandbox.record
        try:
            with phases("network"):
                network = await self.networks.attach(record)
            with phases("scratch"):
                await self.scratch.create(
                    self.scratch_path(sandbox), self.config.vm.scratch_mib, record.uid, record.gid
                )
                failpoints.passing("sandbox.scratch")
            with phases("shim"):
                self.make_directory(sandbox)
                await self.start_shim(sandbox, resume=False)
                failpoints.passing("sandbox.shim")
            if record.virtiofs == "boot":
                with phases("share"):
                    await self.shares.start(sandbox, await self.cgroups.make(self.cgroup(sandbox)))
                    failpoints.passing("sandbox.share")
            async with self._turn(phases):
                with phases("domain"):
                    await self.hypervisor.create(self.domain_spec(sandbox, network))
                    await self.place_qemu(sandbox)
                    failpoints.passing("sandbox.domain")
                    await self.networks.plug(record, network)
                    if record.virtiofs == "boot":
                        await self.shares.seal(sandbox)
                        failpoints.passing("sandbox.sealed")
                with phases("kernel+agent"):
                    hello = await self.wait_for_agent(sandbox, network)
                    failpoints.passing("sandbox.agent")
        except BootError as exc:
            raise BootError(exc.phase, exc.cause, exc.console or await self.console(sandbox)) from exc
        return Built(hello, phases, network)

    @contextlib.asynccontextmanager
    async def _turn(self, phases: Phases) -> AsyncIterator[None]:
        """Wait until few enough others boot: all at once they would be slow together, and some too slow."""
        with phases("turn"):
            await self._boots.acquire()
        try:
            yield
        finally:
            self._boots.release()

    def make_directory(self, sandbox: LiveSandbox) -> None:
        """The shim's folder: 0700 and the sandbox user's before any socket is made in it."""
        shutil.rmtree(sandbox.directory, ignore_errors=True)
        sandbox.directory.parent.mkdir(parents=True, exist_ok=True, mode=0o711)
        sandbox.directory.mkdir(mode=0o700)
        os.chown(sandbox.directory, sandbox.record.uid, sandbox.record.gid)

    def cgroup(self, sandbox: LiveSandbox) -> str:
        return sandbox_folder(sandbox.record.config.cgroup_parent, sandbox.id)

    async def place_qemu(self, sandbox: LiveSandbox) -> None:
        """Out of libvirt's cgroup into the sandbox's."""
        pid = await asyncio.to_thread(qemu_pid, sandbox.record.domain, sandbox.record.uid)
        if pid is None:  # it has ended again, which the wait for the agent is told
            log.warning("sandbox %s: no process of %s found", sandbox.short, sandbox.record.domain)
            return
        await self.cgroups.admit(self.cgroup(sandbox), pid)

    async def mount(self, sandbox: LiveSandbox, binds: Sequence[HostBind]) -> list[str]:
        """Put a container's mounts into the sandbox's share; see Shares.bind."""
        return await self.shares.bind(sandbox, binds, lambda: self.cgroups.make(self.cgroup(sandbox)))

    async def start_shim(self, sandbox: LiveSandbox, *, resume: bool) -> None:
        """Fork the shim into the sandbox's cgroup and connect to it."""
        cgroup = await self.cgroups.make(self.cgroup(sandbox))
        await self.supervisor.spawn_shim(
            sandbox_id=sandbox.id,
            directory=str(sandbox.directory),
            uid=sandbox.record.uid,
            gid=sandbox.record.gid,
            cid=sandbox.record.cid,
            device=sandbox.record.vsock == "vhost-user",
            resume=resume,
            cgroup=cgroup,
        )
        await self.connect_shim(sandbox)
        if resume and sandbox.record.vsock == "vhost-user":
            await self._replug_if_lost(sandbox)

    async def _replug_if_lost(self, sandbox: LiveSandbox) -> None:
        """A new shim without its predecessor's rings (the supervisor died too): QEMU's device is replaced."""
        assert sandbox.shim is not None
        if (await sandbox.shim.hello()).device == "fresh":
            log.warning("sandbox %s: the vsock device's state is lost; plugging a new one", sandbox.short)
            await self.hypervisor.replug_vsock(sandbox.record.domain, str(sandbox.directory / "vhost.sock"))

    async def connect_shim(self, sandbox: LiveSandbox) -> None:
        """Connect to a running shim and tell it where its agent is. Raises Unavailable when there is none."""
        shim = ShimClient(str(sandbox.directory / "control.sock"))
        await shim.connect(timeout=SHIM_TIMEOUT)
        await shim.agent(sandbox.endpoint, sandbox.record.token)
        sandbox.shim = shim

    def domain_spec(self, sandbox: LiveSandbox, network: PodNetwork) -> DomainSpec:
        record, size = sandbox.record, sandbox.record.size
        return DomainSpec(
            name=record.domain,
            uuid=record.domain_uuid,
            instance_id=self.instance_id,
            sandbox_id=record.id,
            memory_mib=size.memory_mib,
            max_memory_mib=size.max_memory_mib,
            vcpus=size.vcpus,
            max_vcpus=size.max_vcpus,
            accelerator=self.hypervisor.facts().accelerator,
            kernel=record.kernel.path,
            initrd=record.kernel.initrd or None,
            # The guest's last: what follows a -- in it is its init's.
            cmdline=" ".join(filter(None, (record.kernel.cmdline, self._clock(), record.guest.cmdline))),
            root=record.guest.path,
            scratch=str(self.scratch_path(sandbox)),
            console_socket=str(sandbox.directory / "console.sock"),
            vsock_socket=str(sandbox.directory / "vhost.sock") if record.vsock == "vhost-user" else None,
            vsock_cid=record.cid if record.vsock == "kernel" else None,
            uid=record.uid,
            gid=record.gid,
            nics=tuple(Nic(mac=x.mac, tap=x.tap, mtu=x.mtu) for x in network.interfaces),
            share_socket=str(sandbox.files.socket) if record.virtiofs == "boot" else None,
            spare_ports=1 if record.virtiofs == "demand" else 0,
        )

    def _clock(self) -> str:
        """The kernel's option for the rate of its clock; empty when it need not be told."""
        khz = self.hypervisor.facts().tsc_khz
        return f"tsc_early_khz={khz}" if khz else ""

    async def wait_for_agent(self, sandbox: LiveSandbox, network: PodNetwork) -> HelloInfo:
        """Dial until the agent answers, the VM dies, or the boot timeout is over."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.config.vm.boot_timeout
        connect = loop.create_task(
            sandbox.session.connect(deadline, claim=True), name=f"boot/{sandbox.short}"
        )
        gone = loop.create_task(sandbox.gone.wait(), name=f"boot-gone/{sandbox.short}")
        try:
            await asyncio.wait({connect, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not connect.done():
                raise BootError("kernel+agent", f"the VM ended: {sandbox.gone_detail or 'no reason given'}")
            client = await connect
            name = hostname(sandbox.record.config)
            return await client.hello(
                host_time_ns=now_ns(),
                entropy=os.urandom(64),
                hostname=name,
                sysctls={**DEFAULT_SYSCTLS, **sandbox.record.config.sysctls},
                interfaces=network.interfaces,
                resolv_conf=podfiles.resolv_conf(sandbox.record.config.dns, hostdns.host_resolv_conf()),
                hosts=podfiles.hosts(name, network.addresses),
            )
        finally:
            for task in (connect, gone):
                task.cancel()
            await asyncio.gather(connect, gone, return_exceptions=True)

    async def console(self, sandbox: LiveSandbox) -> str:
        """The last lines of the guest's console, escaped; empty when there is no shim to ask."""
        if sandbox.shim is None:
            return ""
        try:
            return printable(base64.b64decode(await sandbox.shim.console()), 2048).strip()
        except (HyperpodError, ValueError):
            return ""

    async def tear_down(self, sandbox: LiveSandbox) -> None:
        """Undo everything on the host but the network; safe to repeat.

        Raises only when the VM cannot be destroyed."""
        await sandbox.session.close()
        try:
            async with asyncio.timeout(DESTROY_TIMEOUT):
                await self.hypervisor.destroy(sandbox.record.domain)
        except TimeoutError as exc:
            raise DeadlineExceeded(f"VM {sandbox.record.domain} could not be destroyed") from exc
        failpoints.passing("sandbox.destroyed")
        await self.end_shim(sandbox)
        await self.shares.end(sandbox)
        await self.cgroups.remove(self.cgroup(sandbox), sandbox.record.domain)
        await asyncio.to_thread(shutil.rmtree, sandbox.directory, ignore_errors=True)
        await self.scratch.remove(self.scratch_path(sandbox))

    async def end_shim(self, sandbox: LiveSandbox) -> None:
        """Ask the shim to leave, then have the supervisor make sure of it and drop what it stored."""
        shim, sandbox.shim = sandbox.shim, None
        if shim is not None:
            with contextlib.suppress(HyperpodError):
                await shim.shutdown()
            await shim.close()
        await self.supervisor.drop(sandbox.id)
