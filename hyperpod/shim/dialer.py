"""Where the sandbox's agent is, once the daemon has told."""

from __future__ import annotations

import asyncio
import socket

from hyperpod.vsock.dial import Endpoint, HostEndpoint
from hyperpod.vsock.open import STDIO_PORT, open_agent
from hyperpod.wire.preface import TIMEOUT

_AT_ONCE = 16
"""Connections being made; the agent takes a limited number that have not proven themselves yet."""


class AgentDialer:
    """Opens proven connections to the stdio port of one sandbox's agent."""

    def __init__(self, sandbox_id: str) -> None:
        self._sandbox_id = sandbox_id
        self._target: tuple[Endpoint, bytes] | None = None
        self._known = asyncio.Event()
        self._turns = asyncio.Semaphore(_AT_ONCE)

    @property
    def known(self) -> bool:
        return self._target is not None

    @property
    def direct(self) -> bool:
        """Whether the agent is a process of this host, which can hand descriptors over."""
        return self._target is not None and isinstance(self._target[0], HostEndpoint)

    def set(self, endpoint: Endpoint, token: bytes) -> None:
        self._target = endpoint, token
        self._known.set()

    async def open(self) -> tuple[socket.socket, bytes]:
        """A non-blocking socket and what was read past the preface.

        Waits (without end: for the daemon) until the agent is known. Raises Unavailable, DeadlineExceeded,
        ProtocolError.
        """
        await self._known.wait()
        assert self._target is not None
        endpoint, token = self._target
        async with self._turns:
            return await open_agent(endpoint, STDIO_PORT, self._sandbox_id, token, timeout=TIMEOUT)
