"""Random bytes on the vhost-user socket and random rings: the device ends the session or the rings, cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import struct
from pathlib import Path

import pytest

from hyperpod.errors import HyperpodError, ProtocolError
from hyperpod.vsock.device import VsockDevice
from hyperpod.vsock.dial import HybridEndpoint, dial
from hyperpod.wire.vsock import vhost_user
from hyperpod.wire.vsock.packet import OP_REQUEST, OP_RESPONSE, Packet, encode
from tests.component.vsock_guest import GUEST_BASE, GUEST_CID, MEMORY, SIZE, USER_BASE, Guest

ROUNDS = int(os.environ.get("HYPERPOD_FUZZ_ROUNDS", "60"))


class Target:
    """A device whose only acceptable misfortune is a ProtocolError."""

    def __init__(self, directory: Path) -> None:
        self.errors: list[str] = []
        self.failures: list[ProtocolError] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: self.errors.append(repr(context)))
        self.device = VsockDevice(
            GUEST_CID,
            str(directory / "vhost.sock"),
            str(directory / "vsock.sock"),
            on_failure=self.failures.append,
        )

    async def still_works(self) -> None:
        """A well-behaved guest gets through afterwards."""
        guest = Guest()
        await guest.boot(self.device.vhost_path)
        task = asyncio.create_task(dial(HybridEndpoint(self.device.hybrid_path), 1024, 10))
        guest.transmit(OP_RESPONSE, await guest.expect(OP_REQUEST))
        (await task).close()
        guest.close()
        assert self.errors == []

    async def idle(self) -> None:
        """Let the device do all that it can do now, including seeing a hang-up."""
        for _ in range(20):
            await asyncio.sleep(0)


def random_message(rng: random.Random, guest: Guest) -> tuple[bytes, list[int]]:
    request = rng.choice([*vhost_user.Request, rng.randrange(50)])
    index = rng.choice([0, 1, 1, 0, 2, rng.getrandbits(32)])
    number = rng.choice([0, 1, SIZE, 7, rng.getrandbits(32)])
    address = rng.choice([USER_BASE, USER_BASE + rng.randrange(MEMORY), rng.getrandbits(64)])
    payload = rng.choice(
        [
            struct.pack("<II", index, number),
            struct.pack("<Q", rng.choice([index, 0x100, guest.features, rng.getrandbits(64)])),
            struct.pack("<IIQQQQ", index, 0, address, address + 0x2000, address + 0x1000, 0),
            struct.pack("<IIQQQQ", 1, 0, GUEST_BASE, rng.choice([MEMORY, 4096, number]), USER_BASE, 0),
            struct.pack("<III", 0, 8, 0) + bytes(8),
            rng.randbytes(rng.randrange(40)),
        ]
    )
    fds = rng.choice([[], [guest.memfd], [guest.tx.kick], [guest.rx.call], [guest.memfd] * 8])
    return vhost_user.encode(request, payload, flags=rng.choice([0, 8])), fds


@pytest.mark.parametrize("structured", [False, True])
async def test_random_messages(tmp_path: Path, structured: bool) -> None:
    target = Target(tmp_path)
    await target.device.start()
    for seed in range(ROUNDS):
        rng = random.Random(seed)
        guest = Guest()
        await guest.connect(target.device.vhost_path)
        sock = guest.sock
        assert sock is not None
        with contextlib.suppress(ConnectionError, BlockingIOError):
            if structured and rng.random() < 0.5:
                await guest.realize()
                await guest.start()
            for _ in range(20):
                if structured:
                    data, fds = random_message(rng, guest)
                    socket.send_fds(sock, [data], fds)
                else:
                    sock.send(rng.randbytes(rng.randrange(1, 64)))
                await asyncio.sleep(0)
        await target.idle()
        guest.close()
        await target.idle()
    assert target.failures  # or nothing was tested
    await target.still_works()
    await target.device.close()
    assert target.errors == []


def scribble(rng: random.Random, guest: Guest) -> None:
    """Random values where the device looks: descriptors, indices, headers."""
    for ring in guest.rings:
        flags = 2 if ring is guest.rx else 0
        for i in range(SIZE):
            if rng.random() < 0.3:
                address = rng.choice([GUEST_BASE + rng.randrange(MEMORY), rng.getrandbits(64)])
                length = rng.choice([44, 48, rng.randrange(5000), rng.getrandbits(32)])
                ring.descriptor(
                    i, address, length, flags ^ rng.choice([0, 0, 0, 1, 4, 2]), rng.randrange(SIZE)
                )
            ring.available[2 + i] = rng.choice([i, i, i, rng.randrange(SIZE + 1)])
        if rng.random() < 0.5:
            ring.available[1] = (ring.available[1] + rng.choice([1, 3, SIZE])) & 0xFFFF
        ring.available[2 + SIZE] = rng.getrandbits(16)
        if rng.random() < 0.1:
            ring.used[1] = rng.getrandbits(16)


def random_packet(rng: random.Random, to: Packet) -> tuple[Packet, bytes]:
    payload = rng.randbytes(rng.choice([0, 1, 100, 4000]))
    packet = Packet(
        src_cid=rng.choice([GUEST_CID] * 9 + [7]),
        dst_cid=2,
        src_port=rng.choice([to.dst_port] * 9 + [5]),
        dst_port=rng.choice([to.src_port] * 9 + [6]),
        length=rng.choice([len(payload)] * 300 + [rng.getrandbits(32)]),
        type=rng.choice([1] * 9 + [2]),
        op=rng.choice([1, 2, 3, 4, 5, 5, 5, 5, 6, 7, 8]),
        flags=rng.getrandbits(2),
        buf_alloc=rng.choice([0, 10, 1 << 18, rng.getrandbits(32)]),
        fwd_cnt=rng.choice([0, rng.getrandbits(32)]),
    )
    return packet, payload


async def client(target: Target, guest: Guest) -> tuple[socket.socket, Packet] | None:
    task = asyncio.create_task(dial(HybridEndpoint(target.device.hybrid_path), 1024, 1))
    try:
        request, _ = await guest.receive()
        guest.transmit(OP_RESPONSE, request)
        return await task, request
    except HyperpodError:
        return None


async def test_random_rings_and_packets(tmp_path: Path) -> None:
    target = Target(tmp_path)
    await target.device.start()
    for seed in range(ROUNDS):
        rng = random.Random(seed)
        guest = Guest(split=rng.random() < 0.5)
        await guest.boot(target.device.vhost_path)
        made = await client(target, guest)
        if made is not None:
            sock, request = made
            with contextlib.suppress(BlockingIOError, OSError):
                sock.send(rng.randbytes(20_000))
            for _ in range(20):
                if len(guest.tx_free) > 1:
                    packet, payload = random_packet(rng, request)
                    guest.transmit_raw(encode(packet) + payload)
                await asyncio.sleep(0)
            scribble(rng, guest)
            for ring in guest.rings:
                os.eventfd_write(ring.kick, 1)
            await target.idle()
            sock.close()
        guest.close()
        await target.idle()
    assert len({str(failure)[:10] for failure in target.failures}) > 3  # or little was tested
    await target.still_works()
    await target.device.close()
    assert target.errors == []
