"""Parts of streaming sessions: frames of processes and ports, the daemon's request, taps, queues, sockets."""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperpod.errors import InvalidArgument, ProtocolError, ResourceExhausted
from hyperpod.shim.sessions import tap as tap_module
from hyperpod.shim.sessions.direct import AgentSocket, PipeEnd, taken
from hyperpod.shim.sessions.port import FramedPort, PortBroke
from hyperpod.shim.sessions.socket import HIGH_WATER, StreamSocket
from hyperpod.shim.sessions.spec import SessionSpec, from_request, to_json
from hyperpod.shim.sessions.stdin import InputQueue
from hyperpod.shim.sessions.tap import Fanout
from hyperpod.wire import stdio
from hyperpod.wire.control import Request, decode_request, encode_request
from hyperpod.wire.portpipe import HostPort, PortEnd
from hyperpod.wire.process import (
    MAX_PROCESS,
    Exit,
    HostProcess,
    Starting,
    decode_resize,
    encode_exit,
    encode_resize,
)
from hyperpod.wire.remotecommand import Wanted
from hyperpod.wire.stdio import FrameDecoder, FrameType, Open, StreamRefused
from hyperpod.wire.upgrade import Transport

CONTAINER, EXEC = "ab" * 32, "cd" * 16


def test_a_process_from_start_to_exit() -> None:
    host = HostProcess(Open(CONTAINER, "process", EXEC, tty=True), b'{"args":[]}')
    opening, start = FrameDecoder().feed(host.start())
    assert stdio.decode_open(opening).tty
    assert (start.type, bytes(start.payload)) == (FrameType.START, b'{"args":[]}')
    host.feed(stdio.encode_opened(0))
    assert (host.opened, host.exit) == (True, None)
    host.feed(encode_exit(137))
    assert host.exit == Exit(137)
    [resize] = FrameDecoder().feed(encode_resize(50, 132))
    assert decode_resize(resize.offset) == (50, 132)


def test_a_process_that_did_not_start() -> None:
    host = HostProcess(Open(CONTAINER, "process", EXEC), b"{}")
    host.feed(encode_exit(127, "no such program"))
    assert host.exit == Exit(127, "no such program")
    with pytest.raises(StreamRefused, match="not RUNNING"):
        HostProcess(Open(CONTAINER, "process", EXEC), b"{}").feed(stdio.encode_error("not RUNNING"))
    with pytest.raises(InvalidArgument, match="fit"):
        HostProcess(Open(CONTAINER, "process", EXEC), bytes(MAX_PROCESS + 1))


@pytest.mark.parametrize(
    "frames",
    [
        stdio.encode_opened(0) * 2, encode_exit(256), encode_exit(1) * 2, stdio.encode_eof(0),
        encode_exit(1) + stdio.encode_opened(0), encode_resize(1, 1),
    ],
)  # fmt: skip
def test_a_guests_nonsense_about_a_process(frames: bytes) -> None:
    with pytest.raises(ProtocolError):
        HostProcess(Open(CONTAINER, "process", EXEC), b"{}").feed(frames)


@given(st.binary(min_size=1, max_size=300_000))
def test_a_process_of_many_frames(process: bytes) -> None:
    """A pod in a namespace with many services has an environment of more than one."""
    starting, [_, *starts] = (
        Starting(),
        FrameDecoder().feed(HostProcess(Open(CONTAINER, "process"), process).start()),
    )
    assert [starting.feed(frame) for frame in starts] == [None] * (len(starts) - 1) + [process]


def test_starts_that_do_not_fit_together() -> None:
    for first, second in ((MAX_PROCESS, 0), (9, 9), (9, 10), (9, 0)):
        starting = Starting()
        with pytest.raises(ProtocolError):
            for left in (first, second):
                starting.feed(stdio.Frame(FrameType.START, left, b"12"))


@pytest.mark.parametrize("value", [0, 1, 1 << 16, 2**40])
def test_sizes_that_no_terminal_has(value: int) -> None:
    with pytest.raises(ProtocolError):
        decode_resize(value)


@given(st.lists(st.binary(min_size=1, max_size=200_000), max_size=4), st.integers(1, 100_000))
def test_a_port_both_ways(pieces: list[bytes], step: int) -> None:
    host, agent, decoder = HostPort(8080), PortEnd(), FrameDecoder()
    [opening] = decoder.feed(host.start())
    assert stdio.decode_open(opening) == Open("", "port", port=8080)
    raw = stdio.encode_opened(0) + b"".join(b for p in pieces for b in agent.data(p)) + agent.finish()
    got = b"".join(bytes(p) for i in range(0, len(raw), step) for p in host.feed(raw[i : i + step]))
    assert got == b"".join(pieces)
    assert host.ended
    back = b"".join(b for p in pieces for b in host.data(p)) + host.finish()
    assert b"".join(agent.take(f) for f in decoder.feed(back)) == got
    assert agent.ended


