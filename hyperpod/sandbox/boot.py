"""The steps that make a VM sandbox, each undone by the stack when a later one fails."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import os
import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from hyperpod import failpoints
from hyperpod.agentclient.types import HelloInfo
from hyperpod.errors import BootError, DeadlineExceeded, HyperpodError
from hyperpod.hypervisor.base import Hypervisor
from hyperpod.hypervisor.scratch import ScratchDisks
from hyperpod.logs import printable
from hyperpod.model.base import now_ns
from hyperpod.model.network import PodNetwork
from hyperpod.network import hostdns
from hyperpod.sandbox.builder import DEFAULT_SYSCTLS, Built, Common, SandboxBuilder, hostname
from hyperpod.sandbox.cgroup import qemu_pid
from hyperpod.sandbox.live import LiveSandbox
from hyperpod.sandbox.phases import Phases
from hyperpod.sandbox.share import Shares
from hyperpod.spec import podfiles
from hyperpod.spec.domain import DomainSpec, Nic
from hyperpod.spec.mounts import HostBind

log = logging.getLogger(__name__)

DESTROY_TIMEOUT = 30.0

SHIM_NAME = "hyperpod-shim"
"""As supervisor/shims.py titles it."""


class VmBuilder(SandboxBuilder):
    """Makes and unmakes the host-side things of one VM."""

    def __init__(
        self, common: Common, hypervisor: Hypervisor, scratch: ScratchDisks, *, instance_id: str
    ) -> None:
        super().__init__(common)
        self.hypervisor, self.scratch, self.instance_id = hypervisor, scratch, instance_id
        self._boots = asyncio.Semaphore(self.config.vm.max_concurrent_boots or 2 * (os.cpu_count() or 1))
        self.shares = Shares(hypervisor)

    def scratch_path(self, sandbox: LiveSandbox) -> Path:
        return self.config.state_dir / "scratch" / f"{sandbox.id}.raw"

    def scratch_bytes(self, sandbox: LiveSandbox) -> int:
        try:
            return self.scratch_path(sandbox).stat().st_size
        except FileNotFoundError:  # the pod is being stopped
            return 0

    async def build(self, sandbox: LiveSandbox) -> Built:
        phases, record = Phases(), sandbox.record
        try:
            with phases("network"):
                await sandbox.on_disk()
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
                        await self.shares.uncover(sandbox)
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

    async def place_qemu(self, sandbox: LiveSandbox) -> None:
        """Out of libvirt's cgroup into the sandbox's."""
        pid = await asyncio.to_thread(qemu_pid, sandbox.record.domain, sandbox.record.uid)
        if pid is None:  # it has ended again, which the wait for the agent is told
            log.warning("sandbox %s: no process of %s found", sandbox.short, sandbox.record.domain)
            return
        await self.cgroups.admit(self.cgroup(sandbox), pid)
        await self.weigh(sandbox, 0)

    async def weigh(self, sandbox: LiveSandbox, score: int) -> None:
        """To the host's kernel the VM is what its containers are in the guest; it has our own score otherwise, and
        the service's is one that nobody kills. The shim keeps that: it is small, and the logs are its."""
        await self.cgroups.weigh(self.cgroup(sandbox), score, SHIM_NAME)

    async def mount(self, sandbox: LiveSandbox, binds: Sequence[HostBind]) -> list[str]:
        """Put a container's mounts into the sandbox's share; see Shares.bind."""
        return await self.shares.bind(sandbox, binds, lambda: self.cgroups.make(self.cgroup(sandbox)))

    async def unmount(self, sandbox: LiveSandbox, container_id: str) -> None:
        await self.shares.release(sandbox, container_id)

    async def death(self, sandbox: LiveSandbox) -> str:
        """Whatever a container does on its mounts hangs without their server: such a pod is of no use."""
        if sandbox.record.virtiofs == "off":
            await asyncio.Event().wait()
        return await self.shares.death(sandbox)

    async def start_shim(self, sandbox: LiveSandbox, *, resume: bool) -> None:
        await super().start_shim(sandbox, resume=resume)
        if resume and sandbox.record.vsock == "vhost-user":
            await self._replug_if_lost(sandbox)

    async def _replug_if_lost(self, sandbox: LiveSandbox) -> None:
        """A new shim without its predecessor's rings (the supervisor died too): QEMU's device is replaced."""
        assert sandbox.shim is not None
        if (await sandbox.shim.hello()).device == "fresh":
            log.warning("sandbox %s: the vsock device's state is lost; plugging a new one", sandbox.short)
            await self.hypervisor.replug_vsock(sandbox.record.domain, str(sandbox.directory / "vhost.sock"))

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
        await self.claim(sandbox, self.config.vm.boot_timeout, "kernel+agent")
        client = await sandbox.session.client()
        name = hostname(sandbox.record.config)
        return await client.hello(
            host_time_ns=now_ns(),
            entropy=os.urandom(64),
            hostname=name,
            sysctls={**DEFAULT_SYSCTLS, **sandbox.record.config.sysctls},
            interfaces=network.interfaces,
            resolv_conf=podfiles.resolv_conf(sandbox.record.config.dns, hostdns.host_resolv_conf()),
            hosts=podfiles.hosts(name, network.addresses),
            userns=sandbox.record.config.namespaces.userns,
        )

    async def last_words(self, sandbox: LiveSandbox) -> str:
        said = (await self.hypervisor.last_words(sandbox.record.domain), await self.console(sandbox))
        return "\n".join(filter(None, said))

    async def console(self, sandbox: LiveSandbox) -> str:
        """The last lines of the guest's console, escaped; empty when there is no shim to ask."""
        if sandbox.shim is None:
            return ""
        try:
            return printable(base64.b64decode(await sandbox.shim.console()), 2048).strip()
        except (HyperpodError, ValueError):
            return ""

    async def tear_down(self, sandbox: LiveSandbox) -> None:
        await sandbox.session.end(sandbox.gone_detail)
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
