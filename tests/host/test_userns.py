"""Host pods with a user namespace of their own (hostUsers: false), looked at from inside and from the host."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from hyperpod.api.gen.runtime import v1 as cri
from tests.daemonkit import Cri
from tests.host.test_lifecycle import until_logged
from tests.netkit import echoed
from tests.usernskit import (
    BASE,
    LENGTH,
    OWN,
    context,
    image_volume,
    output,
    run_pod,
    streams,
    userns,
    volume,
)

POD, NODE, TARGET = cri.NamespaceMode.POD, cri.NamespaceMode.NODE, cri.NamespaceMode.TARGET


async def test_root_inside_is_nobody_outside(cri_client: Cri) -> None:
    pod = await run_pod(cri_client)
    container = await cri_client.sh(pod, "cat /proc/self/uid_map; id -u; sleep 600", linux=context())
    mapped, uid = await until_logged(cri_client, container, 2)
    assert mapped.split() == ["0", str(BASE), str(LENGTH)]
    assert uid == "0"
    reply = await cri_client.runtime.container_status(
        cri.ContainerStatusRequest(container_id=container, verbose=True)
    )
    pid = json.loads(reply.info["container"])["pid"]
    status = Path(f"/proc/{pid}/status").read_text()
    assert f"Uid:\t{BASE}\t{BASE}\t{BASE}\t{BASE}\n" in status
    assert f"Gid:\t{BASE}\t{BASE}\t{BASE}\t{BASE}\n" in status
    host = Path("/proc/self/ns/user").readlink()
    assert Path(f"/proc/{pid}/ns/user").readlink() != host
    pod_status = (
        await cri_client.runtime.pod_sandbox_status(cri.PodSandboxStatusRequest(pod_sandbox_id=pod))
    ).status
    assert pod_status is not None and pod_status.linux is not None and pod_status.linux.namespaces is not None
    assert pod_status.linux.namespaces.options is not None
    assert pod_status.linux.namespaces.options.userns_options == userns()


async def test_the_image_is_roots_and_its_users_hold(cri_client: Cri) -> None:
    pod = await run_pod(cri_client)
    script = (
        "stat -c %u:%g /bin/busybox /etc/passwd /; touch /new; chown 7:8 /new; stat -c %u:%g /new; "
        "cp /bin/busybox /copy; echo x >> /etc/passwd; stat -c %u /etc/passwd; ls -ld /dev/shm | tr -s ' '"
    )
    lines = await output(cri_client, pod, script)
    assert lines[:5] == ["0:0", "0:0", "0:0", "7:8", "0"], lines
    writable = cri_client.daemon.state / "scratch" / pod
    [new] = writable.glob("c/*/u/new")
    assert (new.stat().st_uid, new.stat().st_gid) == (BASE + 7, BASE + 8)
    other = context(run_as_user=cri.Int64Value(value=1000), supplemental_groups=[5, 6])
    lines = await output(
        cri_client, pod, "id -u; id -G; touch /tmp/x && stat -c %u /tmp/x; touch /y", linux=other
    )
    assert lines[0] == "1000"
    assert set(lines[1].split()) >= {"5", "6"}
    assert lines[2] == "1000" and "denied" in lines[3]


@pytest.fixture(params=["disk", "tmpfs"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder, of either file system."""
    tmp_path.chmod(0o755)
    folder = tmp_path / "v"
    folder.mkdir()
    if request.param == "tmpfs":
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "memory", folder], check=True)
    yield folder
    if request.param == "tmpfs":
        subprocess.run(["umount", folder], check=True)


async def test_files_of_a_volume_belong_to_the_same_ids_on_both_sides(cri_client: Cri, source: Path) -> None:
    (source / "roots").write_text("host\n")
    (source / "users").write_text("host\n")
    os.chown(source / "users", 1000, 1001)
    pod = await run_pod(cri_client)
    script = (
        "stat -c %u:%g /v/roots /v/users; echo in >> /v/roots; touch /v/made; chown 3:4 /v/made; "
        "mkdir /v/d; stat -c %u:%g /v/made"
    )
    lines = await output(cri_client, pod, script, mounts=[volume(source)])
    assert lines == ["0:0", "1000:1001", "3:4"]
    assert (source / "roots").read_text() == "host\nin\n"
    made = (source / "made").stat()
    assert (made.st_uid, made.st_gid) == (3, 4), "ids on disk are the container's, whatever the mapping"
    assert (source / "d").stat().st_uid == 0
    readonly = volume(source, readonly=True)
    lines = await output(cri_client, pod, "touch /v/no; stat -c %u /v/roots", mounts=[readonly])
    assert lines == ["touch: /v/no: Read-only file system", "0"]
    plain = cri.Mount(container_path="/v", host_path=str(source))
    lines = await output(cri_client, pod, "stat -c %u /v/roots; touch /v/no", mounts=[plain])
    assert lines[0] == "65534", "without a mapping the host's root is nobody here"
    assert "denied" in lines[1]


