"""The daemon's conversation with one agent: connected, or being reconnected, until the sandbox ends."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from hyperpod.agentclient.client import AgentClient
from hyperpod.agentclient.types import ContainerInfo
from hyperpod.errors import (
    ConnectionLost,
    DeadlineExceeded,
    FailedPrecondition,
    HyperpodError,
    Unavailable,
)
from hyperpod.vsock.dial import Endpoint

log = logging.getLogger(__name__)

RETRY_MIN, RETRY_MAX = 0.02, 1.0
"""Seconds between attempts to reach an agent; longer each time."""

RETRY_BOOT = 0.03
"""The longest pause while a VM boots: half of it is added to a pod's start, on average."""


STEADY = 10.0
"""Seconds that a connection lasts until the next interruption counts as the first one again."""


PATIENCE = 20.0
"""Seconds that a repeatable call waits for the agent: of one that is on its way back, what it has done is not known
before, and in an emulated guest of a busy host that takes longer than `client` has."""

REPEATS = 3
"""Lost connections that a repeatable call bears."""

T = TypeVar("T")


class AgentSession:
    """Owns the AgentClient. `client()` waits, bounded, while a connection is being made."""

    def __init__(self, sandbox_id: str, endpoint: Endpoint, token: bytes) -> None:
        self.sandbox_id, self.endpoint, self._token = sandbox_id, endpoint, token
        self._client: AgentClient | None = None
        self._ready = asyncio.Event()
        self._broken = asyncio.Event()
        self._ended, self._why = False, ""
        self._seq = 0

    async def connect(self, deadline: float, *, claim: bool) -> AgentClient:
        """Try until `deadline` (loop time). Raises the last reason as DeadlineExceeded."""
        loop, delay, last = asyncio.get_running_loop(), RETRY_MIN, "never answered"
        while (left := deadline - loop.time()) > 0:
            client = AgentClient(self.endpoint, self.sandbox_id, self._token)
            try:
                await client.connect(claim=claim, timeout=min(left, 5.0))
            except (Unavailable, DeadlineExceeded, OSError) as exc:
                last = str(exc) or type(exc).__name__
                await client.close()
                await asyncio.sleep(min(delay, max(left, 0)))
                delay = min(delay * 1.5, RETRY_BOOT if claim else RETRY_MAX)
                continue
            self._client = client
            self._broken.clear()
            self._ready.set()
            return client
        raise DeadlineExceeded(f"the agent could not be reached: {last}")

    async def client(self, timeout: float = 5.0, *, instead_of: AgentClient | None = None) -> AgentClient:
        """The connected client. Raises Unavailable when there is none within `timeout` seconds.

        `instead_of`: whose connection the caller has just seen break, which `follow` may not have noticed yet."""
        try:
            async with asyncio.timeout(timeout):
                await self._ready.wait()
                while self._client is instead_of and not self._ended:
                    await self._broken.wait()
                    await self._ready.wait()
        except TimeoutError as exc:
            raise Unavailable(f"sandbox {self.sandbox_id[:12]}: its agent does not answer") from exc
        if self._ended:
            why = f": {self._why}" if self._why else ""
            raise Unavailable(f"sandbox {self.sandbox_id[:12]} has ended, and its agent with it{why}")
        assert self._client is not None
        return self._client

    async def repeatable(self, call: Callable[[AgentClient], Awaitable[T]]) -> T:
        """Make a call, and make it anew when the connection is lost during it: for one that has its effect once
        however often it is made. Raises what it raises, Unavailable when the agent does not come back."""
        client = await self.client(PATIENCE)
        for _ in range(REPEATS):
            try:
                return await call(client)
            except ConnectionLost as exc:
                log.info("sandbox %s: %s; once more", self.sandbox_id[:12], exc)
                client = await self.client(PATIENCE, instead_of=client)
        return await call(client)

    async def follow(
        self,
        on_exit: Callable[[ContainerInfo], Awaitable[None]],
        on_connected: Callable[[AgentClient], Awaitable[None]],
    ) -> None:
        """Read exit events for ever; reconnect when the connection breaks. Ends by cancellation only."""
        loop, delay, missed = asyncio.get_running_loop(), RETRY_MIN, False
        while True:
            client = await self.client(timeout=3600)
            began = loop.time()
            try:
                async for event in client.events(self._seq):
                    self._seq = event.seq
                    await on_exit(event.exited)
            except FailedPrecondition as exc:
                log.warning("sandbox %s: exits were missed: %s", self.sandbox_id[:12], exc)
                missed = True
            except HyperpodError as exc:
                log.info("sandbox %s: agent connection lost: %s", self.sandbox_id[:12], exc)
            self._gone()
            await client.close()
            if loop.time() - began > STEADY:
                delay = RETRY_MIN
            while True:
                # An agent that answers nonsense at once must not keep the loop busy either.
                await asyncio.sleep(delay)
                delay = min(delay * 2, RETRY_MAX)
                try:
                    fresh = await self.connect(loop.time() + 60, claim=False)
                    if missed:  # the list of containers, asked for next, tells what the events do not
                        greeting = await fresh.hello(
                            host_time_ns=time.time_ns(), entropy=b"", hostname="", sysctls={}
                        )
                        self._seq, missed = greeting.event_seq, False
                    await on_connected(fresh)
                    break
                except HyperpodError as exc:
                    log.warning("sandbox %s: %s", self.sandbox_id[:12], exc)
                    await self.close()

    def _gone(self) -> None:
        self._ready.clear()
        self._broken.set()

    async def end(self, why: str) -> None:
        """The agent is not to come back: who waits for it is told at once, as is who asks later, and `why`."""
        await self.close()
        self._ended, self._why = True, why
        self._ready.set()

    async def close(self) -> None:
        self._gone()
        if self._client is not None:
            await self._client.close()
            self._client = None
