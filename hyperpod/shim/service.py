"""The shim put together: what it listens on, and what each operation of its control socket does."""

from __future__ import annotations

import asyncio
import base64
import ctypes
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hyperpod import __version__
from hyperpod.errors import InvalidArgument, ProtocolError, ResourceExhausted, Unsupported
from hyperpod.shim.collect import Collector
from hyperpod.shim.console import ConsoleRing
from hyperpod.shim.control import ControlServer
from hyperpod.shim.dialer import AgentDialer
from hyperpod.shim.fdstore import FdStore
from hyperpod.shim.logs import LogService, inherited_logs
from hyperpod.shim.packets import close_all
from hyperpod.shim.sessions.command import AttachSession, ExecSession
from hyperpod.shim.sessions.forward import Forwarded, ForwardSession
from hyperpod.shim.sessions.session import Session
from hyperpod.shim.sessions.spec import from_request
from hyperpod.shim.sessions.stdin import SharedStdins
from hyperpod.tasks import TaskOwner
from hyperpod.vsock.device import VsockDevice
from hyperpod.vsock.dial import endpoint_from_json
from hyperpod.wire.control import Request
from hyperpod.wire.process import MAX_PROCESS

log = logging.getLogger(__name__)

_WRITERS = 8
"""Threads for log files, started as they are needed: this many slow disks do not stop the others' logs."""
_CONSOLE_TAIL = 8 * 1024
_COLLECTORS = 256
_MAX_LIMIT = 1 << 40
_IDLE = 1.0
"""Seconds without a session until memory is given back."""
_SESSIONS = 256
"""Streaming sessions at once: each holds up to five sockets, and at most 2 MiB in either direction."""

Stored = dict[str, tuple[dict[str, Any], list[int]]]
"""What a predecessor left with the supervisor: by name, a state and the descriptors that it refers to."""


@dataclass(frozen=True)
class ShimOptions:
    """`directory`: the sandbox's, 0700, where all sockets are. `supervisor`: its socket, empty for none."""

    sandbox_id: str
    directory: str
    cid: int = 3
    device: bool = True
    """False where the kernel has vhost-vsock, or the agent is a process of this host."""
    supervisor: str = ""
    stored: Stored = field(default_factory=dict)


