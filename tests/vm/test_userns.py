"""A user namespace in a real VM: the guest's kernel maps the layers, the host's the volumes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hyperpod.api.gen.runtime import v1 as cri
from tests.daemonkit import Cri
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

pytestmark = pytest.mark.vm


async def test_a_pod_with_a_user_namespace(cri_client: Cri, tmp_path: Path) -> None:
    """One pod, since each boot takes seconds."""
    sysctls = {"kernel.shmmni": "77", "net.ipv4.ip_unprivileged_port_start": "1024", "vm.swappiness": "7"}
    pod = await run_pod(cri_client, privileged=True, sysctls=sysctls)
    await _ids(cri_client, pod)
    await _volumes(cri_client, pod, tmp_path)
    await _network(cri_client, pod)
    await _processes(cri_client, pod)
    await streams(cri_client, pod)
    reply = await cri_client.runtime.pod_sandbox_status(cri.PodSandboxStatusRequest(pod_sandbox_id=pod))
    assert reply.status is not None and reply.status.linux is not None
    assert reply.status.linux.namespaces is not None and reply.status.linux.namespaces.options is not None
    assert reply.status.linux.namespaces.options.userns_options == userns()


async def _ids(client: Cri, pod: str) -> None:
    script = (
        "cat /proc/self/uid_map; stat -c %u:%g /bin/busybox /etc/passwd; touch /new; chown 7:8 /new; "
        "stat -c %u:%g /new; cat /proc/sys/kernel/shmmni /proc/sys/vm/swappiness; "
        "touch /dev/shm/x /dev/mqueue/q && echo made; echo 1 > /proc/sys/vm/swappiness"
    )
    mapped, *lines = await output(client, pod, script)
    assert mapped.split() == ["0", str(BASE), str(LENGTH)]
    assert lines[:-1] == ["0:0", "0:0", "7:8", "77", "7", "made"]
    assert "denied" in lines[-1] or "Read-only" in lines[-1]
    await image_volume(client, pod)


async def _volumes(client: Cri, pod: str, folder: Path) -> None:
    source = folder / "v"
    source.mkdir(mode=0o755)
    (source / "roots").write_text("host\n")
    (source / "users").write_text("host\n")
    os.chown(source / "users", 1000, 1001)
    script = (
        "stat -c %u:%g /v/roots /v/users; echo in >> /v/roots; touch /v/made; chown 3:4 /v/made; "
        "mkdir /v/d; stat -c %u:%g /v/made"
    )
    assert await output(client, pod, script, mounts=[volume(source)]) == ["0:0", "1000:1001", "3:4"]
    assert (source / "roots").read_text() == "host\nin\n"
    made = (source / "made").stat()
    assert (made.st_uid, made.st_gid) == (3, 4), "ids on disk are the container's, whatever the mapping"
    assert (source / "d").stat().st_uid == 0
    user = context(run_as_user=cri.Int64Value(value=1000), run_as_group=cri.Int64Value(value=1001))
    lines = await output(
        client, pod, "echo in >> /v/users; echo in >> /v/roots", mounts=[volume(source)], linux=user
    )
    assert (source / "users").read_text() == "host\nin\n"
    [denied] = lines
    assert "denied" in denied


async def _network(client: Cri, pod: str) -> None:
    capable = context(capabilities=cri.Capability(add_capabilities=["NET_ADMIN"]))
    await client.sh(pod, "nc -l -p 80 -e /bin/cat", linux=capable)
    reply = await client.runtime.pod_sandbox_status(cri.PodSandboxStatusRequest(pod_sandbox_id=pod))
    assert reply.status is not None and reply.status.network is not None
    assert await echoed(reply.status.network.ip, 80)
    stats = await client.runtime.pod_sandbox_stats(cri.PodSandboxStatsRequest(pod_sandbox_id=pod))
    assert stats.stats is not None and stats.stats.linux is not None and stats.stats.linux.network is not None
    card = stats.stats.linux.network.default_interface
    assert card is not None and card.name == "eth0" and card.rx_bytes is not None and card.rx_bytes.value > 0
    script = "ifconfig lo:1 127.0.0.9 up && echo up; ls /sys/class/net; hostname"
    up, *cards, name = await output(client, pod, script, linux=capable)
    assert (up, cards) == ("up", ["eth0", "lo"]) and name.startswith("pod-")


async def _processes(client: Cri, pod: str) -> None:
    user = context(run_as_user=cri.Int64Value(value=1000))
    first = await client.sh(pod, "exec sleep 601", linux=user)
    lines = await output(client, pod, "ps -o pid,user,args")
    assert any("sleep 601" in line for line in lines)
    assert not any("init.pyc" in line for line in lines), "the guest's own processes are not the pod's"
    script = "ps -o pid > /tmp/ps; wc -l < /tmp/ps; echo > /dev/shm/y && echo own"
    lines = await output(client, pod, script, linux=context(namespaces=OWN))
    assert lines == ["3", "own"], "the shell and ps below a title"
    script = "id -u; echo out > /dev/stdout; ulimit -Hn; ulimit -Hu"
    done = await client.exec(first, "sh", "-c", script)
    assert done.stdout.split()[:3] == [b"1000", b"out", b"524288"], (done.stdout, done.stderr)
    script = (
        "mkdir /sys/fs/cgroup/own && echo made; mount -t tmpfs t /tmp && echo mounted; "
        "mknod /x b 8 0; stat -c %u /dev/sda"
    )
    lines = await output(client, pod, script, linux=context(privileged=True))
    assert lines[:2] == ["made", "mounted"]
    assert "not permitted" in lines[2]
    assert lines[3] == "65534"
