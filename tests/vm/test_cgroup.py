"""A pod's shim and QEMU are in its cgroup on the host, from the start to the end."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.spec.cgroup import sandbox_folder
from tests.cgroupkit import USED, cgroups_of
from tests.daemonkit import PATIENCE, Cri

pytestmark = pytest.mark.vm


@pytest.fixture
def parent() -> Iterator[str]:
    """A slice below a slice, as the kubelet makes it with the systemd driver; only its name is yielded."""
    stem = f"hptest{secrets.token_hex(4)}"
    outer, inner = f"/{stem}.slice", f"/{stem}.slice/{stem}-pod1.slice"
    for hierarchy in USED:
        Path(hierarchy.mount + inner).mkdir(parents=True)
        if "cpuset" in hierarchy.controllers:
            for folder in (outer, inner):
                for name in ("cpuset.cpus", "cpuset.mems"):
                    value = (Path(hierarchy.mount) / name).read_text()
                    (Path(hierarchy.mount + folder) / name).write_text(value)
    yield f"{stem}-pod1.slice"
    for hierarchy in USED:
        Path(hierarchy.mount + inner).rmdir()
        Path(hierarchy.mount + outer).rmdir()


def members(pod: str, client: Cri) -> dict[str, int]:
    """The pids of the pod's shim and QEMU."""
    lines = [line for line in client.daemon.processes() if pod[:12] in line]
    return {kind: int(line.split()[0]) for line in lines for kind in ("qemu-system", "shim") if kind in line}


def score(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


async def test_a_vm_is_worth_to_the_host_what_its_containers_are(cri_client: Cri) -> None:
    """The kubelet gives each container a score by its pod's class; the service's own is that of the last to go."""
    pod = await cri_client.run_pod()
    ours = members(pod, cri_client)
    before = score(ours["shim"])
    for wanted, expected in ((1000, 1000), (500, 500), (800, 500)):
        resources = cri.LinuxContainerResources(oom_score_adj=wanted)
        await cri_client.sh(pod, "sleep 600", linux=cri.LinuxContainerConfig(resources=resources))
        assert score(ours["qemu-system"]) == expected
    assert score(ours["shim"]) == before
    await cri_client.remove_pod(pod)


async def test_shim_and_qemu_are_below_the_pods_cgroup(parent: str, cri_client: Cri) -> None:
    pod = await cri_client.run_pod(cri_client.pod_config(cgroup_parent=parent))
    container = await cri_client.sh(pod, "sleep 600")
    path = sandbox_folder(parent, pod)
    was = members(pod, cri_client)
    assert sorted(was) == ["qemu-system", "shim"]
    for pid in was.values():
        assert cgroups_of(pid) == {path}
    assert len(list(Path(f"/proc/{was['qemu-system']}/task").iterdir())) > 2, (
        "vCPU and emulator threads moved"
    )
    cri_client.daemon.kill_daemon()
    async with cri_client.daemon.client() as client:
        os.kill(was["shim"], signal.SIGKILL)
        async with asyncio.timeout(PATIENCE):
            while members(pod, client).get("shim", was["shim"]) == was["shim"]:
                await asyncio.sleep(0.05)
        assert (await client.exec(container, "echo", "hi")).stdout == b"hi\n"
        now = members(pod, client)
        assert now["qemu-system"] == was["qemu-system"]
        assert now["shim"] != was["shim"]
        assert cgroups_of(now["shim"]) == cgroups_of(now["qemu-system"]) == {path}
        await client.remove_pod(pod)
    assert [h.mount for h in USED if Path(h.mount + path).exists()] == []
    assert cri_client.daemon.cgroups() == [], "libvirt's are gone as well"


async def test_without_a_parent(cri_client: Cri, pod: str) -> None:
    for pid in members(pod, cri_client).values():
        assert cgroups_of(pid) == {f"/hyperpod/{pod[:12]}"}
    assert len(cri_client.daemon.cgroups()) >= len(USED), "the leak check sees them"


async def test_a_parent_that_is_none_is_refused_before_any_work(cri_client: Cri) -> None:
    for parent in ("../../etc", "/kubepods/../..", "a--b.slice", "/x\ny", "/cgroup.procs"):
        with pytest.raises(GRPCError) as info:
            await cri_client.run_pod(cri_client.pod_config(cgroup_parent=parent))
        assert info.value.status is Status.INVALID_ARGUMENT
        assert "cgroup_parent" in str(info.value.message)