class Shim:
    """One sandbox's shim. `run` serves until `stop` is set (by a signal)."""

    def __init__(self, options: ShimOptions) -> None:
        self.options = options
        self.stop = asyncio.Event()
        self._tasks = TaskOwner("shim", limit=_COLLECTORS)
        self._sessions = TaskOwner("sessions", limit=_SESSIONS)
        self._dialer = AgentDialer(options.sandbox_id)
        self._stdins = SharedStdins(self._dialer)
        self._forwarded: set[Forwarded] = set()
        self._store = FdStore(options.supervisor, options.sandbox_id, options.directory)
        self._device_state = "none"
        self._trimming = False
        self._malloc_trim = ctypes.CDLL(None).malloc_trim
        self._operations: dict[str, Callable[[Request, list[int]], Awaitable[dict[str, Any]]]] = {
            "hello": self._hello,
            "agent": self._agent,
            "log_start": self._log_start,
            "log_reopen": self._log_reopen,
            "log_finish": self._log_finish,
            "log_stop": self._log_stop,
            "collect": self._collect,
            "session": self._session,
            "console": self._console_tail,
        }

    async def run(self) -> None:
        """Raises OSError when it cannot listen."""
        directory = Path(self.options.directory)
        async with AsyncExitStack() as stack:
            executor = ThreadPoolExecutor(_WRITERS, thread_name_prefix="log")
            stack.callback(executor.shutdown, wait=False)
            logs = inherited_logs(self.options.stored)
            self._console = ConsoleRing(str(directory / "console.sock"))
            await self._console.open()
            stack.callback(self._console.close)
            if self.options.device:
                device = await self._open_device(directory)
                stack.push_async_callback(device.close)
            for _, fds in self.options.stored.values():
                close_all(fds)
            self._logs = LogService(directory / "cursors", self._dialer, self._store, executor, logs)
            stack.push_async_callback(self._logs.close)
            stack.push_async_callback(self._tasks.close)
            stack.push_async_callback(self._sessions.close)
            control = ControlServer(str(directory / "control.sock"), self._handle)
            stack.push_async_callback(control.close)
            self._tasks.spawn("store", self._store.run())
            self._store.ready()
            log.debug("serving (device: %s)", self._device_state)
            await self.stop.wait()

    async def _open_device(self, directory: Path) -> VsockDevice:
        paths = str(directory / "vhost.sock"), str(directory / "vsock.sock")

        def changed(state: dict[str, Any], fds: list[int]) -> None:
            self._store.changed("device")  # which exports anew: only the latest state is worth sending

        if (stored := self.options.stored.pop("device", None)) is not None:
            try:
                device = VsockDevice.resume(*stored, *paths, on_state_change=changed)
                await device.start()
            except ProtocolError as exc:
                log.error("the predecessor's vsock device is lost: %s", exc)
            else:
                self._device_state = "resumed"
                self._store.keep("device", device.export_state)
                return device
        device = VsockDevice(self.options.cid, *paths, on_state_change=changed)
        await device.start()
        self._device_state = "fresh"
        self._store.keep("device", device.export_state)
        return device

    async def _handle(self, request: Request, fds: list[int]) -> dict[str, Any]:
        operation = self._operations.get(request.op)
        if operation is None:
            raise Unsupported(f"the shim has no operation {request.op[:64]!r}")
        return await operation(request, fds)

    async def _hello(self, request: Request, fds: list[int]) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "sandbox_id": self.options.sandbox_id,
            "version": __version__,
            "device": self._device_state,
        }

    async def _agent(self, request: Request, fds: list[int]) -> dict[str, Any]:
        token = bytes.fromhex(request.ident("token"))
        self._dialer.set(endpoint_from_json(request.mapping("endpoint")), token)
        return {}

    async def _log_start(self, request: Request, fds: list[int]) -> dict[str, Any]:
        container, tty = request.ident("container"), request.flag("tty")
        fd = _take(request, fds) if fds else None
        await self._logs.start(container, tty=tty, fd=fd)
        return {}

    async def _log_reopen(self, request: Request, fds: list[int]) -> dict[str, Any]:
        container = request.ident("container")
        await self._logs.reopen(container, _take(request, fds))
        return {}

    async def _log_finish(self, request: Request, fds: list[int]) -> dict[str, Any]:
        timeout = request.number("timeout_ms", 0, 3_600_000) / 1000
        end = await self._logs.finish(request.ident("container"), timeout)
        return {"complete": end.complete, "gap_bytes": end.gap_bytes}

    async def _log_stop(self, request: Request, fds: list[int]) -> dict[str, Any]:
        await self._logs.stop(request.ident("container"))
        return {}

    async def _collect(self, request: Request, fds: list[int]) -> dict[str, Any]:
        container, exec_id = request.ident("container"), request.ident("exec", 32)
        tty, limit = request.flag("tty"), request.number("limit", 0, _MAX_LIMIT)
        if len(self._tasks) >= _COLLECTORS:
            raise ResourceExhausted(f"the pod has {_COLLECTORS} commands whose output is collected already")
        sock = socket.socket(fileno=_take(request, fds))
        collector = Collector(self._dialer, sock, container, exec_id, tty=tty, limit=limit)
        self._tasks.spawn(f"collect/{exec_id[:12]}", collector.run())
        return {}

    async def _session(self, request: Request, fds: list[int]) -> dict[str, Any]:
        """Takes over the client's socket; an exec's second descriptor is a file with its OCI process."""
        spec = from_request(request)
        if len(fds) != (2 if spec.kind == "exec" else 1):
            raise InvalidArgument(f"session: {len(fds)} descriptors came for {spec.kind}")
        if len(self._sessions) >= _SESSIONS:
            raise ResourceExhausted(f"the pod has {_SESSIONS} streaming sessions already")
        fanout = self._logs.fanout(spec.container) if spec.kind == "attach" else None
        process = _read_file(fds[1]) if spec.kind == "exec" else None
        sock = socket.socket(fileno=fds.pop(0))
        try:
            session: Session
            if spec.exec_id:
                session = ExecSession(sock, spec, self._dialer, process)
            elif fanout is not None:
                session = AttachSession(sock, spec, self._dialer, fanout, self._stdins)
            else:
                session = ForwardSession(sock, spec, self._dialer, self._forwarded)
        except InvalidArgument:
            sock.close()
            raise
        task = self._sessions.spawn(f"{spec.kind}/{(spec.exec_id or spec.container)[:12]}", session.run())
        task.add_done_callback(lambda _: self._idle_soon())
        return {}

    def _idle_soon(self) -> None:
        if not len(self._sessions) and not self._trimming:
            self._trimming = True
            asyncio.get_running_loop().call_later(_IDLE, self._trim)

    def _trim(self) -> None:
        """Sessions have left the heap full of holes, of some times what an idle shim has: give them back."""
        self._trimming = False
        if not len(self._sessions):
            self._malloc_trim(0)

    async def _console_tail(self, request: Request, fds: list[int]) -> dict[str, Any]:
        return {"tail": base64.b64encode(self._console.tail(_CONSOLE_TAIL)).decode()}


def _read_file(fd: int) -> bytes:
    """Raises InvalidArgument: more than the agent takes."""
    data = os.pread(fd, MAX_PROCESS + 1, 0)
    if len(data) > MAX_PROCESS:
        raise InvalidArgument(f"arguments and environment of the exec take more than {MAX_PROCESS} bytes")
    return data


def _take(request: Request, fds: list[int]) -> int:
    if len(fds) != 1:
        raise InvalidArgument(f"{request.op} needs one descriptor, {len(fds)} came")
    return fds.pop()
