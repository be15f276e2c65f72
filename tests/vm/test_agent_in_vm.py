"""The agent's test-suite once more, over vsock against the agent of a booted VM (one for all of it)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from hyperpod.errors import HyperpodError, InvalidArgument
from tests.agentkit import TIMEOUT, AgentKit, AgentPlace
from tests.component.test_agent_access import *  # noqa: F403  # the suite: every test_ name
from tests.component.test_agent_envexec import *  # noqa: F403
from tests.component.test_agent_image_volumes import *  # noqa: F403
from tests.component.test_agent_lifecycle import *  # noqa: F403
from tests.component.test_agent_security import *  # noqa: F403
from tests.component.test_agent_streams import *  # noqa: F403
from tests.vm.agentvm import vm_agent

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def vm_place() -> Iterator[AgentPlace]:
    """One VM for the module."""
    with vm_agent() as place:
        yield place


@pytest.fixture
async def agent(vm_place: AgentPlace) -> AsyncIterator[AgentKit]:
    """Claimed again by each test (which is allowed), and without containers."""
    async with asyncio.timeout(TIMEOUT):
        while True:
            try:
                kit = await AgentKit.claim(vm_place)
                break
            except HyperpodError:
                await asyncio.sleep(0.05)
    try:
        yield kit
    finally:
        for info in await kit.client.list_containers():
            await kit.client.remove_container(info.id)
        await kit.client.forget_layers([layer.serial for layer in vm_place.layers])
        await kit.client.close()


async def test_the_guest_is_another_machine(agent: AgentKit) -> None:
    hello = await agent.client.hello(
        host_time_ns=2_000_000_000_000_000_000,
        entropy=os.urandom(64),
        hostname="my-pod",
        sysctls={"net.ipv4.ip_forward": "1"},
    )
    assert hello.boot_id != Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert hello.kernel_release != os.uname().release
    _, _, out = await agent.run(
        "sh", "-c", "cat /proc/sys/kernel/hostname /proc/sys/net/ipv4/ip_forward; date +%s"
    )
    name, forward, now = out.split()
    assert (name, forward) == (b"my-pod", b"1")
    assert 2_000_000_000 <= int(now) < 2_000_000_600


async def test_unknown_sysctls_are_refused_by_name(agent: AgentKit) -> None:
    for name in ("kernel.nothing_like_it", "../../tmp/x", "/etc/passwd", "kernel"):
        with pytest.raises(InvalidArgument):
            await agent.client.hello(host_time_ns=0, entropy=b"", hostname="", sysctls={name: "1"})


async def test_the_clock_is_set_again(agent: AgentKit) -> None:
    await agent.client.set_clock(2_100_000_000_000_000_000)
    _, info, _ = await agent.run("true")
    assert 2_100_000_000 <= info.finished_at_ns // 10**9 < 2_100_000_600
