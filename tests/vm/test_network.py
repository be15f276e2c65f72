"""Pods in their network: real plugins, real virtual machines."""

from __future__ import annotations

import asyncio
import time
import urllib.request

import pytest

from hyperpod.api.gen.runtime import v1 as cri
from tests.daemonkit import Cri

pytestmark = pytest.mark.vm

SERVE = "mkdir -p /w; echo hello from $(hostname) > /w/index.html; exec httpd -f -p 80 -h /w"


async def pod_ips(client: Cri, pod: str) -> list[str]:
    reply = await client.runtime.pod_sandbox_status(cri.PodSandboxStatusRequest(pod_sandbox_id=pod))
    assert reply.status is not None and reply.status.network is not None
    return [reply.status.network.ip, *(item.ip for item in reply.status.network.additional_ips)]


async def fetch(address: str, port: int = 80, seconds: float = 15.0) -> str:
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


async def test_the_pod_answers_at_all_its_addresses(cri_client: Cri, pod: str) -> None:
    await cri_client.sh(pod, SERVE)
    addresses = await pod_ips(cri_client, pod)
    assert [":" in a for a in addresses] == [False, True]
    for address in addresses:
        assert (await fetch(address)).startswith("hello from pod-")
