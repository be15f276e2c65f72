"""Environment variables that are not UTF-8, in real containers and execs; nothing here depends on the transport."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from hyperpod.agentclient.types import Security
from hyperpod.errors import FailedPrecondition, HyperpodError, InvalidArgument, NotFound
from hyperpod.spec.oci import ContainerSpecInput, build_process
from hyperpod.spec.seccomp import ALLOW_ALL, without_host_sockets
from tests.agentkit import TIMEOUT, AgentKit

BINARY = b"BIN=\xff\xfe caf\xe9\n\x01"
SHOW = "tr '\\0' '|' </proc/$$/environ; exit 0"
"""The shell's own block, as exec gave it. Not its last command, which the shell would become itself."""


def spec(*args: str, env: tuple[bytes, ...] = (b"PATH=/bin", BINARY), **more: Any) -> ContainerSpecInput:
    return ContainerSpecInput(args=args, env=env, **more)


async def shown(agent: AgentKit, made: ContainerSpecInput, security: Security | None = None) -> set[bytes]:
    _, info, out = await agent.run(spec=made, security=security)
    assert info.exit_code == 0, out
    return set(out.rstrip(b"|").split(b"|"))


async def test_bytes_arrive_beside_text(agent: AgentKit) -> None:
    got = await shown(agent, spec("sh", "-c", SHOW, env=(b"PATH=/bin", BINARY, "TEXT=\u00e9".encode())))
    assert {BINARY, b"PATH=/bin", "TEXT=\u00e9".encode()} <= got
    assert not [item for item in got if item.startswith((b"binaryEnv", b"HYPERPOD"))]


async def test_they_replace_what_crun_sets_itself(agent: AgentKit) -> None:
    got = await shown(agent, spec("sh", "-c", SHOW, env=(b"PATH=/bin", b"HOME=/\xff")), Security(user="bob"))
    assert [item for item in got if item.startswith(b"HOME=")] == [b"HOME=/\xff"]


async def test_under_every_restriction(agent: AgentKit) -> None:
    restricted = spec(
        "sh", "-c", SHOW, uid=4711, gid=4711, readonly_rootfs=True, no_new_privileges=True,
        drop_capabilities=("ALL",), seccomp=without_host_sockets(ALLOW_ALL),
    )  # fmt: skip
    assert BINARY in await shown(agent, restricted)


async def test_nothing_of_it_is_left_in_the_container(agent: AgentKit) -> None:
    look = "ls -l /proc/self/fd; cat /proc/mounts; ls /"
    _, info, out = await agent.run(spec=spec("sh", "-c", look))
    plain = (await agent.run(spec=spec("sh", "-c", look, env=(b"PATH=/bin",))))[2]
    assert info.exit_code == 0 and b"envexec" not in out and b"memfd" not in out
    assert len(out.splitlines()) == len(plain.splitlines())
    assert (
        await agent.run("sh", "-c", "readlink /proc/self/exe; echo $0", spec=spec("sh", "-c", "echo $0"))
    )[2] == b"sh\n"


async def test_a_terminal(agent: AgentKit) -> None:
    ident = await agent.start(spec=spec("sh", "-c", "tty; echo $BIN | od -c | head -1", tty=True))
    async with agent.output(ident) as stream:
        out = await stream.read_all()
    assert out.startswith(b"/dev/pts/") and b"377 376" in out


async def test_an_exec_has_them_too(agent: AgentKit) -> None:
    ident = await agent.start("sleep", "600")
    exec_id = await agent.exec(ident, "sh", "-c", SHOW, env=(b"PATH=/bin", BINARY))
    async with agent.output(ident, exec_id) as stream:
        assert BINARY in (await stream.read_all()).split(b"|")
    assert await agent.client.wait_exec(ident, exec_id, timeout=TIMEOUT) == 0


@pytest.mark.parametrize("env", [(b"PATH=/bin",), (b"PATH=/bin", BINARY)])
@pytest.mark.parametrize(
    ("program", "kind"),
    [
        ("missing", NotFound),
        ("/bin/missing", NotFound),
        ("/etc/passwd", FailedPrecondition),
        ("/bin", FailedPrecondition),
    ],
)
async def test_a_missing_program_fails_the_start_alike(
    agent: AgentKit, env: tuple[bytes, ...], program: str, kind: type[HyperpodError]
) -> None:
    ident = await agent.create(spec=spec(program, env=env))
    for _ in range(2):  # it is CREATED still
        with pytest.raises(kind):
            await agent.client.start_container(ident)
    await agent.client.remove_container(ident)
    running = await agent.start("sleep", "600")
    process = build_process(spec(program, env=env))
    with pytest.raises(kind):
        await agent.client.start_exec(running, "e" * 32, process_json=process)
    assert [c.id for c in await agent.client.list_containers()] == [running]


async def test_the_path_is_searched_in_order_and_may_be_binary(agent: AgentKit) -> None:
    make = (
        "mkdir /tmp/a /tmp/b /tmp/$(printf '\\377'); "
        "for d in /tmp/*; do echo '#!/bin/sh' >$d/x; echo echo $d >>$d/x; done"
    )
    ident = await agent.start("sh", "-c", f"{make}; chmod 755 /tmp/b/x /tmp/$(printf '\\377')/x; sleep 600")
    for path, found in ((b"/tmp/a:/tmp/b:/bin", b"/tmp/b\n"), (b"/tmp/\xff:/tmp/b", b"/tmp/\xff\n")):
        async with asyncio.timeout(TIMEOUT):
            while True:
                try:
                    exec_id = await agent.exec(ident, "x", env=(b"PATH=" + path, BINARY))
                    break
                except HyperpodError:  # the container is still making them
                    await asyncio.sleep(0.05)
        async with agent.output(ident, exec_id) as stream:
            assert await stream.read_all() == found


async def test_a_damaged_variable_is_refused(agent: AgentKit) -> None:
    process = json.loads(build_process(spec("true")))
    process["binaryEnv"] = ["zz"]
    ident = await agent.start("sleep", "600")
    with pytest.raises(InvalidArgument, match="binaryEnv"):
        await agent.client.start_exec(ident, "e" * 32, process_json=json.dumps(process).encode())
