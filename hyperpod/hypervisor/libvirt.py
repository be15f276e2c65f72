"""The Hypervisor of production: QEMU through libvirt, by default with libvirt's driver inside this process."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from builtins import list as List  # noqa: N812  the Protocol has a method named list
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import libvirt
import libvirt_qemu

from hyperpod.errors import (
    AlreadyExists,
    BootError,
    DeadlineExceeded,
    FailedPrecondition,
    HyperpodError,
    NotFound,
)
from hyperpod.hypervisor import accelerator, orphans, tsc
from hyperpod.hypervisor.base import Disk, DomainEvent, DomainInfo, DomainSpec, HostFacts
from hyperpod.hypervisor.connection import Connection
from hyperpod.logs import printable
from hyperpod.spec.domain import (
    EMULATOR,
    NAMESPACE,
    VSOCK_ID,
    disk_xml,
    domain_xml,
    share_xml,
    vsock_device,
)
from hyperpod.tasks import TaskOwner

log = logging.getLogger(__name__)

DESTROY_TIMEOUT = 60.0
"""Seconds: libvirt waits 10 s after SIGTERM and 5 s after SIGKILL, once more if the domain is just starting."""

START_TIMEOUT = 90.0
"""Seconds for createXML; libvirt itself gives QEMU's monitor 30 s and then adds time by memory size."""

REPLUG_TIMEOUT = 20.0
"""Seconds for a guest to let its vsock device go (1.5 s when it is idle)."""

RECONNECT_PAUSE = 1.0

_KINDS = {
    libvirt.VIR_DOMAIN_EVENT_STARTED: "started",
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED: "paused",
    libvirt.VIR_DOMAIN_EVENT_RESUMED: "resumed",
    libvirt.VIR_DOMAIN_EVENT_STOPPED: "stopped",
    libvirt.VIR_DOMAIN_EVENT_CRASHED: "crashed",
}

_WHY = {
    (libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN): "the guest powered off",
    (libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_STOPPED_DESTROYED): "it was destroyed",
    (libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_STOPPED_CRASHED): "the guest crashed",
    (libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_STOPPED_FAILED): "QEMU ended by itself",
    (libvirt.VIR_DOMAIN_EVENT_SUSPENDED, libvirt.VIR_DOMAIN_EVENT_SUSPENDED_PAUSED): "on request",
    (libvirt.VIR_DOMAIN_EVENT_SUSPENDED, libvirt.VIR_DOMAIN_EVENT_SUSPENDED_IOERROR): "a disk failed",
    (
        libvirt.VIR_DOMAIN_EVENT_CRASHED,
        libvirt.VIR_DOMAIN_EVENT_CRASHED_PANICKED,
    ): "the guest's kernel panicked",
}
"""(event, detail) in words; others are shown as a number."""


