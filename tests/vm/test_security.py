"""Security contexts of CRI requests, as they come out in a container of a real pod."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from grpclib.const import Status

from hyperpod.api.gen.runtime import v1 as cri
from tests.daemonkit import Cri
from tests.vm.test_bad_input import refused, security

pytestmark = pytest.mark.vm

KINDS = cri.SecurityProfileProfileType
MODES = cri.NamespaceMode


async def lines(client: Cri, pod: str, script: str, **more: Any) -> list[str]:
    """What a shell in a new container prints; it must end with 0."""
    container = await client.sh(pod, script, **more)
    status = await client.wait(container)
    printed = [text for stream, _, text in await client.log(container)]
    assert status.exit_code == 0, printed
    return printed


async def privileged_pod(client: Cri) -> str:
    context = cri.LinuxSandboxSecurityContext(privileged=True)
    return await client.run_pod(client.pod_config(security_context=context))


async def test_seccomp_profiles(cri_client: Cri, pod: str, tmp_path: Path) -> None:
    show = "grep Seccomp: /proc/self/status; chmod 700 /tmp 2>&1; true"
    local = tmp_path / "p.json"
    local.write_text(
        json.dumps(
            {
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
                "syscalls": [{"names": ["chmod", "fchmodat"], "action": "SCMP_ACT_ERRNO"}],
            }
        )
    )
    profile = cri.SecurityProfile
    for more, want in (
        ({}, "2"),  # nothing said of security: the default profile
        (security(), "0"),  # said, but no profile: CRI's unconfined
        (security(seccomp=profile(profile_type=KINDS.RuntimeDefault)), "2"),
        (security(seccomp=profile(profile_type=KINDS.Unconfined)), "0"),
        (security(seccomp_profile_path="runtime/default"), "2"),
    ):
        assert await lines(cri_client, pod, show, **more) == [f"Seccomp:\t{want}"], more
    by_path = security(seccomp=profile(profile_type=KINDS.Localhost, localhost_ref=str(local)))
    filtered, refusal = await lines(cri_client, pod, show, **by_path)
    assert filtered == "Seccomp:\t2"
    assert "Operation not permitted" in refusal


async def test_a_profile_that_is_mended_works_at_the_next_try(
    cri_client: Cri, pod: str, tmp_path: Path
) -> None:
    local = tmp_path / "p.json"
    more = security(seccomp=cri.SecurityProfile(profile_type=KINDS.Localhost, localhost_ref=str(local)))

    async def create() -> str:
        return await cri_client.create(pod, "/bin/true", name="one", **more)

    await refused(create(), Status.FAILED_PRECONDITION, str(local), "No such file")
    local.write_text('{"defaultAction": "ALLOW"}')
    await refused(create(), Status.INVALID_ARGUMENT, str(local), "defaultAction is 'ALLOW'")
    local.write_text('{"defaultAction": "SCMP_ACT_ALLOW"}')
    container = await create()
    await cri_client.start(container)
    assert (await cri_client.wait(container)).exit_code == 0


async def test_users_are_reported_as_they_are(cri_client: Cri, pod: str) -> None:
    more = security(
        run_as_user=cri.Int64Value(value=1234),
        run_as_group=cri.Int64Value(value=5),
        supplemental_groups=[9, 5],
    )
    container = await cri_client.sh(pod, "id -u; id -g; id -G; echo $HOME; sleep 1000", **more)
    status = await cri_client.status(container)
    assert status.user is not None and status.user.linux is not None
    user = status.user.linux
    assert (user.uid, user.gid, user.supplemental_groups) == (1234, 5, [5, 9])
    shown = (await cri_client.exec(container, "sh", "-c", "id -u; id -g; id -G; echo $HOME")).stdout
    assert shown == b"1234\n5\n5 9\n/\n"
    said = shown.decode().splitlines()
    assert [text for _, _, text in await cri_client.logged(container, *said)] == said


async def test_privileged(cri_client: Cri) -> None:
    pod = await privileged_pod(cri_client)
    script = (
        "grep -E 'CapEff|Seccomp:' /proc/self/status; test -b /dev/vda && echo disk; "
        "mkdir /sys/fs/cgroup/mine && echo cgroup; ip link set lo down && ip link set lo up && echo net; "
        "mount -t tmpfs x /tmp && echo mount; echo 1 > /proc/sys/vm/overcommit_memory && echo sysctl; "
        "head -c 1 /dev/vda | wc -c"
    )
    printed = await lines(cri_client, pod, script, **security(privileged=True))
    caps = f"CapEff:\t{(1 << 41) - 1:016x}"
    assert printed == [caps, "Seccomp:\t0", "disk", "cgroup", "net", "mount", "sysctl", "1"]
    tries = ("mount -t tmpfs x /tmp", "mkdir /sys/fs/cgroup/m", "ip link set lo down", "ls /dev/vda")
    plain = "; ".join(f"{command} 2>/dev/null || echo no" for command in tries)
    assert await lines(cri_client, pod, plain) == ["no"] * len(tries)
    await cri_client.remove_pod(pod)


async def test_a_node_that_is_made_by_hand_stays_shut(cri_client: Cri, pod: str) -> None:
    """CAP_MKNOD is among the defaults; the cgroup keeps the guest's disks out all the same."""
    script = "mknod /tmp/disk b 254 0 && head -c 1 /tmp/disk 2>&1 | grep -c permitted"
    assert await lines(cri_client, pod, script) == ["1"]


async def test_a_debug_container_sees_its_target(cri_client: Cri, pod: str) -> None:
    own = security(namespace_options=cri.NamespaceOption(pid=MODES.CONTAINER))
    target = await cri_client.run(pod, "/bin/sleep", "4321", **own)
    debug = security(namespace_options=cri.NamespaceOption(pid=MODES.TARGET, target_id=target))
    assert (await lines(cri_client, pod, "tr '\\0' ' ' < /proc/1/cmdline; echo", **debug))[
        0
    ] == "/bin/sleep 4321 "
    other = await cri_client.run_pod()
    await refused(cri_client.create(other, "/bin/true", **debug), Status.INVALID_ARGUMENT, "another pod")
    await cri_client.remove_pod(other)
    await cri_client.stop(target)
    await refused(
        cri_client.create(pod, "/bin/true", **debug), Status.FAILED_PRECONDITION, target[:12], "not running"
    )


async def test_a_pod_shares_its_memory_segments(cri_client: Cri, pod: str) -> None:
    await lines(cri_client, pod, "echo hello > /dev/shm/x")
    size = "df -m /dev/shm | tail -1 | tr -s ' ' | cut -d' ' -f2"
    assert await lines(cri_client, pod, f"cat /dev/shm/x; {size}") == ["hello", "64"]
    own = security(namespace_options=cri.NamespaceOption(ipc=MODES.CONTAINER))
    assert await lines(cri_client, pod, "ls /dev/shm | wc -l", **own) == ["0"]


async def test_limits_and_paths(cri_client: Cri, pod: str) -> None:
    script = "ulimit -Sn; ulimit -Hn; ulimit -u; ulimit -c; head -c 1 /proc/kcore 2>/dev/null | wc -c"
    assert await lines(cri_client, pod, script) == ["1024", "524288", "unlimited", "0", "0"]
    unmasked = security(masked_paths=[], readonly_paths=[])
    assert await lines(cri_client, pod, "echo 1 > /proc/sys/vm/swappiness && echo written", **unmasked) == [
        "written"
    ]
    refusal = await lines(cri_client, pod, "(echo 1 > /proc/sys/vm/swappiness) 2>/dev/null || echo no")
    assert refusal == ["no"]
