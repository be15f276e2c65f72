"""The life of pods and containers through the CRI socket, in real virtual machines."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from hyperpod.api.gen.runtime import v1 as cri
from tests.daemonkit import BUSYBOX, PATIENCE, Cri

pytestmark = pytest.mark.vm

BINARY = cri.KeyValue(key="BIN", value=b"\xff\xfe\n\xe9")


async def test_the_guest_is_another_machine(cri_client: Cri, pod: str) -> None:
    other = await cri_client.run_pod()
    script = "uname -r; cat /proc/sys/kernel/random/boot_id; hostname; ls /; echo over; sleep 600"
    facts = []
    for ident in (pod, other):
        container = await cri_client.sh(ident, script)
        facts.append([text for _, _, text in await cri_client.logged(container, "over")])
    host_boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert facts[0][0] != os.uname().release
    assert len({host_boot, facts[0][1], facts[1][1]}) == 3
    assert facts[0][2] != facts[1][2]
    assert "lost+found" not in facts[0]
    await cri_client.remove_pod(other)


async def test_log_lines_and_exit_code(cri_client: Cri, pod: str) -> None:
    container = await cri_client.sh(pod, "echo out; echo err >&2; printf unterminated; exit 7")
    status = await cri_client.wait(container)
    assert (status.exit_code, status.reason) == (7, "Error")
    assert status.started_at <= status.finished_at <= time.time_ns()
    log = await cri_client.log(container)
    assert [x for x in log if x[0] == "stdout"] == [("stdout", "F", "out"), ("stdout", "P", "unterminated")]
    assert [x for x in log if x[0] == "stderr"] == [("stderr", "F", "err")]


async def test_success_is_completed(cri_client: Cri, pod: str) -> None:
    status = await cri_client.wait(await cri_client.run(pod, "/bin/true"))
    assert (status.exit_code, status.reason) == (0, "Completed")


@pytest.mark.parametrize("envs", [[], [BINARY]])
async def test_a_missing_entry_point_is_a_start_error(
    cri_client: Cri, pod: str, envs: list[cri.KeyValue]
) -> None:
    container = await cri_client.create(pod, "/no/such/program", envs=envs)
    with pytest.raises(GRPCError) as info:
        await cri_client.start(container)
    assert "/no/such/program" in str(info.value.message)
    status = await cri_client.status(container)
    assert status.state == cri.ContainerState.CONTAINER_EXITED
    assert (status.exit_code, status.reason) == (128, "StartError")
    assert status.finished_at > 0


async def test_exec_sync(cri_client: Cri, pod: str) -> None:
    container = await cri_client.sh(pod, "sleep 600")
    reply = await cri_client.exec(container, "/bin/sh", "-c", "echo o; echo e >&2; exit 3")
    assert (reply.stdout, reply.stderr, reply.exit_code) == (b"o\n", b"e\n", 3)
    big = await cri_client.exec(container, "/bin/sh", "-c", "head -c 1000000 /dev/zero")
    assert big.stdout == b"\0" * 1_000_000
    with pytest.raises(GRPCError) as info:
        await cri_client.exec(container, "/bin/sh", "-c", "sleep 500 & sleep 501", timeout=2)
    assert info.value.status is Status.DEADLINE_EXCEEDED
    left = await cri_client.exec(container, "/bin/sh", "-c", "ps | grep -c 'sleep 50[01]' || true")
    assert left.stdout.strip() in (b"0", b"1"), "the exec's whole cgroup is killed (the grep itself may show)"


async def test_stop_graces_and_overtaking(cri_client: Cri, pod: str) -> None:
    deaf = await cri_client.sh(pod, "trap '' TERM; echo up; while :; do sleep 1; done")
    await cri_client.logged(deaf, "up")
    slow = asyncio.ensure_future(cri_client.stop(deaf, timeout=500))
    await asyncio.sleep(0.5)
    await cri_client.stop(deaf, timeout=1)
    await asyncio.wait_for(slow, PATIENCE)
    status = await cri_client.status(deaf)
    assert (status.exit_code, status.reason) == (137, "Error")
    polite = await cri_client.sh(pod, "trap 'exit 5' TERM; echo up; while :; do sleep 0.1; done")
    await cri_client.logged(polite, "up")
    await cri_client.stop(polite, timeout=120)
    assert (await cri_client.status(polite)).exit_code == 5


async def test_lists_and_prefixes(cri_client: Cri, pod: str) -> None:
    container = await cri_client.sh(pod, "sleep 600", labels={"x": "y"})
    listed = (await cri_client.runtime.list_containers(cri.ListContainersRequest())).containers
    assert container in [c.id for c in listed]
    picked = await cri_client.runtime.list_containers(
        cri.ListContainersRequest(
            filter=cri.ContainerFilter(label_selector={"x": "y"}, pod_sandbox_id=pod[:10])
        )
    )
    assert [c.id for c in picked.containers] == [container]
    assert (await cri_client.status(container[:14])).id == container
    none = await cri_client.runtime.list_containers(
        cri.ListContainersRequest(
            filter=cri.ContainerFilter(
                state=cri.ContainerStateValue(state=cri.ContainerState.CONTAINER_EXITED)
            )
        )
    )
    assert none.containers == []
    pods = (await cri_client.runtime.list_pod_sandbox(cri.ListPodSandboxRequest())).items
    assert pod in [p.id for p in pods]


async def test_unknown_things(cri_client: Cri) -> None:
    ghost = "f" * 64
    await cri_client.stop(ghost)
    await cri_client.runtime.remove_container(cri.RemoveContainerRequest(container_id=ghost))
    await cri_client.remove_pod(ghost)
    for call in (
        cri_client.status(ghost),
        cri_client.runtime.pod_sandbox_status(cri.PodSandboxStatusRequest(pod_sandbox_id=ghost)),
        cri_client.exec(ghost, "true"),
        cri_client.start(ghost),
    ):
        with pytest.raises(GRPCError) as info:
            await call
        assert info.value.status is Status.NOT_FOUND


async def test_a_retry_joins_and_another_configuration_is_refused(cri_client: Cri) -> None:
    config = cri_client.pod_config()
    first, second = await asyncio.gather(cri_client.run_pod(config), cri_client.run_pod(config))
    assert first == second
    config.labels["app"] = "other"
    with pytest.raises(GRPCError) as info:
        await cri_client.run_pod(config)
    assert info.value.status is Status.ALREADY_EXISTS


async def test_environment_users_and_root(cri_client: Cri, pod: str) -> None:
    context = cri.LinuxContainerSecurityContext(
        run_as_user=cri.Int64Value(value=1234),
        run_as_group=cri.Int64Value(value=77),
        supplemental_groups=[88],
        readonly_rootfs=True,
    )
    container = await cri_client.sh(
        pod,
        "id; pwd; echo $GREETING; printf '%s' \"$BIN\" | od -An -tx1; touch /x || echo readonly",
        working_dir="/tmp",
        envs=[cri.KeyValue(key="GREETING", value=b"hi"), cri.KeyValue(key="BIN", value="é\n".encode())],
        linux=cri.LinuxContainerConfig(security_context=context),
    )
    await cri_client.wait(container)
    text = [line for stream, _, line in await cri_client.log(container) if stream == "stdout"]
    assert text[0].startswith("uid=1234 gid=77")
    assert "88" in text[0]
    assert text[1:] == ["/tmp", "hi", " c3 a9 0a", "readonly"]


async def test_environment_that_is_no_text(cri_client: Cri, pod: str) -> None:
    """A container has it byte by byte, and its execs too."""
    show = "printf '%s' \"$BIN\" | od -An -tx1; exec sleep 600"
    container = await cri_client.sh(pod, show, envs=[BINARY])
    reply = await cri_client.exec(container, "/bin/sh", "-c", "printf '%s' \"$BIN\"; ls / >&2")
    assert reply.stdout == BINARY.value and b"envexec" not in reply.stderr
    await cri_client.logged(container, " ff fe 0a e9")
    await cri_client.stop(container)
    assert [line for _, _, line in await cri_client.log(container)] == [" ff fe 0a e9"]


async def test_tty(cri_client: Cri, pod: str) -> None:
    container = await cri_client.sh(pod, "test -t 1 && echo terminal; echo e >&2", tty=True)
    await cri_client.wait(container)
    assert [line for _, _, line in await cri_client.log(container)] == ["terminal\r", "e\r"]


async def test_rotation_loses_nothing(cri_client: Cri, pod: str) -> None:
    count = 20_000
    # It goes on until it has been rotated twice, however fast it is.
    script = f"i=0; while [ $i -lt {count} ] || ! [ -e /rotated ]; do echo line $i; i=$((i+1)); done"
    container = await cri_client.sh(pod, script)
    path = Path((await cri_client.status(container)).log_path)
    parts: list[Path] = []
    while (await cri_client.status(container)).state == cri.ContainerState.CONTAINER_RUNNING:
        if path.exists() and path.stat().st_size > 50_000:
            target = path.with_name(f"rotated.{len(parts)}")
            path.rename(target)
            parts.append(target)
            try:
                await cri_client.runtime.reopen_container_log(
                    cri.ReopenContainerLogRequest(container_id=container)
                )
                if len(parts) == 2:
                    await cri_client.exec(container, "touch", "/rotated")
            except GRPCError as exc:
                assert exc.status is Status.FAILED_PRECONDITION  # it exited in between
                break
        await asyncio.sleep(0.02)
    await cri_client.wait(container)
    text = b"".join(p.read_bytes() for p in [*parts, path] if p.exists()).decode()
    lines = [line.split(" ", 3)[3] for line in text.splitlines()]
    assert lines == [f"line {i}" for i in range(len(lines))]
    assert len(lines) >= count and len(parts) > 1


async def test_a_dead_vm_tells_the_truth(cri_client: Cri) -> None:
    pod = await cri_client.run_pod()
    container = await cri_client.sh(pod, "echo up; sleep 600")
    [qemu] = [p for p in cri_client.daemon.processes() if "qemu-system" in p and pod[:12] in p]
    os.kill(int(qemu.split()[0]), 9)
    status = await cri_client.wait(container)
    assert (status.exit_code, status.reason) == (255, "Unknown")
    assert "virtual machine" in status.message
    reply = await cri_client.runtime.pod_sandbox_status(cri.PodSandboxStatusRequest(pod_sandbox_id=pod))
    assert reply.status is not None
    assert reply.status.state == cri.PodSandboxState.SANDBOX_NOTREADY


async def test_a_pod_that_is_stopped_did_not_die(cri_client: Cri) -> None:
    pod = await cri_client.run_pod()
    never_started = await cri_client.create(pod, "/bin/true")
    await cri_client.runtime.stop_pod_sandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod))
    assert (await cri_client.status(never_started)).message == "the pod was stopped"
    await cri_client.remove_pod(pod)


async def test_images_in_use_can_be_removed_and_come_back(cri_client: Cri, pod: str) -> None:
    container = await cri_client.sh(pod, "sleep 600")
    await cri_client.images.remove_image(cri.RemoveImageRequest(image=cri.ImageSpec(image=BUSYBOX)))
    reply = await cri_client.exec(container, "echo", "still here")
    assert reply.stdout == b"still here\n"
    with pytest.raises(GRPCError) as info:
        await cri_client.create(pod, "true")
    assert info.value.status is Status.NOT_FOUND
    await cri_client.load_busybox()
    assert (await cri_client.wait(await cri_client.run(pod, "/bin/true"))).exit_code == 0


async def test_pid_namespaces(cri_client: Cri, pod: str) -> None:
    def linux(mode: cri.NamespaceMode) -> cri.LinuxContainerConfig:
        options = cri.NamespaceOption(pid=mode)
        return cri.LinuxContainerConfig(
            security_context=cri.LinuxContainerSecurityContext(namespace_options=options)
        )

    own = await cri_client.sh(pod, "exec sleep 3001", linux=linux(cri.NamespaceMode.CONTAINER))
    shared = await cri_client.sh(pod, "sleep 3002 & exec sleep 3003", linux=linux(cri.NamespaceMode.POD))
    inside = (await cri_client.exec(own, "ps")).stdout.decode()
    assert "sleep 3001" in inside
    assert "sleep 3003" not in inside
    pod_view = (await cri_client.exec(shared, "ps")).stdout.decode()
    assert "sleep 3001" in pod_view
    assert "sleep 3003" in pod_view
    await cri_client.stop(shared, timeout=120)
    assert (await cri_client.status(shared)).exit_code == 143, "not process 1, so SIGTERM's default works"
    witness = await cri_client.sh(pod, "exec sleep 3004", linux=linux(cri.NamespaceMode.POD))
    assert "sleep 3002" not in (await cri_client.exec(witness, "ps")).stdout.decode(), "nobody outlives it"


async def test_the_guests_clock_keeps_pace_with_the_hosts(cri_client: Cri, pod: str) -> None:
    """An emulated guest that counts its time-stamp counter for itself is off by factors on a busy host."""
    container = await cri_client.run(pod, "/bin/sleep", "600")

    async def look() -> tuple[float, float, float]:
        """What the guest's clock says, and the host's before and after that."""
        before = time.monotonic()
        reply = await cri_client.exec(container, "/bin/cat", "/proc/uptime")
        return before, float(reply.stdout.split()[0]), time.monotonic()

    before, guest, after = await look()
    await asyncio.sleep(5)
    later_before, later_guest, later_after = await look()
    assert later_before - after - 0.5 <= later_guest - guest <= later_after - before + 0.5
