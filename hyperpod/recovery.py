"""Start-up: records and domains are joined, and each object is brought to a state that is true.

Both: adopt, within 10 s an object. Record only: NOTREADY, containers EXITED. Domain only and ours: destroy.
Unreadable record: set aside by the store and reported here. After a host reboot (another boot id) nothing can
be running, whatever the volatile folders say.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from pathlib import Path

from hyperpod.agent.rootfs import remove_tree
from hyperpod.container.known import KnownContainers
from hyperpod.errors import HyperpodError
from hyperpod.model.sandbox import Kind
from hyperpod.sandbox.host import remove_home
from hyperpod.sandbox.live import LiveSandbox
from hyperpod.sandbox.manager import SandboxManager
from hyperpod.supervisor.client import SupervisorClient

log = logging.getLogger(__name__)

PER_OBJECT = 10.0
"""Seconds after which one object's recovery is given up and retried as a stop."""

AT_ONCE = 8


class Recovery:
    """Runs once, before the CRI socket listens."""

    def __init__(
        self, sandboxes: SandboxManager, containers: KnownContainers, supervisor: SupervisorClient
    ) -> None:
        self.sandboxes, self.containers, self.supervisor = sandboxes, containers, supervisor
        self._strays: set[str] = set()

    async def run(self) -> None:
        records, aside = await self.sandboxes.store.load()
        container_records, _ = await self.containers.store.load()
        live = [self.sandboxes.adopt(record, status) for record, status in records.values()]
        for container, container_status in container_records.values():
            await self.containers.adopt(container, container_status)
        running = await self._domains()
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(sandbox: LiveSandbox) -> None:
            async with gate:
                await self._recover(sandbox, running)

        await asyncio.gather(*(one(sandbox) for sandbox in live))
        await asyncio.gather(*(self._leave_network(ident, gate) for ident in aside))
        await self._sweep(live)
        if live or container_records:
            log.info(
                "recovered %d sandboxes, %d containers", len(self.sandboxes.index), len(self.containers.index)
            )

    async def _domains(self) -> set[str]:
        """Domains of this instance that run and have a record; the others are destroyed."""
        running: set[str] = set()
        for info in await self.sandboxes.vms.hypervisor.list():
            if not info.ours:
                continue
            if self.sandboxes.index.find(info.sandbox_id) is None:
                log.warning("domain %s has no record; destroying it", info.name)
                self._strays.add(info.sandbox_id[:12])
                await self.sandboxes.vms.hypervisor.destroy(info.name)
            elif info.running:
                running.add(info.name)
        return running

    async def _recover(self, sandbox: LiveSandbox, running: set[str]) -> None:
        rebooted = sandbox.record.host_boot_id != self.sandboxes.boot_id
        alive = not rebooted and self._alive(sandbox, running)
        what = "VM" if sandbox.record.kind is Kind.VM else "agent"
        why = "the host was rebooted" if rebooted else f"its {what} was gone when the daemon started"
        try:
            async with asyncio.timeout(PER_OBJECT):
                await self.sandboxes.recover(sandbox, running=alive, why_not=why)
        except Exception as exc:  # whatever one pod's is, the others' daemon has to start
            foreseen = isinstance(exc, (HyperpodError, TimeoutError, OSError))
            reason = str(exc) or type(exc).__name__
            log.error(
                "sandbox %s could not be recovered, stopping it: %s",
                sandbox.short,
                reason,
                exc_info=None if foreseen else exc,
            )
            sandbox.gone_detail = f"it could not be recovered: {reason}"
            sandbox.gone.set()
            # Not waited for: a plugin or a VM that does not end must not keep the CRI socket from listening.
            self.sandboxes.owner.spawn(f"stop/{sandbox.short}", self.sandboxes.stop(sandbox.id))

    def _alive(self, sandbox: LiveSandbox, running: set[str]) -> bool:
        if sandbox.record.kind is Kind.HOST:
            return self.sandboxes.hosts.agent_pid(sandbox) > 0
        return sandbox.record.domain in running

    async def _leave_network(self, ident: str, gate: asyncio.Semaphore) -> None:
        """Of one whose record cannot be read: its VM is gone, its address is given back, if not now, later."""
        try:
            async with gate, asyncio.timeout(PER_OBJECT):
                await self.sandboxes.networks.detach(ident, self.sandboxes.store.aside(ident))
        except (HyperpodError, TimeoutError, OSError) as exc:
            log.error("sandbox %s, set aside, keeps its address: %s", ident[:12], exc or "timeout")

    async def _sweep(self, live: list[LiveSandbox]) -> None:
        """Shims, folders and cgroups of sandboxes that nobody knows."""
        known = {s.id for s in self.sandboxes.index.values()}
        for sandbox_id in await self.supervisor.list_ids():
            if sandbox_id not in known:
                await self.supervisor.drop(sandbox_id)
                self._strays.add(sandbox_id[:12])
        folders = {s.directory.name for s in live if s.ready}
        root = self.sandboxes.config.run_dir / "s"
        if root.is_dir():
            for folder in root.iterdir():
                if folder.name not in folders:
                    self._strays.add(folder.name)
                    await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        shares = self.sandboxes.config.run_dir / "m"
        if shares.is_dir():
            for folder in shares.iterdir():
                if folder.name not in folders:
                    self._strays.add(folder.name)
                    await self.sandboxes.vms.shares.sweep(folder)
        await self.sandboxes.networks.sweep(known)
        homes = [f for f in _folders(self.sandboxes.config.run_dir / "h") if f.name not in folders]
        self._strays.update(home.name for home in homes)
        await self.sandboxes.cgroups.sweep(self._strays)
        for home in homes:  # after its agent's end
            try:
                await asyncio.to_thread(remove_home, home)
            except HyperpodError as exc:
                log.error("%s", exc)
        for path in _folders(self.sandboxes.config.state_dir / "scratch"):
            if path.is_dir() and path.name not in known:
                await asyncio.to_thread(remove_tree, str(path))
            elif path.suffix == ".raw" and path.stem not in known:
                path.unlink(missing_ok=True)


def _folders(root: Path) -> list[Path]:
    return list(root.iterdir()) if root.is_dir() else []
