"""ExecSync: a process beside the container's own, its output collected by the shim, all of it bounded."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import struct
from dataclasses import replace

from hyperpod.agentclient.client import AgentClient
from hyperpod.container import process
from hyperpod.container.manager import ContainerManager
from hyperpod.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    GuestError,
    HyperpodError,
    InvalidArgument,
    ResourceExhausted,
)
from hyperpod.logs import printable
from hyperpod.model.container import ContainerState, ExecResult
from hyperpod.sandbox.phases import Laps
from hyperpod.spec.oci import build_process

log = logging.getLogger(__name__)

LIMIT = 16 * 1024 * 1024 - 64 * 1024
"""Bytes of stdout and stderr together: the kubelet takes gRPC messages of at most 16 MiB."""

DRAIN = 2.0
"""Seconds that output may go on after the process's end, when a grandchild holds the pipe."""

_HEADER = struct.Struct("!BI")
_STDOUT, _STDERR, _END, _TRUNCATED = 1, 2, 3, 5


class ExecRunner:
    """Runs ExecSync on the containers of one manager."""

    def __init__(self, containers: ContainerManager) -> None:
        self._containers = containers

    async def exec_sync(self, ident: str, argv: tuple[str, ...], timeout: int) -> ExecResult:
        """Run and wait; `timeout` seconds, 0 is none. Raises DeadlineExceeded after killing all of it."""
        container = self._containers.index.get(ident)
        if not argv:
            raise InvalidArgument("ExecSync without a command")
        if container.state is not ContainerState.RUNNING:
            raise FailedPrecondition(f"container {container.short} is {container.state.value}, not running")
        sandbox = self._containers.sandboxes.live(container.sandbox_id)
        laps = Laps()
        sandbox.calls["ExecSync"] = laps.seconds
        agent = await sandbox.session.client()
        spec = build_process(replace(process.spec_input(container.record), args=argv, tty=False))
        exec_id = secrets.token_hex(16)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        collector: asyncio.Task[tuple[bytes, bytes]] | None = None
        try:
            with theirs:
                try:
                    await agent.start_exec(container.id, exec_id, process_json=spec, tty=False, stdin=False)
                except HyperpodError as exc:
                    raise process.start_failure(argv, exc) from exc
                laps("agent and crun")
                await sandbox.need_shim().collect(
                    container.id, exec_id, tty=False, limit=LIMIT, fd=theirs.fileno()
                )
            collector = self._containers.owner.spawn(f"collect/{exec_id}", _read(ours))
            code = await self._wait(
                agent, container.id, exec_id, timeout=timeout, argv=argv, collector=collector
            )
            laps("its run")
            stdout, stderr = await self._drain(agent, container.id, exec_id, collector)
            laps("output")
            return ExecResult(stdout=stdout, stderr=stderr, exit_code=code)
        finally:
            if collector is not None:
                collector.cancel()
                await asyncio.gather(collector, return_exceptions=True)
            ours.close()
            # The answer need not wait for it.
            self._containers.owner.spawn(f"remove/{exec_id}", _remove(agent, container.id, exec_id))

    @staticmethod
    async def _wait(
        agent: AgentClient,
        container: str,
        exec_id: str,
        *,
        timeout: int,
        argv: tuple[str, ...],
        collector: asyncio.Task[tuple[bytes, bytes]],
    ) -> int:
        """The exit code. A command whose output cannot be given back is killed at once: it might never end."""
        end = asyncio.ensure_future(agent.wait_exec(container, exec_id, timeout=timeout or None))
        try:
            await asyncio.wait({end, collector}, return_when=asyncio.FIRST_COMPLETED)
            if not end.done() and collector.exception() is not None:
                await agent.kill_exec(container, exec_id)
                collector.result()
            return await end
        except DeadlineExceeded as exc:
            await agent.kill_exec(container, exec_id)
            raise DeadlineExceeded(f"{argv[0][:100]!r} ran longer than {timeout} s and was killed") from exc
        finally:
            end.cancel()
            await asyncio.gather(end, return_exceptions=True)

    @staticmethod
    async def _drain(
        agent: AgentClient, container: str, exec_id: str, collector: asyncio.Task[tuple[bytes, bytes]]
    ) -> tuple[bytes, bytes]:
        """The process has ended; what it left behind may hold the pipes for DRAIN seconds, no longer."""
        _, pending = await asyncio.wait({collector}, timeout=DRAIN)
        if pending:
            await agent.kill_exec(container, exec_id)
            _, pending = await asyncio.wait({collector}, timeout=DRAIN)
        if pending:
            raise GuestError("the output of the command did not end")
        return collector.result()


async def _remove(agent: AgentClient, container: str, exec_id: str) -> None:
    with contextlib.suppress(HyperpodError):
        await agent.remove_exec(container, exec_id)


async def _read(sock: socket.socket) -> tuple[bytes, bytes]:
    """Read the shim's records to their end. Raises GuestError for failed, ResourceExhausted for too much."""
    reader, writer = await asyncio.open_connection(sock=sock)
    parts: dict[int, list[bytes]] = {_STDOUT: [], _STDERR: []}
    try:
        while True:
            kind, length = _HEADER.unpack(await reader.readexactly(_HEADER.size))
            data = await reader.readexactly(length) if length else b""
            if kind in parts:
                parts[kind].append(data)
            elif kind == _END:
                return b"".join(parts[_STDOUT]), b"".join(parts[_STDERR])
            elif kind == _TRUNCATED:
                raise ResourceExhausted(f"the command printed more than {LIMIT} bytes; use a streaming exec")
            else:
                raise GuestError(f"the output was lost: {printable(data, 500)}")
    except asyncio.IncompleteReadError as exc:
        raise GuestError("the shim went away while it collected the output") from exc
    finally:
        writer.close()
