"""A connection that is cut during a call to the agent: the call is made anew, and has its effect once."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hyperpod.agentclient.client import AgentClient
from hyperpod.container.live import LiveContainer
from hyperpod.container.stop import Stopper
from hyperpod.errors import AlreadyExists, ConnectionLost, Unavailable
from hyperpod.sandbox.session import AgentSession
from hyperpod.spec.oci import ContainerSpecInput, build_process
from hyperpod.vsock.dial import HostEndpoint
from hyperpod.vsock.open import CONTROL_PORT
from tests.agentkit import TIMEOUT, AgentKit
from tests.unit.test_metrics import _made


class Cutter:
    """Stands before the agent's control socket; cuts each connection of which so many more bytes have gone by."""

    def __init__(self, behind: Path, directory: Path) -> None:
        self._behind, self.directory = behind, directory
        self.up, self.down = -1, -1
        """Bytes towards and from the agent until the cut; negative: never."""
        self.cuts = 0
        self._writers: set[asyncio.StreamWriter] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner, outer = await asyncio.open_unix_connection(str(self._behind))
        self._writers |= {writer, outer}
        with contextlib.suppress(OSError):
            await asyncio.gather(self._pump(reader, outer, "up"), self._pump(inner, writer, "down"))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        while data := await reader.read(65536):
            left = getattr(self, way)
            if left >= 0:
                data = data[:left]
                setattr(self, way, left - len(data))
            writer.write(data)
            await writer.drain()
            if left >= 0 and left == len(data):
                self.cut()
        writer.close()

    def cut(self) -> None:
        self.up = self.down = -1
        self.cuts += 1
        for writer in self._writers:
            writer.close()
        self._writers.clear()


@pytest.fixture
async def cutter(agent: AgentKit, tmp_path: Path) -> AsyncIterator[Cutter]:
    assert isinstance(agent.place.endpoint, HostEndpoint)
    made = Cutter(Path(agent.place.endpoint.directory) / f"{CONTROL_PORT}.sock", tmp_path)
    server = await asyncio.start_unix_server(made.serve, str(tmp_path / f"{CONTROL_PORT}.sock"))
    yield made
    made.cut()
    server.close()


@pytest.fixture
async def session(agent: AgentKit, cutter: Cutter) -> AsyncIterator[AgentSession]:
    made = AgentSession(agent.place.sandbox_id, HostEndpoint(str(cutter.directory)), agent.place.token)
    await made.connect(asyncio.get_running_loop().time() + TIMEOUT, claim=False)

    async def nothing(_: object) -> None:
        pass

    following = asyncio.ensure_future(made.follow(nothing, nothing))
    await asyncio.sleep(0.2)
    yield made
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    await made.close()


@pytest.mark.parametrize(("up", "down"), [(0, -1), (60, -1), (400, -1), (-1, 0), (-1, 20)])
async def test_an_exec_starts_once(
    agent: AgentKit, session: AgentSession, cutter: Cutter, up: int, down: int
) -> None:
    container, ident = await agent.start("sleep", "1000"), secrets.token_hex(16)
    script = "echo x >>/ran; while [ ! -e /over ]; do sleep 0.05; done"
    spec = ContainerSpecInput(args=("sh", "-c", script), env=(b"PATH=/bin",))
    process = build_process(spec)

    async def start(client: AgentClient) -> int:
        return await client.start_exec(container, ident, process_json=process)

    cutter.up, cutter.down = up, down
    try:
        assert await session.repeatable(start) > 0
    except AlreadyExists:
        assert down >= 0  # the first call has started it, its answer did not come
    assert cutter.cuts == 1
    wait = asyncio.ensure_future(session.repeatable(lambda client: client.wait_exec(container, ident)))
    await asyncio.sleep(0.1)
    cutter.cut()
    assert await agent.client.wait_exec(container, await agent.exec(container, "touch", "/over")) == 0
    assert await wait == 0
    assert cutter.cuts == 2
    again = await agent.exec(container, "sh", "-c", "exit $(cat /ran | wc -l)")
    assert await agent.client.wait_exec(container, again, timeout=TIMEOUT) == 1


@pytest.mark.parametrize(("up", "down"), [(0, -1), (20, -1), (-1, 0)])
@pytest.mark.parametrize("grace", [0, 30])
async def test_a_stop_whose_connection_is_cut_is_carried_out(
    agent: AgentKit, session: AgentSession, cutter: Cutter, up: int, down: int, grace: int
) -> None:
    """Else the container would not end, and its whole pod be ended for it."""
    ident = await agent.start("sh", "-c", "trap 'exit 5' TERM; echo up; while :; do sleep 0.05; done")
    async with agent.output(ident) as output:
        await output.read_until(b"up")
    _, [running, _], _ = _made()
    container = LiveContainer(
        running.record.model_copy(update={"id": ident, "stop_signal": "SIGTERM"}), running.status
    )

    async def unresponsive(_: LiveContainer, what: str) -> None:
        raise AssertionError(f"the guest is alive, but its container {what}")

    class Sandboxes:
        def live(self, _: str) -> Any:
            return SimpleNamespace(session=session)

    stopper = Stopper(cast(Any, Sandboxes()), unresponsive)
    cutter.up, cutter.down = up, down
    stopping = asyncio.ensure_future(stopper.stop(container, grace))
    async with asyncio.timeout(TIMEOUT):
        assert (await agent.exit_of(ident)).exit_code == (5 if grace else 137)
        container.exited.set()
        await stopping
    assert cutter.cuts == 1


async def test_an_agent_that_does_not_come_back(
    agent: AgentKit, session: AgentSession, cutter: Cutter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hyperpod.sandbox.session.PATIENCE", 1.0)
    (cutter.directory / f"{CONTROL_PORT}.sock").unlink()
    cutter.cut()
    with pytest.raises(Unavailable, match="does not answer"):
        await session.repeatable(lambda client: client.list_containers())


async def test_who_waits_for_an_agent_that_has_ended_is_told(
    agent: AgentKit, session: AgentSession, cutter: Cutter
) -> None:
    (cutter.directory / f"{CONTROL_PORT}.sock").unlink()
    cutter.cut()
    waiting = asyncio.ensure_future(session.repeatable(lambda client: client.list_containers()))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    await session.end("it was stopped")
    async with asyncio.timeout(5):
        with pytest.raises(Unavailable, match="has ended"):
            await waiting
        with pytest.raises(Unavailable, match="has ended, and its agent with it: it was stopped"):
            await session.client()


@pytest.mark.parametrize("closer", ["ours", "theirs"])
async def test_a_lost_connection_is_told_apart(agent: AgentKit, cutter: Cutter, closer: str) -> None:
    """Also a loss that was noticed before the call began."""
    client = AgentClient(HostEndpoint(str(cutter.directory)), agent.place.sandbox_id, agent.place.token)
    await client.connect(claim=False, timeout=TIMEOUT)
    await client.list_containers()
    if closer == "ours":
        await client.close()
    else:
        cutter.cut()
        await asyncio.sleep(0.2)
    with pytest.raises(ConnectionLost):
        await client.list_containers()
    await client.close()
