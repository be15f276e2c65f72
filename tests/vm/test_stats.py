"""Statistics through the CRI socket: what a container does in its guest is seen, within bounds."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from hyperpod.api.gen.runtime import v1 as cri
from tests.daemonkit import Cri, eventually

pytestmark = pytest.mark.vm

MIB = 1 << 20


def value(number: cri.UInt64Value | None) -> int:
    assert number is not None
    return number.value


async def of(client: Cri, container: str) -> cri.ContainerStats:
    reply = await client.runtime.container_stats(cri.ContainerStatsRequest(container_id=container))
    assert reply.stats is not None
    return reply.stats


async def of_pod(client: Cri, pod: str) -> cri.PodSandboxStats:
    reply = await client.runtime.pod_sandbox_stats(cri.PodSandboxStatsRequest(pod_sandbox_id=pod))
    assert reply.stats is not None
    return reply.stats


def usage(cpu: cri.CpuUsage | None) -> int:
    """Nanoseconds; 0 before a guest has told any."""
    return cpu.usage_core_nano_seconds.value if cpu is not None and cpu.usage_core_nano_seconds else 0


async def test_what_containers_do_is_seen(cri_client: Cri, pod: str) -> None:
    began = time.time_ns()
    limits = cri.LinuxContainerResources(memory_limit_in_bytes=100 * MIB)
    linux = cri.LinuxContainerConfig(resources=limits)
    busy = await cri_client.sh(pod, "echo up; while :; do :; done", labels={"kind": "busy"})
    hungry = await cri_client.sh(
        pod, "dd if=/dev/zero of=/dev/shm/hog bs=1M count=40; echo up; sleep 600", linux=linux
    )
    writing = await cri_client.sh(
        pod,
        "dd if=/dev/zero of=/big bs=1M count=30; for i in 1 2 3 4 5; do : > /f$i; done; sync; echo up; sleep 600",
    )
    idle = await cri_client.create(pod, "sleep", "600")
    for container in (busy, hungry, writing):
        await cri_client.logged(container, "up")
    # A guest on a busy host misses its time now and then: what it said before is shown.
    first = (await eventually(lambda: of(cri_client, busy), lambda seen: usage(seen.cpu) > 0)).cpu

    def has_worked(seen: cri.ContainerStats) -> bool:
        assert seen.cpu is not None
        return usage(seen.cpu) - usage(first) > 100_000_000 and seen.cpu.usage_nano_cores is not None

    await eventually(lambda: of(cri_client, busy), has_worked)
    stats = {name: await of(cri_client, name) for name in (busy, hungry, writing, idle)}
    cpu, memory, disk = stats[busy].cpu, stats[hungry].memory, stats[writing].writable_layer
    assert cpu is not None and first is not None
    assert 50_000_000 < value(cpu.usage_nano_cores) <= 8_000_000_000
    assert began < first.timestamp < cpu.timestamp <= time.time_ns(), "by the host's clock"
    assert cpu.psi is not None and cpu.psi.some is not None
    assert memory is not None
    assert 40 * MIB <= value(memory.working_set_bytes) <= value(memory.usage_bytes) <= 100 * MIB
    assert value(memory.available_bytes) == 100 * MIB - value(memory.working_set_bytes)
    assert value(memory.rss_bytes) < 20 * MIB, "tmpfs is no anonymous memory"
    assert value(memory.page_faults) > 0
    assert disk is not None and disk.fs_id is not None
    assert 30 * MIB <= value(disk.used_bytes) < 34 * MIB
    assert 7 <= value(disk.inodes_used) < 20
    images = await cri_client.images.image_fs_info(cri.ImageFsInfoRequest())
    scratch = images.container_filesystems[0].fs_id
    assert scratch is not None and scratch.mountpoint == disk.fs_id.mountpoint
    other = stats[busy].writable_layer
    assert other is not None and value(other.used_bytes) < MIB, "each has its own quota"
    assert stats[idle].cpu is None and stats[idle].memory is None
    assert stats[idle].writable_layer is not None
    await cri_client.exec(writing, "rm", "/big")

    def has_room(seen: cri.ContainerStats) -> bool:
        return seen.writable_layer is not None and value(seen.writable_layer.used_bytes) < 4 * MIB

    await eventually(lambda: of(cri_client, writing), has_room)

    def has_all(seen: cri.PodSandboxStats) -> bool:
        return seen.linux is not None and usage(seen.linux.cpu) >= usage(cpu)

    whole = await eventually(lambda: of_pod(cri_client, pod), has_all)
    assert whole.linux is not None and whole.linux.cpu is not None and whole.linux.memory is not None
    assert {c.attributes.id for c in whole.linux.containers if c.attributes} == {busy, hungry, writing, idle}
    assert value(whole.linux.cpu.usage_nano_cores) > 0
    assert value(whole.linux.memory.working_set_bytes) >= 40 * MIB
    assert whole.linux.process is not None and value(whole.linux.process.process_count) >= 3
    assert whole.linux.network is not None and whole.linux.network.default_interface is not None
    assert whole.linux.network.default_interface.name == "eth0"
    assert value(whole.linux.network.default_interface.tx_bytes) > 0, "IPv6 greets its neighbours"
    assert whole.linux.network.interfaces == [], "those beside it, and a guest has no others"


async def test_lists_and_filters(cri_client: Cri, pod: str) -> None:
    other = await cri_client.run_pod()
    one = await cri_client.sh(pod, "sleep 600", labels={"a": "b"})
    two = await cri_client.sh(other, "sleep 600")
    done = await cri_client.run(other, "/bin/true")
    await cri_client.wait(done)

    async def listed(**wanted: object) -> set[str]:
        request = cri.ListContainerStatsRequest(filter=cri.ContainerStatsFilter(**wanted))  # type: ignore[arg-type]
        found = (await cri_client.runtime.list_container_stats(request)).stats
        pages = [
            page
            async for page in cri_client.runtime.stream_container_stats(
                cri.StreamContainerStatsRequest(filter=request.filter)
            )
        ]
        # Who is listed, not the figures: on a busy host a guest may miss its time for one of the two answers.
        assert [s.attributes for page in pages for s in page.container_stats] == [s.attributes for s in found]
        return {stats.attributes.id for stats in found if stats.attributes}

    assert await listed() == {one, two, done}
    assert await listed(id=one[:20]) == {one}
    assert await listed(pod_sandbox_id=other) == {two, done}
    assert await listed(label_selector={"a": "b"}) == {one}
    assert await listed(label_selector={"a": "c"}) == set()
    everything = (await cri_client.runtime.list_container_stats(cri.ListContainerStatsRequest())).stats
    without = [s.attributes.id for s in everything if s.cpu is None and s.attributes]
    assert without == [done]
    pods = (await cri_client.runtime.list_pod_sandbox_stats(cri.ListPodSandboxStatsRequest())).stats
    assert {s.attributes.id for s in pods if s.attributes} == {pod, other}
    picked = cri.ListPodSandboxStatsRequest(filter=cri.PodSandboxStatsFilter(id=other))
    [stats] = (await cri_client.runtime.list_pod_sandbox_stats(picked)).stats
    assert stats.attributes is not None and stats.attributes.id == other
    await cri_client.runtime.stop_pod_sandbox(cri.StopPodSandboxRequest(pod_sandbox_id=other))
    pods = (await cri_client.runtime.list_pod_sandbox_stats(cri.ListPodSandboxStatsRequest())).stats
    assert [s.attributes.id for s in pods if s.attributes] == [pod]
    with pytest.raises(GRPCError) as info:
        await of_pod(cri_client, other)
    assert info.value.status is Status.FAILED_PRECONDITION
    for call in (of(cri_client, "f" * 64), of_pod(cri_client, "f" * 64)):
        with pytest.raises(GRPCError) as info:
            await call
        assert info.value.status is Status.NOT_FOUND
    await cri_client.remove_pod(other)


async def test_a_guest_that_does_not_answer_holds_nobody_up(cri_client: Cri, pod: str) -> None:
    other = await cri_client.run_pod()
    container = await cri_client.sh(other, "sleep 600")
    known = await eventually(lambda: of(cri_client, container), lambda seen: usage(seen.cpu) > 0)
    await eventually(
        lambda: of_pod(cri_client, pod), lambda seen: seen.linux is not None and seen.linux.cpu is not None
    )
    complaint = f"sandbox {other[:12]}: no statistics"
    complaints = cri_client.daemon.text().count(complaint)
    [line] = [p for p in cri_client.daemon.processes() if "qemu-system" in p and other[:12] in p]
    os.kill(int(line.split()[0]), signal.SIGSTOP)
    try:
        await asyncio.sleep(0.6)
        for _ in range(2):
            began = time.monotonic()
            reply = await cri_client.runtime.list_pod_sandbox_stats(cri.ListPodSandboxStatsRequest())
            assert time.monotonic() - began < 15
            stats = {s.attributes.id: s for s in reply.stats if s.attributes}
            answering, silent = stats[pod].linux, stats[other].linux
            assert answering is not None and answering.cpu is not None
            assert silent is not None
            [last] = silent.containers
            assert last.cpu == known.cpu, "what was last known, with its time"
        assert cri_client.daemon.text().count(complaint) == complaints + 1
    finally:
        os.kill(int(line.split()[0]), signal.SIGCONT)
    await eventually(lambda: of(cri_client, container), lambda seen: seen.cpu != known.cpu)
    await cri_client.remove_pod(other)


async def test_what_the_vm_costs_its_host(cri_client: Cri, pod: str) -> None:
    request = cri.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True)
    host = json.loads((await cri_client.runtime.pod_sandbox_status(request)).info["host"])
    names = {process["name"] for process in host["processes"]}
    assert any(name.startswith("qemu-system") for name in names)
    assert len(host["processes"]) >= 2, "the shim too"
    assert 20 * MIB < host["overhead_memory_bytes"] < 300 * MIB
    assert host["memory_bytes"] > host["guest_memory_bytes"] > 10 * MIB
    assert host["cpu_ns"] >= host["guest_cpu_ns"] / 2
    assert host["cgroup"].endswith(pod[:12])


async def test_statistics_while_containers_come_and_go(cri_client: Cri, pod: str) -> None:
    async def churn() -> None:
        for _ in range(4):
            container = await cri_client.run(pod, "/bin/true")
            await cri_client.wait(container)
            await cri_client.runtime.remove_container(cri.RemoveContainerRequest(container_id=container))

    working = asyncio.gather(churn(), churn())
    while not working.done():
        await cri_client.runtime.list_container_stats(cri.ListContainerStatsRequest())
        await of_pod(cri_client, pod)
        await asyncio.sleep(0.05)
    await working


async def test_metrics(cri_client: Cri, pod: str) -> None:
    container = await cri_client.sh(pod, "dd if=/dev/zero of=/f bs=1M count=8; sync; echo up; sleep 600")
    await cri_client.logged(container, "up")
    described = (
        await cri_client.runtime.list_metric_descriptors(cri.ListMetricDescriptorsRequest())
    ).descriptors
    keys = {d.name: d.label_keys for d in described}
    [told] = (
        await cri_client.runtime.list_pod_sandbox_metrics(cri.ListPodSandboxMetricsRequest())
    ).pod_metrics
    streamed = [
        pod
        async for page in cri_client.runtime.stream_pod_sandbox_metrics(cri.StreamPodSandboxMetricsRequest())
        for pod in page.pod_sandbox_metrics
    ]
    assert [p.pod_sandbox_id for p in streamed] == [pod] == [told.pod_sandbox_id]
    [one] = told.container_metrics
    assert one.container_id == container
    everything = [*told.metrics, *one.metrics]
    assert {m.name for m in everything} == set(keys) - {"container_spec_cpu_quota"}, "that one has no quota"
    assert all(len(m.label_values) == len(keys[m.name]) for m in everything)
    values = {(m.name, *m.label_values[5:]): value(m.value) for m in everything}
    assert values["container_fs_usage_bytes", "scratch"] >= 8 * MIB
    assert values["container_fs_writes_bytes_total", "scratch"] >= 8 * MIB
    assert values["container_processes",] >= 1
    assert values["container_memory_max_usage_bytes",] > MIB
    assert values["container_network_transmit_packets_total", "eth0"] > 0
