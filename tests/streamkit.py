"""Streaming sessions without a daemon: a real agent, a real shim, the real server, and clients for it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import secrets
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection

from hyperpod.cli.streamclient import SpdyClient, Stream
from hyperpod.cli.upgrade import upgraded
from hyperpod.config import StreamingConfig
from hyperpod.errors import FailedPrecondition
from hyperpod.shim.sessions.socket import StreamSocket
from hyperpod.shim.sessions.spec import SessionSpec
from hyperpod.shimclient.client import ShimClient
from hyperpod.spec.oci import ContainerSpecInput, build_process
from hyperpod.streaming.server import StreamingServer
from hyperpod.streaming.tokens import Target, Tokens
from hyperpod.vsock.dial import Endpoint, HostEndpoint, HybridEndpoint, dial
from hyperpod.wire.remotecommand import Wanted
from hyperpod.wire.upgrade import Upgrade
from tests.agentkit import TIMEOUT, AgentKit
from tests.shimkit import WAIT, SupervisorProcess, opened, supervisor

OUT = Wanted(stdout=True, stderr=True)
ALL = Wanted(stdin=True, stdout=True, stderr=True)
TTY = Wanted(stdin=True, stdout=True, tty=True)


async def forwarded(url: str, port: int, data: bytes) -> bytes:
    """What the pod's port answers to `data` and its end; it may take a while until something listens there."""
    client = await SpdyClient.connect(url, "portforward.k8s.io")
    async with asyncio.timeout(TIMEOUT):
        for attempt in itertools.count():
            headers = (("port", str(port)), ("requestid", str(attempt)))
            error = await client.open((("streamtype", "error"), *headers))
            stream = await client.open((("streamtype", "data"), *headers))
            await stream.write(data)
            await stream.end()
            got, text = await asyncio.gather(stream.read_all(), error.read_all())
            if not text:
                break
            assert b"refused" in text
            await asyncio.sleep(0.2)
    await client.close()
    return got


@dataclass
class Known:
    """What the daemon would know of a container."""

    tty: bool = False
    stdin_once: bool = False


class StreamPod:
    """A claimed agent with containers, its shim, and a streaming server that knows only them."""

    def __init__(
        self,
        agent: AgentKit,
        parent: SupervisorProcess,
        config: StreamingConfig,
        endpoint: Endpoint | None = None,
    ) -> None:
        self.agent, self.parent = agent, parent
        self._endpoint = endpoint or agent.place.endpoint
        self.hands_over = isinstance(self._endpoint, HostEndpoint)
        self.id = agent.place.sandbox_id
        self.directory = parent.run_dir / "s" / self.id[:12]
        self.directory.mkdir(mode=0o700)
        self.shim = ShimClient(str(self.directory / "control.sock"))
        self.known: dict[str, Known] = {}
        self.tokens = Tokens()
        self.server = StreamingServer(config, self.tokens, self._hand_over)
        self.idle = config.idle_timeout
        self.creation = config.creation_timeout

    async def start(self) -> None:
        async with self.parent.client() as client:
            await client.spawn_shim(
                sandbox_id=self.id, directory=str(self.directory), uid=0, gid=0, device=False, resume=False
            )
        await self.shim.connect(WAIT)
        await self.shim.agent(self._endpoint, self.agent.place.token)
        await self.server.listen()

    def log(self, container: str) -> bytes:
        return (self.parent.run_dir / container[:12]).read_bytes()

    async def run(self, *args: str, tty: bool = False, stdin: bool = False, stdin_once: bool = False) -> str:
        """A started container with its log."""
        spec = ContainerSpecInput(args=args, tty=tty)
        ident = await self.agent.create(spec=spec, stdin=stdin, stdin_once=stdin_once)
        with opened(self.parent.run_dir / ident[:12]) as fd:
            await self.shim.log_start(ident, tty=tty, fd=fd)
        await self.agent.client.start_container(ident)
        self.known[ident] = Known(tty, stdin_once)
        return ident

    async def _hand_over(
        self, target: Target, upgrade: Upgrade, sock: socket.socket, head: bytes, early: bytes
    ) -> None:
        spec = SessionSpec(
            transport=upgrade.transport, protocol=upgrade.protocol, head=head, early=early, idle=self.idle,
            creation=self.creation, wanted=target.wanted, ports=target.ports,
        )  # fmt: skip
        if target.kind == "portforward":
            await self.shim.session(spec, sock.fileno())
            return
        if target.kind == "exec" and len(target.ident) == 32:
            await self.shim.session(replace(spec, exec_id=target.ident, tty=target.wanted.tty), sock.fileno())
            return
        if (known := self.known.get(target.ident)) is None:
            raise FailedPrecondition("no such container here")
        spec = replace(spec, container=target.ident, tty=known.tty, stdin_once=known.stdin_once)
        if target.kind == "attach":
            await self.shim.session(spec, sock.fileno())
            return
        given = ContainerSpecInput(args=target.argv, env=(b"PATH=/bin",), tty=target.wanted.tty)
        spec = replace(spec, exec_id=secrets.token_hex(16), tty=target.wanted.tty)
        with memory_file(build_process(given)) as file:
            await self.shim.session(spec, sock.fileno(), file)

    def exec_url(self, container: str, *argv: str, wanted: Wanted = OUT) -> str:
        return self.server.url(Target("exec", container, argv=argv, wanted=wanted))

    def attach_url(self, container: str, wanted: Wanted = OUT) -> str:
        return self.server.url(Target("attach", container, wanted=wanted))

    async def shell_url(self, wanted: Wanted = ALL) -> str:
        """Of a shell in the agent's own place, which runs already."""
        exec_id = secrets.token_hex(16)
        process = json.dumps({"env": ["PATH=/usr/bin:/bin", "PS1=ready "]}).encode()
        await self.agent.client.start_exec("", exec_id, process_json=process, tty=wanted.tty, stdin=True)
        return self.server.url(Target("exec", exec_id, wanted=wanted))

    def forward_url(self, *ports: int) -> str:
        return self.server.url(Target("portforward", self.id, ports=ports))


