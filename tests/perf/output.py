"""A container's output on its way into the CRI log: host agent, real crun, real shim."""

from __future__ import annotations

import asyncio
import hashlib
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from hyperpod.agentclient.types import Layer
from hyperpod.shimclient.client import ShimClient
from tests.agentkit import AgentKit, AgentPlace, host_agent, make_busybox_layer
from tests.perf.report import Figure, progress, spread
from tests.shimkit import SupervisorProcess, opened, payload, supervisor

LINE = 100
"""Bytes of a line, with its end."""

TIMEOUT = 300.0


async def figures(megabytes: int, rounds: int) -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="hp-perf-") as folder, supervisor() as parent:
        base = Path(folder)
        box = make_busybox_layer(base)
        lines, digest = await asyncio.to_thread(_lines_layer, base, megabytes * 1_000_000 // LINE)
        rates = []
        async with host_agent(base, box) as place:
            kit = await AgentKit.claim(place)
            try:
                shim = await _shim(parent, place)
                try:
                    for _ in range(rounds):
                        rates.append(await _one(kit, shim, lines, digest, base / "log"))
                        progress(f"container output to log: {rates[-1]:.0f} MB/s, nothing lost")
                finally:
                    await shim.close()
                    async with parent.client() as client:
                        await client.drop(place.sandbox_id)
            finally:
                await kit.client.close()
    note = f"{rounds} x {megabytes} MB, {LINE}-byte lines, nothing lost: {spread(rates)}"
    return [
        Figure(
            "container stdout to CRI log", statistics.median(rates), "MB/s", 100.0, at_least=True, note=note
        )
    ]


def _lines_layer(base: Path, count: int) -> tuple[Layer, str]:
    """A layer with /lines: numbered lines; and their digest."""
    root, image = base / "lines-root", base / "lines.sqfs"
    root.mkdir()
    digest = hashlib.sha256()
    with (root / "lines").open("wb") as file:
        for start in range(0, count, 10_000):
            numbers = range(start, min(count, start + 10_000))
            block = b"".join(b"%012d %s\n" % (number, b"." * (LINE - 14)) for number in numbers)
            digest.update(block)
            file.write(block)
    subprocess.run(
        ["mksquashfs", root, image, "-quiet", "-no-progress", "-all-root", "-comp", "gzip"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    (root / "lines").unlink()
    return Layer(serial="lines", path=str(image), fstype="squashfs"), digest.hexdigest()


async def _shim(parent: SupervisorProcess, place: AgentPlace) -> ShimClient:
    directory = parent.run_dir / "s" / place.sandbox_id[:12]
    directory.mkdir(mode=0o700)
    async with parent.client() as client:
        await client.spawn_shim(
            sandbox_id=place.sandbox_id, directory=str(directory), uid=0, gid=0, device=False
        )
    shim = ShimClient(str(directory / "control.sock"))
    await shim.connect(TIMEOUT)
    await shim.agent(place.endpoint, place.token)
    return shim


async def _one(kit: AgentKit, shim: ShimClient, lines: Layer, digest: str, log: Path) -> float:
    """MB/s from the first byte in the log to the last. Fails when the log does not stand for the very bytes."""
    log.unlink(missing_ok=True)
    place = kit.place
    with_lines = AgentKit(
        AgentPlace(
            place.endpoint, place.sandbox_id, place.token, (*place.layers, lines), place.memory_limits
        ),
        kit.client,
    )
    container = await with_lines.create("cat", "/lines")
    with opened(log) as fd:
        await shim.log_start(container, tty=False, fd=fd)
    await kit.client.start_container(container)
    while not log.stat().st_size:
        await asyncio.sleep(0.001)
    start = time.monotonic()
    end = await shim.log_finish(container, TIMEOUT)
    seconds = time.monotonic() - start
    assert end.complete, "the log is not complete"
    assert end.gap_bytes == 0, f"{end.gap_bytes} bytes are missing"
    data = await asyncio.to_thread(lambda: payload(log.read_bytes()))
    assert hashlib.sha256(data).hexdigest() == digest, "the log has other bytes"
    await shim.log_stop(container)
    await kit.client.remove_container(container)
    return len(data) / 1e6 / seconds
