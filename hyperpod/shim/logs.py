"""The logs of a sandbox's containers: files, streams, and what the daemon may ask of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import NamedTuple, TypeVar

from hyperpod.errors import NotFound
from hyperpod.shim.dialer import AgentDialer
from hyperpod.shim.fdstore import FdStore
from hyperpod.shim.logfile import LogFile
from hyperpod.shim.sessions.tap import Fanout
from hyperpod.shim.stream import StreamPump
from hyperpod.tasks import TaskOwner

log = logging.getLogger(__name__)
T = TypeVar("T")

_FIRST_RETRY, _LAST_RETRY = 0.05, 2.0
_STORE_TIMEOUT = 1.0


class LogEnd(NamedTuple):
    complete: bool
    """Every stream's EOF is reached and written."""
    gap_bytes: int
    """Bytes that are missing in between."""


class ContainerLog:
    """One container's log and its streams. File operations run in the executor, one at a time."""

    def __init__(self, container: str, file: LogFile, executor: Executor, fanout: Fanout) -> None:
        self.container = container
        self.turn = asyncio.Lock()
        self.pumps: dict[str, StreamPump] = {}
        self.tasks: list[asyncio.Task[None]] = []
        self.fanout = fanout
        self._file, self._executor = file, executor
        self._io = asyncio.Lock()

    @property
    def gap_bytes(self) -> int:
        return self._file.cursor.gap_bytes

    @property
    def fd(self) -> int | None:
        return self._file.fd

    def offset(self, stream: str) -> int:
        return self._file.offset(stream)

    def has_ended(self, stream: str) -> bool:
        return self._file.cursor.has_ended(stream)

    async def write(self, stream: str, offset: int, records: list[bytes], gap: int = 0) -> None:
        """See stream.Sink. A full or broken disk is waited out: the guest feels it as back-pressure."""
        if gap:
            self._file.add_gap(gap)
        try:
            await self._blocking(lambda: self._file.write(stream, offset, records))
        except OSError as exc:
            log.error("log of %s: %s; its output waits", self.container[:12], exc.strerror)
            await self._retry()
            log.info("log of %s: written again", self.container[:12])

    async def end(self, stream: str) -> None:
        await self._blocking(lambda: self._file.end(stream))

    async def reopen(self, fd: int) -> None:
        """Takes the descriptor over; when this returns, no byte goes to the old file any more."""
        await self._blocking(lambda: self._file.reopen(fd))

    async def close(self) -> None:
        await self._blocking(self._file.close)

    async def _retry(self) -> None:
        delay = _FIRST_RETRY
        while True:
            await asyncio.sleep(delay)
            delay = min(2 * delay, _LAST_RETRY)
            with contextlib.suppress(OSError):
                return await self._blocking(self._file.flush)

    async def _blocking(self, work: Callable[[], T]) -> T:
        """Run it in a thread; also when cancelled, the lock is only left once the thread is through."""
        async with self._io:
            future = asyncio.get_running_loop().run_in_executor(self._executor, work)
            try:
                return await asyncio.shield(future)
            except asyncio.CancelledError:
                await asyncio.wait({future})
                raise


