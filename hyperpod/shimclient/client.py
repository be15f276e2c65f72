"""ShimClient: one method per operation of a shim, each with a deadline."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from hyperpod.errors import ProtocolError
from hyperpod.shim.caller import ControlCaller
from hyperpod.shim.sessions.spec import SessionSpec, to_json
from hyperpod.vsock.dial import Endpoint, endpoint_to_json

CALL = 10.0
"""Seconds for a shim to answer what needs no waiting in it."""


@dataclass(frozen=True)
class ShimHello:
    """`device`: "fresh", "resumed" (from a dead predecessor's state) or "none"."""

    pid: int
    sandbox_id: str
    version: str
    device: str


@dataclass(frozen=True)
class LogEnd:
    """`complete`: all output is in the log. `gap_bytes`: how much is known to be missing."""

    complete: bool
    gap_bytes: int


class ShimClient:
    """Every method raises Unavailable when the shim is gone, DeadlineExceeded when it does not answer."""

    def __init__(self, path: str, uid: int | None = None) -> None:
        """`path`: the shim's control.sock, in a folder of the user `uid`, who could put a link to another there."""
        self._caller = ControlCaller(path, "shim", uid)

    @property
    def closed(self) -> asyncio.Event:
        """Set once the connection is lost: the shim has died, or `close` was called."""
        return self._caller.closed

    async def connect(self, timeout: float) -> None:
        """Raises Unavailable at once when nobody listens."""
        await self._caller.connect(timeout)

    async def close(self) -> None:
        await self._caller.close()

    async def hello(self) -> ShimHello:
        fields = await self._caller.call("hello", timeout=CALL)
        try:
            return ShimHello(**fields)
        except TypeError as exc:
            raise ProtocolError("shim: its hello has other fields") from exc

    async def agent(self, endpoint: Endpoint, token: bytes) -> None:
        """Tell where the agent is; needed before any stream flows."""
        args = {"endpoint": endpoint_to_json(endpoint), "token": token.hex()}
        await self._caller.call("agent", args, timeout=CALL)

    async def log_start(self, container: str, *, tty: bool, fd: int | None) -> None:
        """Write the container's log to `fd` (O_RDWR | O_APPEND; stays the caller's), None: drop its output.

        May be repeated; resumes where a dead predecessor stopped.
        """
        fds = () if fd is None else (fd,)
        await self._caller.call("log_start", {"container": container, "tty": tty}, fds, timeout=CALL)

    async def log_reopen(self, container: str, fd: int) -> None:
        """When this returns, nothing is written to the old file any more. Raises NotFound."""
        await self._caller.call("log_reopen", {"container": container}, (fd,), timeout=CALL)

    async def log_finish(self, container: str, timeout: float) -> LogEnd:
        """Wait until all output is in the log, at most `timeout` seconds. Raises NotFound."""
        args = {"container": container, "timeout_ms": int(timeout * 1000)}
        fields = await self._caller.call("log_finish", args, timeout=timeout + CALL)
        complete, gap = fields.get("complete"), fields.get("gap_bytes")
        if not isinstance(complete, bool) or type(gap) is not int:
            raise ProtocolError("shim: the end of a log is not told as it should be")
        return LogEnd(complete, gap)

    async def log_stop(self, container: str) -> None:
        """Forget the container's log; what is not written yet is lost. Unknown ones are fine."""
        await self._caller.call("log_stop", {"container": container}, timeout=CALL)

    async def collect(self, container: str, exec_id: str, *, tty: bool, limit: int, fd: int) -> None:
        """Have an exec's output relayed to the stream socket `fd`: see hyperpod.shim.collect."""
        args = {"container": container, "exec": exec_id, "tty": tty, "limit": limit}
        await self._caller.call("collect", args, (fd,), timeout=CALL)

    async def session(self, spec: SessionSpec, client: int, process: int | None = None) -> None:
        """Hand a client's socket over (both descriptors stay the caller's): see hyperpod.shim.sessions.

        `process`: a file with the OCI process of an exec. Raises NotFound, ResourceExhausted, InvalidArgument:
        nothing has been written to the client then.
        """
        fds = (client,) if process is None else (client, process)
        await self._caller.call("session", to_json(spec), fds, timeout=CALL)

    async def console(self) -> str:
        """The last 8 KiB of the guest's console, base64."""
        tail = (await self._caller.call("console", timeout=CALL)).get("tail")
        if not isinstance(tail, str):
            raise ProtocolError("shim: console without a tail")
        return tail
