"""Which namespaces a host pod has: its own, its containers', the host's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from hyperpod.api.gen.runtime import v1 as cri
from tests.daemonkit import Cri
from tests.host.test_lifecycle import until_logged
from tests.netkit import echoed

POD, CONTAINER, NODE, TARGET = (
    cri.NamespaceMode.POD,
    cri.NamespaceMode.CONTAINER,
    cri.NamespaceMode.NODE,
    cri.NamespaceMode.TARGET,
)


def context(**options: Any) -> cri.LinuxContainerConfig:
    asked = cri.NamespaceOption(**options)
    return cri.LinuxContainerConfig(
        security_context=cri.LinuxContainerSecurityContext(namespace_options=asked)
    )


async def run_pod(client: Cri, **options: Any) -> str:
    """Without a handler: a NODE option makes it a host pod."""
    client.handler = "" if NODE in options.values() else "host"
    security = cri.LinuxSandboxSecurityContext(namespace_options=cri.NamespaceOption(**options))
    return await client.run_pod(client.pod_config(security_context=security))


async def namespaces(client: Cri, container: str) -> dict[str, str]:
    names = ("net", "pid", "ipc", "uts", "mnt", "cgroup")
    script = f"for name in {' '.join(names)}; do readlink /proc/self/ns/$name; done"
    reply = await client.exec(container, "sh", "-c", script)
    return dict(zip(names, reply.stdout.decode().split(), strict=True))


def host_has(name: str) -> str:
    return str(Path(f"/proc/self/ns/{name}").readlink())


@pytest.mark.parametrize(
    ("options", "of_host"),
    [
        ({}, set()),
        ({"network": NODE}, {"net", "uts"}),
        ({"pid": NODE}, {"pid"}),
        ({"ipc": NODE}, {"ipc"}),
        ({"network": NODE, "pid": NODE, "ipc": NODE}, {"net", "uts", "pid", "ipc"}),
    ],
)
async def test_node_is_the_hosts_and_pod_is_shared(
    cri_client: Cri, options: dict[str, Any], of_host: set[str]
) -> None:
    pod = await run_pod(cri_client, **options)
    first, second = [await cri_client.sh(pod, "sleep 600", linux=context(**options)) for _ in range(2)]
    one, other = await namespaces(cri_client, first), await namespaces(cri_client, second)
    assert {name for name, ident in one.items() if ident == host_has(name)} == of_host
    assert {name for name in one if one[name] != other[name]} == {"mnt", "cgroup"}


async def test_the_hosts_network(cri_client: Cri) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        config = cri_client.pod_config(
            security_context=cri.LinuxSandboxSecurityContext(
                namespace_options=cri.NamespaceOption(network=NODE)
            )
        )
        # As the kubelet sends it for such a pod: the port is the host's anyway, and mapped by nobody.
        config.port_mappings = [cri.PortMapping(container_port=port, host_port=port)]
        cri_client.handler = ""
        pod = await cri_client.run_pod(config)
        container = await cri_client.sh(
            pod, f"echo hi | nc 127.0.0.1 {port}; hostname; sleep 600", linux=context(network=NODE)
        )
        server.settimeout(30)
        peer, _ = server.accept()
        with peer:
            assert peer.recv(10) == b"hi\n"
    assert await until_logged(cri_client, container) == [os.uname().nodename]
    hosts = await cri_client.exec(container, "cat", "/etc/hosts")
    assert hosts.stdout == Path("/etc/hosts").read_bytes()
    reply = await cri_client.runtime.pod_sandbox_status(cri.PodSandboxStatusRequest(pod_sandbox_id=pod))
    assert reply.status is not None and reply.status.network is not None and reply.status.linux is not None
    assert reply.status.network.ip == ""
    assert reply.status.linux.namespaces is not None and reply.status.linux.namespaces.options is not None
    assert reply.status.linux.namespaces.options.network == NODE
    stats = await cri_client.runtime.pod_sandbox_stats(cri.PodSandboxStatsRequest(pod_sandbox_id=pod))
    assert stats.stats is not None and stats.stats.linux is not None
    assert stats.stats.linux.network is None, "the node's traffic is not the pod's"
    metrics = await cri_client.runtime.list_pod_sandbox_metrics(cri.ListPodSandboxMetricsRequest())
    [told] = [item for item in metrics.pod_metrics if item.pod_sandbox_id == pod]
    assert told.metrics == [] and len(told.container_metrics) == 1


async def test_figures_of_interfaces_whatever_their_names(cri_client: Cri, pod: str) -> None:
    """A container with CAP_NET_ADMIN makes and names them, and may not hide the pod by that."""
    netns = cri_client.daemon.run_dir / "netns" / pod[:12]
    made = ["ip", "link", "add", "a!b", "type", "veth", "peer", "name", "é"]
    subprocess.run(["nsenter", f"--net={netns}", *made], check=True)
    stats = await cri_client.runtime.pod_sandbox_stats(cri.PodSandboxStatsRequest(pod_sandbox_id=pod))
    assert stats.stats is not None and stats.stats.linux is not None
    assert stats.stats.linux.cpu is not None and stats.stats.linux.network is not None
    assert stats.stats.linux.network.default_interface is not None
    assert stats.stats.linux.network.default_interface.name == "eth0"
    assert [item.name for item in stats.stats.linux.network.interfaces] == ["a!b"]


async def test_a_network_of_its_own(cri_client: Cri) -> None:
    config = cri_client.pod_config(sysctls={"net.ipv4.tcp_fin_timeout": "17", "kernel.shmmni": "99"})
    config.dns_config = cri.DnsConfig(servers=["10.1.2.3"], searches=["a.b"])
    pod = await cri_client.run_pod(config)
    container = await cri_client.sh(pod, "nc -l -p 8080 -e /bin/cat")
    reply = await cri_client.runtime.pod_sandbox_status(cri.PodSandboxStatusRequest(pod_sandbox_id=pod))
    assert reply.status is not None and reply.status.network is not None
    address = reply.status.network.ip
    assert await echoed(address, 8080)
    other = await cri_client.sh(pod, "sleep 600")
    seen = await cri_client.exec(
        other,
        "cat",
        "/proc/sys/net/ipv4/tcp_fin_timeout",
        "/proc/sys/kernel/shmmni",
        "/etc/resolv.conf",
        "/etc/hostname",
    )
    assert seen.stdout.decode().split("\n")[:4] == ["17", "99", "search a.b", "nameserver 10.1.2.3"]
    assert config.hostname in seen.stdout.decode()
    assert Path("/proc/sys/kernel/shmmni").read_text().strip() != "99"
    assert container


async def test_a_namespace_that_somebody_removes_is_no_network(cri_client: Cri) -> None:
    """The kubelet makes a pod without an address anew."""
    pod = await cri_client.run_pod()
    netns = cri_client.daemon.run_dir / "netns" / pod[:12]
    subprocess.run(["umount", netns], check=True)
    netns.unlink()
    reply = await cri_client.runtime.pod_sandbox_status(cri.PodSandboxStatusRequest(pod_sandbox_id=pod))
    assert reply.status is not None and reply.status.network is not None
    assert (reply.status.network.ip, reply.status.network.additional_ips) == ("", [])
    await cri_client.remove_pod(pod)
    assert cri_client.daemon.network.leftovers() == []


@pytest.mark.parametrize(
    ("options", "sysctl"),
    [
        ({}, "kernel.panic"),
        ({}, "vm.swappiness"),
        ({}, "kernel.hostname"),
        ({"network": NODE}, "net.ipv4.ip_forward"),
        ({"network": NODE}, "net/ipv4/ip_forward"),
        ({"ipc": NODE}, "kernel.shmmni"),
    ],
)
async def test_sysctls_of_the_host_are_refused(cri_client: Cri, options: dict[str, Any], sysctl: str) -> None:
    security = cri.LinuxSandboxSecurityContext(namespace_options=cri.NamespaceOption(**options))
    with pytest.raises(GRPCError) as info:
        await cri_client.run_pod(cri_client.pod_config(sysctls={sysctl: "1"}, security_context=security))
    assert info.value.status is Status.INVALID_ARGUMENT
    assert sysctl in str(info.value.message)


async def test_a_shared_pid_namespace_reaps(cri_client: Cri) -> None:
    pod = await run_pod(cri_client)
    first = await cri_client.sh(pod, "(sleep 0.2 &) ; sleep 601")
    second = await cri_client.sh(pod, "sleep 602")
    seen = (await cri_client.exec(second, "ps")).stdout.decode()
    assert "sleep 601" in seen and "sleep 602" in seen
    one = (await cri_client.exec(second, "cat", "/proc/1/comm")).stdout
    assert one == b"pause\n"
    for _ in range(60):
        if "sleep 0.2" not in seen and " Z " not in seen and "[sleep]" not in seen:
            break
        seen = (await cri_client.exec(second, "ps")).stdout.decode()
    assert "[sleep]" not in seen, seen
    assert first


async def test_the_end_of_a_shared_pid_namespace_is_the_pods(cri_client: Cri) -> None:
    """No container could join it any more; and the number of its first process is soon another's."""
    pod = await run_pod(cri_client)
    container = await cri_client.sh(pod, "sleep 600")
    verbose = cri.ContainerStatusRequest(container_id=container, verbose=True)
    reply = await cri_client.runtime.container_status(verbose)
    [inner] = [
        path.parent
        for path in Path("/proc").glob("[0-9]*/status")
        if is_first(path) and namespace(path.parent) == namespace(Path("/proc", pid_of(reply)))
    ]
    os.kill(int(inner.name), signal.SIGKILL)
    assert (await cri_client.wait(container)).exit_code in (137, 255)
    request = cri.PodSandboxStatusRequest(pod_sandbox_id=pod)
    async with asyncio.timeout(60):
        while True:
            status = (await cri_client.runtime.pod_sandbox_status(request)).status
            assert status is not None
            if status.state == cri.PodSandboxState.SANDBOX_NOTREADY:
                break
            await asyncio.sleep(0.05)


