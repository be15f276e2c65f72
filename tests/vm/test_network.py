"""Pods in their network: real plugins, real virtual machines."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
import urllib.request
from collections.abc import Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from hyperpod.api.gen.runtime import v1 as cri
from tests.daemonkit import PATIENCE, Cri, Daemon, daemon
from tests.netkit import free_port

pytestmark = pytest.mark.vm

SERVE = "mkdir -p /w; echo hello from $(hostname) > /w/index.html; exec httpd -f -p 80 -h /w"


async def addresses(client: Cri, pod: str) -> list[str]:
    reply = await client.runtime.pod_sandbox_status(cri.PodSandboxStatusRequest(pod_sandbox_id=pod))
    assert reply.status is not None and reply.status.network is not None
    return [reply.status.network.ip, *(item.ip for item in reply.status.network.additional_ips)]


async def fetch(address: str, port: int = 80, seconds: float = PATIENCE) -> str:
    """The page at an address, asked for from the host; waits for the server to start."""
    host = f"[{address}]" if ":" in address else address
    deadline = time.monotonic() + seconds
    while True:
        try:
            return await asyncio.to_thread(
                lambda: urllib.request.urlopen(f"http://{host}:{port}/", timeout=5).read().decode()
            )
        except OSError:
            assert time.monotonic() < deadline, f"nothing answers at {host}:{port}"
            await asyncio.sleep(0.1)


async def output(client: Cri, pod: str, script: str, **more: Any) -> list[str]:
    """Lines of stdout of a shell that has ended."""
    container = await client.sh(pod, script, **more)
    status = await client.wait(container)
    log = await client.log(container)
    assert status.exit_code == 0, log
    return [text for stream, _, text in log if stream == "stdout"]


async def network_condition(client: Cri) -> cri.RuntimeCondition:
    reply = await client.runtime.status(cri.StatusRequest())
    assert reply.status is not None
    return next(c for c in reply.status.conditions if c.type == "NetworkReady")


@asynccontextmanager
async def refused(*words: str) -> Any:
    with pytest.raises(GRPCError) as info:
        yield
    assert info.value.status is Status.UNAVAILABLE
    for word in words:
        assert word in str(info.value.message), info.value.message


async def test_the_pod_answers_at_all_its_addresses_and_another_pod_hears_it(
    cri_client: Cri, pod: str
) -> None:
    await cri_client.sh(pod, SERVE)
    own = await addresses(cri_client, pod)
    assert [":" in a for a in own] == [False, True]
    for address in own:
        assert (await fetch(address)).startswith("hello from pod-")
    netns = cri_client.daemon.run_dir / "netns" / pod[:12]
    text = await shell("nsenter", f"--net={netns}", "ip", "-o", "addr")
    assert "eth0" in text and f"hp{pod[:12]}" not in text, "the tap has no address to speak from"
    assert f"hp{pod[:12]}0" in await shell("nsenter", f"--net={netns}", "ip", "-o", "link")
    other = await cri_client.run_pod()
    for address in own:
        host = f"[{address}]" if ":" in address else address
        [text] = await output(cri_client, other, f"wget -qO- http://{host}/")
        assert text.startswith("hello from pod-")
    await cri_client.remove_pod(other)


async def test_names_and_settings_in_the_guest(cri_client: Cri) -> None:
    config = cri_client.pod_config("named", sysctls={"net.ipv4.ip_local_port_range": "20000 30000"})
    config.dns_config = cri.DnsConfig(
        servers=["10.96.0.10", "fd00::a"], searches=["shop.svc", "svc"], options=["ndots:5"]
    )
    pod = await cri_client.run_pod(config)
    v4, v6 = await addresses(cri_client, pod)
    lines = await output(
        cri_client,
        pod,
        "cat /etc/resolv.conf; echo; cat /etc/hostname; hostname; echo; grep named /etc/hosts; echo; "
        "cat /proc/sys/net/ipv4/ip_local_port_range /proc/sys/net/ipv4/ip_unprivileged_port_start "
        "/proc/sys/net/ipv4/ping_group_range; echo; cat /sys/class/net/eth0/mtu; ip -o addr show dev eth0; "
        "ping -c 1 -W 60 $(ip route | awk '/^default/ {print $3}') >/dev/null && echo reached",
    )
    resolv, names, hosts, sysctls, links = "\n".join(lines).split("\n\n")
    assert resolv.splitlines() == [
        "search shop.svc svc",
        "nameserver 10.96.0.10",
        "nameserver fd00::a",
        "options ndots:5",
    ]
    assert names.splitlines() == ["named", "named"]
    assert [line.split() for line in hosts.splitlines()] == [[v4, "named"], [v6, "named"]]
    assert [line.split() for line in sysctls.splitlines()] == [["20000", "30000"], ["0"], ["0", "2147483647"]]
    assert links.startswith("1500\n") and f"inet {v4}/24" in links and f"inet6 {v6}/64" in links
    assert "tentative" not in links and links.endswith("reached")
    # All containers of the pod share the files; those with a read-only root cannot change them.
    await output(cri_client, pod, "echo 10.1.1.1 added >> /etc/hosts")
    linux = cri.LinuxContainerConfig(security_context=cri.LinuxContainerSecurityContext(readonly_rootfs=True))
    lines = await output(
        cri_client, pod, "tail -1 /etc/hosts; echo x >> /etc/hosts || echo refused", linux=linux
    )
    assert lines == ["10.1.1.1 added", "refused"]
    await cri_client.remove_pod(pod)


async def test_a_sysctl_that_the_guest_does_not_have(cri_client: Cri) -> None:
    for name, value in (("net.ipv4.no_such_thing", "1"), ("net.ipv4.ip_local_port_range", "rubbish")):
        with pytest.raises(GRPCError) as info:
            await cri_client.run_pod(cri_client.pod_config(sysctls={name: value}))
        assert info.value.status is Status.INVALID_ARGUMENT
        assert name in str(info.value.message)


async def test_ports_of_the_host(cri_client: Cri) -> None:
    port, config = free_port(), cri_client.pod_config()
    config.port_mappings = [
        cri.PortMapping(container_port=80, host_port=port),
        cri.PortMapping(protocol=cri.Protocol.SCTP, container_port=80, host_port=port),
        cri.PortMapping(container_port=80),
    ]
    pod = await cri_client.run_pod(config)
    await cri_client.sh(pod, SERVE)
    host = f"{cri_client.daemon.network.v4}.1"
    assert (await fetch(host, port)).startswith("hello from pod-")
    taken = cri_client.pod_config()
    taken.port_mappings = [cri.PortMapping(container_port=1, host_port=port, host_ip=host)]
    async with refused(f"{port}/TCP is in use by pod", config.metadata.name if config.metadata else "?"):
        await cri_client.run_pod(taken)
    await cri_client.remove_pod(pod)
    with socket.create_server(("", port)):
        async with refused(f"{port}/TCP is in use by a process of the host"):
            await cri_client.run_pod(taken)
    await cri_client.remove_pod(await cri_client.run_pod(taken))


async def test_limits_of_bandwidth_reach_the_host_s_end(cri_client: Cri) -> None:
    config = cri_client.pod_config()
    config.annotations = {"kubernetes.io/ingress-bandwidth": "10M", "kubernetes.io/egress-bandwidth": "20M"}
    pod = await cri_client.run_pod(config)
    rates = [await shell("tc", "qdisc", "show", "dev", port) for port in cri_client.daemon.network.ports()]
    assert any("tbf" in text and "rate 10Mbit" in text for text in rates)
    # The other way goes through a card of the plugin's, to which that end leads.
    [port] = cri_client.daemon.network.ports()
    [card] = set(
        re.findall(r"bwp[0-9a-f]+", await shell("tc", "filter", "show", "dev", port, "parent", "ffff:"))
    )
    assert "rate 20Mbit" in await shell("tc", "qdisc", "show", "dev", card)
    await cri_client.remove_pod(pod)
    assert not Path(f"/sys/class/net/{card}").exists()


async def shell(*argv: str) -> str:
    process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    return out.decode()


@pytest.fixture
def own_daemon() -> Iterator[Daemon]:
    with daemon() as one:
        yield one


async def test_the_network_outlives_the_daemon(own_daemon: Daemon) -> None:
    async with own_daemon.client() as client:
        await client.load_busybox()
        pod = await client.run_pod()
        await client.sh(pod, SERVE)
        own = await addresses(client, pod)
    own_daemon.kill_daemon()
    async with own_daemon.client() as client:
        assert await addresses(client, pod) == own
        for address in own:
            await fetch(address)
        # A changed configuration is for new pods; this one leaves the network that it is in.
        own_daemon.network.file.write_text("{")
        await client.remove_pod(pod)
    assert own_daemon.leftovers() == []


async def test_what_is_wrong_is_said_and_a_retry_after_the_mend_works(own_daemon: Daemon) -> None:
    network = own_daemon.network
    good = network.file.read_text()
    async with own_daemon.client() as client:
        await client.load_busybox()
        assert (await network_condition(client)).status
        network.file.write_text(good[:-20])
        condition = await network_condition(client)
        assert not condition.status and str(network.file) in condition.message
        async with refused(str(network.file), "not JSON"):
            await client.run_pod()
        network.file.unlink()
        async with refused("no CNI network", str(network.conf_dir)):
            await client.run_pod()
        network.write({"type": "no-such-plugin"})
        assert "no-such-plugin" in (await network_condition(client)).message
        async with refused("'no-such-plugin'", "/opt/cni/bin, /usr/lib/cni"):
            await client.run_pod()
        bridge = network.bridge_plugin(dual=False, mtu=1300)
        bridge["ipam"]["ranges"] = [[{"subnet": f"{network.v4}.0/30"}]]  # room for one
        network.write(bridge)
        one = await client.run_pod()
        assert await output(client, one, "cat /sys/class/net/eth0/mtu") == ["1300"]
        assert await addresses(client, one) == [f"{network.v4}.2"], "a pod of one family"
        async with refused("CNI plugin bridge", "no IP addresses available"):
            await client.run_pod()
        assert len((await client.runtime.list_pod_sandbox(cri.ListPodSandboxRequest())).items) == 1
        await client.remove_pod(one)
        two = await client.run_pod()
        assert await addresses(client, two) == [f"{network.v4}.2"]
        await client.remove_pod(two)
        bridge["ipam"] |= {"ranges": [[{"subnet": f"{network.v6}:/64"}]], "routes": [{"dst": "::/0"}]}
        network.write(bridge)
        six = await client.run_pod()
        assert await addresses(client, six) == [f"{network.v6}:2"], "a pod of the other family"
        await client.sh(six, SERVE)
        assert (await fetch(f"{network.v6}:2")).startswith("hello from pod-")
        await client.remove_pod(six)
    assert own_daemon.leftovers() == []


MORE = """#!/bin/sh
# A second interface, as a meta plugin makes one: eth1 at 10.127.<x>.2, the host at .1
read -r input
if [ "$CNI_COMMAND" = ADD ]; then
  name=hpm$(echo $CNI_CONTAINERID | cut -c 1-8)
  ip link add $name type veth peer name eth1 netns $CNI_NETNS
  ip addr add 10.127.77.1/30 dev $name; ip link set $name up
  nsenter --net=$CNI_NETNS sh -c 'ip addr add 10.127.77.2/30 dev eth1; ip link set eth1 up'
  echo "$input" | python3 -c 'import json, sys; print(json.dumps(json.load(sys.stdin)["prevResult"]))'
