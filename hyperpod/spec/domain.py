"""Libvirt's domain XML of a sandbox VM (https://libvirt.org/formatdomain.html)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from hyperpod.errors import InvalidArgument
from hyperpod.spec.mounts import TAG

NAMESPACE = "https://hyperpod.dev/domain/1"
QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
EMULATOR = "/usr/bin/qemu-system-x86_64"
SCRATCH_SERIAL = "scratch"

VSOCK_ID = "hpvsock"
VSOCK_PORT = "hpvsockrp"
"""QMP ids of the vhost-user-vsock device and of its root port, used again when the device is replaced."""

TRANSLATED_MIB = 128
"""What an emulator keeps of translated code. Its own limit is 1 GiB, which a pod of some thousand execs fills, and
its cgroup has no room for; the start of a guest takes about 50."""

MEMORY_SLOTS = 8

FIRST_SLOT = 1
"""On the root complex, where the devices of the start are: a root port for each, as libvirt gives by default, costs
an emulated guest 17 ms apiece. A device there cannot be unplugged, but those of a start stay anyway."""

MODERN = "virtio-non-transitional"
"""Without the ports of virtio before 1.0, which a device on the root complex would have otherwise."""

UNITS_PER_TARGET = 256
"""LUNs below 256 keep SCSI's plain addressing (SAM-5 4.7)."""

_SAFE = re.compile(r"[\x20-\x7e]*\Z")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}\Z")
"""Of a domain: it becomes part of file names, and of QEMU's comma-separated options."""

ET.register_namespace("hyperpod", NAMESPACE)
ET.register_namespace("qemu", QEMU_NAMESPACE)


@dataclass(frozen=True)
class Disk:
    """A raw LUN on the sandbox's virtio-scsi controller.

    `serial` is at most 36 characters (the guest finds it in VPD page 0x80); `unit` is below 256.
    """

    serial: str
    path: str
    readonly: bool
    target: int
    unit: int


@dataclass(frozen=True)
class Nic:
    """A virtio network card. libvirt makes the tap on the host; who made the domain moves it from there."""

    mac: str
    tap: str
    mtu: int


@dataclass(frozen=True)
class DomainSpec:
    """All that a VM is made of. Sizes in MiB; paths absolute.

    `root` is the guest's read-only image (vda), `scratch` its writable disk (vdb, serial "scratch"). QEMU connects
    to `console_socket` and `vsock_socket` (vhost-user), which someone listens on; `vsock_cid` is for the kernel's
    vhost-vsock instead. QEMU runs as uid:gid.
    """

    name: str
    uuid: str
    instance_id: str
    sandbox_id: str
    memory_mib: int
    max_memory_mib: int
    vcpus: int
    max_vcpus: int
    accelerator: str
    kernel: str
    initrd: str | None
    cmdline: str
    root: str
    scratch: str | None
    console_socket: str | None
    vsock_socket: str | None
    vsock_cid: int | None
    uid: int
    gid: int
    nics: tuple[Nic, ...] = ()
    share_socket: str | None = None
    """Of a virtiofsd that listens already."""
    spare_ports: int = 0
    """PCIe root ports for what is plugged in later: a port itself cannot be."""


def _add(parent: ET.Element, tag: str, text: str | None = None, **attributes: str) -> ET.Element:
    for value in (text or "", *attributes.values()):
        if not _SAFE.match(value):
            raise InvalidArgument(f"<{tag}> of the domain would carry unprintable text: {value[:80]!r}")
    element = ET.SubElement(parent, tag, attributes)
    element.text = text
    return element


def _virtio_disk(devices: ET.Element, name: str, path: str, *, serial: str, readonly: bool) -> ET.Element:
    disk = _add(devices, "disk", type="file", device="disk", model=MODERN)
    # read-only: the host's page cache holds one copy for all VMs
    driver = {"name": "qemu", "type": "raw", "cache": "writeback" if readonly else "unsafe"}
    if not readonly:
        # the default policy pauses the VM on a full host disk; the guest must see the error instead
        driver |= {"error_policy": "report", "rerror_policy": "report", "discard": "unmap"}
    ET.SubElement(disk, "driver", driver)
    _add(disk, "source", file=path)
    _add(disk, "target", dev=name, bus="virtio")
    _add(disk, "serial", serial)
    if readonly:
        _add(disk, "readonly")
    return disk


