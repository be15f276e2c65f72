"""How long Version and ListContainers take while exec sessions run flat out, beside an idle daemon.

The bytes go from shim to client, the daemon is not among them; what is left is that all share the host's CPUs. So
the same calls are made a third time while as many processes as those that carry the sessions only burn CPU.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from hyperpod.api.gen.runtime import v1 as cri
from tests.daemonkit import ROOT, Cri, Daemon
from tests.host.conftest import host_daemon_of
from tests.perf.many import cpu_ns
from tests.perf.report import Figure, number, progress

SESSIONS = 16
BURNERS = 3
"""QEMU, the shim, the client of the sessions."""
_ENDLESS = ("dd", "if=/dev/zero", "bs=64k")
_PAUSE = 0.01
_WAIT = 120.0


async def on_host(rounds: int) -> list[Figure]:
    """The same with a host pod, where nothing is emulated: at the rate of which the host is capable."""
    with host_daemon_of('host_pods = ["test"]\n---', log_level="info") as one:
        async with one.client() as client:
            client.handler = "host"
            await client.load_busybox()
            return await figures(one, client, rounds)


async def figures(daemon: Daemon, client: Cri, rounds: int) -> list[Figure]:
    place = client.handler or "VM"
    pod = await client.run_pod()
    container = await client.run(pod, "sleep", "100000")
    idle = await _calls(client, rounds)
    async with _flood(client, container) as rate:
        cpu, start = cpu_ns(daemon.pid()), time.monotonic()
        busy = await _calls(client, rounds)
        used = (cpu_ns(daemon.pid()) - cpu) / 1e7 / (time.monotonic() - start)
    async with _burning():
        burnt = await _calls(client, rounds)
    await client.remove_pod(pod)
    note = f"{rate[0]:.1f} MiB/s in all; the daemon's loop took {used:.0f}% of a CPU, the calls included"
    return [
        Figure(
            f"{name} while {SESSIONS} execs of a {place} pod run flat out", statistics.median(busy[name]), "ms",
            note=f"p99 {_p99(busy[name])}; idle {_both(idle[name])}; "
            f"{BURNERS} burning CPUs instead {_both(burnt[name])}; {note}",
        )
        for name in idle
    ]  # fmt: skip


def _both(values: list[float]) -> str:
    return f"{number(statistics.median(values))}, p99 {_p99(values)}"


def _p99(values: list[float]) -> str:
    return number(sorted(values)[len(values) * 99 // 100])


async def _calls(client: Cri, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call."""
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "Version": lambda: client.runtime.version(cri.VersionRequest()),
        "ListContainers": lambda: client.runtime.list_containers(cri.ListContainersRequest()),
    }
    took: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.monotonic()
            await call()
            took[name].append((time.monotonic() - start) * 1000)
            await asyncio.sleep(_PAUSE)
    return took


@asynccontextmanager
async def _flood(client: Cri, container: str) -> AsyncIterator[list[float]]:
    """Sessions that send all the time; gives their rate in MiB/s, once they have ended."""
    request = cri.ExecRequest(container_id=container, cmd=[*_ENDLESS], stdout=True, stderr=True)
    urls = [(await client.runtime.exec(request)).url for _ in range(SESSIONS)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.perf.flood", *urls,
        cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    rate: list[float] = []
    try:
        async with asyncio.timeout(_WAIT):
            assert await process.stdout.readline() == b"started\n", "a session did not begin"
        progress(f"{SESSIONS} execs run flat out")
        start = time.monotonic()
        yield rate
        async with asyncio.timeout(_WAIT):
            output, _ = await process.communicate(b"")
        rate.append(int(output) / (1 << 20) / (time.monotonic() - start))
        assert process.returncode == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@asynccontextmanager
async def _burning() -> AsyncIterator[None]:
    processes = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", "while True: pass") for _ in range(BURNERS)
    ]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            await process.wait()