def pid_of(reply: cri.ContainerStatusResponse) -> str:
    return str(json.loads(reply.info["container"])["pid"])


def is_first(status: Path) -> bool:
    """Of its pid namespace, one that is not the host's."""
    with contextlib.suppress(OSError):
        [numbers] = [line for line in status.read_text().splitlines() if line.startswith("NSpid:")]
        return len(numbers.split()) > 2 and numbers.split()[-1] == "1"
    return False


def namespace(process: Path) -> str:
    with contextlib.suppress(OSError):
        return str((process / "ns/pid").readlink())
    return ""


async def test_container_and_target(cri_client: Cri) -> None:
    pod = await run_pod(cri_client, pid=CONTAINER)
    target = await cri_client.sh(pod, "sleep 601", linux=context(pid=CONTAINER))
    first = (await cri_client.exec(target, "cat", "/proc/1/cmdline")).stdout
    assert b"sleep 601" in first.replace(b"\0", b" "), "it may be the shell still, which becomes sleep"
    debugger = await cri_client.sh(pod, "sleep 602", linux=context(pid=TARGET, target_id=target))
    assert b"sleep 601" in (await cri_client.exec(debugger, "ps")).stdout
    by_prefix = context(pid=TARGET, target_id=target[:12])
    assert (
        b"sleep 601"
        in (await cri_client.exec(await cri_client.sh(pod, "sleep 603", linux=by_prefix), "ps")).stdout
    )
    # The kubelet leaves it out where it does not count, but a client may leave it in.
    own = await cri_client.sh(pod, "sleep 604", linux=context(pid=CONTAINER, target_id=target))
    assert b"sleep 601" not in (await cri_client.exec(own, "ps")).stdout
    with pytest.raises(GRPCError, match="was made with CONTAINER"):
        await cri_client.create(pod, "true", linux=context(pid=POD))