@contextmanager
def memory_file(data: bytes) -> Iterator[int]:
    file = os.memfd_create("test")
    try:
        os.write(file, data)
        yield file
    finally:
        os.close(file)


class Command:
    """A remote command over SPDY v4."""

    def __init__(self, client: SpdyClient, streams: dict[str, Stream]) -> None:
        self.client, self.streams = client, streams
        self.stdin, self.stdout = streams.get("stdin"), streams.get("stdout")

    @classmethod
    async def open(cls, url: str, wanted: Wanted = OUT) -> Command:
        client = await SpdyClient.connect(url, "v4.channel.k8s.io")
        names = ["error", *(n for n in ("stdin", "stdout", "stderr") if getattr(wanted, n))]
        if wanted.tty:
            names.append("resize")
        return cls(client, {name: await client.open((("streamtype", name),)) for name in names})

    async def write(self, data: bytes) -> None:
        await self.streams["stdin"].write(data)

    async def end(self) -> None:
        await self.streams["stdin"].end()

    async def resize(self, rows: int, columns: int) -> None:
        await self.streams["resize"].write(json.dumps({"Width": columns, "Height": rows}).encode())

    async def until(self, text: bytes, name: str = "stdout") -> bytes:
        got = b""
        while text not in got:
            part = await self.streams[name].read()
            assert part, (text, got)
            got += part
        return got

    async def result(self) -> tuple[bytes, bytes, dict[str, Any]]:
        """stdout and stderr to their ends, and the status."""
        async with asyncio.timeout(TIMEOUT):
            names = [n for n in ("stdout", "stderr", "error") if n in self.streams]
            parts = dict(
                zip(names, await asyncio.gather(*(self.streams[n].read_all() for n in names)), strict=True)
            )
            await self.client.close()
        return parts.get("stdout", b""), parts.get("stderr", b""), json.loads(parts["error"])


def exit_code(status: dict[str, Any]) -> int:
    """Of a metav1.Status; -1 for one that has none."""
    if status["status"] == "Success":
        return 0
    causes = status.get("details", {}).get("causes", [])
    return next((int(c["message"]) for c in causes if c.get("reason") == "ExitCode"), -1)


