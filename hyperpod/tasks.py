"""Every task owned, named and bounded.

`TaskOwner.spawn` is the only way to start a background task: the owner holds it, logs its failure, and
`close` cancels and awaits what is left. `Operations` runs named operations that outlive the RPC that asked
for them: a second caller with the same name joins the first (DESIGN section 8).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from hyperpod.errors import DeadlineExceeded, HyperpodError

T = TypeVar("T")
log = logging.getLogger(__name__)


class TaskOwner:
    """Holds background tasks; at most `limit` at once."""

    def __init__(self, name: str, limit: int = 4096) -> None:
        self.name, self.limit = name, limit
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def closed(self) -> bool:
        """Whether it takes no tasks any more."""
        return self._closed

    def spawn(self, name: str, coro: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start `coro` as a task of this owner. Raises RuntimeError when closed or full."""
        if self._closed or len(self._tasks) >= self.limit:
            coro.close()
            why = "closed" if self._closed else "too many tasks"
            raise RuntimeError(f"{self.name}: {why}, not starting {name}")
        task = asyncio.get_running_loop().create_task(coro, name=f"{self.name}/{name}")
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            if isinstance(
                exc, HyperpodError
            ):  # foreseen: its words are enough, and its caller hears them too
                log.info("task %s failed: %s", task.get_name(), exc)
            else:
                log.error("task %s failed: %r", task.get_name(), exc, exc_info=exc)

    async def close(self, timeout: float = 10.0) -> None:
        """Cancel every task and wait for them, at most `timeout` seconds."""
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            _, pending = await asyncio.wait(tasks, timeout=timeout)
            for task in pending:
                log.error("task %s did not end within %.0f s", task.get_name(), timeout)


class Operations:
    """Named operations that go on when their caller leaves; callers with the same name join."""

    def __init__(self, owner: TaskOwner) -> None:
        self._owner = owner
        self._running: dict[str, asyncio.Task[Any]] = {}
        self._requests: dict[str, object] = {}

    def running(self, name: str) -> bool:
        return name in self._running

    def request(self, name: str) -> object:
        """What the running operation `name` was started for; None when it does not run, or for nothing special."""
        return self._requests.get(name)

    async def run(self, name: str, make: Callable[[], Coroutine[Any, Any, T]], request: object = None) -> T:
        """Join the operation `name`, or start it with `make()`; a cancelled caller does not cancel it."""
        task: asyncio.Task[T] | None = self._running.get(name)
        if task is None:
            task = self._owner.spawn(name, make())
            self._running[name], self._requests[name] = task, request
            task.add_done_callback(lambda t: self._forget(name, t))
        return await asyncio.shield(task)

    def _forget(self, name: str, task: asyncio.Task[Any]) -> None:
        if self._running.get(name) is task:
            del self._running[name], self._requests[name]
        if not task.cancelled():
            task.exception()  # retrieved: the owner has logged it

    async def wait(self, name: str) -> None:
        """Wait for the end of `name`, whatever its outcome; returns at once when it is not running."""
        if (task := self._running.get(name)) is not None:
            await asyncio.wait([task])


async def settle_all(*awaitables: Awaitable[Any]) -> list[Any]:
    """Await all of them, each to its end also when another fails. Raises the first failure."""
    results = await asyncio.gather(*awaitables, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def report_on(number: int) -> None:
    """From now on the signal `number` makes this process log what its loop has to do, for who wonders."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(number, lambda: log.warning("%s", _report(loop)))


def _report(loop: asyncio.AbstractEventLoop) -> str:
    names = [task.get_name() for task in asyncio.all_tasks(loop)]
    kinds = Counter("/".join(name.split("/")[:2]) if "/" in name else "other" for name in names)
    told = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common(20))
    return f"pid {os.getpid()}: {len(names)} tasks, {len(os.listdir('/proc/self/fd'))} descriptors: {told}"


async def bounded(awaitable: Awaitable[T], seconds: float | None, what: str) -> T:
    """Await with a deadline (None: without). Raises DeadlineExceeded that names `what`."""
    try:
        async with asyncio.timeout(seconds):
            return await awaitable
    except TimeoutError as exc:
        raise DeadlineExceeded(f"{what} took longer than {seconds:g} s") from exc
