"""The domain XML says what DESIGN asks of a VM, and nothing can be smuggled into it."""

from __future__ import annotations

import json
from dataclasses import replace
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperpod.errors import InvalidArgument
from hyperpod.spec.domain import (
    NAMESPACE,
    QEMU_NAMESPACE,
    Disk,
    DomainSpec,
    Nic,
    disk_xml,
    domain_xml,
    share_xml,
)

SPEC = DomainSpec(
    name="hp-abc",
    uuid="11111111-2222-4333-8444-555555555555",
    instance_id="inst",
    sandbox_id="f" * 64,
    memory_mib=512,
    max_memory_mib=1024,
    vcpus=1,
    max_vcpus=4,
    accelerator="tcg",
    kernel="/k/vmlinux",
    initrd=None,
    cmdline="console=ttyS0",
    root="/g/root.img",
    scratch="/s/a.raw",
    console_socket="/r/console.sock",
    vsock_socket="/r/vhost.sock",
    vsock_cid=None,
    uid=1500001,
    gid=1500000,
)


def parsed(spec: DomainSpec) -> ET.Element:
    return ET.fromstring(domain_xml(spec))


def test_an_emulator_s_memory_is_bounded() -> None:
    assert parsed(SPEC).findtext("features/tcg/tb-cache") == "128"
    assert parsed(replace(SPEC, accelerator="kvm")).find("features/tcg") is None


def test_identity_and_user() -> None:
    root = parsed(SPEC)
    tag = root.find(f"metadata/{{{NAMESPACE}}}sandbox")
    assert tag is not None
    assert (tag.get("instance"), tag.get("id")) == ("inst", "f" * 64)
    assert root.findtext("seclabel/label") == "+1500001:+1500000"
    label = root.find("seclabel")
    assert label is not None
    assert label.attrib == {"type": "static", "model": "dac", "relabel": "no"}


def test_memory_is_shared_and_can_grow() -> None:
    root = parsed(SPEC)
    access = root.find("memoryBacking/access")
    assert access is not None
    assert access.get("mode") == "shared"
    assert root.findtext("maxMemory") == "1024"
    cell = root.find("cpu/numa/cell")
    assert cell is not None
    assert cell.get("cpus") == "0-3"
    assert parsed(replace(SPEC, max_memory_mib=512)).find("maxMemory") is None


def test_disks() -> None:
    root = parsed(SPEC)
    first, second = root.findall("devices/disk")
    assert first.find("readonly") is not None
    assert second.find("readonly") is None
    driver = second.find("driver")
    assert driver is not None
    assert (driver.get("error_policy"), driver.get("rerror_policy")) == ("report", "report")
    assert all(d.get("type") == "raw" for d in root.iterfind("devices/disk/driver"))


def test_kvm_and_the_kernels_vsock() -> None:
    root = parsed(replace(SPEC, accelerator="kvm", vsock_socket=None, vsock_cid=77))
    assert root.get("type") == "kvm"
    cid = root.find("devices/vsock/cid")
    assert cid is not None
    assert cid.get("address") == "77"
    assert root.find(f"{{{QEMU_NAMESPACE}}}commandline") is None


def test_the_vhost_user_device_has_a_port_of_its_own() -> None:
    args = [
        a.get("value", "")
        for a in parsed(SPEC).iterfind(f"{{{QEMU_NAMESPACE}}}commandline/{{{QEMU_NAMESPACE}}}arg")
    ]
    assert args[::2] == ["-chardev", "-device", "-device"]
    port, device = (json.loads(args[i]) for i in (3, 5))
    assert device["bus"] == port["id"]
    comma = parsed(replace(SPEC, vsock_socket="/r/a,b"))
    assert any("path=/r/a,,b" in (a.get("value") or "") for a in comma.iter(f"{{{QEMU_NAMESPACE}}}arg"))


@given(st.text(max_size=40))
def test_any_command_line_comes_back_as_it_went_in_or_is_refused(text: str) -> None:
    try:
        root = parsed(replace(SPEC, cmdline=text))
    except InvalidArgument:
        return
    assert (root.findtext("os/cmdline") or "") == text


