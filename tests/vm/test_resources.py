"""Limits as the kernel of a pod applies them, out-of-memory kills, and updates."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.sandbox.cgroup import mounted
from tests.daemonkit import Cri, eventually

pytestmark = pytest.mark.vm

MIB = 1 << 20
CGROUP = "/sys/fs/cgroup"


def limited(**resources: Any) -> dict[str, Any]:
    """The `linux` argument of a container with these resources."""
    return {"linux": cri.LinuxContainerConfig(resources=cri.LinuxContainerResources(**resources))}


async def files(client: Cri, container: str, *names: str) -> list[str]:
    """First lines of files in the container's cgroup, as it sees them itself."""
    out = (await client.exec(container, "/bin/sh", "-c", f"cd {CGROUP}; head -qn1 {' '.join(names)}")).stdout
    return out.decode().splitlines()


async def test_every_limit_is_applied(cri_client: Cri) -> None:
    linux = cri.LinuxContainerResources(
        cpu_quota=200_000, cpu_period=100_000, memory_limit_in_bytes=200 * MIB
    )
    pod = await cri_client.run_pod(cri_client.pod_config(resources=linux))
    container = await cri_client.sh(
        pod,
        "cat /proc/self/oom_score_adj; sleep 600",
        **limited(
            cpu_shares=512,
            cpu_quota=50_000,
            cpu_period=100_000,
            cpuset_cpus="1",
            cpuset_mems="0",
            memory_limit_in_bytes=64 * MIB,
            memory_swap_limit_in_bytes=64 * MIB,
            oom_score_adj=-500,
            hugepage_limits=[cri.HugepageLimit(page_size="2MB"), cri.HugepageLimit(page_size="1GB")],
            unified={"pids.max": "77", "memory.oom.group": "1", "memory.high": str(60 * MIB)},
        ),
    )
    names = [
        *("cpu.max", "cpuset.cpus", "cpuset.mems", "memory.max", "memory.swap.max", "pids.max"),
        *("memory.oom.group", "memory.high", "hugetlb.2MB.max", "cpu.weight"),
    ]
    got = dict(zip(names, await files(cri_client, container, *names), strict=True))
    weight = int(got.pop("cpu.weight"))
    assert got == {
        "cpu.max": "50000 100000",
        "cpuset.cpus": "1",
        "cpuset.mems": "0",
        "memory.max": str(64 * MIB),
        "memory.swap.max": "0",
        "pids.max": "77",
        "memory.oom.group": "1",
        "memory.high": str(60 * MIB),
        "hugetlb.2MB.max": "0",
    }
    assert 15 <= weight <= 60, "512 of 1024 shares"
    assert [text for _, _, text in await cri_client.logged(container, "-500")] == ["-500"]
    assert (await cri_client.exec(container, "cat", "/proc/self/oom_score_adj")).stdout.strip() == b"-500"
    await cri_client.remove_pod(pod)


async def test_what_cannot_be_is_refused_by_name(cri_client: Cri, pod: str) -> None:
    for resources, text in (
        ({"cpuset_cpus": "0-5"}, "linux.resources.cpuset_cpus '0-5': there is no CPU 5"),
        ({"cpuset_mems": "1"}, "linux.resources.cpuset_mems '1'"),
        ({"unified": {"cgroup.procs": "1"}}, "linux.resources.unified key 'cgroup.procs'"),
        ({"memory_limit_in_bytes": 5 * MIB, "memory_swap_limit_in_bytes": MIB}, "memory_swap_limit_in_bytes"),
        ({"oom_score_adj": 1001}, "linux.resources.oom_score_adj is 1001"),
        ({"hugepage_limits": [cri.HugepageLimit(page_size="3MB", limit=5)]}, "no huge pages of 3MB"),
    ):
        with pytest.raises(GRPCError) as info:
            await cri_client.create(pod, "true", **limited(**resources))
        assert info.value.status is Status.INVALID_ARGUMENT
        assert text in str(info.value.message)
    refused = await cri_client.create(pod, "/bin/true", **limited(unified={"memory.nothing": "1"}))
    with pytest.raises(GRPCError) as info:
        await cri_client.start(refused)
    assert "memory.nothing" in str(info.value.message)


