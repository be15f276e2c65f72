"""What a container of a host pod may do, and what a hostile image or request cannot."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from hyperpod.api.gen.hyperpod.admin.v1 import LoadRequest
from hyperpod.api.gen.runtime import v1 as cri
from images import busybox
from tests import imagekit
from tests.daemonkit import Cri
from tests.host.test_lifecycle import until_logged

HOSTILE = "docker.io/library/hostile:latest"
DISK = (os.major(Path("/").stat().st_dev), os.minor(Path("/").stat().st_dev))
"""What the host's root lies on."""

LOOP_CONTROL = (10, 237)
"""The same on every Linux."""


def security(**context: object) -> cri.LinuxContainerConfig:
    return cri.LinuxContainerConfig(
        security_context=cri.LinuxContainerSecurityContext(**context)  # type: ignore[arg-type]
    )


async def lines(client: Cri, pod: str, script: str, **more: object) -> list[str]:
    container = await client.sh(pod, script, **more)
    await client.wait(container)
    return [text for _, _, text in await client.log(container)]


async def privileged_pod(client: Cri) -> str:
    context = cri.LinuxSandboxSecurityContext(privileged=True)
    return await client.run_pod(client.pod_config(security_context=context))


def number_program(folder: Path, expression: str) -> bytes:
    """A static program that prints the value of a C expression."""
    source = folder / "number.c"
    headers = ("stdio", "sys/syscall", "unistd")
    source.write_text(
        "".join(f"#include <{name}.h>\n" for name in headers)
        + f'int main(void) {{ printf("%ld\\n", (long)({expression})); }}\n'
    )
    subprocess.run(["gcc", "-static", "-o", folder / "number", source], check=True)
    return (folder / "number").read_bytes()


SESSION_KEYS = "syscall(SYS_keyctl, 0, -3, 0)"
"""KEYCTL_GET_KEYRING_ID of the session's keyring."""


async def load_hostile(client: Cri, folder: Path) -> cri.ImageSpec:
    """An image with device nodes of the host, a set-uid program, one that uses keys, and links that lead out."""
    layer = imagekit.tar(
        imagekit.Item("disk", kind=tarfile.BLKTYPE, mode=0o666, device=DISK),
        imagekit.Item("loop-control", kind=tarfile.CHRTYPE, mode=0o666, device=LOOP_CONTROL),
        imagekit.Item("who", number_program(folder, "geteuid()"), mode=0o4755),
        imagekit.Item("keys", number_program(folder, SESSION_KEYS), mode=0o755),
        imagekit.symlink("out", "../../../../../../etc"),
    )
    built = imagekit.image(busybox.layer(Path("/bin/busybox").read_bytes()), layer)
    path = imagekit.write_layout(folder / "layout", built, HOSTILE)
    await client.admin.load(LoadRequest(path=str(path)))
    return cri.ImageSpec(image=HOSTILE)


async def test_a_hostile_image(cri_client: Cri, pod: str, tmp_path: Path) -> None:
    """Device nodes of the host open for nobody; set-uid programs work, in their container."""
    image = await load_hostile(cri_client, tmp_path)
    script = (
        "exec 2>&1; test -b /disk && echo there; head -c 1 /disk; head -c 1 /loop-control;"
        f"mknod /made b {DISK[0]} {DISK[1]} && head -c 1 /made; ls /out/hostname"
    )
    assert await lines(cri_client, pod, script, image=image) == [
        *("there", "head: /disk: Operation not permitted", "head: /loop-control: Operation not permitted"),
        *("head: /made: Operation not permitted", "/out/hostname"),
    ]
    user = security(run_as_user=cri.Int64Value(value=1000))
    assert await lines(cri_client, pod, "id -u; /who", image=image, linux=user) == ["1000", "0"]
    tied = security(run_as_user=cri.Int64Value(value=1000), no_new_privs=True)
    assert await lines(cri_client, pod, "/who", image=image, linux=tied) == ["1000"]


async def test_keys_of_the_session_stay_apart(cri_client: Cri, tmp_path: Path) -> None:
    """An exec holds neither those of whoever started the daemon nor those of another pod's execs."""
    image = await load_hostile(cri_client, tmp_path)
    program = tmp_path / "keys"
    program.write_bytes(number_program(tmp_path, SESSION_KEYS))
    program.chmod(0o755)
    seen = [subprocess.run([program], capture_output=True, check=True).stdout]
    unconfined = security(seccomp=cri.SecurityProfile(profile_type=cri.SecurityProfileProfileType.Unconfined))
    for _ in range(2):
        pod = await cri_client.run_pod()
        container = await cri_client.sh(pod, "/keys; sleep 600", image=image, linux=unconfined)
        own = (await until_logged(cri_client, container))[0].encode() + b"\n"
        seen += [own, (await cri_client.exec(container, "/keys")).stdout]
        await cri_client.remove_pod(pod)
    assert len(set(seen)) == len(seen) == 5, seen
    assert all(int(number) > 0 for number in seen[1:]), seen


