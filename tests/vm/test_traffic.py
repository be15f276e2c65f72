"""iperf3 and curl between pods, to the host, through host ports, over IPv4 and IPv6."""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from hyperpod.api.gen.hyperpod.admin.v1 import LoadRequest
from hyperpod.api.gen.runtime import v1 as cri
from tests import toolsimage
from tests.daemonkit import PATIENCE, Cri
from tests.netkit import free_port
from tests.vm.test_network import addresses

pytestmark = pytest.mark.vm

AMOUNT = 4 << 20
"""Bytes; an emulated guest moves some 10 MB/s."""


class Pair:
    """A pod that serves with iperf3 on `port` of the host, and one that asks."""

    def __init__(self, client: Cri, addresses: list[str], asking: str, port: int) -> None:
        self.client, self.addresses, self.asking, self.port = client, addresses, asking, port

    async def iperf(self, *arguments: str) -> dict[str, Any]:
        """iperf3 as a client in the asking pod: its report."""

        async def run(command: list[str]) -> bytes:
            return (await self.client.exec(self.asking, *command, timeout=90)).stdout

        return await iperf(run, *arguments)


async def iperf(run: Callable[[list[str]], Awaitable[bytes]], *arguments: str) -> dict[str, Any]:
    """A client's report. A server may not listen yet, or still be busy with whoever asked before."""
    command = ["iperf3", "-J", "-n", str(AMOUNT), *arguments]
    async with asyncio.timeout(PATIENCE):
        while True:
            report: dict[str, Any] = json.loads(await run(command))
            if "error" not in report:
                return report["end"]  # type: ignore[no-any-return]
            assert "refused" in report["error"] or "busy" in report["error"], report["error"]
            await asyncio.sleep(0.3)


async def on_the_host(command: list[str]) -> bytes:
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, timeout=90, check=False)
    return done.stdout


@pytest.fixture
async def pair(cri_client: Cri) -> AsyncIterator[Pair]:
    folder = cri_client.daemon.base / "tools"
    if not folder.exists():
        await asyncio.to_thread(toolsimage.write, folder, "iperf3", "curl")
    await cri_client.admin.load(LoadRequest(path=str(folder)))
    image = cri.ImageSpec(image=toolsimage.NAME)
    port, config = free_port(), cri_client.pod_config("serving")
    config.port_mappings = [cri.PortMapping(protocol=cri.Protocol.TCP, container_port=5201, host_port=port)]
    serving, asking = await asyncio.gather(cri_client.run_pod(config), cri_client.run_pod())
    await cri_client.run(serving, "iperf3", "-s", image=image)
    container = await cri_client.run(asking, "sleep", "3600", image=image)
    yield Pair(cri_client, await addresses(cri_client, serving), container, port)


@contextmanager
def host_server(address: str, port: int) -> Iterator[None]:
    """iperf3 as a server in the daemon's own namespace."""
    process = subprocess.Popen(["iperf3", "-s", "-B", address, "-p", str(port)], stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


async def test_iperf3_runs_everywhere(pair: Pair) -> None:
    """What the server has read is no figure to rely on: iperf3 stops it when the client has written all."""
    v4, v6 = pair.addresses
    gateway = f"{pair.client.daemon.network.v4}.1"
    for address in (v4, v6):
        for direction in ((), ("-R",)):
            report = await pair.iperf("-c", address, *direction)
            assert report["sum_sent"]["bytes"] >= AMOUNT, (address, direction)
            assert report["sum_received"]["bytes"] > 0, (address, direction)
    udp = await pair.iperf("-c", v4, "-u", "-b", "5M", "-l", "1400")
    assert udp["sum"]["bytes"] >= AMOUNT
    # A guest that a busy host lets stand for a second has no room for what comes meanwhile.
    assert udp["sum"]["lost_percent"] < 50
    port = free_port()
    with host_server(gateway, port):
        for direction in ((), ("-R",)):
            report = await pair.iperf("-c", gateway, "-p", str(port), *direction)
            assert report["sum_sent"]["bytes"] >= AMOUNT, direction
    # The host port: from another pod by the host's address, and from the host itself.
    report = await pair.iperf("-c", gateway, "-p", str(pair.port))
    assert report["sum_sent"]["bytes"] >= AMOUNT
    report = await iperf(on_the_host, "-c", "127.0.0.1", "-p", str(pair.port))
    assert report["sum_sent"]["bytes"] >= AMOUNT


async def test_curl_gets_every_byte(cri_client: Cri, pair: Pair) -> None:
    network, runtime = cri_client.daemon.network, cri_client.runtime
    port, config = free_port(), cri_client.pod_config("web")
    config.port_mappings = [cri.PortMapping(protocol=cri.Protocol.TCP, container_port=80, host_port=port)]
    web = await cri_client.run_pod(config)
    served = await cri_client.sh(
        web, "mkdir /w; head -c 4194304 /dev/urandom >/tmp/x; mv /tmp/x /w/big; exec httpd -f -h /w"
    )
    ready = "while [ ! -e /w/big ]; do sleep 0.1; done; sha256sum /w/big"
    expected = (await cri_client.exec(served, "sh", "-c", ready)).stdout.split()[0]
    retries = "--retry-connrefused --retry 60 --retry-delay 1 --max-time 90"
    hosts = [f"[{a}]" if ":" in a else a for a in await addresses(cri_client, web)]
    for host in (*hosts, f"{network.v4}.1:{port}"):
        script = f"curl -sS {retries} http://{host}/big | sha256sum"
        reply = await cri_client.exec(pair.asking, "sh", "-c", script, timeout=120)
        assert reply.stdout.split()[0] == expected, (host, reply.stderr)
    for host in (*hosts, f"127.0.0.1:{port}"):
        command = ["curl", "-sS", *retries.split(), f"http://{host}/big"]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, timeout=120, check=False)
        assert hashlib.sha256(done.stdout).hexdigest().encode() == expected, (host, done.stderr)
    refused = await cri_client.exec(pair.asking, "curl", "-sS", f"http://{network.v4}.1:{free_port()}/")
    assert refused.exit_code == 7, "connection refused comes back from the host"
    await runtime.stop_container(cri.StopContainerRequest(container_id=served, timeout=0))
    refused = await cri_client.exec(pair.asking, "curl", "-sS", f"http://{hosts[0]}/")
    assert refused.exit_code == 7, "and from a pod"