async def test_shared_memory_is_the_pods(cri_client: Cri) -> None:
    pod = await run_pod(cri_client)
    writer = await cri_client.sh(pod, "echo shared > /dev/shm/x; echo up; sleep 600")
    await until_logged(cri_client, writer)
    reader = await cri_client.sh(pod, "cat /dev/shm/x; sleep 600")
    assert await until_logged(cri_client, reader) == ["shared"]
    assert not Path("/dev/shm/x").exists()
    own = await cri_client.sh(pod, "ls /dev/shm; echo end; sleep 600", linux=context(ipc=CONTAINER))
    assert await until_logged(cri_client, own) == ["end"]


@pytest.mark.parametrize("name", ["network", "pid", "ipc"])
async def test_no_container_leaves_its_pods_namespaces(cri_client: Cri, pod: str, name: str) -> None:
    with pytest.raises(GRPCError) as info:
        await cri_client.create(pod, "true", linux=context(**{name: NODE}))
    assert info.value.status is Status.INVALID_ARGUMENT
    assert f"namespace_options.{name} is NODE" in str(info.value.message)


@pytest.mark.parametrize("name", ["network", "pid", "ipc"])
async def test_a_vm_has_no_namespace_of_the_host(cri_client: Cri, name: str) -> None:
    cri_client.handler = "vm"
    asked: dict[str, Any] = {name: NODE}
    security = cri.LinuxSandboxSecurityContext(namespace_options=cri.NamespaceOption(**asked))
    with pytest.raises(GRPCError) as info:
        await cri_client.run_pod(cri_client.pod_config(security_context=security))
    assert info.value.status is Status.INVALID_ARGUMENT
    assert f"{name}=NODE needs a host pod" in str(info.value.message)


@pytest.mark.parametrize("by_handler", [True, False])
async def test_other_kubernetes_namespaces_are_not_allowed(cri_client: Cri, by_handler: bool) -> None:
    config = cri_client.pod_config(
        security_context=cri.LinuxSandboxSecurityContext(
            namespace_options=cri.NamespaceOption(network=POD if by_handler else NODE)
        )
    )
    assert config.metadata is not None
    config.metadata.namespace = "tenant"
    cri_client.handler = "host" if by_handler else ""
    with pytest.raises(GRPCError) as info:
        await cri_client.run_pod(config)
    assert info.value.status is Status.PERMISSION_DENIED
    assert "host_pods" in str(info.value.message)
    assert "tenant" in str(info.value.message)
