"""Connecting to an agent's port, whatever way it is reached."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass
from typing import Any, Final

from hyperpod.errors import DeadlineExceeded, InvalidArgument, Unavailable

_ANSWER_LIMIT: Final = 32  # "OK <n>\n"
_RETRY_SECONDS: Final = 0.005  # while a Unix listener's backlog is full


@dataclass(frozen=True)
class HybridEndpoint:
    """A Unix socket that speaks the CONNECT convention: our own device's, or another VMM's."""

    path: str

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True)
class KernelEndpoint:
    """A guest behind the kernel's /dev/vhost-vsock."""

    cid: int

    def __str__(self) -> str:
        return f"CID {self.cid}"


@dataclass(frozen=True)
class HostEndpoint:
    """An agent on this host: one Unix socket per port, `<directory>/<port>.sock`."""

    directory: str

    def __str__(self) -> str:
        return self.directory


Endpoint = HybridEndpoint | KernelEndpoint | HostEndpoint


def endpoint_to_json(endpoint: Endpoint) -> dict[str, Any]:
    """{"kind": "hybrid", "path"}, {"kind": "kernel", "cid"} or {"kind": "host", "directory"}."""
    match endpoint:
        case HybridEndpoint(path):
            return {"kind": "hybrid", "path": path}
        case KernelEndpoint(cid):
            return {"kind": "kernel", "cid": cid}
        case HostEndpoint(directory):
            return {"kind": "host", "directory": directory}


def endpoint_from_json(data: dict[str, Any]) -> Endpoint:
    """The inverse of `endpoint_to_json`. Raises InvalidArgument."""
    match data:
        case {"kind": "hybrid", "path": str(path)}:
            return HybridEndpoint(path)
        case {"kind": "kernel", "cid": int(cid)}:
            return KernelEndpoint(cid)
        case {"kind": "host", "directory": str(directory)}:
            return HostEndpoint(directory)
    raise InvalidArgument("not an agent endpoint")


async def dial(endpoint: Endpoint, port: int, timeout: float) -> socket.socket:
    """A connected, non-blocking stream socket to `port`; the caller owns it.

    Raises Unavailable when nothing answers there (yet), DeadlineExceeded after `timeout` seconds.
    """
    try:
        async with asyncio.timeout(timeout):
            match endpoint:
                case HybridEndpoint(path):
                    return await _hybrid(path, port)
                case KernelEndpoint(cid):
                    return await _kernel(cid, port)
                case HostEndpoint(directory):
                    return await _unix(f"{directory}/{port}.sock")
    except TimeoutError as exc:
        if exc.errno is not None:  # ETIMEDOUT: the kernel's own, shorter patience with a vsock port
            raise Unavailable(f"cannot connect to {endpoint} port {port}: {exc}") from exc
        raise DeadlineExceeded(
            f"connecting to {endpoint} port {port} took longer than {timeout:g} s"
        ) from exc
    except OSError as exc:
        raise Unavailable(f"cannot connect to {endpoint} port {port}: {exc}") from exc


async def _unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        while True:
            try:
                sock.connect(path)
                return sock
            except BlockingIOError:
                # A full backlog is EAGAIN on Unix sockets; the loop's sock_connect would take it for
                # "in progress".
                await asyncio.sleep(_RETRY_SECONDS)
    except BaseException:
        sock.close()
        raise


async def _kernel(cid: int, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        await asyncio.get_running_loop().sock_connect(sock, (cid, port))
    except BaseException:
        sock.close()
        raise
    return sock


async def _hybrid(path: str, port: int) -> socket.socket:
    sock = await _unix(path)
    try:
        sock.send(b"CONNECT %d\n" % port)
        line = await _answer(sock)
        if not line.startswith(b"OK "):
            raise ConnectionRefusedError(
                "the guest does not listen there" if not line else "no OK in the answer"
            )
    except BaseException:
        sock.close()
        raise
    return sock


async def _answer(sock: socket.socket) -> bytes:
    """The first line, b"" at the end; nothing beyond it is taken, for that is the stream's."""
    line = b""
    while len(line) < _ANSWER_LIMIT:
        await _readable(sock)
        try:
            seen = sock.recv(_ANSWER_LIMIT - len(line), socket.MSG_PEEK)
        except BlockingIOError:
            continue
        if not seen:
            return b""
        end = seen.find(b"\n") + 1
        line += sock.recv(end or len(seen))
        if end:
            return line
    raise ConnectionRefusedError("no OK in the answer")


def _resolve(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(sock.fileno(), _resolve, ready)
    try:
        await ready
    finally:
        loop.remove_reader(sock.fileno())