class LibvirtHypervisor:
    """Implements hyperpod.hypervisor.base.Hypervisor."""

    def __init__(self, *, run_dir: Path, instance_id: str, uri: str, accelerator: str) -> None:
        self._root = None if uri else run_dir / "libvirt"
        self._logs = (self._root / "log" if self._root else Path("/var/log/libvirt")) / "qemu"
        self._connection = Connection(uri or f"qemu:///embed?root={self._root}", self._root)
        self._instance, self._setting = instance_id, accelerator
        self._facts: HostFacts | None = None
        self._callbacks: List[Callable[[DomainEvent], None]] = []
        self._sandboxes: dict[str, str] = {}
        """Name to sandbox id, of every domain of ours that has not sent its `stopped` yet."""
        self._starting: dict[str, asyncio.Task[HyperpodError | None]] = {}
        self._tasks = TaskOwner("hypervisor")

    # -- connection ---------------------------------------------------------------------------------------

    async def open(self) -> None:
        choice = await asyncio.to_thread(accelerator.probe, self._setting)
        if self._root is not None:
            await asyncio.to_thread(orphans.forget_unstarted, self._root)
        await self._connection.open(self._on_event, self._on_lost)
        try:
            machine = await self._connection.call(
                "asking for QEMU's capabilities", lambda conn: _machine(conn, choice.kind)
            )
            if self._root is not None:
                known = {info.name for info in await self.list()}
                await asyncio.to_thread(orphans.sweep, self._root, known)
        except BaseException:
            await self._connection.close()
            raise
        self._facts = HostFacts(
            accelerator=choice.kind,
            accelerator_reason=choice.reason,
            vhost_vsock=accelerator.device_error("/dev/vhost-vsock") == "",
            libvirt_version=_version(libvirt.getVersion()),
            hypervisor_version=machine,
            tsc_khz=await asyncio.to_thread(tsc.measure) if choice.kind == "tcg" else 0,
        )
        log.info("libvirt %s, accelerator %s: %s", self._facts.libvirt_version, choice.kind, choice.reason)

    async def close(self) -> None:
        await self._tasks.close()
        await self._connection.close()

    def facts(self) -> HostFacts:
        assert self._facts is not None, "open() first"
        return self._facts

    # -- events -------------------------------------------------------------------------------------------

    def subscribe(self, callback: Callable[[DomainEvent], None]) -> None:
        self._callbacks.append(callback)

    def _on_event(self, name: str, event: int, detail: int) -> None:
        if (kind := _KINDS.get(event)) is not None:
            self._tell(name, kind, _WHY.get((event, detail), f"{kind}, detail {detail}"))

    def _tell(self, name: str, kind: str, detail: str) -> None:
        sandbox = self._sandboxes.get(name)
        if sandbox is None:
            return  # not ours
        if kind == "stopped":
            del self._sandboxes[name]
        for callback in self._callbacks:
            callback(DomainEvent(sandbox_id=sandbox, name=name, kind=kind, detail=detail))

    def _on_lost(self) -> None:
        self._tasks.spawn("reconnect", self._reconnect())

    async def _reconnect(self) -> None:
        """Until a libvirtd answers again; then tell of the domains that ended in between."""
        while True:
            try:
                alive = {info.name for info in await self.list()}
                break
            except HyperpodError as exc:
                log.debug("libvirt is still away: %s", exc)
                await asyncio.sleep(RECONNECT_PAUSE)
        log.info("connected to %s again", self._connection.uri)
        for name in [n for n in self._sandboxes if n not in alive and n not in self._starting]:
            self._tell(name, "stopped", "it ended while libvirt was away")

    # -- domains ------------------------------------------------------------------------------------------

    async def create(self, spec: DomainSpec) -> None:
        xml = domain_xml(spec)
        if spec.name in self._sandboxes:
            raise AlreadyExists(f"domain {spec.name} exists")
        self._sandboxes[spec.name] = spec.sandbox_id
        # A task of its own: it lasts as long as libvirt's call, whatever becomes of our caller, and destroy()
        # waits for it. Otherwise a domain could start after its clean-up.
        task = self._tasks.spawn(f"create/{spec.name}", self._start(spec.name, xml))
        self._starting[spec.name] = task
        task.add_done_callback(lambda _: self._starting.pop(spec.name, None))
        try:
            async with asyncio.timeout(START_TIMEOUT):
                failure = await asyncio.shield(task)
        except TimeoutError as exc:
            raise BootError("domain", f"libvirt took longer than {START_TIMEOUT:.0f} s to start it") from exc
        if failure is not None:
            raise BootError("domain", str(failure), await self.last_words(spec.name)) from failure

    async def _start(self, name: str, xml: str) -> HyperpodError | None:
        try:
            await self._connection.call(f"starting {name}", lambda conn: conn.createXML(xml, 0), timeout=None)
        except HyperpodError as exc:
            self._sandboxes.pop(name, None)
            return exc
        return None

    async def last_words(self, name: str) -> str:
        return await asyncio.to_thread(self._log, name)

    def _log(self, name: str) -> str:
        """The last lines of QEMU's log."""
        try:
            with (self._logs / f"{name}.log").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 2048))
                return printable(b"\n".join(file.read().splitlines()[-4:]))
        except OSError:
            return ""

    async def destroy(self, name: str) -> None:
        try:
            async with asyncio.timeout(DESTROY_TIMEOUT):
                while True:
                    starting = self._starting.get(name)
                    await self._destroy(name)
                    if starting is None:
                        break
                    await asyncio.wait([starting], timeout=0.2)
        except TimeoutError as exc:
            raise DeadlineExceeded(f"destroying {name} took longer than {DESTROY_TIMEOUT:.0f} s") from exc
        await asyncio.to_thread(self._clean, name)

    def _clean(self, name: str) -> None:
        """What libvirt leaves of a domain that is gone; most of it when we ended before it was on record."""
        if self._root is not None:
            orphans.remove_files(self._root, name)
        else:
            (self._logs / f"{name}.log").unlink(missing_ok=True)
        orphans.remove_cgroups(name)

    async def _destroy(self, name: str) -> None:
        try:
            await self._connection.call(
                f"destroying {name}", lambda conn: conn.lookupByName(name).destroy(), urgent=True
            )
        except NotFound:
            return
        except HyperpodError:
            # It may have ended while we asked.
            if any(info.name == name for info in await self.list()):
                raise

    async def list(self) -> List[DomainInfo]:
        def collect(conn: Any) -> List[DomainInfo]:
            return [info for domain in conn.listAllDomains(0) if (info := self._info(domain)) is not None]

        found = await self._connection.call("listing domains", collect, urgent=True)
        for info in found:
            if info.ours:
                self._sandboxes[info.name] = info.sandbox_id
        return found

    def _info(self, domain: Any) -> DomainInfo | None:
        instance, sandbox = "", ""
        try:
            state, _ = domain.state()
            try:
                text = domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, NAMESPACE, 0)
                element = ET.fromstring(text)  # noqa: S314  written by us, kept by libvirt
                instance, sandbox = element.get("instance", ""), element.get("id", "")
            except libvirt.libvirtError as exc:
                if exc.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN_METADATA:
                    raise
            return DomainInfo(
                name=domain.name(),
                uuid=domain.UUIDString(),
                sandbox_id=sandbox,
                instance_id=instance,
                running=state
                in (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_BLOCKED),
                ours=bool(sandbox) and instance == self._instance,
            )
        except libvirt.libvirtError as exc:
            if exc.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                raise
            return None  # it ended while we looked

    # -- devices ------------------------------------------------------------------------------------------

    async def attach_disk(self, name: str, disk: Disk) -> None:
        def attach(conn: Any) -> None:
            domain = conn.lookupByName(name)
            if _find_disk(domain, disk.serial) is None:
                domain.attachDeviceFlags(disk_xml(disk), libvirt.VIR_DOMAIN_AFFECT_LIVE)

        await self._connection.call(f"attaching {disk.serial} to {name}", attach)

    async def detach_disk(self, name: str, serial: str) -> None:
        def detach(conn: Any) -> None:
            domain = conn.lookupByName(name)
            if (xml := _find_disk(domain, serial)) is not None:
                domain.detachDeviceFlags(xml, libvirt.VIR_DOMAIN_AFFECT_LIVE)

        try:
            await self._connection.call(f"detaching {serial} from {name}", detach)
        except NotFound:
            log.debug("domain %s is gone, and its disk %s with it", name, serial)

    async def attach_share(self, name: str, socket_path: str) -> None:
        def attach(conn: Any) -> None:
            domain = conn.lookupByName(name)
            root = ET.fromstring(domain.XMLDesc(0))  # noqa: S314  libvirt's own answer
            if root.find("./devices/filesystem") is None:
                domain.attachDeviceFlags(share_xml(socket_path), libvirt.VIR_DOMAIN_AFFECT_LIVE)

        await self._connection.call(f"attaching the share to {name}", attach)

    async def replug_vsock(self, name: str, socket_path: str) -> None:
        # Each step may have been done by a try before this one.
        await self._qmp(name, "device_del", {"id": VSOCK_ID}, fine="DeviceNotFound")
        try:
            async with asyncio.timeout(REPLUG_TIMEOUT):
                # QEMU's event for it is not among libvirt's, so it has to be asked.
                while not await self._remove_chardev(name):  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
        except TimeoutError as exc:
            raise DeadlineExceeded(
                f"the guest of {name} did not let its vsock device go within {REPLUG_TIMEOUT:.0f} s"
            ) from exc
        address = {"type": "unix", "data": {"path": socket_path}}
        backend = {"type": "socket", "data": {"addr": address, "server": False}}
        await self._qmp(name, "chardev-add", {"id": VSOCK_ID, "backend": backend})
        await self._qmp(name, "device_add", vsock_device())

    async def _remove_chardev(self, name: str) -> bool:
        """False while the device still uses it."""
        present = await self._qmp(name, "query-chardev", {})
        if all(entry.get("label") != VSOCK_ID for entry in present):
            return True
        try:
            await self._qmp(name, "chardev-remove", {"id": VSOCK_ID})
        except FailedPrecondition:
            return False
        return True

    async def _qmp(self, name: str, command: str, arguments: dict[str, Any], fine: str = "") -> Any:
        """What QEMU returned. Raises FailedPrecondition when it refused, unless its error class is `fine`."""
        text = json.dumps({"execute": command, "arguments": arguments})

        def send(conn: Any) -> str:
            return str(libvirt_qemu.qemuMonitorCommand(conn.lookupByName(name), text, 0))

        reply = json.loads(await self._connection.call(f"{command} on {name}", send))
        error = reply.get("error")
        if error and error.get("class") != fine:
            raise FailedPrecondition(f"{command} on {name}: {printable(str(error.get('desc')), 500)}")
        return reply.get("return")


def _machine(conn: Any, kind: str) -> str:
    """Has QEMU probed, and says which machine q35 stands for.

    For the one binary only: getVersion() would probe every emulator of the host.
    """
    virt = "kvm" if kind == "kvm" else "qemu"
    text = conn.getDomainCapabilities(EMULATOR, "x86_64", "q35", virt, 0)
    return ET.fromstring(text).findtext("machine") or "q35"  # noqa: S314  libvirt's own answer


def _find_disk(domain: Any, serial: str) -> str | None:
    """The XML of the attached disk with that serial."""
    root = ET.fromstring(domain.XMLDesc(0))  # noqa: S314  libvirt's own answer
    for disk in root.iterfind("./devices/disk"):
        if disk.findtext("serial") == serial:
            return ET.tostring(disk, encoding="unicode")
    return None


def _version(number: int) -> str:
    """libvirt writes major * 1,000,000 + minor * 1,000 + release."""
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"
