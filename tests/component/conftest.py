"""Fixtures of the component tests."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.agentkit import AgentKit, AgentPlace, host_agent, make_busybox_layer


@pytest.fixture(scope="session")
def busybox_layer() -> Iterator[Path]:
    """A squashfs image of a busybox root."""
    with tempfile.TemporaryDirectory(prefix="hyperpod-layer-") as directory:
        yield make_busybox_layer(Path(directory))


@pytest.fixture
async def agent_place(busybox_layer: Path) -> AsyncIterator[AgentPlace]:
    """A fresh host agent that nobody has claimed."""
    with tempfile.TemporaryDirectory(prefix="hp-agent-") as directory:
        async with host_agent(Path(directory), busybox_layer) as place:
            yield place


@pytest.fixture
async def agent(agent_place: AgentPlace) -> AsyncIterator[AgentKit]:
    """A fresh, claimed agent."""
    kit = await AgentKit.claim(agent_place)
    try:
        yield kit
    finally:
        await kit.client.close()