class LogService:
    """All logs of one sandbox. `cursors` is a folder; `inherited` are a predecessor's log descriptors."""

    def __init__(
        self,
        cursors: Path,
        dialer: AgentDialer,
        store: FdStore,
        executor: Executor,
        inherited: dict[str, int],
    ) -> None:
        self._cursors, self._dialer, self._store, self._executor = cursors, dialer, store, executor
        self._inherited = inherited
        self._logs: dict[str, ContainerLog] = {}
        self._owner = TaskOwner("logs")
        self._changing = asyncio.Lock()
        cursors.mkdir(mode=0o700, exist_ok=True)

    async def start(self, container: str, *, tty: bool, fd: int | None) -> None:
        """Begin (or go on) to write a container's log; `fd` is owned from here on. Raises OSError."""
        async with self._changing:
            if (known := self._logs.get(container)) is not None:
                await self._renew(known, fd)
                return
            path, inherited = str(self._cursors / container), self._inherited.pop(container, None)
            loop = asyncio.get_running_loop()
            file = await loop.run_in_executor(self._executor, lambda: LogFile(path, fd, inherited))
            streams = ("stdout",) if tty else ("stdout", "stderr")
            entry = ContainerLog(container, file, self._executor, Fanout(streams))
            for stream in streams:
                pump = StreamPump(container, stream, self._dialer, entry, entry.fanout)
                entry.pumps[stream] = pump
                entry.tasks.append(self._owner.spawn(f"{container[:12]}/{stream}", pump.run()))
            self._logs[container] = entry
            await self._keep(entry)

    def fanout(self, container: str) -> Fanout:
        """Who listens to the container's output. Raises NotFound."""
        return self._get(container).fanout

    async def reopen(self, container: str, fd: int) -> None:
        """Owns `fd`. Raises NotFound, OSError, FailedPrecondition."""
        entry = self._logs.get(container)
        if entry is None:
            os.close(fd)
            raise NotFound(f"container {container[:12]} has no log here")
        await entry.reopen(fd)
        await self._keep(entry)

    async def finish(self, container: str, timeout: float) -> LogEnd:
        """Wait up to `timeout` seconds until all is written. Raises NotFound."""
        entry = self._get(container)
        _, pending = await asyncio.wait(entry.tasks, timeout=timeout)
        if pending:
            for pump in entry.pumps.values():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        await pump.write_tail()
        return LogEnd(all(map(entry.has_ended, entry.pumps)), entry.gap_bytes)

    async def stop(self, container: str) -> None:
        """Forget the container, also what is not written yet; unknown ones are fine."""
        async with self._changing:
            self._store.forget(_name(container))
            if (fd := self._inherited.pop(container, None)) is not None:
                os.close(fd)
            if (entry := self._logs.pop(container, None)) is not None:
                await self._end(entry)
            (self._cursors / container).unlink(missing_ok=True)

    async def close(self) -> None:
        """Leave everything as it is, for a successor to go on."""
        for entry in self._logs.values():
            await self._end(entry)
        self._logs.clear()
        await self._owner.close()

    def _get(self, container: str) -> ContainerLog:
        if (entry := self._logs.get(container)) is None:
            raise NotFound(f"container {container[:12]} has no log here")
        return entry

    async def _renew(self, entry: ContainerLog, fd: int | None) -> None:
        """A repeated start: only another file is news."""
        if fd is None:
            return
        if entry.fd is not None and os.path.samestat(os.fstat(fd), os.fstat(entry.fd)):
            os.close(fd)
            return
        await entry.reopen(fd)
        await self._keep(entry)

    async def _keep(self, entry: ContainerLog) -> None:
        """The supervisor holds the file open as well: after a rotation its path names another one."""

        def export() -> tuple[dict[str, object], list[int]]:
            return {}, [] if entry.fd is None else [entry.fd]

        self._store.keep(_name(entry.container), export)
        await self._store.flush(_STORE_TIMEOUT)

    async def _end(self, entry: ContainerLog) -> None:
        for task in entry.tasks:
            task.cancel()
        await asyncio.wait(entry.tasks)
        entry.fanout.close()
        await entry.close()


def _name(container: str) -> str:
    return f"log-{container}"


def inherited_logs(stored: dict[str, tuple[dict[str, object], list[int]]]) -> dict[str, int]:
    """Take the log descriptors out of what a predecessor stored."""
    found: dict[str, int] = {}
    for name in [name for name in stored if name.startswith("log-")]:
        _, fds = stored.pop(name)
        for fd in fds:
            if stat.S_ISREG(os.fstat(fd).st_mode) and name not in found:
                found[name.removeprefix("log-")] = fd
            else:
                os.close(fd)
    return found
