"""QEMU and a guest's driver in one object, for tests of the vhost-user-vsock device.

It speaks the real protocol over a real socket, memfd and eventfds, notifies by the driver's rules (so that a
lost kick or interrupt hangs the test), and lets a test write whatever a hostile guest might.
"""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import socket
import struct
from typing import Any

from hyperpod.wire.vsock import packet as wire
from hyperpod.wire.vsock import vhost_user
from hyperpod.wire.vsock.packet import Packet
from hyperpod.wire.vsock.vhost_user import Request

GUEST_CID = 3
MEMORY = 4 << 20
GUEST_BASE = 0x100000
USER_BASE = 0x7F00_0000_0000
SIZE = 128  # ring entries, as QEMU's
RX_BUFFER = 3776  # what Linux 6.1 and later post: one descriptor
DEADLINE = 60.0
EVENT_INDEX, INDIRECT = vhost_user.F_EVENT_INDEX, vhost_user.F_INDIRECT


class Ring:
    """The driver's half of a virtqueue at `offset` in guest memory: descriptors, available, used."""

    def __init__(self, memory: memoryview, offset: int, event_index: bool) -> None:
        self.offset, self.event_index = offset, event_index
        self.descriptors = memory[offset : offset + 16 * SIZE]
        self.available = memory[offset + 0x1000 : offset + 0x1000 + 6 + 2 * SIZE].cast("H")
        used = memory[offset + 0x2000 : offset + 0x2000 + 6 + 8 * SIZE]
        self.used, self.used_ring = used.cast("H"), used[: 4 + 8 * SIZE].cast("I")
        self.kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.seen = 0

    def addresses(self) -> tuple[int, int, int]:
        """Descriptors, used, available, as QEMU maps them."""
        base = USER_BASE + self.offset
        return base, base + 0x2000, base + 0x1000

    def descriptor(self, index: int, address: int, length: int, flags: int = 0, following: int = 0) -> None:
        struct.pack_into("<QIHH", self.descriptors, 16 * index, address, length, flags, following)

    def offer(self, *heads: int) -> None:
        """Make chains available; kick when the device asked for it."""
        old = self.available[1]
        for i, head in enumerate(heads):
            self.available[2 + (old + i) % SIZE] = head
        new = self.available[1] = (old + len(heads)) & 0xFFFF
        if self.event_index:
            wanted = (new - self.used[2 + 4 * SIZE] - 1) & 0xFFFF < (new - old) & 0xFFFF
        else:
            wanted = not self.used[0] & 1
        if wanted:
            os.eventfd_write(self.kick, 1)

    def take(self) -> tuple[int, int] | None:
        """The next used (head, length); None when there is none and an interrupt was asked for."""
        if self.seen == self.used[1]:
            self.available[2 + SIZE] = self.seen  # used_event
            if self.seen == self.used[1]:
                return None
        slot = 1 + 2 * (self.seen % SIZE)
        self.seen = (self.seen + 1) & 0xFFFF
        return self.used_ring[slot], self.used_ring[slot + 1]

    async def interrupt(self) -> None:
        loop = asyncio.get_running_loop()
        arrived: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self.call, lambda: None if arrived.done() else arrived.set_result(None))
        try:
            await asyncio.wait_for(arrived, DEADLINE)
            os.eventfd_read(self.call)
        finally:
            loop.remove_reader(self.call)


