"""The life of host pods through the CRI socket: the same calls as for VMs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.sandbox.cgroup import mounted
from tests.daemonkit import BUSYBOX, Cri

BINARY = cri.KeyValue(key="BIN", value=b"\xff\xfe\n\xe9")


HOLD = (
    "for p in /proc/[0-9]*; do "
    "[ $p != /proc/$$ ] && grep -q 'echo up' $p/cmdline 2>/dev/null && exec 9>$p/fd/1; done;"
)
"""For a shell in a pod's pid namespace: keep the output of another one that says `echo up` open."""


async def until_logged(client: Cri, container: str, count: int = 1) -> list[str]:
    async with asyncio.timeout(60):
        while len(lines := await client.log(container)) < count:
            await asyncio.sleep(0.02)
    return [text for _, _, text in lines]


async def test_a_container_s_life(cri_client: Cri, pod: str) -> None:
    script = "uname -r; cat /proc/sys/kernel/random/boot_id; hostname; echo err >&2; printf end; exit 7"
    container = await cri_client.sh(pod, script)
    status = await cri_client.wait(container)
    assert (status.exit_code, status.reason) == (7, "Error")
    assert status.started_at <= status.finished_at <= time.time_ns()
    log = await cri_client.log(container)
    assert ("stderr", "F", "err") in log
    assert ("stdout", "P", "end") in log
    kernel, boot_id, name, _ = [text for stream, _, text in log if stream == "stdout"]
    assert kernel == os.uname().release
    assert boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert name.startswith("pod-")


async def test_exec_and_its_end(cri_client: Cri, pod: str) -> None:
    container = await cri_client.sh(pod, "sleep 600", envs=[BINARY])
    reply = await cri_client.exec(container, "sh", "-c", "echo o; echo e >&2; exit 3")
    assert (reply.stdout, reply.stderr, reply.exit_code) == (b"o\n", b"e\n", 3)
    assert BINARY.value in (await cri_client.exec(container, "sh", "-c", 'printf %s "$BIN"')).stdout
    big = await cri_client.exec(container, "head", "-c", "5000000", "/dev/zero")
    assert big.stdout == b"\0" * 5_000_000
    with pytest.raises(GRPCError) as info:
        await cri_client.exec(container, "sh", "-c", "sleep 500 & sleep 501", timeout=1)
    assert info.value.status is Status.DEADLINE_EXCEEDED
    left = await cri_client.exec(container, "ps")
    assert b"sleep 50" not in left.stdout


async def test_what_a_command_leaves_in_the_background(cri_client: Cri, pod: str) -> None:
    """A postStart hook may start a daemon. It ends with its container."""
    container = await cri_client.run(pod, "sleep", "600")
    script = "(while sleep 0.1; do touch /tmp/alive; done) >/dev/null 2>&1 & echo started"
    for _ in range(2):  # what the first has left is looked at when the second is forgotten
        assert (await cri_client.exec(container, "sh", "-c", script)).stdout == b"started\n"
    check = "rm -f /tmp/alive; while [ ! -e /tmp/alive ]; do sleep 0.1; done"
    assert (await cri_client.exec(container, "sh", "-c", check)).exit_code == 0
    await cri_client.stop(container)
    assert (await cri_client.wait(container)).exit_code == 137


async def test_a_missing_program_is_a_start_error(cri_client: Cri, pod: str) -> None:
    container = await cri_client.create(pod, "/no/such/program")
    with pytest.raises(GRPCError, match="/no/such/program"):
        await cri_client.start(container)
    status = await cri_client.status(container)
    assert (status.exit_code, status.reason) == (128, "StartError")