async def test_a_file_system_that_cannot_map_ids(cri_client: Cri) -> None:
    pod = await run_pod(cri_client)
    with pytest.raises(GRPCError, match="/sys/kernel.*hostUsers: false.*cannot map ids") as caught:
        await cri_client.create(pod, "true", linux=context(), mounts=[volume(Path("/sys/kernel"))])
    assert caught.value.status is Status.FAILED_PRECONDITION


async def test_the_pods_namespaces_are_its_roots(cri_client: Cri) -> None:
    sysctls = {
        "kernel.shmmni": "77",
        "fs.mqueue.msg_max": "11",
        "net.ipv4.ip_unprivileged_port_start": "1024",
    }
    pod = await run_pod(cri_client, sysctls=sysctls)
    capable = context(capabilities=cri.Capability(add_capabilities=["NET_ADMIN"]))
    container = await cri_client.sh(pod, "nc -l -p 80 -e /bin/cat", linux=capable)
    reply = await cri_client.runtime.pod_sandbox_status(cri.PodSandboxStatusRequest(pod_sandbox_id=pod))
    assert reply.status is not None and reply.status.network is not None
    assert await echoed(reply.status.network.ip, 80)
    del container
    script = (
        "cat /proc/sys/kernel/shmmni /proc/sys/fs/mqueue/msg_max; ifconfig lo:1 127.0.0.9 up && echo up; "
        "ls /sys/class/net | sort; touch /dev/mqueue/q && echo queue"
    )
    lines = await output(cri_client, pod, script, linux=capable)
    assert lines == ["77", "11", "up", "eth0", "lo", "queue"]


async def test_processes_shared_or_own(cri_client: Cri) -> None:
    pod = await run_pod(cri_client)
    sharing = context(namespaces={"pid": POD})
    first = await cri_client.sh(pod, "exec sleep 601", linux=sharing)
    lines = await output(cri_client, pod, "ps -o pid,user,args", linux=sharing)
    assert any("sleep 601" in line for line in lines)
    [pause] = [line for line in lines if "pause" in line]
    assert pause.split()[:2] == ["1", "root"], "it is the pod's root too, not the host's"
    hidden = await output(cri_client, pod, "cat /proc/1/environ; ls /proc/1/root/; true", linux=sharing)
    assert len(hidden) == 2 and all("denied" in line for line in hidden), hidden
    own = await output(
        cri_client,
        pod,
        "ps -o args | grep -c 'sleep 60[1]'; echo > /dev/shm/y && echo own",
        linux=context(namespaces=OWN),
    )
    assert own == ["0", "own"]
    seeing = context(namespaces={"pid": TARGET, "target_id": first})
    lines = await output(cri_client, pod, "ps -o args", linux=seeing)
    assert any("sleep 601" in line for line in lines)


async def test_exec_and_its_streams(cri_client: Cri) -> None:
    pod = await run_pod(cri_client)
    user = context(run_as_user=cri.Int64Value(value=1000), run_as_group=cri.Int64Value(value=1000))
    container = await cri_client.sh(pod, "echo hi > /dev/stdout; sleep 600", linux=user)
    assert await until_logged(cri_client, container) == ["hi"]
    done = await cri_client.exec(
        container, "sh", "-c", "id -u; echo out > /dev/stdout; echo err > /dev/stderr; ulimit -Hn"
    )
    assert done.exit_code == 0, done.stderr
    assert done.stdout.split()[:2] == [b"1000", b"out"] and done.stderr == b"err\n"
    assert await output(cri_client, pod, "cat; echo nothing > /dev/null; stat -c %u /dev/null") == ["65534"]
    null = Path("/dev/null").stat()
    assert (null.st_uid, stat.S_IMODE(null.st_mode)) == (0, 0o666), "the host's own, whoever reads from it"


async def test_sessions(cri_client: Cri) -> None:
    await streams(cri_client, await run_pod(cri_client))


async def test_privileged_is_privileged_in_its_namespace_only(cri_client: Cri) -> None:
    pod = await run_pod(cri_client, privileged=True)
    script = (
        "grep CapEff /proc/self/status | cut -f2; mount -t tmpfs t /tmp && echo mounted; "
        "cat /proc/sys/kernel/random/boot_id > /dev/null; echo 1 > /proc/sys/vm/drop_caches; "
        "mknod /disk b 7 0; ls -ln /dev/loop-control | tr -s ' ' | cut -d' ' -f3; "
        "chmod 0 /dev/zero; hostname changed && hostname"
    )
    lines = await output(cri_client, pod, script, linux=context(privileged=True))
    assert int(lines[0], 16) >= (1 << 41) - 1, "all capabilities, those too that the host keeps from us"
    assert lines[1] == "mounted"
    assert "denied" in lines[2] and "drop_caches" in lines[2]
    assert "not permitted" in lines[3]
    assert lines[4] == "65534"
    assert "not permitted" in lines[5], "a node that is bound is nobody's here"
    assert lines[6:] == ["changed"]
    assert os.uname().nodename != "changed"