class Guest:
    """One VM. `split`: two descriptors per receive buffer, as older drivers post them."""

    def __init__(
        self, *, features: int = EVENT_INDEX | INDIRECT, split: bool = False, seal: bool = True
    ) -> None:
        self.features = features | vhost_user.F_VERSION_1 | vhost_user.F_PROTOCOL_FEATURES
        self.split = split
        self.memfd = os.memfd_create("guest", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        os.ftruncate(self.memfd, MEMORY)
        if seal:
            fcntl.fcntl(self.memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self.map = mmap.mmap(self.memfd, MEMORY)
        self.memory = memoryview(self.map)
        self.rings: list[Ring] = []
        self.sock: socket.socket | None = None
        self.tx_free: list[int] = []
        self.buf_alloc, self.fwd_cnt = 256 * 1024, 0
        self._new_rings()

    def _new_rings(self) -> None:
        for ring in self.rings:
            os.close(ring.kick)
            os.close(ring.call)
        self.memory[:0x10000] = bytes(0x10000)
        event_index = bool(self.features & EVENT_INDEX)
        self.rings = [Ring(self.memory, offset, event_index) for offset in (0x0, 0x8000)]
        self.tx_free = list(range(SIZE))

    @property
    def rx(self) -> Ring:
        return self.rings[0]

    @property
    def tx(self) -> Ring:
        return self.rings[1]

    def close(self) -> None:
        self.disconnect()
        for ring in self.rings:
            os.close(ring.kick)
            os.close(ring.call)
        os.close(self.memfd)
        self.rings = []
        del self.memory, self.map

    def disconnect(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None

    # ---- vhost-user ----

    async def connect(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(self.sock, path)

    async def send(self, request: int, payload: bytes, fds: list[int] | None = None, flags: int = 0) -> None:
        assert self.sock is not None
        socket.send_fds(self.sock, [vhost_user.encode(request, payload, flags=flags)], fds or [])

    async def ask(
        self, request: int, payload: bytes = b"", fds: list[int] | None = None, flags: int = 0
    ) -> bytes:
        """Send, and return the payload of the reply; b"" when the device hung up."""
        await self.send(request, payload, fds, flags)
        header = await self._exactly(12)
        if not header:
            return b""
        number, reply_flags, size = struct.unpack("<III", header)
        assert (number, reply_flags) == (request, 5)
        return await self._exactly(size)

    async def _exactly(self, size: int) -> bytes:
        assert self.sock is not None
        loop, data = asyncio.get_running_loop(), b""
        while len(data) < size:
            part = await asyncio.wait_for(loop.sock_recv(self.sock, size - len(data)), DEADLINE)
            if not part:
                return b""
            data += part
        return data

    async def realize(self) -> None:
        """What QEMU says when the device is created."""
        u64 = struct.Struct("<Q").pack
        offered = struct.unpack("<Q", await self.ask(Request.GET_FEATURES))[0]
        assert self.features & ~offered == 0
        protocol = struct.unpack("<Q", await self.ask(Request.GET_PROTOCOL_FEATURES))[0]
        await self.send(Request.SET_PROTOCOL_FEATURES, u64(protocol))
        assert await self.ask(Request.GET_QUEUE_NUM) == u64(2)
        await self.send(Request.SET_OWNER, b"")
        config = await self.ask(Request.GET_CONFIG, struct.pack("<III", 0, 8, 0) + bytes(8))
        assert struct.unpack("<Q", config[12:])[0] == GUEST_CID

    async def set_memory(self) -> None:
        table = struct.pack("<II", 1, 0) + struct.pack("<QQQQ", GUEST_BASE, MEMORY, USER_BASE, 0)
        answer = await self.ask(Request.SET_MEM_TABLE, table, [self.memfd], flags=8)
        assert answer == bytes(8)

    async def start(self, bases: tuple[int, int] = (0, 0)) -> None:
        """What QEMU says when the driver is ready."""
        await self.send(Request.SET_FEATURES, struct.pack("<Q", self.features))
        await self.set_memory()
        for index, ring in enumerate(self.rings):
            descriptors, used, available = ring.addresses()
            await self.send(Request.SET_VRING_NUM, struct.pack("<II", index, SIZE))
            await self.send(Request.SET_VRING_BASE, struct.pack("<II", index, bases[index]))
            address = struct.pack("<IIQQQQ", index, 0, descriptors, used, available, 0)
            await self.send(Request.SET_VRING_ADDR, address)
            await self.send(Request.SET_VRING_KICK, struct.pack("<Q", index), [ring.kick])
            await self.send(Request.SET_VRING_CALL, struct.pack("<Q", index), [ring.call])
        for index in (0, 1):
            await self.ask(Request.SET_VRING_ENABLE, struct.pack("<II", index, 1), flags=8)

    async def stop(self) -> tuple[int, int]:
        """Pause or reset: the next available entry of each ring, as the device answers."""
        bases = [await self.ask(Request.GET_VRING_BASE, struct.pack("<II", i, 0)) for i in (0, 1)]
        first, second = (struct.unpack("<II", base)[1] for base in bases)
        return first, second

    async def boot(self, path: str) -> None:
        """Connect, set up, post all receive buffers."""
        await self.connect(path)
        await self.realize()
        await self.start()
        self.post_all()

    async def reset(self) -> None:
        """The guest reboots: rings begin again, all streams are forgotten."""
        await self.stop()
        self._new_rings()
        await self.start()
        self.post_all()

    # ---- the driver ----

    def post_all(self) -> None:
        step = 2 if self.split else 1
        for head in range(0, SIZE, step):
            self._write_rx_descriptors(head)
        self.rx.offer(*range(0, SIZE, step))

    def _write_rx_descriptors(self, head: int) -> None:
        address = GUEST_BASE + self._rx_offset(head)
        if self.split:
            self.rx.descriptor(head, address, 44, 3, head + 1)
            self.rx.descriptor(head + 1, address + 44, 4096, 2)
        else:
            self.rx.descriptor(head, address, RX_BUFFER, 2)

    @staticmethod
    def _rx_offset(head: int) -> int:
        return 0x10000 + head * 0x1200

    async def receive(self, *, repost: bool = True) -> tuple[Packet, bytes]:
        """The next packet from the device; its buffer goes back at once unless told otherwise."""
        while (used := self.rx.take()) is None:
            await self.rx.interrupt()
        head, length = used
        offset = self._rx_offset(head)
        header = wire.decode(self.memory[offset : offset + 44])
        payload = bytes(self.memory[offset + 44 : offset + length])
        assert header.length == len(payload)
        if repost:
            self.rx.offer(head)
        return header, payload

    async def expect(self, op: int) -> Packet:
        packet, _ = await self.receive()
        assert packet.op == op, packet
        return packet

    def transmit(self, op: int, to: Packet, payload: bytes = b"", **changes: Any) -> None:
        """Answer the stream that `to` came on; any field of the header can be changed."""
        packet = Packet(
            src_cid=GUEST_CID,
            dst_cid=wire.HOST_CID,
            src_port=to.dst_port,
            dst_port=to.src_port,
            length=len(payload),
            type=wire.TYPE_STREAM,
            op=op,
            flags=0,
            buf_alloc=self.buf_alloc,
            fwd_cnt=self.fwd_cnt,
        )
        self.transmit_raw(wire.encode(packet._replace(**changes)) + payload)

    def transmit_raw(self, data: bytes) -> None:
        """Put bytes into a transmit buffer and offer it."""
        while (used := self.tx.take()) is not None:
            self.tx_free.append(used[0])
        head = self.tx_free.pop(0)
        offset = 0x200000 + head * 0x2000
        self.memory[offset : offset + len(data)] = data
        self.tx.descriptor(head, GUEST_BASE + offset, len(data))
        self.tx.offer(head)

    async def sent(self) -> None:
        """Wait until the device has taken everything."""
        while self.tx.used[1] != self.tx.available[1]:
            while self.tx.take() is not None:
                pass
            if self.tx.used[1] != self.tx.available[1]:
                await self.tx.interrupt()
        self.tx_free = list(range(SIZE))
        self.tx.seen = self.tx.used[1]
