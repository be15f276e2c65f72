"""A pod's network as its peers see it: bytes both ways between host and pod, and how long a connection takes."""

from __future__ import annotations

import asyncio
import socket
import statistics
import time
import urllib.request

from hyperpod.api.gen.runtime import v1 as cri
from tests.daemonkit import Cri
from tests.perf.report import Figure, spread

MIB = 1 << 20
PIECE = bytes(256 * 1024)
SERVE = "mkdir /w; truncate -s {mib}M /w/file; nc -l -p 5001 >/dev/null & exec httpd -f -p 80 -h /w"
CONNECTS = 50
TIMEOUT = 120.0


async def figures(client: Cri, mib: int) -> list[Figure]:
    """One pod, one stream at a time."""
    pod = await client.run_pod()
    await client.sh(pod, SERVE.format(mib=mib))
    status = await client.runtime.pod_sandbox_status(cri.PodSandboxStatusRequest(pod_sandbox_id=pod))
    assert status.status is not None and status.status.network is not None
    address = status.status.network.ip
    incoming = await asyncio.to_thread(_send, address, mib)
    outgoing = await asyncio.to_thread(_receive, address, mib)
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


def _receive(address: str, mib: int) -> float:
    """One file over HTTP; the server sends it with sendfile(2)."""
    with urllib.request.urlopen(f"http://{address}/file", timeout=TIMEOUT) as answer:
        start, taken = time.monotonic(), 0
        while piece := answer.read(1 << 20):
            taken += len(piece)
    assert taken == mib * MIB
    return taken / 1e6 / (time.monotonic() - start)


def _connects(address: str) -> list[float]:
    """Milliseconds each."""
    found = []
    for _ in range(CONNECTS):
        start = time.monotonic()
        with socket.create_connection((address, 80), timeout=TIMEOUT):
            found.append((time.monotonic() - start) * 1e3)
        time.sleep(0.02)  # the server's backlog is short
    return found