async def test_stop_has_a_grace(cri_client: Cri, pod: str) -> None:
    deaf = await cri_client.sh(pod, "trap '' TERM; echo up; while :; do sleep 1; done")
    polite = await cri_client.sh(pod, "trap 'exit 5' TERM; echo up; while :; do sleep 0.1; done")
    for container in (deaf, polite):
        await until_logged(cri_client, container)
    await cri_client.stop(deaf, timeout=1)
    await cri_client.stop(polite, timeout=60)
    assert (await cri_client.status(deaf)).exit_code == 137
    assert (await cri_client.status(polite)).exit_code == 5


async def test_out_of_memory(cri_client: Cri, pod: str) -> None:
    limit = cri.LinuxContainerConfig(resources=cri.LinuxContainerResources(memory_limit_in_bytes=32 << 20))
    container = await cri_client.sh(pod, "exec tail /dev/zero", linux=limit)
    status = await cri_client.wait(container)
    assert (status.exit_code, status.reason) == (137, "OOMKilled")
    reply = await cri_client.runtime.pod_sandbox_status(cri.PodSandboxStatusRequest(pod_sandbox_id=pod))
    assert reply.status is not None
    assert reply.status.state == cri.PodSandboxState.SANDBOX_READY


async def test_limits_and_figures(cri_client: Cri, pod: str) -> None:
    resources = cri.LinuxContainerResources(memory_limit_in_bytes=64 << 20, cpu_shares=512, oom_score_adj=500)
    container = await cri_client.sh(
        pod, "while :; do :; done", linux=cri.LinuxContainerConfig(resources=resources)
    )
    [above] = [path for path in cri_client.daemon.cgroups() if "/memory/" in path]
    folder = Path(above) / "pod" / container
    assert int((folder / "memory.limit_in_bytes").read_text()) == 64 << 20
    await cri_client.runtime.update_container_resources(
        cri.UpdateContainerResourcesRequest(
            container_id=container, linux=cri.LinuxContainerResources(memory_limit_in_bytes=96 << 20)
        )
    )
    assert int((folder / "memory.limit_in_bytes").read_text()) == 96 << 20
    async with asyncio.timeout(60):  # on a busy host it has little of a CPU
        while True:
            request = cri.ContainerStatsRequest(container_id=container)
            stats = (await cri_client.runtime.container_stats(request)).stats
            assert (
                stats is not None and stats.cpu is not None and stats.cpu.usage_core_nano_seconds is not None
            )
            if stats.cpu.usage_core_nano_seconds.value > 10**7:
                break
            await asyncio.sleep(0.1)
    assert stats.memory is not None and stats.writable_layer
    assert stats.memory.working_set_bytes is not None
    assert 0 < stats.memory.working_set_bytes.value < 96 << 20
    whole = await cri_client.runtime.pod_sandbox_stats(cri.PodSandboxStatsRequest(pod_sandbox_id=pod))
    assert whole.stats is not None and whole.stats.linux is not None and whole.stats.linux.network is not None
    default = whole.stats.linux.network.default_interface
    assert default is not None
    assert (default.name, whole.stats.linux.network.interfaces) == ("eth0", []), (
        "the others, of which none is"
    )


async def test_a_cpu_quota_and_its_end(cri_client: Cri, pod: str) -> None:
    """What a kubelet sends for a container with CPUs of its own: -1, also at first."""

    async def update(container: str, **resources: object) -> None:
        linux = cri.LinuxContainerResources(**resources)  # type: ignore[arg-type]
        request = cri.UpdateContainerResourcesRequest(container_id=container, linux=linux)
        await cri_client.runtime.update_container_resources(request)

    def limited(quota: int) -> cri.LinuxContainerConfig:
        return cri.LinuxContainerConfig(
            resources=cri.LinuxContainerResources(cpu_quota=quota, cpu_period=100_000)
        )

    free = await cri_client.sh(pod, "sleep 600", linux=limited(-1))
    bound = await cri_client.sh(pod, "sleep 600", linux=limited(20_000))
    [above] = [path for path in cri_client.daemon.cgroups() if "/cpu/" in path]
    for container, quota in ((free, -1), (bound, 20_000)):
        file = Path(above) / "pod" / container / "cpu.cfs_quota_us"
        assert int(file.read_text()) == quota
        await update(container, cpu_quota=30_000)
        assert int(file.read_text()) == 30_000
        await update(container, cpu_quota=-1)
        assert int(file.read_text()) == -1
        await update(container, cpu_shares=512)
        assert int(file.read_text()) == -1


