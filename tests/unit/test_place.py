"""Which place a pod gets, who may have the host, and what containers may ask for in either place."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperpod.container import placement
from hyperpod.errors import HyperpodError, InvalidArgument, PermissionDenied, Unsupported
from hyperpod.model.container import ContainerConfig, ContainerMetadata
from hyperpod.model.mounts import Mount, Propagation
from hyperpod.model.sandbox import Artifact, Kind, SandboxConfig, SandboxMetadata, SandboxRecord, VmSize
from hyperpod.model.security import Device, NamespaceMode, NamespaceOptions
from hyperpod.spec import place, podnet
from hyperpod.spec.mounts import explained, oci_mounts, root_propagation
from hyperpod.spec.sysctls import namespace_of

POD, CONTAINER, NODE = NamespaceMode.POD, NamespaceMode.CONTAINER, NamespaceMode.NODE


def options(**values: NamespaceMode) -> NamespaceOptions:
    return NamespaceOptions(**values)


def pod(namespace: str = "kube-system", **values: NamespaceMode) -> SandboxConfig:
    metadata = SandboxMetadata(name="p", uid="u", namespace=namespace)
    return SandboxConfig(metadata=metadata, namespaces=options(**values))


def record(kind: Kind, **values: NamespaceMode) -> SandboxRecord:
    size = VmSize(memory_mib=1, vcpus=1, max_memory_mib=1, max_vcpus=1)
    none = Artifact(version="", path="")
    return SandboxRecord(
        id="a" * 64, config=pod(**values), runtime_handler="", kind=kind, created_at=0, host_boot_id="", slot=0,
        uid=1, gid=1, cid=3, token=b"", domain="", domain_uuid="", kernel=none, guest=none, size=size,
    )  # fmt: skip


def container(**values: Any) -> ContainerConfig:
    return ContainerConfig(metadata=ContainerMetadata(name="c"), image="i", **values)


def test_every_choice() -> None:
    """The whole table: a NODE option or the handler host make a host pod, and a VM has nothing of the host's."""
    for handler, *modes in itertools.product(
        ("", "vm", "host"), (POD, NODE), (POD, CONTAINER, NODE), (POD, NODE)
    ):
        asked = NamespaceOptions(network=modes[0], pid=modes[1], ipc=modes[2])
        if handler == "vm" and NODE in modes:
            with pytest.raises(InvalidArgument, match="=NODE needs a host pod"):
                place.choose(handler, asked)
        else:
            expected = Kind.HOST if handler == "host" or NODE in modes else Kind.VM
            assert place.choose(handler, asked) is expected


def test_unknown_handlers() -> None:
    with pytest.raises(InvalidArgument, match="no runtime handler 'runc'"):
        place.choose("runc", options())


@pytest.mark.parametrize(
    ("namespace", "allowed", "may"),
    [
        ("kube-system", ("kube-system",), True),
        ("default", ("kube-system",), False),
        ("kube-system", (), False),
        ("anything", ("*",), True),
        ("kube", ("kube-system",), False),
        ("kube-system2", ("kube-system",), False),
    ],
)
def test_who_may_have_the_host(namespace: str, allowed: tuple[str, ...], may: bool) -> None:
    if may:
        place.permit(pod(namespace), allowed)
    else:
        with pytest.raises(
            PermissionDenied, match=f"namespace {namespace} may not have: the setting host_pods"
        ):
            place.permit(pod(namespace), allowed)


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("name", place.NAMESPACES)
def test_no_container_leaves_its_pod(kind: Kind, name: str) -> None:
    with pytest.raises(InvalidArgument, match=f"namespace_options.{name} is NODE: "):
        place.check_container(kind, options(), options(**{name: NODE}))
    place.check_container(Kind.HOST, options(**{name: NODE}), options(**{name: NODE}))


def test_no_pod_has_shared_processes_that_it_did_not_ask_for() -> None:
    with pytest.raises(InvalidArgument, match="was made with CONTAINER"):
        place.check_container(Kind.HOST, options(pid=CONTAINER), options(pid=POD))
    place.check_container(Kind.VM, options(pid=CONTAINER), options(pid=POD))
    place.check_container(Kind.HOST, options(pid=NODE), options(pid=POD))