def disk_xml(disk: Disk) -> str:
    """The element for attaching or detaching one LUN."""
    if not 0 <= disk.unit < UNITS_PER_TARGET:
        raise InvalidArgument(f"disk {disk.serial}: unit {disk.unit} is not below {UNITS_PER_TARGET}")
    root = ET.Element("disk", {"type": "file", "device": "disk"})
    ET.SubElement(root, "driver", {"name": "qemu", "type": "raw", "cache": "writeback"})
    _add(root, "source", file=disk.path)
    _add(root, "target", dev=f"sd{_letters(disk.target * UNITS_PER_TARGET + disk.unit)}", bus="scsi")
    _add(root, "serial", disk.serial)
    if disk.readonly:
        _add(root, "readonly")
    # Without an explicit address libvirt adds controllers of its own.
    _add(root, "address", type="drive", controller="0", bus="0", target=str(disk.target), unit=str(disk.unit))
    return ET.tostring(root, encoding="unicode")


def share_xml(socket: str) -> str:
    """The element for attaching the virtio-fs device."""
    return ET.tostring(_share(ET.Element("devices"), socket), encoding="unicode")


def _share(devices: ET.Element, socket: str) -> ET.Element:
    share = _add(devices, "filesystem", type="mount", accessmode="passthrough")
    _add(share, "driver", type="virtiofs", queue="1024")
    _add(share, "source", socket=socket)
    _add(share, "target", dir=TAG)
    return share


def _letters(number: int) -> str:
    """0 to a, 25 to z, 26 to aa: the tail of a disk's name."""
    name = ""
    number += 1
    while number:
        number, rest = divmod(number - 1, 26)
        name = chr(ord("a") + rest) + name
    return name


def vsock_chardev(path: str) -> str:
    """QEMU's -chardev option; a comma in a value is written twice."""
    return f"socket,id={VSOCK_ID},path={path.replace(',', ',,')}"


def vsock_device() -> dict[str, object]:
    """QEMU's -device option, and QMP device_add's arguments."""
    return {"driver": "vhost-user-vsock-pci", "id": VSOCK_ID, "chardev": VSOCK_ID, "bus": VSOCK_PORT}


def domain_xml(spec: DomainSpec) -> str:
    """The whole domain. Raises InvalidArgument for text that XML or QEMU would misread."""
    if not _NAME.match(spec.name):
        raise InvalidArgument(f"{spec.name[:80]!r} is no name for a domain")
    domain = ET.Element("domain", {"type": "kvm" if spec.accelerator == "kvm" else "qemu"})
    _add(domain, "name", spec.name)
    _add(domain, "uuid", spec.uuid)
    metadata = _add(domain, "metadata")
    ET.SubElement(metadata, f"{{{NAMESPACE}}}sandbox", {"instance": spec.instance_id, "id": spec.sandbox_id})
    if spec.max_memory_mib > spec.memory_mib:
        _add(domain, "maxMemory", str(spec.max_memory_mib), slots=str(MEMORY_SLOTS), unit="MiB")
    # A core file of QEMU would hold a tenant's memory.
    _add(domain, "memory", str(spec.memory_mib), unit="MiB", dumpCore="off")
    _add(domain, "currentMemory", str(spec.memory_mib), unit="MiB")
    backing = _add(domain, "memoryBacking")
    _add(backing, "source", type="memfd")
    _add(backing, "access", mode="shared")
    _add(domain, "vcpu", str(spec.max_vcpus), placement="static", current=str(spec.vcpus))
    boot = _add(domain, "os")
    _add(boot, "type", "hvm", arch="x86_64", machine="q35")
    _add(boot, "kernel", spec.kernel)
    if spec.initrd:
        _add(boot, "initrd", spec.initrd)
    _add(boot, "cmdline", spec.cmdline)
    features = _add(domain, "features")
    _add(features, "acpi")
    if spec.accelerator == "tcg":
        _add(_add(features, "tcg"), "tb-cache", str(TRANSLATED_MIB), unit="MiB")
    _cpu(domain, spec)
    _add(domain, "clock", offset="utc")
    for event in ("on_poweroff", "on_reboot", "on_crash"):
        _add(domain, event, "destroy")
    _devices(_add(domain, "devices"), spec)
    label = _add(domain, "seclabel", type="static", model="dac", relabel="no")
    _add(label, "label", f"+{spec.uid}:+{spec.gid}")
    if spec.vsock_socket:
        _vhost_user_vsock(domain, spec.vsock_socket)
    _ask_less(domain)
    return ET.tostring(domain, encoding="unicode")


