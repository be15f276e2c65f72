"""ExecSync: a process beside the container's own, its output collected by the shim, all of it bounded."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import replace

from hyperpod.container import process
from hyperpod.container.known import KnownContainers
from hyperpod.container.live import LiveContainer
from hyperpod.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    GuestError,
    HyperpodError,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from hyperpod.logs import printable
from hyperpod.model.container import ContainerState, ExecResult
from hyperpod.sandbox.live import EXECS, LiveSandbox
from hyperpod.sandbox.phases import Laps
from hyperpod.spec.oci import build_process
from hyperpod.tasks import TaskOwner, bounded

log = logging.getLogger(__name__)

LIMIT = 16 * 1024 * 1024 - 64 * 1024
"""Bytes of stdout and stderr together: the kubelet takes gRPC messages of at most 16 MiB."""

DRAIN = 2.0
"""Seconds that output may go on after the process's end, when a grandchild holds the pipe."""

DEAD_DRAIN = 20.0
"""Seconds for the output to come once nobody can write to it any more: only want of CPU keeps it."""

_HEADER = struct.Struct("!BI")
_STDOUT, _STDERR, _END, _TRUNCATED = 1, 2, 3, 5


TURN = 60.0
"""Seconds that a call waits for others to end when there are too many."""

COLLECTORS = 3
"""Shims that are asked for one command's output, each after the death of the one before."""


class ExecRunner:
    """Runs ExecSync on the containers of this daemon."""

    def __init__(self, containers: KnownContainers, owner: TaskOwner) -> None:
        self._containers, self._owner = containers, owner

    async def exec_sync(self, ident: str, argv: tuple[str, ...], timeout: int) -> ExecResult:
        """Run and wait; `timeout` seconds, 0 is none. Raises DeadlineExceeded after killing all of it."""
        container = self._containers.index.get(ident)
        if not argv:
            raise InvalidArgument("ExecSync without a command")
        if container.state is not ContainerState.RUNNING:
            raise FailedPrecondition(f"container {container.short} is {container.state.value}, not running")
        sandbox = self._containers.sandboxes.live(container.sandbox_id)
        async with _turn(sandbox):
            return await self._exec_sync(container, sandbox, argv, timeout)

    async def _exec_sync(
        self, container: LiveContainer, sandbox: LiveSandbox, argv: tuple[str, ...], timeout: int
    ) -> ExecResult:
        laps = Laps()
        sandbox.calls["ExecSync"] = laps.seconds
        spec = build_process(replace(process.spec_input(container.record), args=argv, tty=False))
        one = _Exec(sandbox, container.id, secrets.token_hex(16))
        collector: asyncio.Task[tuple[bytes, bytes]] | None = None
        try:
            try:
                await one.start(spec)
            except HyperpodError as exc:
                raise process.start_failure(argv, exc) from exc
            laps("agent and crun")
            collector = self._owner.spawn(f"collect/{one.id}", one.output())
            code = await self._wait(one, timeout=timeout, argv=argv, collector=collector)
            laps("its run")
            stdout, stderr = await self._drain(one, collector)
            laps("output")
            return ExecResult(stdout=stdout, stderr=stderr, exit_code=code)
        finally:
            if collector is not None:
                collector.cancel()
                await asyncio.gather(collector, return_exceptions=True)
            # The answer need not wait for it.
            self._owner.spawn(f"remove/{one.id}", one.remove())

    @staticmethod
    async def _wait(
        one: _Exec,
        *,
        timeout: int,
        argv: tuple[str, ...],
        collector: asyncio.Task[tuple[bytes, bytes]],
    ) -> int:
        """The exit code. A command whose output cannot be given back is killed at once: it might never end."""
        end = asyncio.ensure_future(one.wait(timeout))
        try:
            await asyncio.wait({end, collector}, return_when=asyncio.FIRST_COMPLETED)
            if not end.done() and collector.exception() is not None:
                await one.kill()
                collector.result()
            return await end
        except DeadlineExceeded as exc:
            await one.kill()
            raise DeadlineExceeded(f"{argv[0][:100]!r} ran longer than {timeout} s and was killed") from exc
        finally:
            end.cancel()
            await asyncio.gather(end, return_exceptions=True)

    @staticmethod
    async def _drain(one: _Exec, collector: asyncio.Task[tuple[bytes, bytes]]) -> tuple[bytes, bytes]:
        """The process has ended; what it left behind may hold the pipes for DRAIN seconds, no longer."""
        _, pending = await asyncio.wait({collector}, timeout=DRAIN)
        if pending:
            await one.kill()
            _, pending = await asyncio.wait({collector}, timeout=DEAD_DRAIN)
        if pending:
            raise GuestError("the output of the command did not end")
        return collector.result()