@pytest.mark.skipif(Path("/sys/fs/cgroup/cgroup.controllers").exists(), reason="this host has cgroup v2")
async def test_files_of_cgroup_v2_are_refused_where_there_is_v1(cri_client: Cri, pod: str) -> None:
    linux = cri.LinuxContainerResources(unified={"memory.high": "1"})
    with pytest.raises(GRPCError) as info:
        await cri_client.create(pod, "true", linux=cri.LinuxContainerConfig(resources=linux))
    assert info.value.status is Status.INVALID_ARGUMENT
    assert "unified" in str(info.value.message)
    container = await cri_client.sh(pod, "sleep 600")
    request = cri.UpdateContainerResourcesRequest(container_id=container, linux=linux)
    with pytest.raises(GRPCError) as info:
        await cri_client.runtime.update_container_resources(request)
    assert info.value.status is Status.INVALID_ARGUMENT
    await cri_client.runtime.update_container_resources(
        cri.UpdateContainerResourcesRequest(
            container_id=container, linux=cri.LinuxContainerResources(cpu_shares=3)
        )
    )


async def test_which_place_is_told(cri_client: Cri, pod: str) -> None:
    reply = await cri_client.runtime.pod_sandbox_status(
        cri.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True)
    )
    assert reply.status is not None and reply.status.network is not None
    assert reply.status.runtime_handler == "host"
    assert reply.status.network.ip
    assert reply.info["place"] == "host"
    assert json.loads(reply.info["host_pod"])["kernel"] == os.uname().release
    assert {p["name"] for p in json.loads(reply.info["host"])["processes"]} >= {
        "hyperpod-agent",
        "hyperpod-shim",
    }
    status = await cri_client.runtime.status(cri.StatusRequest())
    features = {item.name: item.features for item in status.runtime_handlers}
    assert set(features) == {"", "vm", "host"}
    host = features["host"]
    assert host is not None and host.user_namespaces
    for item in features.values():
        assert item is not None and item.recursive_read_only_mounts


async def test_layers_are_shared_and_given_back(cri_client: Cri, pod: str) -> None:
    first = await cri_client.sh(pod, "echo mine > /file; sleep 600")
    second = await cri_client.sh(pod, "cat /file; sleep 600")
    assert (await cri_client.exec(second, "test", "-e", "/file")).exit_code == 1
    assert cri_client.daemon.loops(patience=0)
    for container in (first, second):
        await cri_client.runtime.remove_container(cri.RemoveContainerRequest(container_id=container))
    assert not cri_client.daemon.loops(), "the last container's end gives the layers back"


async def test_a_retry_joins(cri_client: Cri) -> None:
    config = cri_client.pod_config()
    first, second = await asyncio.gather(cri_client.run_pod(config), cri_client.run_pod(config))
    assert first == second == await cri_client.run_pod(config)
    cri_client.handler = "vm"
    with pytest.raises(GRPCError) as info:
        await cri_client.run_pod(config)
    assert info.value.status is Status.ALREADY_EXISTS


async def test_two_pods_of_one_name_at_once(cri_client: Cri) -> None:
    """The second is told so, not given the first one's."""
    config = cri_client.pod_config()
    other = replace(config, labels={"app": "other"})
    made, refused = await asyncio.gather(
        cri_client.run_pod(config), cri_client.run_pod(other), return_exceptions=True
    )
    assert isinstance(made, str)
    assert isinstance(refused, GRPCError) and refused.status is Status.ALREADY_EXISTS
    assert made == await cri_client.run_pod(config)