class WebSocket:
    """A WebSocket client by wsproto, on asyncio."""

    def __init__(self, sock: socket.socket, early: bytes) -> None:
        self._loop, self._sock = asyncio.get_running_loop(), sock
        self._connection = Connection(ConnectionType.CLIENT, trailing_data=early)
        self._partial = b""
        self.code: int | None = None

    @classmethod
    async def connect(cls, url: str, protocol: str) -> WebSocket:
        headers = [
            ("Connection", "Upgrade"),
            ("Upgrade", "websocket"),
            ("Sec-WebSocket-Version", "13"),
            ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
            ("Sec-WebSocket-Protocol", protocol),
        ]
        return cls(*await upgraded(url, headers, "GET"))

    async def send(self, data: bytes) -> None:
        await self._loop.sock_sendall(self._sock, self._connection.send(BytesMessage(data)))

    async def messages(self) -> AsyncIterator[bytes]:
        """Until the server says goodbye."""
        async with asyncio.timeout(TIMEOUT):
            while self.code is None:
                for event in self._connection.events():
                    if isinstance(event, BytesMessage):
                        self._partial += event.data
                        if event.message_finished:
                            message, self._partial = self._partial, b""
                            yield message
                    elif isinstance(event, CloseConnection):
                        self.code = int(event.code)
                        await self._loop.sock_sendall(self._sock, self._connection.send(event.response()))
                        return
                data = await self._loop.sock_recv(self._sock, 262144)
                assert data, "the connection ended without a goodbye"
                self._connection.receive_data(data)

    async def channels(self) -> dict[int, bytes]:
        """Everything to the end, by channel."""
        got: dict[int, bytes] = {}
        async for message in self.messages():
            got[message[0]] = got.get(message[0], b"") + message[1:]
        return got

    def shutdown(self) -> None:
        """Without a goodbye, while another task may be reading."""
        self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()


@asynccontextmanager
async def tunnelled(url: str) -> AsyncIterator[SpdyClient]:
    """A client whose SPDY goes in binary WebSocket messages, as kubectl's port-forward; cut where no frame ends."""
    web = await WebSocket.connect(url, "SPDY/3.1+portforward.k8s.io")
    loop, (ours, theirs) = asyncio.get_running_loop(), socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)

    async def up() -> None:
        while data := await loop.sock_recv(theirs, 9973):
            await web.send(data)
        web.shutdown()

    async def down() -> None:
        async for message in web.messages():
            await loop.sock_sendall(theirs, message)

    tasks = [asyncio.ensure_future(up()), asyncio.ensure_future(down())]
    client = SpdyClient(StreamSocket(ours), b"")
    try:
        yield client
    finally:
        client.abort()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        theirs.close()
        web.close()


@asynccontextmanager
async def as_guest(agent: AgentKit) -> AsyncIterator[HybridEndpoint]:
    """The host agent behind a socket such as a VM's: bytes pass, descriptors do not."""
    assert isinstance(agent.place.endpoint, HostEndpoint)
    loop, running = asyncio.get_running_loop(), set[asyncio.Task[None]]()

    async def pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := await loop.sock_recv(source, 262144):
                try:
                    await loop.sock_sendall(sink, data)
                except OSError:  # it has gone: what it said before is still on its way the other way
                    return
            sink.shutdown(socket.SHUT_WR)
        except OSError:  # so it breaks for the other side, too
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_RDWR)

    async def serve(outer: socket.socket) -> None:
        with outer:
            line = b""
            while not line.endswith(b"\n"):
                if not (byte := await loop.sock_recv(outer, 1)):
                    return
                line += byte
            with await dial(agent.place.endpoint, int(line.removeprefix(b"CONNECT ")), TIMEOUT) as inner:
                await loop.sock_sendall(outer, b"OK 1\n")
                await asyncio.gather(pump(outer, inner), pump(inner, outer))

    async def accept(listener: socket.socket) -> None:
        while True:
            outer, _ = await loop.sock_accept(listener)
            outer.setblocking(False)
            task = loop.create_task(serve(outer))
            running.add(task)
            task.add_done_callback(running.discard)

    path = f"{agent.place.endpoint.directory}/guest.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1024)
        listener.setblocking(False)
        running.add(loop.create_task(accept(listener)))
        yield HybridEndpoint(path)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


@asynccontextmanager
async def stream_pod(
    agent: AgentKit, config: StreamingConfig, *, guest: bool = False
) -> AsyncIterator[StreamPod]:
    """`guest`: as if the agent were in a VM."""
    async with contextlib.AsyncExitStack() as stack:
        endpoint = await stack.enter_async_context(as_guest(agent)) if guest else None
        made = StreamPod(agent, stack.enter_context(supervisor()), config, endpoint)
        await made.start()
        try:
            yield made
        finally:
            await made.server.close()
            await made.shim.close()
