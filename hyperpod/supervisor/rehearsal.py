"""What every shim and every agent does first, done once in the nursery before anything is forked from it.

A page is shared until somebody writes to it, and much of what a start writes is the same for all: byte code that
specialises itself, caches of attribute look-ups, type hints that are evaluated late. Here a shim and an agent talk
to each other and to their callers, without namespaces, mounts, cgroups and containers, and are gone again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import threading
from collections.abc import AsyncIterator
from pathlib import Path

from grpclib.client import Channel
from grpclib.exceptions import GRPCError
from grpclib.protocol import H2Protocol

from hyperpod.agent.cgroups import Cgroups
from hyperpod.agent.containers import Containers
from hyperpod.agent.environment import Place
from hyperpod.agent.layout import Layout
from hyperpod.agent.listener import CONTROL_PORT, STDIO_PORT, Listener, listen_unix
from hyperpod.agent.reaper import Reaper
from hyperpod.agent.service import AgentService, h2_factory
from hyperpod.agent.stdio import StdioConnection
from hyperpod.agent.streams import Stream
from hyperpod.agent.tools import Tools
from hyperpod.api.gen.hyperpod.agent import v1
from hyperpod.errors import Unavailable
from hyperpod.shim.caller import ControlCaller
from hyperpod.shim.service import Shim, ShimOptions
from hyperpod.tasks import TaskOwner
from hyperpod.vsock.dial import HostEndpoint, endpoint_to_json
from hyperpod.vsock.open import open_agent
from hyperpod.wire.preface import TOKEN_LEN, Identity
from hyperpod.wire.stdio import Open

TIMEOUT = 5.0
"""Seconds for all of it; 15 ms are usual."""

_SANDBOX, _CONTAINER, _TOKEN = "0" * 64, "1" * 64, bytes(TOKEN_LEN)


def rehearse(folder: Path) -> None:
    """`folder`: made, and removed. No thread, descriptor or signal handler is left.

    Raises HyperpodError, GRPCError, OSError, TimeoutError."""
    shutil.rmtree(folder, ignore_errors=True)
    agent, shim = folder / "agent", folder / "shim"
    for part in (folder, agent, shim):
        part.mkdir(0o700)
    logging.disable(logging.CRITICAL)  # none of it happens to anybody
    try:
        asyncio.run(_run(str(agent), str(shim)))
    finally:
        logging.disable(logging.NOTSET)
        for thread in threading.enumerate():
            if thread is not threading.main_thread():
                thread.join(TIMEOUT)
        shutil.rmtree(folder, ignore_errors=True)


async def _run(agent: str, shim: str) -> None:
    async with asyncio.timeout(TIMEOUT), _agent(agent) as asked:
        await _call_agent(agent)
        await _shim(shim, agent, asked)


class _Place(Place):
    """None."""

    async def greet(self, hello: v1.HelloRequest) -> None:
        self._crun_version = "1"


@contextlib.asynccontextmanager
async def _agent(folder: str) -> AsyncIterator[asyncio.Event]:
    """As agent/main.py makes it, on the host. The event: somebody has asked for a stream."""
    layout = Layout(root=folder, scratch=folder, cgroup="/none", guest=False)
    owner, reaper = TaskOwner("agent"), Reaper()
    containers = Containers(Tools(layout, Cgroups(layout.cgroup), reaper, owner))
    service = AgentService(containers, _Place(layout, asyncio.Event()))
    asked = asyncio.Event()

    def stream(what: Open) -> Stream:
        asked.set()
        return containers.stream(what)

    identity = Identity(claimable=lambda: len(containers) == 0)
    stdio = Listener(STDIO_PORT, identity, lambda: StdioConnection(stream), 8)
    control = Listener(CONTROL_PORT, identity, h2_factory(service), 8)
    try:
        for listener in (stdio, control):
            await listener.start(listen_unix(folder, listener.port))
        yield asked
    finally:
        control.close()
        stdio.close()
        await owner.close()
        reaper.close()


class _Channel(Channel):
    def __init__(self, folder: str) -> None:
        super().__init__()
        self._folder = folder

    async def _create_connection(self) -> H2Protocol:
        where = HostEndpoint(self._folder)
        sock, _ = await open_agent(where, CONTROL_PORT, _SANDBOX, _TOKEN, claim=True, timeout=TIMEOUT)
        _, protocol = await asyncio.get_running_loop().create_connection(self._protocol_factory, sock=sock)
        return protocol


async def _call_agent(folder: str) -> None:
    """What the daemon asks first; the container has no layers, so nothing is made for it."""
    channel = _Channel(folder)
    agent = v1.AgentStub(channel)
    try:
        await agent.hello(
            v1.HelloRequest(api_version=1, hostname="a", sysctls={"a": "b"}, resolv_conf="a", hosts="a")
        )
        await agent.list_containers(v1.ListContainersRequest())
        with contextlib.suppress(GRPCError):
            await agent.create_container(
                v1.CreateContainerRequest(id=_CONTAINER, oci_spec=b"{}", security=v1.Security())
            )
    finally:
        channel.close()


async def _shim(folder: str, agent: str, asked: asyncio.Event) -> None:
    """Until it asks the agent for a container's output."""
    shim, owner = Shim(ShimOptions(_SANDBOX, folder, device=False)), TaskOwner("rehearsal", limit=1)
    running = owner.spawn("shim", shim.run())
    caller = ControlCaller(f"{folder}/control.sock", "shim")
    log = os.open(f"{folder}/log", os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
    try:
        while True:
            try:
                await caller.connect(TIMEOUT)
                break
            except Unavailable:  # it does not listen yet
                await asyncio.sleep(0)
        await caller.call("hello", timeout=TIMEOUT)
        where = endpoint_to_json(HostEndpoint(agent))
        await caller.call("agent", {"token": _TOKEN.hex(), "endpoint": where}, timeout=TIMEOUT)
        await caller.call("log_start", {"container": _CONTAINER, "tty": False}, [log], timeout=TIMEOUT)
        await asked.wait()
        await caller.call("log_stop", {"container": _CONTAINER}, timeout=TIMEOUT)
    finally:
        os.close(log)
        await caller.close()
        shim.stop.set()
        await asyncio.wait([running])
        await owner.close()
