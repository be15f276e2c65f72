"""What a hostile guest or a taken-over QEMU may try: one stream, the rings or the session end; nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from hyperpod.errors import ProtocolError
from hyperpod.vsock.device import VsockDevice
from hyperpod.vsock.dial import HybridEndpoint, dial
from hyperpod.wire.vsock import packet as wire
from hyperpod.wire.vsock.packet import OP_REQUEST, OP_RESPONSE, OP_RST, OP_RW, OP_SHUTDOWN, Packet
from hyperpod.wire.vsock.vhost_user import Request
from tests.component.vsock_guest import DEADLINE, GUEST_BASE, GUEST_CID, MEMORY, SIZE, USER_BASE, Guest

NOBODY = Packet(2, GUEST_CID, 77, 88, 0, 1, OP_RW, 0, 0, 0)


class Setup:
    def __init__(self, directory: Path) -> None:
        self.failures: asyncio.Queue[ProtocolError] = asyncio.Queue()
        self.device = VsockDevice(
            GUEST_CID,
            str(directory / "vhost.sock"),
            str(directory / "vsock.sock"),
            on_failure=self.failures.put_nowait,
        )
        self.guest = Guest()

    async def failure(self) -> str:
        return str(await asyncio.wait_for(self.failures.get(), DEADLINE))

    async def stream(self) -> tuple[socket.socket, Packet]:
        task = asyncio.create_task(dial(HybridEndpoint(self.device.hybrid_path), 1024, DEADLINE))
        request = await self.guest.expect(OP_REQUEST)
        self.guest.transmit(OP_RESPONSE, request)
        return await task, request


@pytest.fixture
async def setup(tmp_path: Path) -> AsyncIterator[Setup]:
    errors: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(repr(context)))
    before = len(os.listdir("/proc/self/fd"))
    made = Setup(tmp_path)
    await made.device.start()
    await made.guest.boot(made.device.vhost_path)
    yield made
    await made.device.close()
    made.guest.close()
    assert errors == []
    assert (
        len(os.listdir("/proc/self/fd")) <= before
    )  # less when what other tests left is collected meanwhile


def jump(guest: Guest) -> None:
    guest.tx.available[1] = SIZE + 1


def head_out_of_range(guest: Guest) -> None:
    guest.tx.available[2] = SIZE
    guest.tx.available[1] = 1


def loop(guest: Guest) -> None:
    guest.tx.descriptor(0, GUEST_BASE, 64, 1, 1)
    guest.tx.descriptor(1, GUEST_BASE, 64, 1, 0)
    guest.tx.offer(0)


def outside_memory(guest: Guest) -> None:
    guest.tx.descriptor(0, GUEST_BASE + MEMORY - 10, 44)
    guest.tx.offer(0)


def wrapping_address(guest: Guest) -> None:
    guest.tx.descriptor(0, (1 << 64) - 20, 44)
    guest.tx.offer(0)


def wrong_direction(guest: Guest) -> None:
    guest.tx.descriptor(0, GUEST_BASE, 44, 2)
    guest.tx.offer(0)


def huge_indirect_table(guest: Guest) -> None:
    guest.tx.descriptor(0, GUEST_BASE, 16 * (SIZE + 1), 4)
    guest.tx.offer(0)


def uneven_indirect_table(guest: Guest) -> None:
    guest.tx.descriptor(0, GUEST_BASE, 40, 4)
    guest.tx.offer(0)


def nested_indirect_table(guest: Guest) -> None:
    struct.pack_into("<QIHH", guest.memory, 0x300000, GUEST_BASE, 16, 4, 0)
    guest.tx.descriptor(0, GUEST_BASE + 0x300000, 16, 4)
    guest.tx.offer(0)


def short_packet(guest: Guest) -> None:
    guest.transmit_raw(bytes(43))


def length_beyond_the_buffer(guest: Guest) -> None:
    guest.transmit(OP_RW, NOBODY, b"xyz", length=4)


def giant_length(guest: Guest) -> None:
    guest.transmit(OP_RW, NOBODY, length=0xFFFFFFFF)


RING_ATTACKS = [
    jump,
    head_out_of_range,
    loop,
    outside_memory,
    wrapping_address,
    wrong_direction,
    huge_indirect_table,
    uneven_indirect_table,
    nested_indirect_table,
    short_packet,
    length_beyond_the_buffer,
    giant_length,
]


@pytest.mark.parametrize("attack", RING_ATTACKS, ids=lambda attack: attack.__name__)
async def test_broken_rings_stop_until_the_driver_starts_again(
    setup: Setup, attack: Callable[[Guest], None]
) -> None:
    sock, _ = await setup.stream()
    await setup.guest.reset()
    sock.close()
    sock, _ = await setup.stream()
    await setup.guest.sent()
    await setup.guest.reset()
    attack(setup.guest)
    os.eventfd_write(setup.guest.tx.kick, 1)
    assert await setup.failure()
    assert not setup.device.guest_up
    os.eventfd_write(setup.guest.tx.kick, 1)  # may not run the broken rings again
    await setup.guest.reset()
    fresh, request = await setup.stream()
    setup.guest.transmit(OP_RW, request, b"works")
    assert await asyncio.get_running_loop().sock_recv(fresh, 10) == b"works"
    fresh.close()
    sock.close()


async def test_a_receive_buffer_without_room(setup: Setup) -> None:
    sock, _ = await setup.stream()
    for head in range(SIZE):
        setup.guest.rx.descriptor(head, GUEST_BASE + 0x300000, 44, 2)
    await asyncio.get_running_loop().sock_sendall(sock, b"x")
    assert "packet should fit" in await setup.failure()
    sock.close()


async def test_rings_outside_memory_never_start(tmp_path: Path) -> None:
    made = Setup(tmp_path)
    await made.device.start()
    await made.guest.connect(made.device.vhost_path)
    await made.guest.realize()
    made.guest.tx.offset = MEMORY - 0x1000
    await made.guest.start()
    assert not made.device.guest_up
    assert await made.guest.ask(Request.GET_QUEUE_NUM) == struct.pack("<Q", 2)  # QEMU is not lost
    await made.device.close()
    made.guest.close()


STREAM_ATTACKS: dict[str, tuple[int, bytes, int]] = {  # operation, payload, times
    "data beyond the credit": (OP_RW, bytes(8000), 70),
    "a second response": (OP_RESPONSE, b"", 1),
    "a request on an open stream": (OP_REQUEST, b"", 1),
    "an unknown operation": (99, b"", 1),
    "a payload in a credit update": (wire.OP_CREDIT_UPDATE, b"x", 1),
}


@pytest.mark.parametrize("name", STREAM_ATTACKS)
async def test_a_broken_stream_is_reset_alone(setup: Setup, name: str) -> None:
    op, payload, times = STREAM_ATTACKS[name]
    good, other = await setup.stream()
    bad, request = await setup.stream()
    for _ in range(times):
        setup.guest.transmit(op, request, payload)
        await setup.guest.sent()
    reset, _ = await setup.guest.receive()
    while reset.op == wire.OP_CREDIT_UPDATE:  # for what the client's socket took
        reset, _ = await setup.guest.receive()
    assert (reset.op, reset.src_port) == (OP_RST, request.src_port)
    bad.close()
    setup.guest.transmit(OP_RW, other, b"unharmed")
    assert await asyncio.get_running_loop().sock_recv(good, 20) == b"unharmed"
    good.close()


async def test_data_after_shutdown_resets(setup: Setup) -> None:
    sock, request = await setup.stream()
    setup.guest.transmit(OP_SHUTDOWN, request, flags=2)
    setup.guest.transmit(OP_RW, request, b"too late")
    await setup.guest.expect(OP_RST)
    assert await asyncio.get_running_loop().sock_recv(sock, 20) == b""
    sock.close()


async def test_a_flood_of_unknown_packets_waits_for_receive_buffers(setup: Setup) -> None:
    """The guest gives no buffer back: at some point its packets stay in its own ring; then all are answered."""
    taken = []
    for _ in range(SIZE):
        setup.guest.transmit(OP_RW, NOBODY)
        await setup.guest.sent()
        taken.append(await setup.guest.receive(repost=False))
    count = 0
    while setup.guest.tx.used[1] == setup.guest.tx.available[1] and count < 10_000:
        setup.guest.transmit(OP_RW, NOBODY)
        count += 1
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert 0 < count < 1000
    setup.guest.rx.offer(*range(SIZE))
    for _ in range(count):
        await setup.guest.expect(OP_RST)
    await setup.guest.sent()


async def test_packets_from_another_address_are_dropped(setup: Setup) -> None:
    setup.guest.transmit(OP_RW, NOBODY, src_cid=99)
    setup.guest.transmit(OP_RW, NOBODY, dst_cid=1)
    setup.guest.transmit(OP_RST, NOBODY)
    setup.guest.transmit(OP_RW, NOBODY, src_port=5)
    assert (await setup.guest.expect(OP_RST)).dst_port == 5


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def region(
    guest: int = GUEST_BASE, size: int = MEMORY, user: int = USER_BASE, offset: int = 0, count: int = 1
) -> bytes:
    return struct.pack("<II", count, 0) + struct.pack("<QQQQ", guest, size, user, offset) * count


SESSION_ATTACKS: dict[str, tuple[int, bytes, int]] = {  # request, payload, number of memfds
    "unknown request": (99, b"", 0),
    "features not offered": (Request.SET_FEATURES, u64(1 << 26), 0),
    "short payload": (Request.SET_FEATURES, b"1234", 0),
    "third ring": (Request.SET_VRING_NUM, struct.pack("<II", 2, 128), 0),
    "size of a running ring": (Request.SET_VRING_NUM, struct.pack("<II", 0, 256), 0),
    "base of a running ring": (Request.SET_VRING_BASE, struct.pack("<II", 0, 1), 0),
    "memory without a descriptor": (Request.SET_MEM_TABLE, region(), 0),
    "memory beyond its file": (Request.SET_MEM_TABLE, region(size=2 * MEMORY), 1),
    "memory of no size": (Request.SET_MEM_TABLE, region(size=0), 1),
    "memory of impossible size": (Request.SET_MEM_TABLE, region(size=1 << 63), 1),
    "memory at the end of the address space": (Request.SET_MEM_TABLE, region(guest=(1 << 64) - 4096), 1),
    "offset beyond the file": (Request.SET_MEM_TABLE, region(offset=1 << 40), 1),
    "overlapping memory": (Request.SET_MEM_TABLE, region(count=2), 2),
    "nine regions": (Request.SET_MEM_TABLE, region(count=9), 0),
    "a kick that is no eventfd": (Request.SET_VRING_KICK, u64(0), 1),
    "a kick without a descriptor": (Request.SET_VRING_KICK, u64(0x100), 0),
    "two call descriptors": (Request.SET_VRING_CALL, u64(0), 2),
    "configuration out of range": (Request.GET_CONFIG, struct.pack("<III", 4, 8, 0) + bytes(8), 0),
    "setting the CID": (Request.SET_CONFIG, struct.pack("<III", 0, 8, 0) + bytes(8), 0),
}


@pytest.mark.parametrize("name", SESSION_ATTACKS)
async def test_a_session_that_breaks_the_protocol_ends(setup: Setup, name: str) -> None:
    request, payload, fds = SESSION_ATTACKS[name]
    sock, _ = await setup.stream()
    assert await setup.guest.ask(request, payload, [setup.guest.memfd] * fds, flags=8) == b""
    assert await setup.failure()
    assert await asyncio.get_running_loop().sock_recv(sock, 1) == b""
    sock.close()
    setup.guest.disconnect()
    again = Guest()
    await again.boot(setup.device.vhost_path)  # the device can be plugged anew
    assert setup.device.guest_up
    again.close()


async def test_memory_that_can_shrink_is_refused(setup: Setup) -> None:
    setup.guest.disconnect()
    unsealed = Guest(seal=False)
    while True:  # the device may not have seen the end of the first session yet
        await unsealed.connect(setup.device.vhost_path)
        with contextlib.suppress(ConnectionResetError):
            if await unsealed.ask(Request.GET_QUEUE_NUM):
                break
        unsealed.disconnect()
    assert await unsealed.ask(Request.SET_MEM_TABLE, region(), [unsealed.memfd], flags=8) == b""
    assert "F_SEAL_SHRINK" in await setup.failure()
    unsealed.close()


async def test_a_second_qemu_is_refused(setup: Setup) -> None:
    second = Guest()
    await second.connect(setup.device.vhost_path)
    with contextlib.suppress(ConnectionResetError):  # what the kernel says when the request was not read
        assert await second.ask(Request.GET_FEATURES) == b""
    second.close()
    assert setup.device.guest_up


async def test_a_guest_that_takes_no_packets_is_not_owed_ever_more(setup: Setup) -> None:
    """Dialled again and again by who does not know better, for as long as it stands still."""
    switch = setup.device._switch
    assert switch is not None
    for _ in range(SIZE + 300):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(setup.device.hybrid_path)
        sock.send(b"CONNECT 1024\n")
        while not switch._streams:
            await asyncio.sleep(0)
        sock.close()
        while switch._streams:
            await asyncio.sleep(0)
    assert len(switch._resets) <= SIZE
    assert not switch._control
