"""The streaming server before any stream: tokens, wrong requests, TLS, and clients that only sit there."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from hyperpod.config import StreamingConfig
from hyperpod.errors import (
    FailedPrecondition,
    HyperpodError,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from hyperpod.streaming import server as module
from hyperpod.streaming.server import StreamingServer
from hyperpod.streaming.tokens import MAX_TOKENS, Target, Tokens
from hyperpod.wire.upgrade import Upgrade
from tests.certkit import Authority

SPDY = "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n"
TARGET = Target("exec", "ab" * 32, argv=("true",))


class Echo:
    """Stands where the shim does: writes the head, and what it was given, then echoes one message."""

    def __init__(self) -> None:
        self.handed: list[Target] = []
        self.error: HyperpodError | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def __call__(
        self, target: Target, upgrade: Upgrade, sock: socket.socket, head: bytes, early: bytes
    ) -> None:
        if self.error is not None:
            raise self.error
        self.handed.append(target)
        mine = sock.dup()
        mine.setblocking(False)
        self._tasks.append(asyncio.ensure_future(self._run(mine, head + early)))

    async def _run(self, sock: socket.socket, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        with sock:
            await loop.sock_sendall(sock, data)
            while data := await loop.sock_recv(sock, 65536):
                await loop.sock_sendall(sock, data)

    async def close(self) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def serving(**options: object) -> AsyncIterator[tuple[StreamingServer, Echo, Tokens]]:
    echo, tokens = Echo(), Tokens()
    server = StreamingServer(StreamingConfig.model_validate(options), tokens, echo)
    await server.listen()
    try:
        yield server, echo, tokens
    finally:
        await server.close()
        await echo.close()


def place(url: str) -> tuple[str, int, str]:
    host, _, rest = url.partition("://")[2].rpartition(":")
    port, _, path = rest.partition("/")
    return host.strip("[]"), int(port), "/" + path


async def ask(url: str, request: str, behind: bytes = b"", context: ssl.SSLContext | None = None) -> bytes:
    """Everything that the server says, until it stops or (101) has echoed what came behind."""
    host, port, _ = place(url)
    reader, writer = await asyncio.open_connection(host, port, ssl=context)
    try:
        writer.write(request.encode("latin-1") + behind)
        async with asyncio.timeout(20):
            answer = await reader.readuntil(b"\r\n\r\n")
            if b" 101 " in answer:
                answer += await reader.readexactly(len(behind))
            else:
                answer += await reader.read()
        return answer
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


def post(url: str, headers: str = SPDY, method: str = "POST") -> str:
    return f"{method} {place(url)[2]} HTTP/1.1\r\nHost: x\r\n{headers}\r\n"


async def test_a_token_works_once() -> None:
    async with serving() as (server, echo, tokens):
        url = server.url(TARGET)
        assert len(url.rpartition("/")[2]) * 6 >= 128
        assert "ab" * 8 not in url
        answer = await ask(url, post(url), b"early bytes")
        assert answer.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
        assert b"X-Stream-Protocol-Version: v4.channel.k8s.io\r\n" in answer
        assert answer.endswith(b"\r\n\r\nearly bytes")
        assert echo.handed == [TARGET]
        assert b" 404 " in await ask(url, post(url))
        assert len(tokens) == 0


async def test_of_many_uses_at_once_one_wins() -> None:
    async with serving() as (server, echo, _):
        url = server.url(TARGET)
        answers = await asyncio.gather(*(ask(url, post(url)) for _ in range(50)))
        assert sorted(a.split()[1] for a in answers) == [b"101"] + [b"404"] * 49
        assert echo.handed == [TARGET]


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ("GET / HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        ("GET /exec/ HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (f"GET /exec/{'x' * 32} HTTP/1.1\r\nHost: x\r\n{SPDY}\r\n", 404),
        (f"GET /exec/a/b HTTP/1.1\r\nHost: x\r\n{SPDY}\r\n", 404),
        (f"DELETE /exec/a HTTP/1.1\r\nHost: x\r\n{SPDY}\r\n", 405),
        ("GET /exec/a HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("nonsense\r\n\r\n", 400),
        ("GET /exec/a HTTP/1.1\r\n\r\n", 400),
        ("\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
        (f"GET /exec/a HTTP/1.1\r\nHost: x\r\nX: {'y' * 30000}\r\n\r\n", 431),
        (f"POST /exec/a HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n{'z' * 20000}", 413),
    ],
)
async def test_wrong_requests(request_: str, status: int) -> None:
    async with serving() as (server, echo, _):
        answer = await ask(server.url(TARGET), request_)
        assert answer.split()[1] == b"%d" % status, answer
        assert b"Connection: close" in answer
        assert not echo.handed


async def test_a_refused_protocol_does_not_use_the_token_up() -> None:
    async with serving() as (server, echo, _):
        url = server.url(TARGET)
        answer = await ask(url, post(url, SPDY.replace("v4.", "v9.")))
        assert b" 403 " in answer
        assert b"X-Accepted-Stream-Protocol-Versions: v3.channel.k8s.io\r\n" in answer
        wrong_kind = url.replace("/exec/", "/portforward/")
        assert b" 403 " in await ask(wrong_kind, post(wrong_kind))
        forward = SPDY.replace("v4.channel.k8s.io", "portforward.k8s.io")
        assert b" 404 " in await ask(wrong_kind, post(wrong_kind, forward))
        assert b" 101 " in await ask(url, post(url))
        assert echo.handed == [TARGET]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NotFound("no such container"), 404), (FailedPrecondition("it has exited"), 409),
        (Unavailable("the shim is away"), 503), (ResourceExhausted("too many"), 429),
        (InvalidArgument("odd"), 400), (HyperpodError("other"), 500),
    ],
)  # fmt: skip
async def test_what_the_shim_refuses(error: HyperpodError, status: int) -> None:
    async with serving() as (server, echo, _):
        echo.error = error
        url = server.url(TARGET)
        answer = await ask(url, post(url))
        assert answer.split()[1] == b"%d" % status
        assert str(error).encode() in answer


async def test_a_thousand_half_open_connections_hold_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir("/proc/self/fd"))
    async with serving() as (server, _, _tokens):
        url = server.url(TARGET)
        host, port, _ = place(url)
        loop, idle = asyncio.get_running_loop(), []
        for index in range(1000):
            sock = socket.socket()
            sock.setblocking(False)
            await loop.sock_connect(sock, (host, port))
            await loop.sock_sendall(sock, b"POST /ex"[: index % 9])
            idle.append(sock)
        assert b" 101 " in await ask(url, post(url))
        assert len(server._pending) <= module.PENDING
        for sock in idle:
            sock.close()
    assert len(os.listdir("/proc/self/fd")) <= before + 2


async def test_who_sends_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REQUEST_TIMEOUT", 0.3)
    async with serving() as (server, _, _tokens):
        host, port, _ = place(server.url(TARGET))
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"POST /exec")
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()


async def test_an_address_that_is_taken() -> None:
    async with serving() as (server, echo, tokens):
        port = place(server.url(TARGET))[1]
        other = StreamingServer(StreamingConfig(port=port), tokens, echo)
        with pytest.raises(FailedPrecondition, match=r"streaming\.port"):
            await other.listen()
        await other.close()


def test_tokens_end_and_are_bounded() -> None:
    now = 0.0
    tokens = Tokens(lambda: now)
    token = tokens.issue(TARGET)
    now = 59.9
    assert tokens.redeem("attach", token) is None
    kept = tokens.issue(TARGET)
    now = 60.0
    assert tokens.redeem("exec", token) is None
    assert tokens.redeem("exec", kept) == TARGET
    for _ in range(MAX_TOKENS):
        tokens.issue(TARGET)
    with pytest.raises(ResourceExhausted):
        tokens.issue(TARGET)
    now = 121.0
    assert len({tokens.issue(TARGET) for _ in range(100)}) == 100


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority(tmp_path_factory.mktemp("ca"))
    for name in ("server", "next", "client"):
        made.issue(name)
    return made


async def test_tls_with_client_certificates_and_reload(authority: Authority, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def use(name: str) -> None:
        key.write_bytes((authority.folder / f"{name}.key").read_bytes())
        cert.write_bytes((authority.folder / f"{name}.pem").read_bytes())

    use("server")
    options = {"tls_cert": str(cert), "tls_key": str(key), "tls_client_ca": str(authority.folder / "ca.pem")}
    async with serving(**options) as (server, echo, _):
        url = server.url(TARGET)
        assert url.startswith("https://127.0.0.1:")
        data = os.urandom(1_000_000)
        answer = await ask(url, post(url), data[:1000], authority.client("client"))
        assert answer.endswith(data[:1000])
        with pytest.raises((OSError, asyncio.IncompleteReadError)):
            await ask(url, post(url), context=authority.client())
        assert len(echo.handed) == 1
        use("next")
        assert await subject(url, authority) == "next"
        cert.write_text("broken")
        assert await subject(url, authority) == "next"
        big = server.url(TARGET)
        assert (await ask(big, post(big), data, authority.client("client"))).endswith(data)


@pytest.mark.parametrize("sndbuf", [16_384, 1_000_000])
async def test_a_slow_reader_behind_tls_gets_the_end_too(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, sndbuf: int
) -> None:
    """However long it takes: what the shim has sent, its last words too, is the daemon's to deliver; from the
    kernel's buffer, too, which a close would throw away because of what the client still sends."""
    monkeypatch.setattr("hyperpod.streaming.connection._LINGER", 0.5)
    data, sending = os.urandom(400_000), list[asyncio.Task[None]]()

    async def hand_over(
        target: Target, upgrade: Upgrade, sock: socket.socket, head: bytes, early: bytes
    ) -> None:
        sending.append(asyncio.create_task(send(sock.dup())))

    async def send(sock: socket.socket) -> None:
        with sock:
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_sendall(sock, data)

    def receive(url: str, request: bytes) -> bytes:
        host, port, _ = place(url)
        got = b""
        with socket.socket() as plain:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
            plain.connect((host, port))
            with authority.client().wrap_socket(plain, server_hostname=host) as sock:
                sock.sendall(request)
                time.sleep(1.5)
                sock.sendall(b"ping")
                time.sleep(0.2)
                while part := sock.recv(65536):
                    got += part
        return got

    config = StreamingConfig(
        tls_cert=authority.folder / "server.pem", tls_key=authority.folder / "server.key"
    )
    server = StreamingServer(config, Tokens(), hand_over)
    await server.listen()
    assert server._sock is not None
    server._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sndbuf)
    url = server.url(TARGET)
    assert await asyncio.to_thread(receive, url, post(url).encode()) == data
    await asyncio.gather(*sending)
    await server.close()


async def subject(url: str, authority: Authority) -> str:
    host, port, _ = place(url)
    _, writer = await asyncio.open_connection(host, port, ssl=authority.client("client"))
    name: str = writer.get_extra_info("peercert")["subject"][0][0][1]
    writer.close()
    await asyncio.gather(writer.wait_closed(), return_exceptions=True)
    return name


@pytest.mark.parametrize(
    "options",
    [
        {"tls_cert": "/x"},
        {"tls_client_ca": "/x"},
        {"address": "localhost"},
        {"port": 70000},
        {"idle_timeout": -1},
    ],
)
def test_configuration_that_cannot_be(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        StreamingConfig.model_validate(options)


def test_certificates_that_cannot_be_read(tmp_path: Path) -> None:
    config = StreamingConfig(tls_cert=tmp_path / "none", tls_key=tmp_path / "none")
    with pytest.raises(InvalidArgument, match="cannot be used"):
        StreamingServer(config, Tokens(), Echo())