def _cpu(domain: ET.Element, spec: DomainSpec) -> None:
    cpu = _add(domain, "cpu", mode="host-passthrough" if spec.accelerator == "kvm" else "maximum")
    if spec.max_memory_mib > spec.memory_mib:
        # Memory hot-plug wants at least one NUMA cell to plug into.
        _add(
            _add(cpu, "numa"), "cell", id="0", cpus=f"0-{spec.max_vcpus - 1}", memory=str(spec.memory_mib),
            unit="MiB", memAccess="shared",
        )  # fmt: skip


def _devices(devices: ET.Element, spec: DomainSpec) -> None:
    _add(devices, "emulator", EMULATOR)
    pci = [_virtio_disk(devices, "vda", spec.root, serial="root", readonly=True)]
    if spec.scratch:
        pci.append(_virtio_disk(devices, "vdb", spec.scratch, serial=SCRATCH_SERIAL, readonly=False))
    pci.append(_add(devices, "controller", type="scsi", index="0", model=MODERN))
    _add(devices, "controller", type="usb", model="none")
    _add(devices, "controller", type="pci", index="0", model="pcie-root")
    for index in range(1, spec.spare_ports + 1):
        pci.append(_add(devices, "controller", type="pci", index=str(index), model="pcie-root-port"))
    if spec.console_socket:
        serial = _add(devices, "serial", type="unix")
        source = _add(serial, "source", mode="connect", path=spec.console_socket)
        _add(source, "reconnect", enabled="yes", timeout="1")
        _add(serial, "target", port="0")
    pci.extend(_nic(devices, nic) for nic in spec.nics)
    if spec.share_socket:
        pci.append(_share(devices, spec.share_socket))
    if spec.vsock_cid is not None:
        vsock = _add(devices, "vsock", model=MODERN)
        _add(vsock, "cid", auto="no", address=str(spec.vsock_cid))
        pci.append(vsock)
    rng = _add(devices, "rng", model=MODERN)
    _add(rng, "backend", "/dev/urandom", model="random")
    pci += [rng, _add(devices, "memballoon", model=MODERN, freePageReporting="on")]
    _add(devices, "panic", model="isa")  # tells a kernel panic from a power-off
    for slot, device in enumerate(pci, FIRST_SLOT):
        _add(device, "address", type="pci", domain="0", bus="0", slot=hex(slot), function="0")


def _nic(devices: ET.Element, nic: Nic) -> ET.Element:
    interface = _add(devices, "interface", type="ethernet")
    _add(interface, "mac", address=nic.mac)
    _add(interface, "target", dev=nic.tap, managed="yes")
    _add(interface, "mtu", size=str(nic.mtu))
    _add(interface, "model", type=MODERN)
    _add(interface, "rom", enabled="no")  # nothing boots from it, and loading it takes time
    return interface


def _vhost_user_vsock(domain: ET.Element, path: str) -> None:
    """libvirt 9.0 has no element for it: a device of QEMU's own command line on a root port of its own."""
    command = ET.SubElement(domain, f"{{{QEMU_NAMESPACE}}}commandline")
    port = {
        "driver": "pcie-root-port",
        "id": VSOCK_PORT,
        "bus": "pcie.0",
        "addr": "0x1e",
        "chassis": 200,
        "port": 240,
    }
    for value in (
        "-chardev",
        vsock_chardev(path),
        "-device",
        json.dumps(port),
        "-device",
        json.dumps(vsock_device()),
    ):
        ET.SubElement(command, f"{{{QEMU_NAMESPACE}}}arg", {"value": value})


def _ask_less(domain: ET.Element) -> None:
    """Have libvirt look at the CPU by QEMU's two words of features.

    Else it asks for each of 400 features by a command of its own, before the CPU runs, and we use none of it."""
    capabilities = ET.SubElement(domain, f"{{{QEMU_NAMESPACE}}}capabilities")
    ET.SubElement(capabilities, f"{{{QEMU_NAMESPACE}}}del", {"capability": "cpu-unavailable-features"})
