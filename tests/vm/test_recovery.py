"""Pods survive the daemon and the shim; a daemon killed at any step is mended by the next."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator

import pytest
from grpclib.exceptions import GRPCError, StreamTerminatedError

from hyperpod import failpoints
from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.processes import running_since
from tests.daemonkit import PATIENCE, Cri, Daemon, daemon, eventually
from tests.recoverykit import killed_at_every_step, numbers, reboot

pytestmark = pytest.mark.vm


@pytest.fixture
def own_daemon() -> Iterator[Daemon]:
    with daemon() as one:
        yield one


COUNTER = "i=0; while :; do echo line $i; i=$((i+1)); sleep 0.05; done"


async def test_pods_survive_kill_of_daemon_and_shim(own_daemon: Daemon) -> None:
    async with own_daemon.client() as client:
        await client.load_busybox()
        pod = await client.run_pod()
        container = await client.sh(pod, COUNTER)
    own_daemon.kill_daemon()
    async with own_daemon.client() as client:
        before = len(await numbers(client, container))
        assert (await client.status(container)).state == cri.ContainerState.CONTAINER_RUNNING
        assert (await client.exec(container, "echo", "hi")).stdout == b"hi\n"
        [shim] = [p for p in own_daemon.processes() if "shim" in p and pod[:12] in p]
        os.kill(int(shim.split()[0]), signal.SIGKILL)
        # With it goes the daemon's connection to the agent: a call under way is made anew, its effect is not.
        for reply in await asyncio.gather(*(client.exec(container, "echo", "hi") for _ in range(4))):
            assert reply.stdout == b"hi\n"
        await eventually(lambda: numbers(client, container), lambda got: len(got) > before + 20)
        assert (await client.exec(container, "echo", "hi")).stdout == b"hi\n"
        await client.stop(container)
        got = await numbers(client, container)
        assert got == list(range(len(got))), "every line exactly once"
        assert len(got) > before + 20
        await client.remove_pod(pod)
    assert own_daemon.leftovers() == []


async def test_exits_while_the_daemon_is_away_are_learnt(own_daemon: Daemon) -> None:
    async with own_daemon.client() as client:
        await client.load_busybox()
        pod = await client.run_pod()
        container = await client.sh(pod, "sleep 2; echo bye; exit 9")
    own_daemon.stop()
    await asyncio.sleep(4)
    own_daemon.start()
    async with own_daemon.client() as client:
        status = await client.wait(container)
        assert (status.exit_code, status.reason) == (9, "Error")
        assert [text for _, _, text in await client.log(container)] == ["bye"]
        await client.remove_pod(pod)
    assert own_daemon.leftovers() == []


async def test_a_host_reboot(own_daemon: Daemon) -> None:
    async with own_daemon.client() as client:
        await client.load_busybox()
        pod = await client.run_pod()
        container = await client.sh(pod, "sleep 600")
    reboot(own_daemon, pod)
    async with own_daemon.client() as client:
        status = await client.status(container)
        assert status.state == cri.ContainerState.CONTAINER_EXITED
        assert "reboot" in status.message
        reply = await client.runtime.pod_sandbox_status(cri.PodSandboxStatusRequest(pod_sandbox_id=pod))
        assert reply.status is not None
        assert reply.status.state == cri.PodSandboxState.SANDBOX_NOTREADY
        await client.remove_pod(pod)
    assert own_daemon.leftovers() == []


async def test_the_daemon_killed_at_every_step(own_daemon: Daemon) -> None:
    names = (name for name in failpoints.NAMES if name not in failpoints.OF_HOST_PODS)
    await killed_at_every_step(own_daemon, names)


async def answers(client: Cri, container: str) -> bool:
    """Whether the container can be executed in: shim, device and agent are reached again."""
    with contextlib.suppress(GRPCError, StreamTerminatedError, ConnectionError):
        return (await client.exec(container, "echo", "hi")).stdout == b"hi\n"
    return False


@pytest.mark.parametrize("shim_too", [False, True])
async def test_pods_survive_the_supervisor(own_daemon: Daemon, shim_too: bool) -> None:
    """kill -9 of the supervisor ends the daemon; with its shim dead too the VM gets a new vsock device."""
    async with own_daemon.client() as client:
        await client.load_busybox()
        pod = await client.run_pod()
        container = await client.sh(pod, COUNTER)
    daemon_pid = own_daemon.pid()
    own_daemon.kill_supervisor()
    if shim_too:
        [shim] = [p for p in own_daemon.processes() if "shim" in p and pod[:12] in p]
        os.kill(int(shim.split()[0]), signal.SIGKILL)
    async with asyncio.timeout(PATIENCE):
        while running_since(daemon_pid):
            await asyncio.sleep(0.1)
    own_daemon.start()
    async with own_daemon.client() as client:
        await eventually(lambda: answers(client, container), bool)
        before = len(await numbers(client, container))
        await eventually(lambda: numbers(client, container), lambda got: len(got) > before + 5)
        await client.stop(container)
        got = await numbers(client, container)
        assert got == list(range(len(got))), "every line exactly once"
        assert len(got) > before + 5
        await client.remove_pod(pod)
    assert own_daemon.leftovers() == []


async def test_a_shim_that_dies_during_create_and_start(own_daemon: Daemon) -> None:
    """Their answers are lost with it, and their effect is not: what is told of a container is what it is."""
    async with own_daemon.client() as client:
        await client.load_busybox()
        pod = await client.run_pod()

        async def both(pause: float) -> str:
            await asyncio.sleep(pause)
            return await client.sh(pod, "echo up; sleep 600")

        starting = asyncio.gather(*(both(0.15 * n) for n in range(5)))
        for pause in (0.4, 1.5):
            await asyncio.sleep(pause)
            async with asyncio.timeout(PATIENCE):
                while not (shims := [p for p in own_daemon.processes() if "shim" in p and pod[:12] in p]):
                    await asyncio.sleep(0.05)
            [shim] = shims
            os.kill(int(shim.split()[0]), signal.SIGKILL)
        made = await starting
        for container in made:
            assert (await client.status(container)).state == cri.ContainerState.CONTAINER_RUNNING
            assert (await client.exec(container, "echo", "hi")).stdout == b"hi\n"
            assert [text for _, _, text in await client.logged(container, "up")] == ["up"]
        await client.remove_pod(pod)
    assert own_daemon.leftovers() == []
