"""Requests that cannot be: each gets the right code, an error that names the thing, and leaves nothing."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from hyperpod.api.gen.runtime import v1 as cri
from tests.daemonkit import BUSYBOX, Cri, daemon

pytestmark = pytest.mark.vm

INVALID, MISSING, WRONG_STATE = Status.INVALID_ARGUMENT, Status.NOT_FOUND, Status.FAILED_PRECONDITION
REFUSED, TAKEN, DENIED = Status.UNIMPLEMENTED, Status.ALREADY_EXISTS, Status.PERMISSION_DENIED

NODE, TARGET = cri.NamespaceMode.NODE, cri.NamespaceMode.TARGET
LOCALHOST = cri.SecurityProfileProfileType.Localhost


async def refused(call: Awaitable[Any], status: Status, *texts: str) -> str:
    """The call fails with this code, and its message says all of `texts`."""
    with pytest.raises(GRPCError) as info:
        await call
    message = info.value.message or ""
    assert info.value.status is status, f"{info.value.status.name}: {message}"
    for text in texts:
        assert text in message
    return message


def memory(size: int) -> dict[str, Any]:
    return {"resources": cri.LinuxContainerResources(memory_limit_in_bytes=size)}


def pod_security(**values: Any) -> dict[str, Any]:
    return {"security_context": cri.LinuxSandboxSecurityContext(**values)}


LINUX_OF_A_POD: list[tuple[dict[str, Any], Status, str]] = [
    (memory(10 << 40), INVALID, "this host has"),
    (memory(-1), INVALID, "memory_limit_in_bytes"),
    ({"resources": cri.LinuxContainerResources(cpu_period=5, cpu_quota=-7)}, INVALID, "cpu_period"),
    ({"resources": cri.LinuxContainerResources(cpu_shares=-1)}, INVALID, "cpu_shares"),
    (pod_security(namespace_options=cri.NamespaceOption(network=NODE)), DENIED, "host_pods"),
    (pod_security(namespace_options=cri.NamespaceOption(ipc=NODE)), DENIED, "host_pods"),
    (pod_security(namespace_options=cri.NamespaceOption(pid=cri.NamespaceMode(9))), INVALID, "pid"),
    ({"sysctls": {"../kernel": "1"}}, INVALID, "'../kernel'"),
    (pod_security(namespace_options=cri.NamespaceOption(pid=TARGET)), INVALID, "pid"),
]


async def test_pods_that_cannot_be(cri_client: Cri) -> None:
    for linux, status, text in LINUX_OF_A_POD:
        await refused(cri_client.run_pod(cri_client.pod_config(**linux)), status, text)
    request = cri.RunPodSandboxRequest
    await refused(cri_client.runtime.run_pod_sandbox(request()), INVALID, "config")
    plain = cri_client.pod_config()
    for field, value, text in (
        ("metadata", None, "metadata"),
        ("metadata", cri.PodSandboxMetadata(uid="u", namespace="n"), "name"),
        ("hostname", "h" * 65, "hostname"),
        ("hostname", "a/b", "hostname"),
        ("log_directory", "relative", "log_directory"),
        ("port_mappings", [cri.PortMapping(container_port=80, host_port=70_000)], "host_port"),
    ):
        config = dataclasses.replace(plain, **{field: value})  # type: ignore[arg-type]
        await refused(cri_client.run_pod(config), INVALID, text)
    handler = request(config=cri_client.pod_config(), runtime_handler="runc")
    await refused(cri_client.runtime.run_pod_sandbox(handler), INVALID, "'runc'")
    assert (await cri_client.runtime.list_pod_sandbox(cri.ListPodSandboxRequest())).items == []


def security(**values: Any) -> dict[str, Any]:
    return {"linux": cri.LinuxContainerConfig(security_context=cri.LinuxContainerSecurityContext(**values))}


def limits(**values: Any) -> dict[str, Any]:
    return {"linux": cri.LinuxContainerConfig(resources=cri.LinuxContainerResources(**values))}


CONTAINERS: list[tuple[dict[str, Any], Status, str]] = [
    (
        {"mounts": [cri.Mount(container_path="/m", mount_options=["noexec"], host_path="/etc")]},
        REFUSED,
        "mounts[0].mount_options",
    ),
    ({"mounts": [cri.Mount(container_path="/m", host_path="/no/such")]}, Status.NOT_FOUND, "/no/such"),
    ({"mounts": [cri.Mount(container_path="/", host_path="/etc")]}, INVALID, "mounts[0].container_path"),
    ({"mounts": [cri.Mount(container_path="m", host_path="/etc")]}, INVALID, "mounts[0].container_path 'm'"),
    ({"mounts": [cri.Mount(container_path="/m", host_path="../x")]}, INVALID, "mounts[0].host_path '../x'"),
    ({"devices": [cri.Device(container_path="/dev/x", host_path="/dev/sda")]}, REFUSED, "'/dev/sda'"),
    ({"devices": [cri.Device(container_path="/dev/x", host_path="/dev/kvm")]}, WRONG_STATE, "'/dev/kvm'"),
    (security(privileged=True), INVALID, "pod whose security context is privileged"),
    (security(namespace_options=cri.NamespaceOption(pid=NODE)), INVALID, "pid"),
    (security(namespace_options=cri.NamespaceOption(network=NODE)), INVALID, "network"),
    (security(namespace_options=cri.NamespaceOption(pid=TARGET)), INVALID, "target_id is empty"),
    (security(namespace_options=cri.NamespaceOption(pid=TARGET, target_id="f" * 64)), MISSING, "f" * 64),
    (security(seccomp=cri.SecurityProfile(profile_type=LOCALHOST, localhost_ref="x")), INVALID, "'x'"),
    (
        security(seccomp=cri.SecurityProfile(profile_type=LOCALHOST, localhost_ref="/no/such.json")),
        WRONG_STATE,
        "'/no/such.json'",
    ),
    (security(apparmor=cri.SecurityProfile(profile_type=LOCALHOST, localhost_ref="x")), REFUSED, "AppArmor"),
    (security(run_as_username="nobody-here"), INVALID, "'nobody-here' is not in the image's /etc/passwd"),
    (security(run_as_group=cri.Int64Value(value=5)), INVALID, "run_as_group is set without run_as_user"),
    (security(run_as_user=cri.Int64Value(value=-5)), INVALID, "run_as_user"),
    (security(capabilities=cri.Capability(add_capabilities=["CAP_MAGIC"])), INVALID, "CAP_MAGIC"),
    (limits(memory_limit_in_bytes=-1), INVALID, "memory_limit_in_bytes"),
    (limits(memory_limit_in_bytes=1 << 62), INVALID, "memory_limit_in_bytes"),
    (limits(oom_score_adj=4000), INVALID, "oom_score_adj"),
    (limits(cpu_quota=1), INVALID, "cpu_quota"),
    ({"log_path": "../out.log"}, INVALID, "../out.log"),
    ({"log_path": "/etc/passwd"}, INVALID, "/etc/passwd"),
    ({"args": ["a\0b"]}, INVALID, "NUL"),
    ({"envs": [cri.KeyValue(key="A=B", value=b"x")]}, INVALID, "A=B"),
    ({"envs": [cri.KeyValue(key="A", value=b"\0")]}, INVALID, "'A'"),
    ({"envs": [cri.KeyValue(key="A", value=b"x" * (1 << 20))]}, INVALID, "bytes"),
    ({"envs": [cri.KeyValue(key="A", value=b"x" * 131_072)]}, INVALID, "'A'"),
    ({"args": ["x" * 131_072]}, INVALID, "argument 1"),
    ({"working_dir": "not/absolute"}, INVALID, "not/absolute"),
    ({"metadata": cri.ContainerMetadata()}, INVALID, "name"),
    ({"metadata": None}, INVALID, "metadata"),
    ({"image": None}, INVALID, "image"),
    ({"image": cri.ImageSpec(image="no/such:image")}, MISSING, "no/such:image"),
    ({"image": cri.ImageSpec(image="not an image")}, MISSING, "not an image"),
    ({"image": cri.ImageSpec(image="sha256:" + "0" * 64)}, MISSING, "sha256:000"),
    ({"image": cri.ImageSpec(image=BUSYBOX, runtime_handler="gvisor")}, INVALID, "gvisor"),
    ({"stop_signal": cri.Signal(999)}, INVALID, "stop_signal"),
]


async def test_containers_that_cannot_be(cri_client: Cri, pod: str) -> None:
    for more, status, text in CONTAINERS:
        values: dict[str, Any] = {
            "metadata": cri.ContainerMetadata(name="c"),
            "image": cri.ImageSpec(image=BUSYBOX),
            "command": ["/bin/true"],
            "log_path": "c.log",
            **more,
        }
        request = cri.CreateContainerRequest(pod_sandbox_id=pod, config=cri.ContainerConfig(**values))
        await refused(cri_client.runtime.create_container(request), status, text)
    await refused(
        cri_client.runtime.create_container(cri.CreateContainerRequest(pod_sandbox_id=pod)), INVALID, "config"
    )
    listed = await cri_client.runtime.list_containers(cri.ListContainersRequest())
    assert listed.containers == []
    folder = cri_client.daemon.state / "containers"
    assert [path.name for path in folder.iterdir() if not path.name.startswith(".")] == []
    assert (await cri_client.wait(await cri_client.run(pod, "/bin/true"))).exit_code == 0


async def test_ids(cri_client: Cri, pod: str) -> None:
    runtime, ghost = cri_client.runtime, "e" * 64
    for empty in (
        cri_client.status(""),
        cri_client.start(""),
        cri_client.stop(""),
        cri_client.exec("", "true"),
        runtime.remove_container(cri.RemoveContainerRequest()),
        runtime.pod_sandbox_status(cri.PodSandboxStatusRequest()),
        runtime.stop_pod_sandbox(cri.StopPodSandboxRequest()),
        runtime.remove_pod_sandbox(cri.RemovePodSandboxRequest()),
        cri_client.create("", "true"),
    ):
        await refused(empty, INVALID, "id given")
    await refused(cri_client.create(ghost, "true"), MISSING, ghost)
    reopen = runtime.reopen_container_log
    await refused(reopen(cri.ReopenContainerLogRequest(container_id=ghost)), MISSING, ghost)
    await refused(cri_client.exec("zzz", "true"), MISSING, "'zzz'")
    known: list[str] = []
    while len({ident[0] for ident in known}) == len(known):  # 17 at most have different first digits
        known.append(await cri_client.create(pod, "/bin/true"))
    for call in (cri_client.status, cri_client.start, cri_client.stop):
        await refused(call(known[-1][0]), INVALID, "ambiguous", f"{known[-1][0]!r}")
    states = {(await cri_client.status(ident)).state for ident in known}
    assert states == {cri.ContainerState.CONTAINER_CREATED}


async def test_wrong_states(cri_client: Cri, pod: str) -> None:
    runtime = cri_client.runtime
    created = await cri_client.create(pod, "/bin/sleep", "600", name="one")
    await refused(cri_client.exec(created, "true"), WRONG_STATE, created[:12], "created")
    await refused(cri_client.create(pod, "/bin/true", name="one"), TAKEN, "one", created)
    await cri_client.start(created)
    await refused(cri_client.start(created), WRONG_STATE, created[:12], "running")
    await refused(runtime.exec_sync(cri.ExecSyncRequest(container_id=created)), INVALID, "without a command")
    await refused(
        runtime.exec_sync(cri.ExecSyncRequest(container_id=created, cmd=["x"], timeout=-1)),
        INVALID,
        "timeout",
    )
    await refused(cri_client.exec(created, "/no/such"), MISSING, "/no/such")
    await refused(cri_client.stop(created, timeout=-1), INVALID, "timeout")
    await runtime.remove_container(cri.RemoveContainerRequest(container_id=created))
    await refused(cri_client.status(created), MISSING, created)
    done = await cri_client.run(pod, "/bin/true")
    await cri_client.wait(done)
    await refused(cri_client.start(done), WRONG_STATE, "exited")
    await refused(cri_client.exec(done, "true"), WRONG_STATE, "exited")
    reopen = cri.ReopenContainerLogRequest(container_id=done)
    await refused(runtime.reopen_container_log(reopen), WRONG_STATE, "exited")
    await cri_client.stop(done)
    waiting = await cri_client.create(pod, "/bin/true")
    await runtime.stop_pod_sandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod))
    await refused(cri_client.create(pod, "/bin/true"), WRONG_STATE, pod[:12], "stopped")
    await refused(cri_client.start(waiting), WRONG_STATE)
    await runtime.stop_pod_sandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod))


async def test_what_only_the_start_can_tell(cri_client: Cri, pod: str) -> None:
    made = await cri_client.sh(pod, "pwd", working_dir="/not/there")  # as runc does: it is made
    assert (await cri_client.wait(made)).exit_code == 0
    assert await cri_client.log(made) == [("stdout", "F", "/not/there")]
    for argv, more, text in (
        (("/bin/true",), {"working_dir": "/bin/busybox"}, "/bin/busybox"),
        (("/etc",), {}, "/etc"),
        (("relative/none",), {}, "relative/none"),
        (("",), {}, "cannot run ''"),
        (("/bin/true",), limits(memory_limit_in_bytes=4096), "memory limit"),
        (("/bin/true",), limits(unified={"memory.nothing": "1"}), "memory.nothing"),
    ):
        container = await cri_client.create(pod, *argv, **more)
        with pytest.raises(GRPCError) as info:
            await cri_client.start(container)
        assert text.lower() in str(info.value.message).lower()
        status = await cri_client.status(container)
        assert (status.exit_code, status.reason) == (128, "StartError")
        assert status.message


@pytest.mark.parametrize("what", ["missing", "no manifest", "damaged", "not a kernel"])
async def test_a_bad_kernel(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "kernel"
    if what != "missing":
        folder.mkdir()
    if what == "damaged":
        (folder / "manifest.json").write_text("{")
    if what == "not a kernel":
        (folder / "manifest.json").write_text('{"kind": "kernel", "version": "1", "kernel": "vmlinux"}')
        (folder / "vmlinux").write_bytes(b"no kernel at all" * 1000)
    with daemon(kernel=folder) as one:
        async with one.client() as client:
            if what == "not a kernel":
                message = await refused(client.run_pod(), Status.INTERNAL, "phase domain")
                assert "kernel" in message
            else:
                await refused(client.run_pod(), WRONG_STATE, str(folder), "guest kernel")
        assert one.leftovers() == []


async def test_a_bad_guest_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "manifest.json").write_text(
        '{"kind": "guest", "version": "1", "root": "root.img", "fstype": "squashfs",'
        ' "cmdline": "root=/dev/vda rootfstype=squashfs ro"}'
    )
    (tmp_path / "root.img").write_bytes(os.urandom(65536))
    tmp_path.chmod(0o755)
    for parent in list(tmp_path.parents)[:2]:
        parent.chmod(0o755)  # QEMU runs as the sandbox's user
    monkeypatch.setenv("HYPERPOD_TEST_GUEST", str(tmp_path))
    with daemon("---boot_timeout = 180\n") as one:
        async with one.client() as client:
            await refused(client.run_pod(), Status.INTERNAL, "phase kernel+agent", "Unable to mount root")
        assert one.leftovers() == []