@pytest.mark.parametrize("mode", [cri.NamespaceMode.POD, cri.NamespaceMode.NODE])
async def test_a_working_directory_stays_in_its_container(cri_client: Cri, mode: cri.NamespaceMode) -> None:
    """Where other processes are seen, their roots can be named: by an image, or by a container later on."""
    options = cri.NamespaceOption(pid=mode)
    context = cri.LinuxSandboxSecurityContext(namespace_options=options)
    pod = await cri_client.run_pod(cri_client.pod_config(security_context=context))
    own = security(namespace_options=options)
    for path in ("/proc/1/root", "/proc/1/root/etc", "/proc/self/fd/9"):
        out = await cri_client.create(pod, "ls", working_dir=path, linux=own)
        with pytest.raises(GRPCError) as info:
            await cri_client.start(out)
        assert info.value.status is Status.FAILED_PRECONDITION
        assert (await cri_client.status(out)).reason == "StartError"
    assert await lines(cri_client, pod, "pwd; exit 0", working_dir="/usr/new", linux=own) == ["/usr/new"]
    missing = await cri_client.create(pod, "/no/such", working_dir="/etc", linux=own)
    with pytest.raises(GRPCError, match="executable file `/no/such` not found"):
        await cri_client.start(missing)
    container = await cri_client.sh(pod, "sleep 600", working_dir="/wd", linux=own)
    assert (await cri_client.exec(container, "pwd")).stdout == b"/wd\n"
    for link in ("/proc/1/root", "/proc/1/cwd", "/proc/self/fd/3"):
        script = f"cd /; rmdir wd; rm -f wd; ln -s {link} wd; ls"
        assert b"proc" in (await cri_client.exec(container, "sh", "-c", script)).stdout
        with pytest.raises(GRPCError) as info:
            await cri_client.exec(container, "ls")
        assert info.value.status is Status.FAILED_PRECONDITION
        (Path(f"/proc/{await pid_of(cri_client, container)}/root/wd")).unlink()
        (Path(f"/proc/{await pid_of(cri_client, container)}/root/wd")).mkdir()
    await cri_client.remove_pod(pod)


async def pid_of(client: Cri, container: str) -> int:
    """Of its first process, on the host."""
    request = cri.ContainerStatusRequest(container_id=container, verbose=True)
    reply = await client.runtime.container_status(request)
    return int(json.loads(reply.info["container"])["pid"])


async def test_what_a_container_has_by_default(cri_client: Cri, pod: str) -> None:
    script = (
        "grep CapEff /proc/self/status; grep Seccomp: /proc/self/status; ls /dev;"
        "(echo 1 > /proc/sys/vm/swappiness) 2>/dev/null || echo no;"
        "mount -t tmpfs x /tmp 2>/dev/null || echo no; dmesg >/dev/null 2>&1 || echo no;"
        "head -c 1 /proc/kcore 2>/dev/null | wc -c; touch /sys/x 2>/dev/null || echo no"
    )
    found = await lines(cri_client, pod, script)
    assert found[:2] == ["CapEff:\t00000000a80425fb", "Seccomp:\t2"]
    assert [x for x in found if x in ("sda", "vda", "loop-control", "kmsg", "mem")] == []
    assert found[-5:] == ["no", "no", "no", "0", "no"]


async def test_nothing_leads_through_the_holder_of_shared_processes(cri_client: Cri, pod: str) -> None:
    """Every container may look at it, and one with CAP_SYS_PTRACE go where it is and run code in it."""
    able = security(capabilities=cri.Capability(add_capabilities=["SYS_PTRACE"]))
    script = (
        "cat /proc/1/comm; ls -A /proc/1/root/ /proc/1/root/.. /proc/1/cwd/ | grep -v :; wc -l </proc/1/mountinfo;"
        "grep -E '^(Uid|CapPrm|Seccomp):' /proc/1/status; ls -l /proc/1/fd | grep -c -v -e pipe: -e total"
    )
    found = [line for line in await lines(cri_client, pod, script, linux=able) if line]
    assert found == [
        *("pause", "1", "\t".join(["Uid:", *["65535"] * 4]), f"CapPrm:\t{0:016x}"),
        *("Seccomp:\t1", "0"),  # strict: it can read, write and end
    ]