@pytest.mark.parametrize(
    "frames",
    [
        stdio.encode_eof(0),
        stdio.encode_opened(0) + stdio.encode_eof(1),
        stdio.encode_opened(0) + b"".join(stdio.encode_data(1, b"x")),
        stdio.encode_opened(0) + stdio.encode_eof(0) * 2,
        stdio.encode_opened(0) + stdio.encode_ack(0),
    ],
)
def test_a_guests_nonsense_about_a_port(frames: bytes) -> None:
    with pytest.raises(ProtocolError):
        HostPort(1).feed(frames)


SPEC = SessionSpec(
    transport=Transport.SPDY, protocol="v4.channel.k8s.io", head=b"HTTP/1.1 101\r\n\r\n", early=b"\0\xff",
    idle=4.0, creation=0.5, container=CONTAINER, exec_id=EXEC, wanted=Wanted(stdin=True), tty=True,
)  # fmt: skip


def test_what_the_daemon_asks_for_arrives() -> None:
    for spec in (SPEC, replace(SPEC, exec_id=""), replace(SPEC, container="", exec_id="", ports=(1, 65535))):
        request = decode_request(encode_request(1, "session", to_json(spec)))
        assert from_request(request) == spec
    assert [SPEC.kind, replace(SPEC, exec_id="").kind] == ["exec", "attach"]


