"""What makes and unmakes a sandbox: the same calls for each kind of place, and the steps that all kinds share."""

from __future__ import annotations

import asyncio
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hyperpod.agentclient.types import HelloInfo
from hyperpod.config import Config
from hyperpod.errors import BootError
from hyperpod.model.network import PodNetwork
from hyperpod.model.sandbox import Kind, SandboxConfig
from hyperpod.sandbox.cgroup import SandboxCgroups
from hyperpod.sandbox.live import LiveSandbox
from hyperpod.sandbox.network import PodNetworks
from hyperpod.sandbox.phases import Phases
from hyperpod.shimclient.client import ShimClient
from hyperpod.spec.cgroup import sandbox_folder
from hyperpod.spec.mounts import HostBind
from hyperpod.supervisor.client import SupervisorClient

SHIM_TIMEOUT = 20.0
"""Seconds for a shim to listen: a fork, plus what a loaded host adds."""

DEFAULT_SYSCTLS = {"net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.ping_group_range": "0 2147483647"}
"""As other runtimes give them: a pod's ports and pings are its own affair. The pod's own settings win."""

HOSTNAME_LIMIT = 63
"""Bytes; the kernel takes 64, a DNS label 63 (RFC 1035 2.3.4)."""


def hostname(config: SandboxConfig) -> str:
    """The pod's host name: the one asked for, else the pod's name cut to a DNS label."""
    return config.hostname or config.metadata.name[:HOSTNAME_LIMIT].rstrip("-.") or "pod"


@dataclass(frozen=True)
class Built:
    """What a started sandbox has told and cost. `network` is None for a pod in the host's."""

    hello: HelloInfo
    phases: Phases
    network: PodNetwork | None


@dataclass(frozen=True)
class Common:
    """What every kind of sandbox is made with."""

    config: Config
    supervisor: SupervisorClient
    networks: PodNetworks
    cgroups: SandboxCgroups


class SandboxBuilder(ABC):
    """Makes and unmakes the host-side things of one sandbox."""

    def __init__(self, common: Common) -> None:
        self.config, self.supervisor = common.config, common.supervisor
        self.networks, self.cgroups = common.networks, common.cgroups

    # -- each kind's own ----------------------------------------------------------------------------------

    @abstractmethod
    async def build(self, sandbox: LiveSandbox) -> Built:
        """From a written record to an agent that answers.

        Raises BootError, NetworkError or InvalidArgument; the caller then tears down."""

    @abstractmethod
    async def tear_down(self, sandbox: LiveSandbox) -> None:
        """Undo everything on the host but the network; safe to repeat.

        Raises only when what runs in it cannot be ended."""

    @abstractmethod
    async def death(self, sandbox: LiveSandbox) -> str:
        """Waits for the end of a process without which the sandbox is of no use; says which and why."""

    async def last_words(self, sandbox: LiveSandbox) -> str:
        """The last lines of what has ended, escaped; empty when there are none."""
        return ""

    @abstractmethod
    async def mount(self, sandbox: LiveSandbox, binds: Sequence[HostBind]) -> list[str]:
        """Put a container's mounts where its agent finds them. The caller calls `unmount` whatever comes.

        Gives what the agent is told of mounts below them (binds.bind)."""

    @abstractmethod
    async def unmount(self, sandbox: LiveSandbox, container_id: str) -> None:
        """Take a container's mounts away; fine when there are none."""

    @abstractmethod
    async def weigh(self, sandbox: LiveSandbox, score: int) -> None:
        """The OOM score of the sandbox as a whole."""

    @abstractmethod
    def scratch_path(self, sandbox: LiveSandbox) -> Path:
        """Where its writable layers are."""

    @abstractmethod
    def scratch_bytes(self, sandbox: LiveSandbox) -> int:
        """How large they can become together; 0 when it is gone."""

    def cgroup(self, sandbox: LiveSandbox) -> str:
        """Of the sandbox's own processes; they count for it, and a kill of one there for want of memory is told."""
        return self.root_cgroup(sandbox)

    # -- the shim -----------------------------------------------------------------------------------------

    def root_cgroup(self, sandbox: LiveSandbox) -> str:
        """Of all that belongs to the sandbox."""
        return sandbox_folder(sandbox.record.config.cgroup_parent, sandbox.id)

    def make_directory(self, sandbox: LiveSandbox) -> None:
        """The shim's folder: 0700 and the sandbox user's before any socket is made in it."""
        shutil.rmtree(sandbox.directory, ignore_errors=True)
        sandbox.directory.parent.mkdir(parents=True, exist_ok=True, mode=0o711)
        sandbox.directory.mkdir(mode=0o700)
        os.chown(sandbox.directory, sandbox.record.uid, sandbox.record.gid)

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

    async def connect_shim(self, sandbox: LiveSandbox) -> None:
        """Connect to a running shim and tell it where its agent is. Raises Unavailable when there is none.

        The folder is the sandbox's user's, and so QEMU's: what it names must not get another pod's shim told."""
        shim = ShimClient(str(sandbox.directory / "control.sock"), sandbox.record.uid)
        await shim.connect(timeout=SHIM_TIMEOUT)
        await shim.agent(sandbox.endpoint, sandbox.record.token)
        sandbox.shim = shim

    async def end_shim(self, sandbox: LiveSandbox) -> None:
        """Have the supervisor end the shim and drop what it stored."""
        shim, sandbox.shim = sandbox.shim, None
        if shim is not None:
            await shim.close()
        await self.supervisor.drop(sandbox.id)

    # -- the agent ----------------------------------------------------------------------------------------

    async def claim(self, sandbox: LiveSandbox, timeout: float, phase: str) -> None:
        """Dial until the agent answers. Raises BootError when the place ends, DeadlineExceeded."""
        loop = asyncio.get_running_loop()
        connect = loop.create_task(
            sandbox.session.connect(loop.time() + timeout, claim=True), name=f"boot/{sandbox.short}"
        )
        gone = loop.create_task(sandbox.gone.wait(), name=f"boot-gone/{sandbox.short}")
        try:
            await asyncio.wait({connect, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not connect.done():
                what = "VM" if sandbox.record.kind is Kind.VM else "agent"
                raise BootError(phase, f"the {what} ended: {sandbox.gone_detail or 'no reason given'}")
            await connect
        finally:
            for task in (connect, gone):
                task.cancel()
            await asyncio.gather(connect, gone, return_exceptions=True)