@pytest.mark.parametrize(
    ("name", "values", "fine"),
    [
        ("net.ipv4.ip_forward", {}, True),
        ("net/ipv4/conf/eth0.1/rp_filter", {}, True),
        ("kernel.shmmax", {}, True),
        ("kernel.msgmax", {}, True),
        ("kernel.sem", {}, True),
        ("fs.mqueue.msg_max", {}, True),
        ("net.ipv4.ip_forward", {"network": NODE}, False),
        ("kernel.shmmax", {"ipc": NODE}, False),
        ("kernel.shmmax", {"network": NODE}, True),
        ("kernel.core_pattern", {}, False),
        ("vm.swappiness", {}, False),
        ("fs.file-max", {}, False),
        ("network.x", {}, False),
    ],
)
def test_sysctls_of_a_host_pod(name: str, values: dict[str, NamespaceMode], fine: bool) -> None:
    if fine:
        place.check_sysctls({name: "1"}, options(**values))
    else:
        with pytest.raises(InvalidArgument, match=name):
            place.check_sysctls({name: "1"}, options(**values))


@given(st.text(max_size=40))
def test_only_known_beginnings_belong_to_a_namespace(name: str) -> None:
    starts = ("net.", "kernel.shm", "kernel.msg", "kernel.sem", "fs.mqueue.")
    assert bool(namespace_of(name)) == name.replace("/", ".").startswith(starts)


def refusal(kind: Kind, config: ContainerConfig) -> HyperpodError | None:
    try:
        placement.check(record(kind), config)
    except HyperpodError as exc:
        return exc
    return None


def test_what_needs_the_hosts_kernel_is_refused_in_a_vm() -> None:
    shared = container(
        mounts=(Mount(container_path="/v", host_path="/v", propagation=Propagation.BIDIRECTIONAL),)
    )
    found = refusal(Kind.VM, shared)
    assert isinstance(found, InvalidArgument)
    assert "mounts[0].propagation is PROPAGATION_BIDIRECTIONAL" in str(found)
    assert "host pod" in str(found)
    assert refusal(Kind.HOST, shared) is None


@pytest.mark.parametrize(
    ("path", "fits"),
    [("/dev/fuse", True), ("/dev/net/tun", True), ("/dev/sda", False), ("/dev/fuse/..", False)],
)
def test_devices_that_would_be_something_else_in_a_guest_are_refused(path: str, fits: bool) -> None:
    config = container(devices=(Device(host_path=path, container_path="/dev/x", permissions="rw"),))
    found = refusal(Kind.VM, config)
    assert (found is None) == fits
    if not fits:
        assert isinstance(found, Unsupported)
        assert "devices[0].host_path is" in str(found)
    assert refusal(Kind.HOST, config) is None


def test_ports_of_a_pod_in_the_hosts_network_are_nobodys_to_map() -> None:
    from hyperpod.model.sandbox import PortMapping

    ports = (PortMapping(container_port=80, host_port=8080),)
    assert podnet.host_ports(pod().model_copy(update={"port_mappings": ports})) == ports
    assert podnet.host_ports(pod(network=NODE).model_copy(update={"port_mappings": ports})) == ()


@pytest.mark.parametrize(
    ("propagation", "option", "root"),
    [
        (Propagation.PRIVATE, "rprivate", ""),
        (Propagation.HOST_TO_CONTAINER, "rslave", "rslave"),
        (Propagation.BIDIRECTIONAL, "rshared", "rshared"),
    ],
)
def test_propagation_on_a_host(propagation: Propagation, option: str, root: str) -> None:
    mounts = (Mount(container_path="/v", host_path="/v", propagation=propagation),)
    [built] = oci_mounts(mounts, "c" * 64, "/run/x/share")
    assert built["source"] == f"/run/x/share/{'c' * 12}/0"
    assert built["options"] == ["rbind", option, "rw"]
    assert root_propagation(mounts) == root
    assert explained(mounts, {}, via="bind")["/v"].startswith("bind of /v: read-write, ")