@pytest.mark.parametrize(
    "change",
    [
        {"transport": "smoke"}, {"early": "*"}, {"head": 3}, {"wanted": [1, 2, 3, 4]}, {"wanted": []},
        {"ports": [0]}, {"ports": [True]}, {"ports": 80}, {"container": "x"}, {"exec": "x"}, {"creation_ms": 0},
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument):
        from_request(Request(1, "session", to_json(SPEC) | change))


async def test_taps_get_what_comes_from_now_on_once() -> None:
    fanout = Fanout(("stdout", "stderr"))
    await fanout.publish("stdout", 0, b"before")
    one, two = fanout.tap(("stdout", "stderr")), fanout.tap(("stderr",))
    await fanout.publish("stdout", 3, b"oreand")  # a reconnect repeats what was not acknowledged
    await fanout.publish("stderr", 0, b"err")
    assert [await one.get(), await one.get(), await two.get()] == [
        ("stdout", b"and"),
        ("stderr", b"err"),
        ("stderr", b"err"),
    ]
    fanout.end("stderr")
    assert await two.get() is None
    fanout.close()
    assert await one.get() is None
    assert await fanout.tap(("stdout",)).get() is None


async def test_a_tap_that_stands_still_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tap_module, "STALL", 0.05)
    fanout = Fanout(("stdout",))
    slow, offset, piece = fanout.tap(("stdout",)), 0, bytes(tap_module.LIMIT // 4)
    async with asyncio.timeout(10):
        for _ in range(8):
            await fanout.publish("stdout", offset, piece)
            offset += len(piece)
        got = 0
        with pytest.raises(ResourceExhausted):
            while (item := await slow.get()) is not None:
                got += len(item[1])
    assert got == tap_module.LIMIT


async def test_many_taps_that_stand_still_are_cut_off_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each would hold the container's log up for as long again."""
    monkeypatch.setattr(tap_module, "STALL", 0.1)
    fanout = Fanout(("stdout",))
    taps = [fanout.tap(("stdout",)) for _ in range(200)]
    async with asyncio.timeout(10):
        await fanout.publish("stdout", 0, bytes(tap_module.LIMIT))
    for tap in taps:
        assert await tap.get() is not None
        with pytest.raises(ResourceExhausted):
            await tap.get()


async def test_an_input_queue() -> None:
    queue = InputQueue()
    queue.put(b"abcdef")
    assert await queue.take(4) == [b"abcd"]
    queue.put(bytes(2_000_000))
    states = [queue.full]
    assert await queue.take(3) == [b"ef", b"\0"]
    assert [len(piece) for piece in await queue.take(1_500_000)] == [1_500_000]
    assert [*states, queue.full] == [True, False]
    queue.end()
    queue.put(b"late")
    assert [len(piece) for piece in await queue.take(1_000_000)] == [499_999]
    assert await queue.take(1) == []
    queue = InputQueue()
    queue.put(bytes(2_000_000))
    queue.discard()
    await queue.room()


async def test_a_socket_keeps_the_order_and_its_bound() -> None:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    one, loop, data = StreamSocket(ours), asyncio.get_running_loop(), os.urandom(3_000_000)

    async def write() -> None:
        for start in range(0, len(data), 7000):
            one.write([b"", memoryview(data)[start : start + 3000], data[start + 3000 : start + 7000]])
            await one.drain()
            assert one._queued <= HIGH_WATER
        await one.drain(0)
        one.close()

    writing, got = asyncio.ensure_future(write()), b""
    while piece := await loop.sock_recv(theirs, 50_000):
        got += piece
    await writing
    theirs.close()
    assert got == data


async def test_a_socket_whose_peer_makes_it_talk_and_does_not_read() -> None:
    ours, theirs = socket.socketpair()
    one = StreamSocket(ours)
    for _ in range(100):
        one.write([bytes(100_000)])
    with pytest.raises(ConnectionAbortedError):
        await one.drain()
    one.close()
    theirs.close()


async def test_a_peer_that_leaves_while_nobody_reads_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperpod.shim.sessions.socket._LOOK", 0.01)
    ours, theirs = socket.socketpair()
    one = StreamSocket(ours)
    theirs.send(b"unread")
    theirs.close()
    with pytest.raises(ConnectionResetError):
        await one.hold(asyncio.Event().wait())
    one.close()


async def test_a_pipe_keeps_the_order_and_ends_with_its_writers() -> None:
    ours, theirs = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    data = os.urandom(3_000_000)
    reading, writing = PipeEnd(ours), PipeEnd(theirs)

    async def write() -> None:
        with writing:
            for start in range(0, len(data), 300_000):
                piece = memoryview(data)[start : start + 300_000]
                await writing.write([piece[:1], piece[1:200_000], piece[200_000:]])

    task, got = asyncio.ensure_future(write()), b""
    with reading:
        while piece := await reading.read():
            got += piece
    await task
    assert got == data


async def test_a_pipe_that_others_hold_ends_with_silence() -> None:
    ours, theirs = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    with PipeEnd(ours) as pipe:
        os.write(theirs, b"last words")
        pipe.end_when_idle(0.01)
        assert await pipe.read() == b"last words"
        assert await pipe.read() == b""
        waiting = asyncio.ensure_future(pipe.read())
        await asyncio.sleep(0)
        pipe.end_when_idle(0.01)
        assert await waiting == b""
    os.close(theirs)


async def test_a_pipe_that_nobody_reads_any_more() -> None:
    ours, theirs = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    with PipeEnd(theirs) as pipe:
        writing = asyncio.ensure_future(pipe.write([bytes(1_000_000)]))
        await asyncio.sleep(0)
        os.close(ours)
        with pytest.raises(BrokenPipeError):
            await writing


async def test_a_descriptor_that_comes_with_an_answer() -> None:
    ours, theirs = socket.socketpair()
    reading, writing = os.pipe2(os.O_CLOEXEC)
    link = AgentSocket(ours)
    socket.send_fds(theirs, [b"first"], [reading])
    assert await link.receive() == b"first"
    fd = taken(link)
    assert not os.get_inheritable(fd)
    os.write(writing, b"through")
    assert os.read(fd, 10) == b"through"
    with pytest.raises(ProtocolError, match="without a descriptor"):
        link.take()
    socket.send_fds(theirs, [b"again"], [reading])
    assert await link.receive() == b"again"
    link.close()  # and what nobody took
    for one in (fd, reading):
        os.close(one)
    with pytest.raises(BrokenPipeError):
        os.write(writing, b"x")
    os.close(writing)
    theirs.close()


async def test_a_guest_hands_nothing_over() -> None:
    ours, theirs = socket.socketpair()
    link = StreamSocket(ours)
    with pytest.raises(ProtocolError, match="guest"):
        taken(link)
    link.close()
    theirs.close()


async def test_why_a_port_broke_is_read_though_nothing_can_be_sent() -> None:
    """An agent that has said so closes its connection: what is on its way there is the port's loss, not ours."""
    ours, theirs = socket.socketpair()
    port = FramedPort(StreamSocket(ours), HostPort(80))
    answer = b"".join(map(bytes, PortEnd().data(b"no more")))
    theirs.sendall(stdio.encode_opened(0) + answer + stdio.encode_error("it broke"))
    await port.open(b"")
    theirs.close()
    with pytest.raises(PortBroke):
        await port.send([b"x"])
    with pytest.raises(PortBroke):
        await port.end()
    assert b"".join(map(bytes, await port.receive())) == b"no more"
    with pytest.raises(PortBroke, match="it broke"):
        await port.receive()
    port.close()