async def test_retries_of_a_create_join_it(cri_client: Cri, pod: str) -> None:
    """Also while it is being made; and with another configuration they are told so, not given it."""

    def request(*argv: str, **more: object) -> cri.CreateContainerRequest:
        config = cri.ContainerConfig(
            metadata=cri.ContainerMetadata(name="one"),
            image=cri.ImageSpec(image=BUSYBOX),
            command=list(argv),
            **more,  # type: ignore[arg-type]
        )
        return cri.CreateContainerRequest(pod_sandbox_id=pod, config=config)

    create = cri_client.runtime.create_container
    absent = [cri.Device(host_path="/dev/absent", permissions="r")]
    for _ in range(10):
        failed = await asyncio.gather(
            *(create(request("true", devices=absent)) for _ in range(8)), return_exceptions=True
        )
        assert {str(answer) for answer in failed} == {str(failed[0])}
        assert isinstance(failed[0], GRPCError) and failed[0].status is Status.FAILED_PRECONDITION
    first, other, again = await asyncio.gather(
        *(create(request(word)) for word in ("true", "false", "true")), return_exceptions=True
    )
    assert isinstance(first, cri.CreateContainerResponse) and first == again
    assert isinstance(other, GRPCError) and other.status is Status.ALREADY_EXISTS
    await cri_client.start(first.container_id)
    assert (await cri_client.wait(first.container_id)).exit_code == 0


async def test_a_deep_tree_hides_no_figures(cri_client: Cri, pod: str) -> None:
    """What a container makes of its own files must not keep the kubelet from counting everybody's."""
    script = "i=0; while [ $i -lt 1600 ]; do mkdir a && cd a && i=$((i+1)); done; echo done; sleep 600"
    container = await cri_client.sh(pod, script)
    await until_logged(cri_client, container)
    info = await cri_client.images.image_fs_info(cri.ImageFsInfoRequest())
    [disk] = info.container_filesystems
    assert disk.inodes_used is not None and disk.inodes_used.value > 1600


def process_of(status: cri.ContainerStatusResponse) -> int:
    pid: int = json.loads(status.info["container"])["pid"]
    return pid


@contextlib.contextmanager
def reused(pid: int) -> Iterator[subprocess.Popen[bytes] | None]:
    """Another process of the host with the number of one that has ended; None when somebody else has got it."""
    for _ in range(50):
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        with subprocess.Popen(["sleep", "600"]) as other:
            try:
                if other.pid == pid:
                    yield other
                    return
            finally:
                other.kill()
    yield None


async def test_who_gets_a_container_s_number_is_not_taken_for_it(cri_client: Cri, pod: str) -> None:
    """Between the end of a container's process and the report of it, which others can put off."""
    async with asyncio.timeout(120):
        while not await its_number_is_anothers(cri_client, pod):
            pass


async def its_number_is_anothers(cri_client: Cri, pod: str) -> bool:
    """False when a busy host has told of the end before all was looked at, or given the number away."""
    over = f"/dev/shm/{secrets.token_hex(4)}"
    container = await cri_client.sh(pod, f"echo up; while [ ! -e {over} ]; do sleep 0.1; done; exit 0")
    holder = await cri_client.sh(pod, f"{HOLD} echo held; sleep 600")
    await until_logged(cri_client, holder)
    target = cri.NamespaceOption(pid=cri.NamespaceMode.TARGET, target_id=container)
    context = cri.LinuxContainerSecurityContext(namespace_options=target)
    debugger = await cri_client.create(pod, "ps", linux=cri.LinuxContainerConfig(security_context=context))
    verbose = cri.ContainerStatusRequest(container_id=container, verbose=True)
    pid = process_of(await cri_client.runtime.container_status(verbose))
    await cri_client.exec(holder, "touch", over)
    while Path(f"/proc/{pid}").exists():
        await asyncio.sleep(0.01)
    with reused(pid) as bystander:
        state = (await cri_client.status(container)).state
        with pytest.raises(GRPCError, match="has just ended|EXITED") as info:
            await cri_client.start(debugger)
        in_time = bystander is not None and "has just ended" in str(info.value.message)
        assert state == cri.ContainerState.CONTAINER_RUNNING or not in_time
        stopping = asyncio.create_task(cri_client.stop(container, timeout=60))
        await asyncio.sleep(0.3)
        assert bystander is None or bystander.poll() is None
    await cri_client.stop(holder)
    await stopping
    assert (await cri_client.status(container)).exit_code == 0
    return in_time