fi
"""


async def test_links_to_the_host_alone_and_a_second_interface(own_daemon: Daemon) -> None:
    """ptp takes the route to the pods' own network away: whoever is in it is behind the gateway."""
    network = own_daemon.network
    async with own_daemon.client() as client:
        await client.load_busybox()
        own_daemon.add_plugin("more", MORE)
    async with own_daemon.client() as client:
        network.write({"type": "ptp", "ipam": network.bridge_plugin()["ipam"]})
        one = await client.run_pod()
        network.write({"type": "ptp", "ipam": network.bridge_plugin()["ipam"]}, {"type": "more"})
        two = await client.run_pod()
        pings = [f"ping -c 1 -W 60 {address}" for address in (*await addresses(client, one), "10.127.77.1")]
        lines = await output(client, two, " && ".join(pings))
        assert sum("1 packets received" in line for line in lines) == 3, lines
        stats = await client.runtime.pod_sandbox_stats(cri.PodSandboxStatsRequest(pod_sandbox_id=two))
        assert stats.stats is not None and stats.stats.linux is not None
        cards = stats.stats.linux.network
        assert cards is not None and [card.name for card in cards.interfaces] == ["eth1"]
        await client.remove_pod(one)
        await client.remove_pod(two)
    assert own_daemon.leftovers() == []


