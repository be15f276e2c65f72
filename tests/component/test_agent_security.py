"""Users, seccomp, capabilities, namespaces, devices of real containers; nothing here depends on the transport."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hyperpod.agentclient.types import Device, Security
from hyperpod.errors import FailedPrecondition, InvalidArgument, NotFound
from hyperpod.spec.capabilities import DEFAULT
from hyperpod.spec.oci import ContainerSpecInput, build_spec
from hyperpod.spec.profile import Target, resolve
from hyperpod.spec.seccomp import ALLOW_ALL, without_host_sockets
from tests.agentkit import AgentKit

PROFILE = Path("/usr/share/containers/seccomp.json")

EPERM, ENOSYS, EINVAL, EAFNOSUPPORT = "1", "38", "22", "97"
WHO = "id -u; id -g; id -G; echo $HOME"


def spec(*args: str, **more: Any) -> ContainerSpecInput:
    return ContainerSpecInput(args=args, **more)


async def answer(agent: AgentKit, made: ContainerSpecInput, security: Security | None = None) -> list[str]:
    """The lines that a container prints; it must end with 0."""
    _, info, out = await agent.run(spec=made, security=security)
    assert info.exit_code == 0, out
    return out.decode().splitlines()


# -- users -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("security", "asked", "want"),
    [
        (Security(), (), ["0", "0", "0", "/root"]),
        (Security(user="bob"), (), ["1000", "1001", "1001 50000", "/home/bob"]),
        (Security(user="1000"), (7,), ["1000", "1001", "7 1001 50000", "/home/bob"]),
        (Security(user="bob", strict_groups=True), (7,), ["1000", "1001", "7 1001", "/home/bob"]),
        (Security(user="bob:team"), (), ["1000", "50000", "50000", "/home/bob"]),
        (Security(user="4711"), (), ["4711", "0", "0", "/"]),
        (Security(user="4711:5"), (), ["4711", "5", "5", "/"]),
    ],
)
async def test_users_of_the_image(
    agent: AgentKit, security: Security, asked: Sequence[int], want: list[str]
) -> None:
    uid, gid, groups, home = await answer(
        agent, spec("sh", "-c", WHO, additional_gids=tuple(asked)), security
    )
    assert [uid, gid, " ".join(sorted(set(groups.split()), key=int)), home] == want


async def test_the_user_is_told_and_an_exec_has_it_too(agent: AgentKit) -> None:
    ident = secrets.token_hex(32)
    made = spec("sleep", "1000", env=(b"PATH=/bin",), additional_gids=(7,))
    user = await agent.client.create_container(
        ident, oci_spec=build_spec(made), layers=agent.place.layers, security=Security(user="bob")
    )
    assert user is not None
    assert (user.uid, user.gid, user.groups) == (1000, 1001, (1001, 50000, 7))
    await agent.client.start_container(ident)
    exec_id = await agent.exec(ident, "sh", "-c", WHO)
    async with agent.output(ident, exec_id) as out:
        lines = (await out.read_all()).decode().splitlines()
    assert (lines[0], lines[1], lines[3]) == ("1000", "1001", "/home/bob")
    assert {"1001", "50000", "7"} == set(lines[2].split())


async def test_variables_that_every_container_has(agent: AgentKit) -> None:
    show = "echo $HOSTNAME $HOME; test $HOSTNAME = $(hostname) && echo same"
    named, same = await answer(agent, spec("sh", "-c", show), Security(user="4711"))
    assert named.endswith(" /")
    assert same == "same"
    given = spec("sh", "-c", "echo $HOSTNAME $HOME", env=(b"PATH=/bin", b"HOSTNAME=mine", b"HOME=/tmp"))
    assert await answer(agent, given, Security(user="4711")) == ["mine /tmp"]


async def test_users_that_are_not_there_leave_nothing(agent: AgentKit) -> None:
    for user, text in (
        ("alice", "'alice' is not in the image's /etc/passwd"),
        ("0:x", "'x'"),
        ("a:b:c", "':'"),
    ):
        with pytest.raises(InvalidArgument, match=text):
            await agent.create("true", security=Security(user=user))
    assert await agent.client.list_containers() == []
    await agent.client.forget_layers([layer.serial for layer in agent.place.layers])


# -- seccomp -----------------------------------------------------------------------------------------------


def default_profile(*caps: str) -> dict[str, Any]:
    resolved = resolve(json.loads(PROFILE.read_text()), Target(frozenset(caps)))
    del resolved["architectures"]
    return without_host_sockets(resolved)


SOCKETS = "for f in 1 2 16 38 40 0x100000002 0x100000026 0x100000028 0xffffffff00000028; do probe $f 2; done"
"""UNIX, INET, NETLINK, ALG, VSOCK; then INET, ALG and VSOCK with bits that the kernel does not look at."""


@pytest.mark.parametrize(
    "profile",
    [default_profile(*DEFAULT), default_profile(), without_host_sockets(ALLOW_ALL)],
    ids=["default", "no capabilities", "allow"],
)
async def test_sockets_of_the_host_are_denied(agent: AgentKit, profile: dict[str, Any]) -> None:
    lines = await answer(agent, spec("sh", "-c", f"{SOCKETS}; probe uring 40", seccomp=profile))
    no = EAFNOSUPPORT
    assert lines == ["ok", "ok", "ok", no, no, "ok", no, no, no, ENOSYS]


async def test_the_default_profile_filters(agent: AgentKit) -> None:
    script = "grep Seccomp: /proc/self/status; probe 16 3 9; chmod 700 /tmp && echo ok; hostname x 2>&1"
    lines = await answer(agent, spec("sh", "-c", f"{script}; true", seccomp=default_profile()))
    assert lines[:3] == ["Seccomp:\t2", EINVAL, "ok"]
    assert "permitted" in lines[3] or "not implemented" in lines[3]


async def test_without_a_profile_there_is_no_filter(agent: AgentKit) -> None:
    script = "grep Seccomp: /proc/self/status; probe uring 1"
    filtered, by_uring = await answer(agent, spec("sh", "-c", script))
    assert filtered == "Seccomp:\t0"
    # What the host's administrator has forbidden is no answer about us.
    assert by_uring in ("ok", EPERM, ENOSYS)


@pytest.mark.parametrize("action", ["SCMP_ACT_KILL_PROCESS", "SCMP_ACT_ERRNO"])
async def test_a_profile_that_denies_them_itself(agent: AgentKit, action: str) -> None:
    names = ["socket", "socketcall", "io_uring_setup"]
    own = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": names, "action": action}]}
    filtered = without_host_sockets(resolve(own, Target(frozenset())))
    made = spec("sh", "-c", "probe 40; probe uring 40; true", seccomp=filtered)
    assert "ok" not in await answer(agent, made)


async def test_a_profile_of_one_s_own_and_in_execs(agent: AgentKit) -> None:
    own = resolve(
        {
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            "syscalls": [{"names": ["chmod", "fchmodat"], "action": "SCMP_ACT_ERRNO"}],
        },
        Target(frozenset()),
    )
    ident = await agent.start("sleep", "1000", spec=spec("sleep", "1000", seccomp=without_host_sockets(own)))
    exec_id = await agent.exec(ident, "sh", "-c", f"chmod 700 /tmp 2>&1; {SOCKETS}")
    async with agent.output(ident, exec_id) as out:
        lines = (await out.read_all()).decode().splitlines()
    assert "Operation not permitted" in lines[0]
    assert lines[4:6] == [EAFNOSUPPORT, EAFNOSUPPORT]


# -- the rest ----------------------------------------------------------------------------------------------


async def test_capabilities(agent: AgentKit) -> None:
    show = "grep Cap /proc/self/status"
    lines = await answer(agent, spec("sh", "-c", show, drop_capabilities=("ALL",)))
    assert {line.split()[1] for line in lines} == {"0" * 16}
    one = f"{1 << 13:016x}"  # CAP_NET_RAW
    lines = await answer(
        agent, spec("sh", "-c", show, drop_capabilities=("ALL",), add_capabilities=("NET_RAW",))
    )
    sets = dict(line.split() for line in lines)
    assert (sets["CapBnd:"], sets["CapEff:"], sets["CapPrm:"], sets["CapAmb:"]) == (one, one, one, "0" * 16)
    ambient = spec("sh", "-c", show, drop_capabilities=("ALL",), ambient_capabilities=("NET_RAW",))
    lines = await answer(agent, ambient, Security(user="bob"))
    assert {line.split()[1] for line in lines} == {one}  # a user's program has them as well


async def test_masked_and_read_only_paths(agent: AgentKit) -> None:
    script = "cat /etc/notes; touch /tmp/x 2>&1; cat /proc/sys/kernel/ostype; ls /proc/acpi 2>&1 | wc -l"
    made = spec("sh", "-c", script, masked_paths=("/etc/notes",), readonly_paths=("/tmp", "/no/such"))
    lines = await answer(agent, made)
    assert "Read-only file system" in lines[0]
    assert lines[1] == "Linux"


async def test_processes_of_another_container(agent: AgentKit) -> None:
    target = await agent.start("sh", "-c", "echo here; exec sleep 1234")
    async with agent.output(target) as out:
        await out.read_until(b"here")
    joins = spec("sh", "-c", "cat /proc/1/cmdline | tr '\\0' ' '; echo; ps | wc -l", own_pid=False)
    debug = Security(pid_target=target)
    lines = await answer(agent, joins, debug)
    assert lines[0].strip() == "sleep 1234"
    assert int(lines[1]) < 10
    waits = await agent.create(spec=joins, security=debug)
    await agent.client.remove_container(target)
    with pytest.raises(FailedPrecondition, match=f"{target[:12]}.* is EXITED"):
        await agent.client.start_container(waits)
    with pytest.raises(NotFound, match="0000"):
        await agent.create(spec=joins, security=Security(pid_target="0" * 64))


async def test_a_pod_s_shared_memory(agent: AgentKit) -> None:
    name = f"/dev/shm/{secrets.token_hex(8)}"
    writer = spec("sh", "-c", f"echo hello > {name}; df -k /dev/shm | tail -1", own_ipc=False)
    await answer(agent, writer)
    try:
        assert await answer(agent, spec("cat", name, own_ipc=False)) == ["hello"]
        assert (await answer(agent, spec("sh", "-c", f"test -e {name} || echo none"))) == ["none"]
    finally:
        await answer(agent, spec("rm", name, own_ipc=False))


async def test_devices(agent: AgentKit) -> None:
    script = "test -c /dev/f && echo there; cat /dev/f 2>&1 | head -c 4 | wc -c; test -e /dev/mem || echo no"
    device = Device(path="/dev/zero", container_path="/dev/f", permissions="r")
    assert await answer(agent, spec("sh", "-c", script), Security(devices=(device,))) == ["there", "4", "no"]
    for path, text in (("/dev/no-such", "'/dev/no-such' is not there"), ("/dev/shm", "no device")):
        with pytest.raises(FailedPrecondition, match=text):
            await agent.create("true", security=Security(devices=(Device(path, path, "rwm"),)))
