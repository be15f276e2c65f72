"""The operator's shell of a real agent through a real shim: beside the containers, and gone with its client."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hyperpod.config import StreamingConfig
from hyperpod.errors import AlreadyExists, InvalidArgument, ResourceExhausted
from hyperpod.vsock.dial import HostEndpoint
from tests.agentkit import TIMEOUT, AgentKit, agent_pid
from tests.shimkit import eventually
from tests.streamkit import ALL, TTY, Command, StreamPod, exit_code, stream_pod


@pytest.fixture
async def pod(agent: AgentKit) -> AsyncIterator[StreamPod]:
    async with stream_pod(agent, StreamingConfig()) as made:
        yield made


def operator_cgroups(agent: AgentKit) -> list[Path]:
    assert isinstance(agent.place.endpoint, HostEndpoint)
    name = Path(agent.place.endpoint.directory).name
    return [Path(p) for p, _, _ in os.walk("/sys/fs/cgroup") if Path(p).name == f"{name}-operator"]


async def test_commands_run_in_the_agents_own_place(pod: StreamPod, agent: AgentKit) -> None:
    command = await Command.open(await pod.shell_url(), ALL)
    await command.write(b"readlink /proc/self/ns/mnt; pwd; cat /proc/self/cgroup; echo no >&2; exit 7\n")
    out, err, status = await command.result()
    namespace, folder, *cgroups = out.decode().splitlines()
    assert namespace == str(Path(f"/proc/{agent_pid(agent.place)}/ns/mnt").readlink())
    assert folder == "/"
    assert any("-operator/" in line for line in cgroups)
    assert (err, exit_code(status)) == (b"no\n", 7)
    await eventually(lambda: operator_cgroups(agent) == [])


async def test_a_terminal_with_its_size_and_job_control(pod: StreamPod, agent: AgentKit) -> None:
    command = await Command.open(await pod.shell_url(TTY), TTY)
    async with asyncio.timeout(TIMEOUT):
        await command.until(b"ready ")
        await command.resize(31, 77)
        # Sizes and input come on connections of their own, in any order.
        await command.write(b"until stty size | grep '^31 77'; do sleep 0.01; done\n")
        await command.until(b"\r\n31 77")
        await command.write(b"sh -c 'echo go''ing; exec sleep 1000'\n")
        await command.until(b"going")
        await command.write(b"\x03")
        await command.until(b"ready ")
        await command.write(b"exit 3\n")
    _, _, status = await command.result()
    assert exit_code(status) == 3
    await eventually(lambda: operator_cgroups(agent) == [])


@pytest.mark.parametrize("wanted", [ALL, TTY])
async def test_the_end_of_the_client_is_the_end_of_the_shell(
    pod: StreamPod, agent: AgentKit, wanted: object
) -> None:
    chosen = TTY if wanted is TTY else ALL
    command = await Command.open(await pod.shell_url(chosen), chosen)
    await command.write(b"trap '' HUP; sleep 1000 & echo started; wait\n")
    async with asyncio.timeout(TIMEOUT):
        await command.until(b"started\n" if chosen is ALL else b"started\r\n")
    assert operator_cgroups(agent)
    command.client.abort()
    await eventually(lambda: operator_cgroups(agent) == [])


async def test_dead_containers_and_a_full_shim_do_not_matter(pod: StreamPod, agent: AgentKit) -> None:
    container = await agent.start("true")
    await agent.exit_of(container)
    await agent.client.remove_container(container)
    command = await Command.open(await pod.shell_url(), ALL)
    await command.write(b"echo alive\n")
    await command.end()
    out, _, status = await command.result()
    assert (out, exit_code(status)) == (b"alive\n", 0)


async def test_bounded_and_given_up_when_nobody_comes(agent: AgentKit) -> None:
    process = json.dumps({"env": []}).encode()
    idents = [secrets.token_hex(16) for _ in range(4)]
    for ident in idents:
        await agent.client.start_exec("", ident, process_json=process, tty=False, stdin=True)
    with pytest.raises(AlreadyExists):
        await agent.client.start_exec("", idents[0], process_json=process)
    with pytest.raises(ResourceExhausted, match="4 shells"):
        await agent.client.start_exec("", secrets.token_hex(16), process_json=process)
    await eventually(lambda: operator_cgroups(agent) == [])
    with pytest.raises(InvalidArgument, match="env"):
        await agent.client.start_exec("", secrets.token_hex(16), process_json=b'{"env": [1]}')


async def test_one_client_only_and_none_without_a_start(pod: StreamPod, agent: AgentKit) -> None:
    url = await pod.shell_url()
    command = await Command.open(url, ALL)
    await command.write(b"echo here\n")
    await command.until(b"here\n")
    [ident] = [path.name for path in operator_cgroups(agent)[0].iterdir() if path.is_dir()]
    async with agent.output("", ident, "process") as second:
        assert "client already" in await second.refused()
    async with agent.output("", "0" * 32, "process") as unknown:
        assert "no shell" in await unknown.refused()
    await command.end()
    await command.result()


async def test_the_end_of_the_agent_ends_shells(agent: AgentKit) -> None:
    ident = secrets.token_hex(16)
    await agent.client.start_exec("", ident, process_json=b"{}", tty=True, stdin=True)
    assert operator_cgroups(agent)
    await agent.client.shutdown()
    await eventually(lambda: operator_cgroups(agent) == [])
