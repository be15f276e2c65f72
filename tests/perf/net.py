"""A pod's network as its peers see it: bytes both ways between host and pod, and how long a connection takes."""

from __future__ import annotations

import asyncio
import socket
import statistics
import time

from hyperpod.api.gen.runtime import v1 as cri
from tests.daemonkit import Cri
from tests.perf.report import Figure, spread

MIB = 1 << 20
PIECE = bytes(256 * 1024)
LISTEN = "nc -l -p 5001 >/dev/null; while :; do nc -l -p 5002 </dev/null >/dev/null; done"
CONNECTS = 50
TIMEOUT = 120.0


async def figures(client: Cri, mib: int) -> list[Figure]:
    """One pod, one stream at a time."""
    pod = await client.run_pod()
    container = await client.sh(pod, LISTEN)
    status = await client.runtime.pod_sandbox_status(cri.PodSandboxStatusRequest(pod_sandbox_id=pod))
    assert status.status is not None and status.status.network is not None
    address = status.status.network.ip
    incoming = await asyncio.to_thread(_send, address, mib)
    outgoing = await _receive(client, container, mib)
    connects = await asyncio.to_thread(_connects, address)
    await client.remove_pod(pod)
    return [
        Figure("network, host to pod, one stream", incoming, "MB/s", note=f"{mib} MiB"),
        Figure("network, pod to host, one stream", outgoing, "MB/s", note=f"{mib} MiB"),
        Figure(
            "network, TCP connection host to pod", statistics.median(connects), "ms", note=spread(connects)
        ),
    ]


def _connect(address: str, port: int) -> socket.socket:
    """Until it listens."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            return socket.create_connection((address, port), timeout=TIMEOUT)
        except OSError:
            assert time.monotonic() < deadline, f"nothing listens at {address}:{port}"
            time.sleep(0.02)


def _send(address: str, mib: int) -> float:
    with _connect(address, 5001) as sock:
        start = time.monotonic()
        for _ in range(mib * MIB // len(PIECE)):
            sock.sendall(PIECE)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):  # its end closes once all is read
            pass
        return mib * MIB / 1e6 / (time.monotonic() - start)


async def _receive(client: Cri, container: str, mib: int) -> float:
    with socket.create_server((f"{client.daemon.network.v4}.1", 0)) as server:
        server.settimeout(TIMEOUT)
        host, port = server.getsockname()[:2]
        taking = asyncio.create_task(asyncio.to_thread(_take, server), name="perf/take")
        await client.exec(
            container, "sh", "-c", f"dd if=/dev/zero bs=64k count={mib * 16} | nc {host} {port}"
        )
        taken, seconds = await taking
    assert taken == mib * MIB
    return taken / 1e6 / seconds


def _take(server: socket.socket) -> tuple[int, float]:
    sock, _ = server.accept()
    with sock:
        start, taken = time.monotonic(), 0
        while piece := sock.recv(1 << 20):
            taken += len(piece)
        return taken, time.monotonic() - start


def _connects(address: str) -> list[float]:
    """Milliseconds each. The listener comes back for each, so a refused one is tried again and not counted."""
    _connect(address, 5002).close()
    found: list[float] = []
    deadline = time.monotonic() + TIMEOUT
    while len(found) < CONNECTS and time.monotonic() < deadline:
        start = time.monotonic()
        try:
            with socket.create_connection((address, 5002), timeout=TIMEOUT):
                found.append((time.monotonic() - start) * 1e3)
        except OSError:
            time.sleep(0.02)
    return found