@pytest.mark.parametrize(("unit", "name"), [(0, "sda"), (25, "sdz"), (26, "sdaa"), (249, "sdip")])
def test_layer_disks_have_explicit_addresses(unit: int, name: str) -> None:
    root = ET.fromstring(disk_xml(Disk(serial="s" * 32, path="/l", readonly=True, target=0, unit=unit)))
    address, target = root.find("address"), root.find("target")
    assert address is not None
    assert target is not None
    assert (address.get("controller"), address.get("unit"), target.get("dev")) == ("0", str(unit), name)
    assert root.find("readonly") is not None


def test_a_disks_name_is_unique_over_targets() -> None:
    names = set()
    for target in range(4):
        for unit in range(256):
            xml = disk_xml(Disk(serial="s", path="/l", readonly=True, target=target, unit=unit))
            found = ET.fromstring(xml).find("target")
            assert found is not None
            names.add(found.get("dev"))
    assert len(names) == 4 * 256
    with pytest.raises(InvalidArgument, match="256"):
        disk_xml(Disk(serial="s", path="/l", readonly=True, target=0, unit=256))


@pytest.mark.parametrize("name", ["", "a/b", "a,b", "../x", "-x", "x" * 64, "a\n", "ä"])
def test_a_name_becomes_part_of_file_names_and_options(name: str) -> None:
    with pytest.raises(InvalidArgument, match="no name for a domain"):
        domain_xml(replace(SPEC, name=name))


def test_what_a_start_brings_is_on_the_root_complex() -> None:
    """Each in a slot of its own, below those of the vsock device's port (0x1e) and the chip set (0x1f)."""
    nics = tuple(Nic(mac=f"02:00:00:00:00:0{n}", tap=f"t{n}", mtu=1500) for n in range(4))
    root = parsed(replace(SPEC, nics=nics, share_socket="/r/fs.sock", spare_ports=1))
    found = root.findall("devices/*/address[@type='pci']")
    assert [a.get("bus") for a in found] == ["0"] * len(found)
    slots = [int(a.get("slot") or "0", 16) for a in found]
    # two disks, scsi, the spare port, four cards, the share, rng, balloon
    assert sorted(slots) == list(range(1, 12))
    scsi = root.findall("devices/controller[@type='scsi']")
    assert [(c.get("index"), c.get("model")) for c in scsi] == [("0", "virtio-non-transitional")]


def test_a_port_waits_for_a_device_to_come_only_where_one_may() -> None:
    ports = "devices/controller[@model='pcie-root-port']"
    assert parsed(SPEC).findall(ports) == []
    assert [p.get("index") for p in parsed(replace(SPEC, spare_ports=1)).findall(ports)] == ["1"]


def test_libvirt_does_not_ask_for_each_feature_of_the_cpu() -> None:
    words = parsed(SPEC).findall(f"{{{QEMU_NAMESPACE}}}capabilities/{{{QEMU_NAMESPACE}}}del")
    assert [w.get("capability") for w in words] == ["cpu-unavailable-features"]


def test_what_a_guest_does_not_get() -> None:
    root = parsed(SPEC)
    for tag in ("graphics", "video", "hostdev", "filesystem", "interface", "channel", "tpm"):
        assert root.find(f"devices/{tag}") is None, tag
    assert root.find("devices/controller[@type='usb'][@model='none']") is not None
    memory = root.find("memory")
    assert memory is not None
    assert memory.get("dumpCore") == "off"


def test_the_share_is_a_virtiofsd_that_listens() -> None:
    assert parsed(SPEC).find("devices/filesystem") is None
    share = parsed(replace(SPEC, share_socket="/r/m/abc/fs.sock")).find("devices/filesystem")
    assert share is not None
    [source, target, driver] = [share.find(name) for name in ("source", "target", "driver")]
    assert source is not None
    assert source.attrib == {"socket": "/r/m/abc/fs.sock"}
    assert target is not None
    assert target.get("dir") == "hyperpod"
    assert driver is not None
    assert driver.get("type") == "virtiofs"
    assert ET.fromstring(share_xml("/r/m/abc/fs.sock")).find("source") is not None