async def test_a_limit_above_the_vm_is_cut_and_shown(cri_client: Cri, pod: str) -> None:
    container = await cri_client.sh(pod, "sleep 600", **limited(memory_limit_in_bytes=1 << 40))
    status = await cri_client.status(container)
    assert status.resources is not None and status.resources.linux is not None
    shown = status.resources.linux.memory_limit_in_bytes
    assert shown == 256 * MIB
    assert await files(cri_client, container, "memory.max") == [str(shown)]


@pytest.mark.parametrize("attempt", range(3))
async def test_out_of_memory_is_told_each_way(cri_client: Cri, pod: str, attempt: int) -> None:
    hog = "dd if=/dev/zero of=/dev/null bs=100M count=1"
    small = limited(memory_limit_in_bytes=32 * MIB, memory_swap_limit_in_bytes=32 * MIB)
    grouped = limited(memory_limit_in_bytes=32 * MIB, unified={"memory.oom.group": "1"})
    itself = await cri_client.sh(pod, f"exec {hog}", **small)
    child = await cri_client.sh(pod, f"{hog}; exit 4", **small)
    whole = await cri_client.sh(pod, f"{hog}; exit 5", **grouped)
    through_exec = await cri_client.sh(pod, "while ! test -e /over; do sleep 0.1; done", **small)
    reply = await cri_client.exec(through_exec, "/bin/sh", "-c", f"exec {hog}")
    assert reply.exit_code == 137
    with contextlib.suppress(GRPCError):  # on a slow machine the kernel may kill its first process as well
        await cri_client.exec(through_exec, "touch", "/over")
    # More than all containers together may have, in one that has no limit of its own.
    guest = await cri_client.sh(pod, "exec dd if=/dev/zero of=/dev/null ibs=110M obs=109M")
    ends = {itself: [137], child: [4, 137], whole: [137], through_exec: [0, 137], guest: [137]}
    for container, codes in ends.items():
        status = await cri_client.wait(container)
        assert status.exit_code in codes
        assert status.reason == "OOMKilled"
    assert (await cri_client.wait(await cri_client.run(pod, "/bin/true", **small))).reason == "Completed"


async def test_an_update_is_applied_shown_and_durable(cri_client: Cri, pod: str) -> None:
    async def update(container: str, **resources: Any) -> None:
        await cri_client.runtime.update_container_resources(
            cri.UpdateContainerResourcesRequest(
                container_id=container, linux=cri.LinuxContainerResources(**resources)
            )
        )

    started = await cri_client.sh(pod, "sleep 600", **limited(memory_limit_in_bytes=64 * MIB, cpu_shares=100))
    created = await cri_client.create(pod, "sleep", "600", **limited(memory_limit_in_bytes=64 * MIB))
    for container in (started, created):
        await update(
            container, memory_limit_in_bytes=96 * MIB, memory_swap_limit_in_bytes=96 * MIB, cpu_quota=20_000,
            cpu_period=10_000, unified={"pids.max": "99"},
        )  # fmt: skip
    await cri_client.start(created)
    cri_client.daemon.kill_daemon()
    async with cri_client.daemon.client() as client:
        for container in (started, created):
            assert await files(client, container, "memory.max", "cpu.max", "pids.max") == [
                str(96 * MIB),
                "20000 10000",
                "99",
            ]
            status = await client.status(container)
            assert status.resources is not None and (linux := status.resources.linux) is not None
            assert (linux.memory_limit_in_bytes, linux.cpu_quota) == (96 * MIB, 20_000)
            assert linux.unified == {"pids.max": "99"}
        await update(started, memory_limit_in_bytes=1 << 40)
        assert await files(client, started, "memory.max") == [str(256 * MIB)]
        with pytest.raises(GRPCError) as info:
            await update(started, cpuset_cpus="3")
        assert (info.value.status, "cpuset_cpus" in str(info.value.message)) == (
            Status.INVALID_ARGUMENT,
            True,
        )
        await client.stop(started)
        with pytest.raises(GRPCError) as info:
            await update(started, cpu_shares=5)
        assert info.value.status is Status.FAILED_PRECONDITION
        with pytest.raises(GRPCError) as info:
            await update("f" * 64, cpu_shares=5)
        assert info.value.status is Status.NOT_FOUND