@contextlib.asynccontextmanager
async def _turn(sandbox: LiveSandbox) -> AsyncIterator[None]:
    """One of EXECS at once. Raises ResourceExhausted after TURN seconds without."""
    try:
        async with asyncio.timeout(TURN):
            await sandbox.execs.acquire()
    except TimeoutError as exc:
        raise ResourceExhausted(
            f"{EXECS} calls of ExecSync run in sandbox {sandbox.short} already, and none ended within {TURN:g} s"
        ) from exc
    try:
        yield
    finally:
        sandbox.execs.release()


class _Exec:
    """One process by its id, whatever becomes of the connections to agent and shim meanwhile.

    Each call has its effect once however often it is made: an id starts one process at most, and its exit and its
    output stay there until it is removed."""

    def __init__(self, sandbox: LiveSandbox, container: str, ident: str) -> None:
        self._sandbox, self._container, self.id = sandbox, container, ident

    async def start(self, spec: bytes) -> None:
        with contextlib.suppress(AlreadyExists):  # by a call whose answer was lost: nobody else knows the id
            await self._sandbox.session.repeatable(
                lambda agent: agent.start_exec(
                    self._container, self.id, process_json=spec, tty=False, stdin=False
                )
            )

    async def wait(self, timeout: int) -> int:
        """The exit code. Raises DeadlineExceeded after `timeout` seconds, 0: no limit."""
        return await bounded(
            self._sandbox.session.repeatable(lambda agent: agent.wait_exec(self._container, self.id)),
            timeout or None,
            "the command",
        )

    async def kill(self) -> None:
        await self._sandbox.session.repeatable(lambda agent: agent.kill_exec(self._container, self.id))

    async def remove(self) -> None:
        with contextlib.suppress(HyperpodError):
            await self._sandbox.session.repeatable(lambda agent: agent.remove_exec(self._container, self.id))

    async def output(self) -> tuple[bytes, bytes]:
        """stdout and stderr. A shim that dies before the end loses nothing of some 64 KiB of each: the next one
        begins anew."""
        for _ in range(COLLECTORS):
            ours, theirs = socket.socketpair()
            ours.setblocking(False)
            with ours:
                shim = await self._sandbox.living_shim()
                with theirs, contextlib.suppress(Unavailable):
                    await shim.collect(self._container, self.id, tty=False, limit=LIMIT, fd=theirs.fileno())
                with contextlib.suppress(_CutOffError):
                    return await _read(ours)
                await self._sandbox.without(shim)
        raise GuestError("the shim went away again and again while it collected the output")


class _CutOffError(Exception):
    """The shim went away before the end."""


async def _read(sock: socket.socket) -> tuple[bytes, bytes]:
    """Read the shim's records to their end. The shim is as little trusted as what it reads.

    Raises GuestError for failed, ResourceExhausted for too much, _CutOffError."""
    reader, writer = await asyncio.open_connection(sock=sock)
    parts = {_STDOUT: bytearray(), _STDERR: bytearray()}
    left = LIMIT
    try:
        while True:
            kind, length = _HEADER.unpack(await reader.readexactly(_HEADER.size))
            if length > left:
                raise GuestError(f"the shim hands on more than the {LIMIT} bytes that it was asked for")
            left -= length
            data = await reader.readexactly(length) if length else b""
            if kind in parts and data:
                parts[kind] += data
            elif kind == _END:
                return bytes(parts[_STDOUT]), bytes(parts[_STDERR])
            elif kind == _TRUNCATED:
                raise ResourceExhausted(f"the command printed more than {LIMIT} bytes; use a streaming exec")
            else:
                raise GuestError(f"the output was lost: {printable(data, 500)}")
    except asyncio.IncompleteReadError as exc:
        raise _CutOffError from exc
    finally:
        writer.close()