async def test_privileged_is_privileged_on_the_host(cri_client: Cri, pod: str) -> None:
    with pytest.raises(GRPCError) as info:
        await cri_client.create(pod, "true", linux=security(privileged=True))
    assert info.value.status is Status.INVALID_ARGUMENT
    privileged = await privileged_pod(cri_client)
    script = (
        "grep CapEff /proc/self/status; test -c /dev/loop-control && echo dev;"
        "mount -t tmpfs x /tmp && echo mounted"
    )
    mine = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapPrm")
    )
    assert await lines(cri_client, privileged, script, linux=security(privileged=True)) == [
        mine.replace("CapPrm", "CapEff"), "dev", "mounted",
    ]  # fmt: skip


async def test_a_device_of_the_host(cri_client: Cri, pod: str) -> None:
    device = cri.Device(host_path="/dev/loop-control", container_path="/dev/mine", permissions="r")
    container = await cri_client.sh(
        pod, "ls -l /dev/mine; (echo > /dev/mine) 2>/dev/null || echo no; sleep 600", devices=[device]
    )
    number = Path("/dev/loop-control").stat().st_rdev
    listed, refused = await until_logged(cri_client, container, 2)
    assert f"{os.major(number)}, {os.minor(number)}".replace(" ", "") in listed.replace(" ", "")
    assert refused == "no"
    with pytest.raises(GRPCError) as info:
        await cri_client.create(pod, "true", devices=[cri.Device(host_path="/dev/absent", permissions="r")])
    assert info.value.status is Status.FAILED_PRECONDITION
    assert "/dev/absent" in str(info.value.message)


async def test_users_of_the_image(cri_client: Cri, pod: str) -> None:
    user = security(run_as_user=cri.Int64Value(value=1234), supplemental_groups=[7, 8])
    container = await cri_client.sh(pod, "id; sleep 600", linux=user)
    [said] = await until_logged(cri_client, container)
    assert "uid=1234" in said
    status = await cri_client.status(container)
    assert status.user is not None and status.user.linux is not None
    assert status.user.linux.uid == 1234
    assert set(status.user.linux.supplemental_groups) >= {7, 8}


async def test_the_agent_s_folder_is_root_s(cri_client: Cri, pod: str) -> None:
    """The sandbox's user, whose shim reads what containers write, reaches the agent's streams and no more."""
    home = cri_client.daemon.run_dir / "h" / pod[:12]
    for name, owner in (("1024.sock", 0), ("agent", 0), ("b", 0), ("r", 0)):
        assert (home / name).stat().st_uid == owner
    assert stat.S_IMODE((home / "1024.sock").stat().st_mode) == 0o600
    streams = (home / "1025.sock").stat()
    assert (streams.st_uid, stat.S_IMODE(streams.st_mode)) == (
        (cri_client.daemon.run_dir / "s" / pod[:12]).stat().st_uid,
        0o600,
    )
    assert streams.st_uid != 0
    assert stat.S_IMODE((home / "b").stat().st_mode) == 0o700


async def test_the_hosts_null_device_stays_the_hosts(cri_client: Cri, pod: str) -> None:
    user = security(run_as_user=cri.Int64Value(value=1000))
    container = await cri_client.sh(pod, "cat; stat -c %u /proc/self/fd/0; sleep 600", linux=user)
    await until_logged(cri_client, container)
    assert (await cri_client.exec(container, "chmod", "0", "/proc/self/fd/0")).exit_code == 1
    null = Path("/dev/null").stat()
    assert (null.st_uid, stat.S_IMODE(null.st_mode)) == (0, 0o666)


async def test_users_that_have_no_end(cri_client: Cri, pod: str, tmp_path: Path) -> None:
    """Nothing reads a container's /etc/passwd once the container may have put a FIFO there, or a volume has one."""
    endless = tmp_path / "fifo"
    os.mkfifo(endless)
    mount = cri.Mount(container_path="/etc/passwd", host_path=str(endless))
    assert await lines(cri_client, pod, "test -p /etc/passwd; echo $? $HOME", mounts=[mount]) == ["0 /root"]
    container = await cri_client.sh(pod, "rm /etc/passwd; mkfifo /etc/passwd; echo made; sleep 600")
    await until_logged(cri_client, container)
    assert (await cri_client.exec(container, "sh", "-c", "echo $HOME")).stdout == b"/root\n"