async def test_devices_are_bound(cri_client: Cri) -> None:
    pod = await run_pod(cri_client)
    device = cri.Device(host_path="/dev/loop-control", container_path="/dev/other", permissions="r")
    lines = await output(
        cri_client, pod, "stat -c '%t:%T %u' /dev/other; stat -c %t:%T /dev/zero", devices=[device]
    )
    assert lines == ["a:ed 65534", "1:5"]


async def test_files_of_names_are_writable_to_root(cri_client: Cri) -> None:
    pod = await run_pod(cri_client)
    lines = await output(
        cri_client, pod, "echo 10.9.9.9 there >> /etc/hosts; tail -n1 /etc/hosts; stat -c %u /etc/resolv.conf"
    )
    assert lines == ["10.9.9.9 there", "0"]


async def test_variables_that_are_no_text(cri_client: Cri) -> None:
    pod = await run_pod(cri_client)
    env = [cri.KeyValue(key="RAW", value=b"a\xffb")]
    lines = await output(cri_client, pod, 'printf %s "$RAW" | od -An -tx1', envs=env)
    assert lines == [" 61 ff 62"]


async def test_an_image_as_a_volume(cri_client: Cri) -> None:
    await image_volume(cri_client, await run_pod(cri_client))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"network": NODE}, "network is NODE"),
        ({"pid": NODE}, "pid is NODE"),
        ({"ipc": NODE}, "ipc is NODE"),
    ],
)
async def test_the_nodes_namespaces_are_not_for_its_users(
    cri_client: Cri, options: dict[str, Any], why: str
) -> None:
    asked = cri.NamespaceOption(userns_options=userns(), **options)
    config = cri_client.pod_config(security_context=cri.LinuxSandboxSecurityContext(namespace_options=asked))
    with pytest.raises(GRPCError, match=why) as caught:
        await cri_client.run_pod(config)
    assert caught.value.status is Status.INVALID_ARGUMENT


async def test_a_container_has_the_pods(cri_client: Cri) -> None:
    pod = await run_pod(cri_client)
    said_nothing = cri.LinuxContainerConfig(security_context=cri.LinuxContainerSecurityContext())
    assert (await output(cri_client, pod, "cat /proc/self/uid_map", linux=said_nothing))[0].split()[1] == str(
        BASE
    )
    wrong = userns()
    wrong.uids[0].host_id += 1
    for asked in (wrong, cri.UserNamespace(mode=NODE)):
        linux = cri.LinuxContainerConfig(
            security_context=cri.LinuxContainerSecurityContext(
                namespace_options=cri.NamespaceOption(userns_options=asked)
            )
        )
        with pytest.raises(GRPCError, match="that of the pod is POD") as caught:
            await cri_client.create(pod, "true", linux=linux)
        assert caught.value.status is Status.INVALID_ARGUMENT
    beyond = context(run_as_user=cri.Int64Value(value=LENGTH))
    with pytest.raises(GRPCError, match=f"id {LENGTH} is not in the pod's user namespace"):
        await cri_client.create(pod, "true", linux=beyond)


async def test_limits_and_an_end_by_them(cri_client: Cri) -> None:
    pod = await run_pod(cri_client)
    linux = context()
    linux.resources = cri.LinuxContainerResources(memory_limit_in_bytes=32 << 20)
    container = await cri_client.sh(pod, "x=a; while :; do x=$x$x; done", linux=linux)
    status = await cri_client.wait(container)
    assert status.reason == "OOMKilled"
    stats = await cri_client.runtime.pod_sandbox_stats(cri.PodSandboxStatsRequest(pod_sandbox_id=pod))
    assert stats.stats is not None and stats.stats.linux is not None


async def test_a_daemons_restart(cri_client: Cri) -> None:
    pod = await run_pod(cri_client)
    container = await cri_client.sh(pod, "sleep 600", linux=context())
    cri_client.daemon.kill_daemon()
    async with cri_client.daemon.client() as again:
        assert (await again.exec(container, "id", "-u")).stdout == b"0\n"
        assert await output(again, pod, "cat /proc/self/gid_map; stat -c %u /bin") == [
            f"{0:>10} {BASE:>10} {LENGTH:>10}", "0"
        ]  # fmt: skip