async def test_a_quota_holds(cri_client: Cri, pod: str) -> None:
    container = await cri_client.sh(
        pod, "while :; do :; done", **limited(cpu_quota=10_000, cpu_period=100_000)
    )

    async def used() -> float:
        """Seconds of CPU time."""
        [line] = await files(cri_client, container, "cpu.stat")
        return int(line.split()[1]) / 1e6

    await eventually(used, lambda seen: seen > 0)
    began = time.monotonic()
    before = await used()
    await asyncio.sleep(4)
    # The guest's own clock counts what a busy host takes away from it, too: a fifth is a tenth and that.
    after = await eventually(used, lambda seen: seen > before + 0.1)
    assert after - before < max(1.0, (time.monotonic() - began) / 5), "a tenth of a CPU"
    throttled = (await cri_client.exec(container, "grep", "nr_throttled", f"{CGROUP}/cpu.stat")).stdout
    assert int(throttled.split()[1]) > 0


async def test_several_emulated_cpus_bear_what_the_kernel_switches(cri_client: Cri) -> None:
    """The first quota of a guest and the end of its last one switch code of its scheduler, which the other CPU runs
    all the time. A kernel that patches itself for that is dead after some two hundred of these."""
    two = cri.LinuxContainerResources(cpu_quota=200_000, cpu_period=100_000)
    mighty = cri.LinuxSandboxSecurityContext(privileged=True)
    pod = await cri_client.run_pod(cri_client.pod_config(resources=two, security_context=mighty))
    await cri_client.sh(pod, "yes | while read -r line; do :; done")
    switches = await cri_client.sh(
        pod,
        f"cd {CGROUP} && mkdir own limited && echo 0 >own/cgroup.procs && echo +cpu >cgroup.subtree_control && "
        "n=0; while [ $((n += 1)) -le 500 ]; do echo 90000 >limited/cpu.max; echo max >limited/cpu.max; done",
        linux=cri.LinuxContainerConfig(security_context=cri.LinuxContainerSecurityContext(privileged=True)),
    )
    status = await cri_client.wait(switches)
    assert (status.exit_code, status.reason) == (0, "Completed"), await cri_client.log(switches)
    await cri_client.remove_pod(pod)


async def test_a_bigger_pod_needs_another_vm(cri_client: Cri, pod: str) -> None:
    async def update(mib: int) -> None:
        resources = cri.LinuxContainerResources(memory_limit_in_bytes=mib * MIB)
        await cri_client.runtime.update_pod_sandbox_resources(
            cri.UpdatePodSandboxResourcesRequest(pod_sandbox_id=pod, resources=resources)
        )

    await update(160)
    with pytest.raises(GRPCError) as info:
        await update(161)
    assert info.value.status is Status.FAILED_PRECONDITION
    assert "has 160 MiB for containers, 161 MiB are wanted" in str(info.value.message)


@pytest.fixture
def parent() -> Iterator[Path]:
    """The memory cgroup of a pod, as a kubelet makes it on this host; removed with its twins afterwards."""
    name = f"/hptest{secrets.token_hex(4)}"
    found = [Path(h.mount + name) for h in mounted()]
    memory = next(p for p in found if any((p.parent / f).exists() for f in ("memory.stat", "memory.kmem")))
    yield memory
    for folder in found:
        if folder.is_dir():
            folder.rmdir()


async def test_a_pod_whose_cgroup_on_the_host_is_too_small(cri_client: Cri, parent: Path) -> None:
    pod = await cri_client.run_pod(cri_client.pod_config(cgroup_parent=f"/{parent.name}"))
    container = await cri_client.sh(pod, "sleep 600")
    usage, limit = parent / "memory.usage_in_bytes", parent / "memory.limit_in_bytes"
    if not usage.exists():
        usage, limit = parent / "memory.current", parent / "memory.max"
    limit.write_text(str(int(usage.read_text()) + 8 * MIB))
    with pytest.raises(GRPCError):
        await cri_client.exec(container, "dd", "if=/dev/urandom", "of=/dev/shm/x", "bs=1M", "count=60")
    status = await cri_client.wait(container)
    assert (status.exit_code, status.reason) == (137, "OOMKilled")
    assert "its pod's cgroup is too small" in status.message
    await cri_client.remove_pod(pod)
