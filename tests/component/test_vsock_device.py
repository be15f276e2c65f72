"""The device against a driver that follows the rules, and clients on the hybrid socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import TypeVar

import pytest

from hyperpod.errors import DeadlineExceeded, Unavailable
from hyperpod.vsock import dial as dialing
from hyperpod.vsock.device import VsockDevice
from hyperpod.vsock.dial import HybridEndpoint
from hyperpod.vsock.switch import BUFFER
from hyperpod.wire.vsock.packet import (
    OP_CREDIT_REQUEST,
    OP_CREDIT_UPDATE,
    OP_REQUEST,
    OP_RESPONSE,
    OP_RST,
    OP_RW,
    OP_SHUTDOWN,
    Packet,
)
from hyperpod.wire.vsock.vhost_user import Request
from tests.component.vsock_guest import DEADLINE, EVENT_INDEX, GUEST_CID, INDIRECT, SIZE, Guest

T = TypeVar("T")
PORT = 1024


class Setup:
    def __init__(self, directory: Path) -> None:
        self.device = VsockDevice(GUEST_CID, str(directory / "vhost.sock"), str(directory / "vsock.sock"))
        self.guest = Guest()
        self.errors: list[str] = []

    async def dial(self) -> asyncio.Task[socket.socket]:
        return asyncio.create_task(dialing.dial(HybridEndpoint(self.device.hybrid_path), PORT, DEADLINE))

    async def stream(self) -> tuple[socket.socket, Packet]:
        """A client's socket and the request that the guest saw, accepted."""
        task = await self.dial()
        request = await self.guest.expect(OP_REQUEST)
        assert (request.dst_cid, request.dst_port) == (GUEST_CID, PORT)
        self.guest.transmit(OP_RESPONSE, request)
        return await task, request


@pytest.fixture(params=["modern", "split", "plain"])
async def setup(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Setup]:
    """A booted guest: both receive layouts, with and without EVENT_IDX and INDIRECT."""
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(repr(context)))
    errors: list[str] = []
    made = Setup(tmp_path)
    made.guest.close()
    features = 0 if request.param == "plain" else EVENT_INDEX | INDIRECT
    made.guest = Guest(features=features, split=request.param == "split")
    await made.device.start()
    await made.guest.boot(made.device.vhost_path)
    yield made
    await made.device.close()
    made.guest.close()
    assert errors == []


async def soon(awaitable: Awaitable[T]) -> T:
    return await asyncio.wait_for(awaitable, DEADLINE)


