"""One sandbox in the daemon's memory, and what others may hook into its life."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol, TypeVar

from hyperpod.agentclient.types import ContainerInfo
from hyperpod.errors import FailedPrecondition, Unavailable
from hyperpod.model.sandbox import Kind, Sandbox, SandboxPhase, SandboxRecord, SandboxStatus
from hyperpod.sandbox.disks import Layers
from hyperpod.sandbox.session import AgentSession
from hyperpod.share.virtiofsd import FileServer
from hyperpod.shimclient.client import ShimClient
from hyperpod.spec.share import FOLDER
from hyperpod.vsock.dial import Endpoint, HostEndpoint, HybridEndpoint, KernelEndpoint

SHIMS = 2
"""Deaths of shims that a call bears."""

EXECS = 128
"""Calls of ExecSync that run in it at once; shim and agent have room for more."""

NOTICE = 1.0
"""Seconds for a connection that a call found broken to be known as lost."""

T = TypeVar("T")


class LiveSandbox:
    """Record, status, connections. Only the SandboxManager changes it."""

    def __init__(self, record: SandboxRecord, status: SandboxStatus, run_dir: Path, disks: Layers) -> None:
        self.record, self.status, self.disks = record, status, disks
        self.directory = run_dir / "s" / record.id[:12]
        self.agent_home = run_dir / "h" / record.id[:12]
        """A host pod's agent's."""
        self.agent_share = self.agent_home / FOLDER
        self.files = FileServer(run_dir / "m" / record.id[:12])
        self.files_lock = asyncio.Lock()
        """Held while the file server is started, or its device attached."""
        self.files_started = asyncio.Event()
        self.session = AgentSession(record.id, self.endpoint, record.token)
        self._shim: ShimClient | None = None
        self._new_shim = asyncio.Event()
        self.execs = asyncio.Semaphore(EXECS)
        self.gone = asyncio.Event()
        self.gone_detail = ""
        self.host_oom = False
        """The host's kernel killed the VM for want of memory in the pod's cgroup."""
        self.tasks: list[asyncio.Task[None]] = []
        self.calls: dict[str, dict[str, float]] = {}
        """How long the parts of the last call of each kind took, in seconds: for the verbose status."""
        self.settled: asyncio.Task[None] | None = None
        """Of a new sandbox: its record is being made durable."""

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def short(self) -> str:
        return self.record.id[:12]

    @property
    def endpoint(self) -> Endpoint:
        if self.record.kind is Kind.HOST:
            return HostEndpoint(str(self.agent_home))
        if self.record.vsock == "kernel":
            return KernelEndpoint(self.record.cid)
        return HybridEndpoint(str(self.directory / "vsock.sock"))

    @property
    def ready(self) -> bool:
        return self.status.phase is SandboxPhase.READY

    def view(self) -> Sandbox:
        return Sandbox(record=self.record, status=self.status)

    async def on_disk(self) -> None:
        """Wait until the record of a new sandbox outlives the host. Raises ResourceExhausted, OSError."""
        if self.settled is not None:
            await self.settled

    def need_ready(self) -> None:
        """Raises FailedPrecondition unless the sandbox is ready."""
        if not self.ready:
            raise FailedPrecondition(f"sandbox {self.short} is {self.status.phase.value}, not ready")

    @property
    def shim(self) -> ShimClient | None:
        return self._shim

    @shim.setter
    def shim(self, shim: ShimClient | None) -> None:
        self._shim = shim
        if shim is not None:
            self._new_shim.set()

    async def living_shim(self, timeout: float = 5.0) -> ShimClient:
        """Its connection, also while it is being replaced. Raises Unavailable after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                while (shim := self._shim) is None or shim.closed.is_set():
                    self._new_shim.clear()
                    await self._new_shim.wait()
                return shim
        except TimeoutError as exc:
            raise Unavailable(f"sandbox {self.short}: its shim has died, and no new one came") from exc

    async def of_any_shim(self, call: Callable[[ShimClient], Awaitable[T]]) -> T:
        """Make a call, of the next shim when one dies during it: for what has its effect once however often it is
        made. Raises what it raises, Unavailable when no shim comes."""
        for _ in range(SHIMS):
            shim = await self.living_shim()
            try:
                return await call(shim)
            except Unavailable:
                await self.without(shim)
        return await call(await self.living_shim())

    async def without(self, shim: ShimClient) -> None:
        """Wait until the death of a shim is noticed, of which a call was the first to know."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(NOTICE):
                await shim.closed.wait()

    def need_shim(self) -> ShimClient:
        """The shim's control connection. Raises FailedPrecondition when it is being replaced."""
        if self.shim is None:
            raise FailedPrecondition(
                f"sandbox {self.short}: its shim is not there (being replaced?); try again"
            )
        return self.shim


class SandboxListener(Protocol):
    """What the containers of a sandbox need to know; implemented in container/lives.py."""

    async def sandbox_stopping(self, sandbox: LiveSandbox) -> None:
        """The VM still runs: end its containers. Bounded by the implementation."""

    async def sandbox_stopped(self, sandbox: LiveSandbox, detail: str) -> None:
        """The VM is gone: no container of it can be running."""

    async def sandbox_removing(self, sandbox: LiveSandbox) -> None:
        """Forget its containers."""

    def container_exited(self, sandbox: LiveSandbox, info: ContainerInfo) -> object:
        """The agent reports an exit, maybe again and again. Returns at once."""

    async def connected(self, sandbox: LiveSandbox) -> None:
        """Agent and shim are connected (again): reconcile."""