@pytest.mark.skipif(not Path("/sys/fs/cgroup/freezer").exists(), reason="cgroup v2 kills the frozen, too")
async def test_a_pod_that_does_not_die_is_not_called_stopped(cri_client: Cri, pod: str) -> None:
    """A process that waits for a disk, here: frozen by somebody else, outlives SIGKILL."""
    container = await cri_client.sh(pod, "sleep 600")
    verbose = cri.ContainerStatusRequest(container_id=container, verbose=True)
    pid = process_of(await cri_client.runtime.container_status(verbose))
    freezer = Path(f"/sys/fs/cgroup/freezer/hp-test-{os.getpid()}")
    freezer.mkdir()
    try:
        (freezer / "cgroup.procs").write_text(str(pid))
        (freezer / "freezer.state").write_text("FROZEN")
        with pytest.raises(GRPCError, match=str(pid)) as info:
            await cri_client.remove_pod(pod)
        assert info.value.status is Status.UNAVAILABLE
        reply = await cri_client.runtime.pod_sandbox_status(cri.PodSandboxStatusRequest(pod_sandbox_id=pod))
        assert reply.status is not None
        assert reply.status.state == cri.PodSandboxState.SANDBOX_NOTREADY
    finally:
        (freezer / "freezer.state").write_text("THAWED")
        while Path(f"/proc/{pid}").exists():
            await asyncio.sleep(0.01)
        freezer.rmdir()
    await cri_client.remove_pod(pod)


@contextlib.contextmanager
def small_parent(memory: int) -> Iterator[str]:
    """A pod's cgroup as the kubelet makes it, with a limit; nobody else may be left in it."""
    name = f"/hptest{secrets.token_hex(4)}"
    for hierarchy in mounted():
        folder = Path(hierarchy.mount + name)
        folder.mkdir()
        if "cpuset" in hierarchy.controllers:
            for file in ("cpuset.cpus", "cpuset.mems"):
                (folder / file).write_text((Path(hierarchy.mount) / file).read_text())
        for file in ("memory.limit_in_bytes", "memory.max"):
            if (folder / file).exists():
                (folder / file).write_text(str(memory))
    yield name
    for hierarchy in mounted():
        Path(hierarchy.mount + name).rmdir()


async def test_a_pods_limit_is_its_containers(cri_client: Cri) -> None:
    """Agent and shim, which take more than this, are not in it: as with other runtimes."""
    with small_parent(8 << 20) as parent:
        pod = await cri_client.run_pod(cri_client.pod_config(cgroup_parent=parent))
        container = await cri_client.sh(pod, "cat /proc/self/cgroup; sleep 600")
        await until_logged(cri_client, container)
        assert (await cri_client.exec(container, "true")).exit_code == 0
        inside = [path for path in cri_client.daemon.cgroups() if parent in path]
        assert any(Path(path, "pod", container).is_dir() for path in inside)
        for line in cri_client.daemon.processes():
            if pod[:12] in line and ("hyperpod-agent" in line or "hyperpod-shim" in line):
                assert parent not in Path(f"/proc/{line.split()[0]}/cgroup").read_text()
        await cri_client.remove_pod(pod)