async def receive(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = await soon(asyncio.get_running_loop().sock_recv(sock, size - len(data)))
        if not part:
            break
        data += part
    return data


async def send(sock: socket.socket, data: bytes) -> None:
    await soon(asyncio.get_running_loop().sock_sendall(sock, data))


async def test_bytes_go_both_ways(setup: Setup) -> None:
    sock, request = await setup.stream()
    await send(sock, b"to the guest")
    packet, payload = await setup.guest.receive()
    assert (packet.op, payload) == (OP_RW, b"to the guest")
    setup.guest.transmit(OP_RW, request, b"to the host")
    assert await receive(sock, 11) == b"to the host"
    sock.close()


async def test_bulk_to_the_guest_keeps_order_and_credit(setup: Setup) -> None:
    sock, request = await setup.stream()
    data = os.urandom(1_000_000)
    task = asyncio.create_task(send(sock, data))
    got = bytearray()
    asked = 0
    while len(got) < len(data):
        packet, payload = await setup.guest.receive()
        asked += packet.op == OP_CREDIT_REQUEST
        got += payload
        assert len(got) - setup.guest.fwd_cnt <= setup.guest.buf_alloc
        if len(got) - setup.guest.fwd_cnt >= setup.guest.buf_alloc // 2:
            setup.guest.fwd_cnt = len(got)
            setup.guest.transmit(OP_CREDIT_UPDATE, request)
    await task
    assert got == data
    assert asked < 20
    sock.close()


async def test_bulk_to_the_host_keeps_order_and_credit(setup: Setup) -> None:
    """With a small buffer of its own the guest never sends more than that unacknowledged: facts of Linux."""
    setup.guest.buf_alloc = 16384
    sock, request = await setup.stream()
    data = os.urandom(300_000)
    reader = asyncio.create_task(receive(sock, len(data)))
    acknowledged = sent = 0
    while sent < len(data):
        room = min(setup.guest.buf_alloc, request.buf_alloc) - (sent - acknowledged)
        if room <= 0:
            packet = await setup.guest.expect(OP_CREDIT_UPDATE)
            acknowledged = packet.fwd_cnt
            continue
        part = data[sent : sent + min(room, 4096)]
        setup.guest.transmit(OP_RW, request, part)
        sent += len(part)
    assert await reader == data
    sock.close()


async def test_exhausted_credit_is_asked_for_once(setup: Setup) -> None:
    setup.guest.buf_alloc = 1000
    sock, request = await setup.stream()
    await send(sock, bytes(3000))
    got = 0
    while got < 1000:
        packet, payload = await setup.guest.receive()
        assert packet.op == OP_RW
        got += len(payload)
    await setup.guest.expect(OP_CREDIT_REQUEST)
    await send(sock, b"more")  # wakes the device: it must neither send nor ask again
    setup.guest.transmit(OP_CREDIT_REQUEST, request)
    await setup.guest.expect(OP_CREDIT_UPDATE)
    setup.guest.fwd_cnt = 1000
    setup.guest.transmit(OP_CREDIT_UPDATE, request)
    packet, payload = await setup.guest.receive()
    assert packet.op == OP_RW
    assert len(payload) == 1000
    sock.close()


async def test_a_client_that_does_not_read_holds_the_credit(setup: Setup) -> None:
    sock, request = await setup.stream()
    sent = 0
    for _ in range(BUFFER // 4096):
        setup.guest.transmit(OP_RW, request, bytes([sent % 251]) * 4096)
        sent += 4096
        await setup.guest.sent()
    assert await receive(sock, sent) == b"".join(bytes([i % 251]) * 4096 for i in range(0, sent, 4096))
    await setup.guest.expect(OP_CREDIT_UPDATE)
    sock.close()


async def test_half_close_by_the_client(setup: Setup) -> None:
    sock, request = await setup.stream()
    await send(sock, b"last")
    sock.shutdown(socket.SHUT_WR)
    assert (await setup.guest.receive())[1] == b"last"
    assert (await setup.guest.expect(OP_SHUTDOWN)).flags == 2
    setup.guest.transmit(OP_RW, request, b"still comes")
    assert await receive(sock, 11) == b"still comes"
    setup.guest.transmit(OP_SHUTDOWN, request, flags=3)
    await setup.guest.expect(OP_RST)
    assert await receive(sock, 1) == b""
    sock.close()


async def test_half_close_by_the_guest(setup: Setup) -> None:
    sock, request = await setup.stream()
    setup.guest.transmit(OP_RW, request, b"last")
    setup.guest.transmit(OP_SHUTDOWN, request, flags=2)
    assert await receive(sock, 100) == b"last"
    await send(sock, b"still goes")
    assert (await setup.guest.receive())[1] == b"still goes"
    sock.close()
    assert (await setup.guest.expect(OP_SHUTDOWN)).flags == 3
    setup.guest.transmit(OP_RST, request)


async def test_close_by_the_client_delivers_first(setup: Setup) -> None:
    setup.guest.buf_alloc = 10
    sock, request = await setup.stream()
    await send(sock, b"0123456789abcdef")
    sock.close()
    assert (await setup.guest.receive())[1] == b"0123456789"
    await setup.guest.expect(OP_CREDIT_REQUEST)
    setup.guest.fwd_cnt = 10
    setup.guest.transmit(OP_CREDIT_UPDATE, request)
    assert (await setup.guest.receive())[1] == b"abcdef"
    assert (await setup.guest.expect(OP_SHUTDOWN)).flags == 3
    setup.guest.transmit(OP_RST, request)


async def test_what_the_guest_sends_to_a_closed_client_is_dropped_and_credited(setup: Setup) -> None:
    sock, request = await setup.stream()
    sock.close()
    assert (await setup.guest.expect(OP_SHUTDOWN)).flags == 3
    counted = 0
    for sent in range(4096, 4 * BUFFER + 1, 4096):
        setup.guest.transmit(OP_RW, request, bytes(4096))
        await setup.guest.sent()
        if sent - counted == BUFFER:
            while counted < sent:
                counted = (await setup.guest.expect(OP_CREDIT_UPDATE)).fwd_cnt
    setup.guest.transmit(OP_RST, request)


async def test_a_disabled_ring_rests_until_it_is_enabled(setup: Setup) -> None:
    sock, request = await setup.stream()
    await setup.guest.ask(Request.SET_VRING_ENABLE, struct.pack("<II", 1, 0), flags=8)
    assert not setup.device.guest_up
    setup.guest.transmit(OP_RW, request, b"later")
    await setup.guest.ask(Request.SET_VRING_ENABLE, struct.pack("<II", 1, 1), flags=8)
    assert await receive(sock, 5) == b"later"
    sock.close()


async def test_a_silent_client_is_closed(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperpod.vsock.switch.HANDSHAKE_SECONDS", 0.05)
    reader, writer = await asyncio.open_unix_connection(setup.device.hybrid_path)
    assert await soon(reader.read()) == b""
    writer.close()


async def test_a_guest_that_never_answers(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperpod.vsock.switch.REQUEST_SECONDS", 0.05)
    task = await setup.dial()
    await setup.guest.expect(OP_REQUEST)
    with pytest.raises(Unavailable):
        await task
    await setup.guest.expect(OP_RST)


async def test_undelivered_bytes_of_a_closed_client_do_not_stay_for_ever(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hyperpod.vsock.switch.LINGER_SECONDS", 0.05)
    setup.guest.buf_alloc = 10
    sock, _ = await setup.stream()
    await send(sock, b"0123456789abcdef")
    sock.close()
    assert (await setup.guest.receive())[1] == b"0123456789"
    await setup.guest.expect(OP_CREDIT_REQUEST)
    await setup.guest.expect(OP_RST)


async def test_a_reset_hands_out_what_was_received(setup: Setup) -> None:
    sock, request = await setup.stream()
    for _ in range(BUFFER // 4096):
        setup.guest.transmit(OP_RW, request, bytes(4096))
        await setup.guest.sent()
    setup.guest.transmit(OP_RST, request)
    await setup.guest.sent()
    assert len(await receive(sock, BUFFER + 1)) == BUFFER
    sock.close()


async def test_a_closed_port(setup: Setup) -> None:
    task = await setup.dial()
    request = await setup.guest.expect(OP_REQUEST)
    setup.guest.transmit(OP_RST, request)
    with pytest.raises(Unavailable, match="does not listen"):
        await task


async def test_a_client_that_leaves_before_the_answer(setup: Setup) -> None:
    task = asyncio.create_task(dialing.dial(HybridEndpoint(setup.device.hybrid_path), PORT, 0.05))
    request = await setup.guest.expect(OP_REQUEST)
    with pytest.raises(DeadlineExceeded):
        await task
    assert (await setup.guest.expect(OP_RST)).src_port == request.src_port


async def test_a_guest_cannot_connect(setup: Setup) -> None:
    nowhere = Packet(2, GUEST_CID, 1024, 4000, 0, 1, OP_RW, 0, 0, 0)
    setup.guest.transmit(OP_REQUEST, nowhere)
    refusal = await setup.guest.expect(OP_RST)
    assert (refusal.src_port, refusal.dst_port) == (1024, 4000)


async def test_stop_and_continue_keep_streams(setup: Setup) -> None:
    sock, request = await setup.stream()
    bases = await setup.guest.stop()
    await send(sock, b"while stopped")
    await setup.guest.start(bases)
    assert (await setup.guest.receive())[1] == b"while stopped"
    setup.guest.transmit(OP_RW, request, b"answer")
    assert await receive(sock, 6) == b"answer"
    sock.close()


async def test_a_guest_reset_drops_streams(setup: Setup) -> None:
    sock, _ = await setup.stream()
    await setup.guest.reset()
    assert await receive(sock, 1) == b""
    sock.close()
    sock, request = await setup.stream()
    setup.guest.transmit(OP_RW, request, b"again")
    assert await receive(sock, 5) == b"again"
    sock.close()


async def test_a_new_memory_table_while_running(setup: Setup) -> None:
    sock, request = await setup.stream()
    await setup.guest.set_memory()
    setup.guest.transmit(OP_RW, request, b"mapped anew")
    assert await receive(sock, 11) == b"mapped anew"
    sock.close()


async def test_many_streams_without_receive_buffers_wait_for_them(setup: Setup) -> None:
    """Twice as many requests as there are buffers: the rest follows when the guest posts again."""
    tasks = [await setup.dial() for _ in range(2 * SIZE)]
    for _ in tasks:
        setup.guest.transmit(OP_RESPONSE, await setup.guest.expect(OP_REQUEST))
        await setup.guest.sent()
    for sock in await soon(asyncio.gather(*tasks)):
        sock.close()


async def test_no_guest_no_stream(tmp_path: Path) -> None:
    made = Setup(tmp_path)
    await made.device.start()
    with pytest.raises(Unavailable):
        await (await made.dial())
    await made.device.close()
    made.guest.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", [b"GET / HTTP/1.0\r\n", b"CONNECT 99999999999\n", b"CONNECT x\n", b"x" * 40])
async def test_a_malformed_handshake_is_closed(setup: Setup, line: bytes) -> None:
    reader, writer = await asyncio.open_unix_connection(setup.device.hybrid_path)
    writer.write(line)
    with contextlib.suppress(ConnectionResetError):  # what the kernel says when the line was not read
        assert await soon(reader.read()) == b""
    writer.close()


async def test_a_handshake_in_pieces_with_data_behind_it(setup: Setup) -> None:
    reader, writer = await asyncio.open_unix_connection(setup.device.hybrid_path)
    for piece in (b"CONN", b"ECT 10", b"24\nearly"):
        writer.write(piece)
        await asyncio.sleep(0)
    request = await setup.guest.expect(OP_REQUEST)
    setup.guest.transmit(OP_RESPONSE, request)
    assert (await soon(reader.readline())).startswith(b"OK ")
    assert (await setup.guest.receive())[1] == b"early"
    writer.close()
