"""kill -9 of the device's process, and a successor that QEMU and the guest's driver do not notice."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from hyperpod.errors import ProtocolError
from hyperpod.vsock.device import VsockDevice
from hyperpod.vsock.dial import HybridEndpoint, dial
from hyperpod.wire.vsock.packet import OP_REQUEST, OP_RESPONSE, OP_RST, OP_RW, OP_SHUTDOWN, Packet
from tests.component.vsock_guest import Guest

DEADLINE = 60.0


class Keeper:
    """What the supervisor does: start the process, keep its last state and descriptors, start it again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.process: asyncio.subprocess.Process | None = None
        self.sock: socket.socket | None = None
        self.state: bytes = b""
        self.fds: list[int] = []
        self.changed = asyncio.Condition()
        self.reader: asyncio.Task[None] | None = None

    async def spawn(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        resume = ["resume"] if self.state else []
        if resume:
            socket.send_fds(ours, [self.state], self.fds)
        ours.setblocking(False)
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "tests.component.vsock_device_process", str(self.directory), str(theirs.fileno())),
            *resume,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self.sock = ours
        self.reader = asyncio.create_task(self._read(ours))
        before = self.state
        await self.until(lambda state: self.state is not before)

    async def _read(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            readable = asyncio.Event()
            loop.add_reader(sock, readable.set)
            await readable.wait()
            loop.remove_reader(sock)
            data, fds, _, _ = socket.recv_fds(sock, 65536, 32)
            if not data:
                return
            async with self.changed:
                for fd in self.fds:
                    os.close(fd)
                self.state, self.fds = data, fds
                self.changed.notify_all()

    async def until(self, wanted: Any) -> None:
        async with asyncio.timeout(DEADLINE), self.changed:
            await self.changed.wait_for(lambda: self.state and wanted(json.loads(self.state)))

    async def kill(self) -> None:
        assert self.process is not None
        assert self.reader is not None
        assert self.sock is not None
        self.process.send_signal(signal.SIGKILL)
        await self.process.wait()
        await asyncio.wait_for(self.reader, DEADLINE)  # everything that it managed to send has been read
        self.sock.close()
        self.process = None

    async def close(self) -> None:
        if self.process is not None:
            await self.kill()
        for fd in self.fds:
            os.close(fd)


@pytest.fixture
async def keeper(tmp_path: Path) -> AsyncIterator[Keeper]:
    made = Keeper(tmp_path)
    yield made
    await made.close()


def running(state: dict[str, Any]) -> bool:
    rings = state.get("session", {}).get("rings", [])
    return len(rings) == 2 and all(
        ring["started"] and ring["enabled"] and ring["call"] >= 0 for ring in rings
    )


async def stream(guest: Guest, directory: Path) -> tuple[socket.socket, Packet]:
    task = asyncio.create_task(dial(HybridEndpoint(str(directory / "vsock.sock")), 1024, DEADLINE))
    request = await guest.expect(OP_REQUEST)
    guest.transmit(OP_RESPONSE, request)
    return await task, request


async def test_a_successor_continues_and_resets_old_streams(keeper: Keeper, tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    guest = Guest()
    await keeper.spawn()
    await guest.boot(str(tmp_path / "vhost.sock"))
    await keeper.until(running)
    for _ in range(3):
        old = [await stream(guest, tmp_path) for _ in range(5)]
        await guest.sent()
        await keeper.kill()
        for sock, request in old:
            assert await loop.sock_recv(sock, 1) == b""
            sock.close()
            guest.transmit(OP_RW, request, b"to nobody")  # kicks that only the successor sees
        await keeper.spawn()
        ports = {request.src_port for _, request in old}
        resets = [(await guest.expect(OP_RST)).src_port for _ in range(2 * len(old))]
        assert set(resets) == ports  # once out of the journal, once in answer to the data
        sock, request = await stream(guest, tmp_path)
        assert request.src_port not in ports
        guest.transmit(OP_RW, request, b"after")
        assert await loop.sock_recv(sock, 10) == b"after"
        sock.close()
        await guest.expect(OP_SHUTDOWN)
        guest.transmit(OP_RST, request)
    guest.close()


async def test_a_successor_of_a_stopped_device(keeper: Keeper, tmp_path: Path) -> None:
    guest = Guest()
    await keeper.spawn()
    await guest.boot(str(tmp_path / "vhost.sock"))
    await keeper.until(running)
    sock, old = await stream(guest, tmp_path)
    bases = await guest.stop()
    await keeper.until(lambda state: not any(ring["started"] for ring in state["session"]["rings"]))
    await keeper.kill()
    await keeper.spawn()
    await guest.start(bases)
    assert (await guest.expect(OP_RST)).src_port == old.src_port
    sock.close()
    guest.close()


async def test_a_successor_before_qemu_came(keeper: Keeper, tmp_path: Path) -> None:
    guest = Guest()
    await keeper.spawn()
    await keeper.kill()
    await keeper.spawn()
    await guest.boot(str(tmp_path / "vhost.sock"))
    sock, _ = await stream(guest, tmp_path)
    sock.close()
    guest.close()


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"version": 99, "cid": 3, "socket": -1, "journal": -1},
        {"version": 1, "cid": 3, "socket": 5, "journal": -1},
        {"version": 1, "cid": "x", "socket": -1, "journal": -1},
    ],
)
async def test_an_unusable_state_is_refused(state: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ProtocolError):
        VsockDevice.resume(state, [], str(tmp_path / "a"), str(tmp_path / "b"))


@pytest.mark.parametrize(
    "session", [{}, {"features": 0, "protocol_features": 0, "memory": [[1]], "rings": []}]
)
async def test_an_unusable_session_is_refused_and_closed(session: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    extra = os.open("/dev/null", os.O_RDONLY)
    state = {"version": 1, "cid": 3, "socket": 0, "journal": -1, "session": session}
    device = VsockDevice.resume(state, [theirs.detach(), extra], str(tmp_path / "a"), str(tmp_path / "b"))
    with pytest.raises(ProtocolError):
        await device.start()
    assert ours.recv(1) == b""
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(extra)
    ours.close()
