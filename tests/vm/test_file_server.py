"""The life of a pod's virtiofsd: plugged in late, switched off, killed; and what a crash leaves of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from hyperpod.api.gen.runtime import v1 as cri
from tests.daemonkit import Daemon, daemon, eventually
from tests.vm.test_mounts import mount, shell, sleeper, virtiofsd

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def on_demand() -> Iterator[Daemon]:
    with daemon('---\nvirtiofs = "demand"') as one:
        yield one


async def test_on_demand(on_demand: Daemon, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("late")
    async with on_demand.client() as client:
        await client.load_busybox()
        pod = await client.run_pod()
        assert virtiofsd(on_demand, pod) == []
        plain = await client.run(pod, "/bin/sleep", "100")
        both = await asyncio.gather(*(sleeper(client, pod, mount(tmp_path, "/m")) for _ in range(2)))
        for container in both:
            assert await shell(client, container, "cat /m/x") == (0, "late")
        assert len(virtiofsd(on_demand, pod)) == 2
        for pid in virtiofsd(on_demand, pod):
            assert pod[:12] in Path(f"/proc/{pid}/cgroup").read_text()
        on_demand.kill_daemon()
    async with on_demand.client() as client:
        again = await sleeper(client, pod, mount(tmp_path, "/m"))
        assert await shell(client, again, "cat /m/x") == (0, "late")
        assert (await shell(client, plain, "ls /m 2>&1"))[0] != 0
        await client.remove_pod(pod)
    assert on_demand.leftovers() == []


def kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # one may take the other along
            os.kill(pid, signal.SIGKILL)


async def test_its_death_ends_the_pod(on_demand: Daemon, tmp_path: Path) -> None:
    async with on_demand.client() as client:
        await client.load_busybox()
        pod, other = await asyncio.gather(client.run_pod(), client.run_pod())
        container = await sleeper(client, pod, mount(tmp_path, "/m"))
        bystander = await sleeper(client, other, mount(tmp_path, "/m"))
        kill(virtiofsd(on_demand, pod))
        status = await client.wait(container)
        assert (status.exit_code, status.reason) == (255, "Unknown")
        assert "its file server, virtiofsd, ended" in status.message
        asked = cri.PodSandboxStatusRequest(pod_sandbox_id=pod)
        await eventually(
            lambda: client.runtime.pod_sandbox_status(asked),
            lambda reply: (
                reply.status is not None and reply.status.state == cri.PodSandboxState.SANDBOX_NOTREADY
            ),
        )
        with pytest.raises(GRPCError) as info:
            await client.create(pod, "/bin/true", mounts=[mount(tmp_path, "/m")])
        assert info.value.status is Status.FAILED_PRECONDITION
        assert (await shell(client, bystander, "touch /m/fine"))[0] == 0
        # Its death while no daemon looks is found at the next start.
        on_demand.stop()
        kill(virtiofsd(on_demand, other))
    on_demand.start()
    async with on_demand.client() as client:
        assert "virtiofsd, ended" in (await client.wait(bystander)).message
        await asyncio.gather(client.remove_pod(pod), client.remove_pod(other))
    assert on_demand.leftovers() == []


async def test_a_pod_on_its_own_says_why_it_ended(on_demand: Daemon, tmp_path: Path) -> None:
    """virtiofsd leaves when its VM does: the reason is the VM's."""
    async with on_demand.client() as client:
        await client.load_busybox()
        pod = await client.run_pod()
        container = await sleeper(client, pod, mount(tmp_path, "/m"))
        [qemu] = [p for p in on_demand.processes() if "qemu-system" in p and pod[:12] in p]
        os.kill(int(qemu.split()[0]), signal.SIGKILL)
        assert "virtiofsd" not in (await client.wait(container)).message
        await client.remove_pod(pod)
    assert on_demand.leftovers() == []


async def test_what_is_left_is_swept(on_demand: Daemon, tmp_path: Path) -> None:
    """Records gone, processes there: the next daemon ends them, and no file of a tenant with them."""
    (tmp_path / "precious").write_text("x")
    async with on_demand.client() as client:
        await client.load_busybox()
        pod = await client.run_pod()
        await sleeper(client, pod, mount(tmp_path, "/m"))
        processes = virtiofsd(on_demand, pod)
    on_demand.stop()
    for kind in ("sandboxes", "containers"):
        for folder in (on_demand.state / kind).iterdir():
            (folder / "record.json").unlink()
    on_demand.start()
    # (Leases are not asked for: what to give a CNI plugin's DEL was in the records.)
    assert [line for line in on_demand.leftovers() if "virtiofsd" in line or "/m/" in line] == []
    assert [pid for pid in processes if Path(f"/proc/{pid}/exe").exists()] == []
    assert (tmp_path / "precious").read_text() == "x"


async def test_switched_off(tmp_path: Path) -> None:
    with daemon('---\nvirtiofs = "off"') as one:
        async with one.client() as client:
            await client.load_busybox()
            pod = await client.run_pod()
            with pytest.raises(GRPCError) as info:
                await client.create(pod, "/bin/true", mounts=[mount(tmp_path, "/m")])
            assert info.value.status is Status.FAILED_PRECONDITION
            assert "vm.virtiofs" in str(info.value.message)
            assert virtiofsd(one, pod) == []
            await client.remove_pod(pod)
        assert one.leftovers() == []