async def test_a_plugin_that_cannot_clean_up_is_asked_again(own_daemon: Daemon, tmp_path: Path) -> None:
    network = own_daemon.network
    broken = tmp_path / "broken"
    async with own_daemon.client() as client:
        await client.load_busybox()
        # `static` of tuning's kind: a plugin between that passes on what it got, and fails DEL on demand.
        script = (
            "#!/usr/bin/python3\nimport json, os, sys\n"
            f"if os.environ['CNI_COMMAND'] == 'DEL' and os.path.exists({str(broken)!r}):\n"
            "    print(json.dumps({'code': 11, 'msg': 'the switch does not answer'})); sys.exit(1)\n"
            "print(json.dumps(json.load(sys.stdin).get('prevResult', {})))\n"
        )
        network.write(network.bridge_plugin(), {"type": "pass-on"})
        own_daemon.add_plugin("pass-on", script)
    async with own_daemon.client() as client:
        pod = await client.run_pod()
        container = await client.sh(pod, "sleep 600")
        broken.touch()
        async with refused("the switch does not answer", "stop the pod again"):
            await client.runtime.stop_pod_sandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod))
        assert (await client.status(container)).state == cri.ContainerState.CONTAINER_EXITED
        async with refused("the switch does not answer"):
            await client.runtime.remove_pod_sandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod))
        own_daemon.kill_daemon()
    async with own_daemon.client() as client:
        [item] = (await client.runtime.list_pod_sandbox(cri.ListPodSandboxRequest())).items
        assert item.state == cri.PodSandboxState.SANDBOX_NOTREADY
        broken.unlink()
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    await client.remove_pod(pod)
                    break
                except GRPCError as exc:  # joined the stop that the start had begun, whose DEL was under way
                    assert exc.status is Status.UNAVAILABLE
    assert own_daemon.leftovers() == []


async def test_many_pods_at_once_leave_nothing(own_daemon: Daemon) -> None:
    """20 made together, each with a port of the host, then removed together: about 100 s on 2 CPUs, emulated."""
    async with own_daemon.client() as client:
        await client.load_busybox()
        configs = []
        for _ in range(20):
            config = client.pod_config()
            config.port_mappings = [cri.PortMapping(container_port=80, host_port=free_port())]
            configs.append(config)
        pods = await asyncio.gather(*(client.run_pod(config) for config in configs))
        all_of = [tuple(await addresses(client, pod)) for pod in pods]
        assert len(set(all_of)) == 20
        await asyncio.gather(*(client.remove_pod(pod) for pod in pods))
    assert own_daemon.leftovers() == []
    assert json.loads(own_daemon.network.file.read_text())["name"] == own_daemon.network.name
