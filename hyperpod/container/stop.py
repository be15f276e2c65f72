"""StopContainer: grace, overtaking, SIGKILL, and a guest that does not react."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from hyperpod.container import signals
from hyperpod.container.live import LiveContainer
from hyperpod.errors import HyperpodError, NotFound
from hyperpod.sandbox.manager import SandboxManager

log = logging.getLogger(__name__)

AFTER_KILL = 20.0
"""Seconds for SIGKILL to be delivered and to work, until the guest counts as dead and its VM is stopped."""

SIGKILL = 9


class Stopper:
    """Runs stops; several at once on one container agree on the earliest deadline."""

    def __init__(
        self, sandboxes: SandboxManager, unresponsive: Callable[[LiveContainer, str], Awaitable[None]]
    ) -> None:
        self._sandboxes, self._unresponsive = sandboxes, unresponsive

    async def stop(self, container: LiveContainer, timeout: int) -> None:
        """Returns when the container has exited."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + max(timeout, 0)
        if deadline < container.stop_at:
            container.stop_at = deadline
            container.stop_moved.set()
        if timeout > 0:
            with contextlib.suppress(
                TimeoutError
            ):  # a guest that does not take it has its grace all the same
                async with asyncio.timeout_at(deadline):
                    await self._signal(
                        container, signals.number(container.record.stop_signal), everyone=False
                    )
        while not container.exited.is_set() and (left := container.stop_at - loop.time()) > 0:
            container.stop_moved.clear()
            await self._first_of(container.exited, container.stop_moved, left)
        if container.exited.is_set():
            return
        try:
            async with asyncio.timeout(AFTER_KILL):
                await self._signal(container, SIGKILL, everyone=True)
                await container.exited.wait()
        except TimeoutError:
            await self._unresponsive(container, f"did not end within {AFTER_KILL:.0f} s of SIGKILL")
            await container.exited.wait()

    async def _signal(self, container: LiveContainer, number: int, *, everyone: bool) -> None:
        """Send a signal; a guest that cannot be reached is dealt with by the deadlines."""
        try:
            sandbox = self._sandboxes.live(container.sandbox_id)
            # Rather twice than not at all: what is not ended by its signal costs the whole pod in the end.
            await sandbox.session.repeatable(
                lambda agent: agent.signal_container(container.id, number, all_processes=everyone)
            )
        except NotFound:
            return
        except HyperpodError as exc:
            log.warning("container %s: signal %d not delivered: %s", container.short, number, exc)

    @staticmethod
    async def _first_of(one: asyncio.Event, other: asyncio.Event, seconds: float) -> None:
        waits = [asyncio.ensure_future(event.wait()) for event in (one, other)]
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
