"""A shim's other duties: exec output, console, control socket, and what it costs."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import secrets
import signal
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from hyperpod.errors import InvalidArgument, ProtocolError, Unavailable, Unsupported
from hyperpod.shim import packets
from hyperpod.shim.caller import ControlCaller
from hyperpod.shim.collect import END, FAILED, STDERR, STDOUT, TRUNCATED
from hyperpod.wire.control import MAX_MESSAGE
from tests.shimkit import WAIT, Pod, SupervisorProcess, cmdline, eventually, pod, supervisor
from tests.stdiopeer import of_bytes

MEMORY_BUDGET = 8 * 1024 * 1024


@pytest.fixture(scope="module")
def parent() -> Iterator[SupervisorProcess]:
    with supervisor() as one:
        yield one


@pytest.fixture
async def one(parent: SupervisorProcess) -> AsyncIterator[Pod]:
    async with pod(parent) as made:
        await made.spawn()
        yield made
        await made.client.drop(made.id)


async def collect(made: Pod, exec_id: str, limit: int, *, tty: bool = False) -> list[tuple[int, bytes]]:
    """The records, up to and with the end."""
    ours, theirs = socket.socketpair()
    assert made.shim is not None
    with theirs:
        await made.shim.collect("ab" * 32, exec_id, tty=tty, limit=limit, fd=theirs.fileno())
    reader, writer = await asyncio.open_connection(sock=ours)
    records: list[tuple[int, bytes]] = []
    try:
        async with asyncio.timeout(WAIT):
            while not records or records[-1][0] not in (END, FAILED):
                kind, length = struct.unpack("!BI", await reader.readexactly(5))
                records.append((kind, await reader.readexactly(length)))
            assert await reader.read() == b""
    finally:
        writer.close()
    return records


def joined(records: list[tuple[int, bytes]], kind: int) -> bytes:
    return b"".join(data for k, data in records if k == kind)


async def test_collect(one: Pod) -> None:
    exec_id, big = secrets.token_hex(16), os.urandom(1_000_000)
    one.peer.add("ab" * 32, "stdout", of_bytes(big), exec_id)
    one.peer.add("ab" * 32, "stderr", of_bytes(b"oops"), exec_id)
    records = await collect(one, exec_id, 2_000_000)
    assert joined(records, STDOUT) == big
    assert joined(records, STDERR) == b"oops"
    assert records[-1] == (END, b"")


async def test_collect_of_a_terminal(one: Pod) -> None:
    exec_id = secrets.token_hex(16)
    one.peer.add("ab" * 32, "stdout", of_bytes(b"hi"), exec_id)
    assert await collect(one, exec_id, 100, tty=True) == [(STDOUT, b"hi"), (END, b"")]


async def test_collect_keeps_to_its_limit_and_drains(one: Pod) -> None:
    exec_id, big = secrets.token_hex(16), os.urandom(1_000_000)
    stream = one.peer.add("ab" * 32, "stdout", of_bytes(big), exec_id)
    one.peer.add("ab" * 32, "stderr", of_bytes(b""), exec_id)
    records = await collect(one, exec_id, 100_000)
    assert joined(records, STDOUT) == big[:100_000]
    assert [kind for kind, _ in records[-2:]] == [TRUNCATED, END]
    await eventually(lambda: stream.sender.drained)  # the last acknowledgement goes another way


async def test_collect_of_an_unknown_exec_fails_with_the_reason(one: Pod) -> None:
    [(kind, reason)] = await collect(one, secrets.token_hex(16), 100)
    assert kind == FAILED
    assert b"no such stream" in reason


async def test_collect_ends_with_its_reader(one: Pod) -> None:
    exec_id = secrets.token_hex(16)
    stream = one.peer.add("ab" * 32, "stdout", lambda room: b"x" * room, exec_id)
    one.peer.add("ab" * 32, "stderr", of_bytes(b""), exec_id)
    ours, theirs = socket.socketpair()
    assert one.shim is not None
    with theirs:
        await one.shim.collect("ab" * 32, exec_id, tty=False, limit=1 << 30, fd=theirs.fileno())
    assert await asyncio.to_thread(ours.recv, 100)
    ours.close()
    await eventually(lambda: not one.peer.connected)
    assert not stream.sender.finished


async def test_the_console_is_a_ring_and_takes_a_new_connection(one: Pod) -> None:
    assert one.shim is not None
    assert await one.shim.console() == ""
    path = str(one.directory / "console.sock")
    for text in (b"boot\n", b"x" * 200_000 + b"the end"):
        _, writer = await asyncio.open_unix_connection(path)
        writer.write(text)
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        async with asyncio.timeout(WAIT):
            while not base64.b64decode(await one.shim.console()).endswith(text[-100:]):
                await asyncio.sleep(0.01)
    assert base64.b64decode(await one.shim.console()) == b"x" * (8192 - 7) + b"the end"


async def test_hello(one: Pod) -> None:
    assert one.shim is not None
    hello = await one.shim.hello()
    assert (hello.sandbox_id, hello.device) == (one.id, "none")
    assert cmdline(hello.pid).rstrip(b"\0") == b"hyperpod-shim %s" % str(one.directory).encode()


async def test_bad_requests_are_refused_by_name_and_the_shim_lives_on(one: Pod) -> None:
    caller = ControlCaller(str(one.directory / "control.sock"), "shim")
    await caller.connect(WAIT)
    with pytest.raises(Unsupported, match="dance"):
        await caller.call("dance", timeout=WAIT)
    for op, args in (
        ("log_start", {}),
        ("log_start", {"container": "zz", "tty": True}),
        ("log_start", {"container": "../" + "a" * 61, "tty": True}),
        ("log_start", {"container": "ab" * 32, "tty": 1}),
        ("log_reopen", {"container": "ab" * 32}),
        ("collect", {"container": "ab" * 32, "exec": "", "tty": False, "limit": 1}),
        ("collect", {"container": "ab" * 32, "exec": "cd" * 16, "tty": False, "limit": -1}),
        ("agent", {"endpoint": {"kind": "moon"}, "token": "ab" * 32}),
        ("agent", {"endpoint": {"kind": "host", "directory": "/"}, "token": "ab"}),
        ("log_finish", {"container": "ab" * 32, "timeout_ms": "soon"}),
    ):
        with pytest.raises(InvalidArgument):
            await caller.call(op, args, timeout=WAIT)
    with pytest.raises(InvalidArgument, match="bytes"):
        await caller.call("hello", {"x": "y" * MAX_MESSAGE}, timeout=WAIT)
    await caller.close()
    for raw in (b"{", b"[]", b"\xff\xfe", b'{"id":-1,"op":"hello"}', b'{"id":1}', b"[" * 60_000):
        with packets.seqpacket() as sock:
            sock.connect(str(one.directory / "control.sock"))
            sock.setblocking(True)
            packets.send(sock, raw)
            assert await asyncio.to_thread(packets.receive, sock) == (b"", [])
    assert one.shim is not None
    assert (await one.shim.hello()).sandbox_id == one.id


async def test_descriptors_that_nobody_wants_do_not_pile_up(one: Pod) -> None:
    assert one.shim is not None
    pid = (await one.shim.hello()).pid
    caller = ControlCaller(str(one.directory / "control.sock"), "shim")
    await caller.connect(WAIT)
    await caller.call("hello", {}, timeout=WAIT)  # its connection is accepted, and counted
    before = len(os.listdir(f"/proc/{pid}/fd"))
    with open("/dev/null", "rb") as null:
        for op in ("hello", "dance", "log_finish", "collect"):
            for _ in range(5):
                with contextlib.suppress(Unsupported, InvalidArgument):
                    await caller.call(op, {}, [null.fileno()] * 8, timeout=WAIT)
    # The reply may overtake the closing of what came with the request.
    await eventually(lambda: len(os.listdir(f"/proc/{pid}/fd")) <= before)
    await caller.close()


async def test_an_end_in_order_removes_the_sockets(one: Pod) -> None:
    assert one.shim is not None
    pid = (await one.shim.hello()).pid
    os.kill(pid, signal.SIGTERM)
    await one.shim.closed.wait()
    await eventually(lambda: not Path(f"/proc/{pid}").exists())
    assert [p.name for p in one.directory.iterdir() if p.is_socket()] == ["1025.sock"]
    with pytest.raises(Unavailable):
        await one.connect()


async def test_an_idle_shim_costs_little_memory(one: Pod) -> None:
    assert one.shim is not None
    pid = (await one.shim.hello()).pid
    private = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(("Private_Clean", "Private_Dirty")):
            private += int(line.split()[1]) * 1024
    print(f"private memory of an idle shim: {private / 2**20:.1f} MiB")
    assert private <= MEMORY_BUDGET


def test_a_cut_message_is_an_error_and_leaks_no_descriptor() -> None:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with a, b, open("/dev/null", "rb") as null:
        before = len(os.listdir("/proc/self/fd"))
        for data, count in ((b"x" * (MAX_MESSAGE + 1), 1), (b"x", packets.MAX_FDS + 1)):
            packets.send(a, data, [null.fileno()] * count)
            with pytest.raises(ProtocolError):
                packets.receive(b)
        assert (
            len(os.listdir("/proc/self/fd")) <= before
        )  # less when what other tests left is collected meanwhile
