"""A host agent's beginning and end: who may come first, and what is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import socket
import stat
import threading
from pathlib import Path

import pytest

from hyperpod.agent.security import Security, apply
from hyperpod.agentclient.client import AgentClient
from hyperpod.errors import ProtocolError, Unavailable
from hyperpod.vsock.open import CONTROL_PORT, STDIO_PORT
from tests.agentkit import TIMEOUT, AgentKit, AgentPlace, agent_folder, agent_pid, host_agent, processes_with
from tests.shimkit import eventually


async def test_nobody_gets_in_before_a_claim(agent_place: AgentPlace) -> None:
    with pytest.raises(ProtocolError, match="claimed"):
        client = AgentClient(agent_place.endpoint, agent_place.sandbox_id, agent_place.token)
        await client.connect(claim=False, timeout=TIMEOUT)


def cgroups_of(name: str) -> list[str]:
    return [path for path, _, _ in os.walk("/sys/fs/cgroup") if f"/hyperpod/{name}/" in f"{path}/"]


async def until_running(text: str, count: int) -> None:
    """A moment after its start a process shows its own arguments."""
    async with asyncio.timeout(TIMEOUT):
        while len(processes_with(text)) < count:
            await asyncio.sleep(0.02)


def loops_of(image: Path) -> list[str]:
    found = []
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # another's, which goes just now
            if path.read_text().strip() == str(image):
                found.append(str(path))
    return found


async def test_a_host_agent_leaves_nothing(busybox_layer: Path, tmp_path: Path) -> None:
    marker, folder = f"{secrets.randbelow(10**9) + 10**9}", agent_folder(tmp_path)
    async with host_agent(tmp_path, busybox_layer) as place:
        kit = await AgentKit.claim(place)
        ident = await kit.start("sh", "-c", f"sleep {marker} & sleep {marker}")
        await kit.exec(ident, "sleep", marker)
        await kit.create("true")
        await until_running(marker, 3)
        assert loops_of(busybox_layer)
        assert cgroups_of(folder.name)
        await kit.client.close()
    assert processes_with(marker) == []
    # The kernel frees them a moment after the last mount's end; other tests' agents had the same image.
    await eventually(lambda: loops_of(busybox_layer) == [])
    assert cgroups_of(folder.name) == []
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    assert [
        line for line in mounts if str(tmp_path) in line
    ] == []  # others of the host are not ours to judge
    left = [p for p in tmp_path.rglob("*") if not p.is_dir() and not p.is_socket()]
    assert left == []


async def test_an_agent_that_was_killed_is_cleaned_up_by_the_next(
    busybox_layer: Path, tmp_path: Path
) -> None:
    marker = f"{secrets.randbelow(10**9) + 10**9}"
    with pytest.raises(AssertionError, match="ended with -9"):
        async with host_agent(tmp_path, busybox_layer) as place:
            kit = await AgentKit.claim(place)
            await kit.start("sleep", marker)
            await until_running(marker, 1)
            await kit.client.close()
            os.kill(agent_pid(place), 9)
    assert processes_with(marker)
    for port in (CONTROL_PORT, STDIO_PORT):
        (agent_folder(tmp_path) / f"{port}.sock").unlink()
    async with host_agent(tmp_path, busybox_layer) as place:
        assert processes_with(marker) == []
        kit = await AgentKit.claim(place)
        assert await kit.client.list_containers() == []
        _, info, _ = await kit.run("true")
        assert info.exit_code == 0
        await kit.client.close()


async def test_shutdown_ends_a_host_agent(busybox_layer: Path, tmp_path: Path) -> None:
    async with host_agent(tmp_path, busybox_layer) as place:
        kit = await AgentKit.claim(place)
        await kit.start("sleep", "1000")
        await kit.client.shutdown()
        async with asyncio.timeout(TIMEOUT):
            while True:
                try:
                    await kit.client.list_containers()
                except Unavailable:
                    break
                await asyncio.sleep(0.02)
        await kit.client.close()
    with socket.socket(socket.AF_UNIX) as probe, pytest.raises(OSError):
        probe.connect(str(agent_folder(tmp_path) / "1024.sock"))


async def test_all_devices_while_they_come_and_go(tmp_path: Path) -> None:
    """A privileged container does not fail for a disk that somebody has just pulled out."""
    folder, over = Path(f"/dev/hp-test-{os.getpid()}"), threading.Event()

    def plug() -> None:
        while not over.is_set():
            (folder / "below").mkdir(parents=True)
            for number in range(20):
                os.mknod(folder / f"below/{number}", stat.S_IFCHR | 0o600, os.makedev(1, 3))
            shutil.rmtree(folder)

    plugging = threading.Thread(target=plug)
    plugging.start()
    try:
        for _ in range(300):
            spec = {
                "root": {"path": str(tmp_path)},
                "process": {"user": {"uid": 0, "gid": 0, "additionalGids": []}},
                "linux": {"resources": {"devices": []}},
            }
            await apply(spec, Security(all_devices=True))
            assert "/dev/null" in {device["path"] for device in spec["linux"]["devices"]}  # type: ignore[index]
    finally:
        over.set()
        plugging.join()
