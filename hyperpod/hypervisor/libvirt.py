"""The Hypervisor of production: QEMU through libvirt, by default with libvirt's driver inside this process."""

from __future__ import annotations

import asyncio
import json
import logging
from builtins import list as List  # noqa: N812  the Protocol has a method named list
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import libvirt
import libvirt_qemu

from hyperpod.errors import BootError, HyperpodError, NotFound
from hyperpod.hypervisor import accelerator
from hyperpod.hypervisor.base import Disk, DomainEvent, DomainInfo, DomainSpec, HostFacts
from hyperpod.hypervisor.connection import Connection
from hyperpod.logs import printable
from hyperpod.spec.domain import EMULATOR, NAMESPACE, VSOCK_ID, disk_xml, domain_xml, vsock_device

log = logging.getLogger(__name__)

_STOPPED = {
    0: "it shut down", 1: "destroyed", 2: "crashed", 3: "migrated", 4: "saved", 5: "QEMU failed", 6: "snapshot",
}  # fmt: skip
"""virDomainEventStoppedDetailType in words."""


class LibvirtHypervisor:
    """Implements hyperpod.hypervisor.base.Hypervisor."""

    def __init__(self, *, run_dir: Path, instance_id: str, uri: str, accelerator: str) -> None:
        self._root = None if uri else run_dir / "libvirt"
        self._connection = Connection(uri or f"qemu:///embed?root={self._root}", self._root)
        self._instance, self._setting = instance_id, accelerator
        self._facts: HostFacts | None = None
        self._callbacks: List[Callable[[DomainEvent], None]] = []
        self._sandboxes: dict[str, str] = {}

    async def open(self) -> None:
        choice = await asyncio.to_thread(accelerator.probe, self._setting)
        await self._connection.open(self._on_event)
        conn = self._connection.conn

        def probe() -> str:
            # For the one binary only: getVersion() would probe every emulator of the host.
            kind = "kvm" if choice.kind == "kvm" else "qemu"
            text = conn.getDomainCapabilities(EMULATOR, "x86_64", "q35", kind, 0)
            return ET.fromstring(text).findtext("machine") or "q35"  # noqa: S314  libvirt's own answer

        machine = await self._connection.call("asking for QEMU's capabilities", probe)
        self._facts = HostFacts(
            accelerator=choice.kind,
            accelerator_reason=choice.reason,
            vhost_vsock=Path("/dev/vhost-vsock").exists(),
            libvirt_version=_version(libvirt.getVersion()),
            hypervisor_version=machine,
        )
        log.info("libvirt %s, accelerator %s: %s", self._facts.libvirt_version, choice.kind, choice.reason)

    async def close(self) -> None:
        await self._connection.close()

    def facts(self) -> HostFacts:
        assert self._facts is not None, "open() first"
        return self._facts

    def subscribe(self, callback: Callable[[DomainEvent], None]) -> None:
        self._callbacks.append(callback)

    def _on_event(self, name: str, event: int, detail: int) -> None:
        kinds = {
            libvirt.VIR_DOMAIN_EVENT_STARTED: "started",
            libvirt.VIR_DOMAIN_EVENT_SUSPENDED: "paused",
            libvirt.VIR_DOMAIN_EVENT_RESUMED: "resumed",
            libvirt.VIR_DOMAIN_EVENT_STOPPED: "stopped",
            libvirt.VIR_DOMAIN_EVENT_CRASHED: "crashed",
        }
        kind = kinds.get(event)
        sandbox = self._sandboxes.get(name, "")
        if kind is None or not sandbox:
            return
        words = _STOPPED.get(detail, str(detail)) if kind == "stopped" else kind
        for callback in self._callbacks:
            callback(DomainEvent(sandbox_id=sandbox, name=name, kind=kind, detail=words))

    async def create(self, spec: DomainSpec) -> None:
        xml = domain_xml(spec)
        self._sandboxes[spec.name] = spec.sandbox_id
        conn = self._connection.conn
        try:
            # Shielded: a cancelled caller must not leave a domain that starts after its clean-up.
            await asyncio.shield(
                self._connection.call(f"starting {spec.name}", lambda: conn.createXML(xml, 0))
            )
        except HyperpodError as exc:
            raise BootError("domain", str(exc), await asyncio.to_thread(self._qemu_log, spec.name)) from exc

    def _qemu_log(self, name: str) -> str:
        """The last lines that QEMU wrote to its log."""
        for base in (self._root / "log" / "qemu" if self._root else Path("/var/log/libvirt/qemu"),):
            try:
                lines = (base / f"{name}.log").read_bytes()[-2048:].splitlines()[-4:]
                return printable(b"\n".join(lines))
            except OSError:
                continue
        return ""

    async def destroy(self, name: str) -> None:
        conn = self._connection.conn

        def destroy() -> None:
            conn.lookupByName(name).destroy()

        try:
            await self._connection.call(f"destroying {name}", destroy)
        except NotFound:
            pass
        except HyperpodError:
            if any(info.name == name for info in await self.list()):
                raise
        self._sandboxes.pop(name, None)
        if self._root:
            await asyncio.to_thread((self._root / "log" / "qemu" / f"{name}.log").unlink, missing_ok=True)

    async def list(self) -> List[DomainInfo]:
        conn = self._connection.conn

        def collect() -> List[DomainInfo]:
            return [info for domain in conn.listAllDomains(0) if (info := self._info(domain)) is not None]

        found = await self._connection.call("listing domains", collect)
        for info in found:
            if info.ours:
                self._sandboxes[info.name] = info.sandbox_id
        return found

    def _info(self, domain: Any) -> DomainInfo | None:
        try:
            state, _ = domain.state()
            try:
                text = domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, NAMESPACE, 0)
                element = ET.fromstring(text)  # noqa: S314  written by us, kept by libvirt
                instance, sandbox = element.get("instance", ""), element.get("id", "")
            except libvirt.libvirtError:
                instance, sandbox = "", ""
            return DomainInfo(
                name=domain.name(),
                uuid=domain.UUIDString(),
                sandbox_id=sandbox,
                instance_id=instance,
                running=state
                in (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_BLOCKED),
                ours=bool(sandbox) and instance == self._instance,
            )
        except libvirt.libvirtError:
            return None  # it ended while we looked

    async def attach_disk(self, name: str, disk: Disk) -> None:
        conn = self._connection.conn

        def attach() -> None:
            domain = conn.lookupByName(name)
            if _find_disk(domain, disk.serial) is None:
                domain.attachDeviceFlags(disk_xml(disk), libvirt.VIR_DOMAIN_AFFECT_LIVE)

        await self._connection.call(f"attaching {disk.serial} to {name}", attach)

    async def detach_disk(self, name: str, serial: str) -> None:
        conn = self._connection.conn

        def detach() -> None:
            domain = conn.lookupByName(name)
            if (xml := _find_disk(domain, serial)) is not None:
                domain.detachDeviceFlags(xml, libvirt.VIR_DOMAIN_AFFECT_LIVE)

        try:
            await self._connection.call(f"detaching {serial} from {name}", detach)
        except NotFound:
            log.debug("domain %s is gone, and its disk %s with it", name, serial)

    async def replug_vsock(self, name: str, socket_path: str) -> None:
        await self._qmp(name, "device_del", {"id": VSOCK_ID})
        for _ in range(50):
            try:
                await self._qmp(name, "chardev-remove", {"id": VSOCK_ID})
                break
            except HyperpodError:  # in use until the guest has let the device go
                await asyncio.sleep(0.1)
        address = {"type": "unix", "data": {"path": socket_path}}
        backend = {"type": "socket", "data": {"addr": address, "server": False}}
        await self._qmp(name, "chardev-add", {"id": VSOCK_ID, "backend": backend})
        await self._qmp(name, "device_add", vsock_device())

    async def _qmp(self, name: str, command: str, arguments: dict[str, Any]) -> None:
        conn = self._connection.conn
        text = json.dumps({"execute": command, "arguments": arguments})

        def send() -> str:
            return str(libvirt_qemu.qemuMonitorCommand(conn.lookupByName(name), text, 0))

        reply = json.loads(await self._connection.call(f"{command} on {name}", send))
        if "error" in reply:
            raise HyperpodError(f"{command} on {name}: {reply['error'].get('desc', reply)}")


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
