"""A mount beside the guest's own disk: the same commands on both, by turns, inside one container.

No budget: what virtio-fs costs depends on the host's disk and on how fast the guest's CPU is. Told as a ratio.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from hyperpod.api.gen.runtime import v1 as cri
from tests.daemonkit import Cri
from tests.perf.report import Figure, spread

FILES = 1000
CLOCK = 0.01
"""Seconds that /proc/uptime counts in."""

PLACES = {"disk": "/own", "mount": "/m"}

SCRIPTS = {
    "write, MB/s": "dd if=/dev/zero of=$P/big bs=1M count={mib} conv=fsync 2>/dev/null",
    "read, MB/s": "dd if=$P/big of=/dev/null bs=1M 2>/dev/null",
    "create and remove a file, us": "for i in {files}; do : > $P/f$i; done; rm $P/f*",
    "look at a file, us": "for i in {files}; do [ -e $P/big$i ]; done; :",
}


async def figures(client: Cri, mib: int, rounds: int) -> list[Figure]:
    """`mib`: size of the file that is written and read."""
    config = client.pod_config(security_context=cri.LinuxSandboxSecurityContext(privileged=True))
    pod = await client.run_pod(config)
    taken: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="hyperpod-perf-") as folder:
        mounts = [cri.Mount(container_path="/m", host_path=folder)]
        # Privileged, to empty the guest's caches.
        linux = cri.LinuxContainerConfig(security_context=cri.LinuxContainerSecurityContext(privileged=True))
        container = await client.run(pod, "/bin/sleep", "3600", mounts=mounts, linux=linux)
        await client.exec(container, "mkdir", "/own")
        for _ in range(rounds):
            for what, script in SCRIPTS.items():
                for place, path in PLACES.items():
                    text = script.format(mib=mib, files=" ".join(map(str, range(FILES))))
                    taken.setdefault((what, place), []).append(await _seconds(client, container, path, text))
        await client.remove_pod(pod)
        assert not list(Path(folder).glob("f*"))
    return [_figure(what, mib, taken) for what in SCRIPTS]


async def _seconds(client: Cri, container: str, path: str, script: str) -> float:
    """By the guest's clock, from cold caches."""
    cold = "sync; echo 3 > /proc/sys/vm/drop_caches"
    clock = "read now rest < /proc/uptime; echo $now"
    reply = await client.exec(
        container, "/bin/sh", "-c", f"P={path}; {cold}; {clock}; {script}; {clock}", timeout=600
    )
    assert reply.exit_code == 0, reply.stderr
    begin, end = map(float, reply.stdout.split())
    return max(end - begin, CLOCK)


def _figure(what: str, mib: int, taken: dict[tuple[str, str], list[float]]) -> Figure:
    throughput = what.endswith("MB/s")
    values = {
        place: [mib * 1.048576 / s if throughput else s / FILES * 1e6 for s in taken[what, place]]
        for place in PLACES
    }
    mine, own = (statistics.median(values[place]) for place in ("mount", "disk"))
    name, _, unit = what.rpartition(", ")
    note = f"the guest's own disk: {spread(values['disk'])}; ratio {mine / own:.2f}"
    return Figure(f"a mount: {name}", mine, unit, note=note)
