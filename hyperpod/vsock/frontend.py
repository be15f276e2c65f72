"""QEMU's side of the device: the vhost-user session, guest memory, ring set-up, kicks and interrupts.

What QEMU says is checked as well: a guest may have taken it over. A violation ends the session; a violation
in the rings (the guest's doing) only stops the rings until the driver is started again.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import logging
import mmap
import os
import socket
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

from hyperpod.errors import ProtocolError
from hyperpod.wire.vsock import vhost_user as wire
from hyperpod.wire.vsock.memory import GuestMemory, Region
from hyperpod.wire.vsock.vhost_user import MemoryRegion, Message, MessageReader, Request
from hyperpod.wire.vsock.virtqueue import RingLayout, Virtqueue

log = logging.getLogger(__name__)

RINGS: Final = 2  # receive, transmit; QEMU keeps the event queue to itself
_CONFIG_SIZE: Final = 8
_MESSAGES_PER_WAKE: Final = 32


class Rings(Protocol):
    """What the session tells its owner."""

    def rings_started(self, rx: Virtqueue, tx: Virtqueue, *, continued: bool) -> None:
        """`continued`: the same rings at the same place as at the last stop; streams are still known."""

    def rings_stopped(self) -> None: ...

    def kicked(self) -> None: ...

    def session_changed(self) -> None:
        """Something that `export` reports has changed."""

    def session_ended(self, error: ProtocolError | None) -> None:
        """QEMU has closed the socket, or broken the protocol; the session is closed already."""


_NO_LAYOUT: Final = RingLayout(0, 0, 0, 0)


@dataclass(frozen=True)
class Vring:
    """One ring as QEMU described it so far; descriptors -1 where none was given."""

    layout: RingLayout = _NO_LAYOUT
    base: int = 0
    kick: int = -1
    call: int = -1
    enabled: bool = False
    started: bool = False  # between SET_VRING_KICK and GET_VRING_BASE


class Session:
    """One vhost-user connection. Owns its socket and every descriptor that came over it."""

    def __init__(self, sock: socket.socket, guest_cid: int, owner: Rings) -> None:
        sock.setblocking(False)
        self._sock, self._cid, self._owner = sock, guest_cid, owner
        self._loop = asyncio.get_running_loop()
        self._reader = MessageReader()
        self._fds: list[int] = []  # came with the message being read
        self._features = self._protocol_features = 0
        self._regions: list[tuple[MemoryRegion, int]] = []
        self._memory = GuestMemory()
        self._vrings = [Vring() for _ in range(RINGS)]
        self._queues: tuple[Virtqueue, Virtqueue] | None = None
        self._stopped_at: list[tuple[RingLayout, int]] | None = None
        self._broken = False
        self._closed = False
        self._loop.add_reader(sock.fileno(), self._readable)

    def close(self) -> None:
        """Close everything; the owner is not told."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        self._queues = None
        self._memory = GuestMemory()
        for index, vring in enumerate(self._vrings):
            self._replace_fds(index, kick=-1, call=-1)
            self._vrings[index] = replace(vring, started=False, kick=-1, call=-1)
        _close_all([fd for _, fd in self._regions] + self._fds)
        self._regions, self._fds = [], []

    def interrupt(self, ring: int) -> None:
        """Signal the guest that a ring has used entries."""
        call = self._vrings[ring].call
        if call >= 0:
            with contextlib.suppress(BlockingIOError):  # its counter is at the limit: signalled often enough
                os.eventfd_write(call, 1)

    def break_rings(self) -> None:
        """The guest broke the rules of its rings: touch them no more until its driver starts again."""
        self._broken = True
        self._stop_queues()
        self._vrings = [replace(vring, started=False) for vring in self._vrings]
        self._owner.session_changed()

    # ---- hand-over ----

    def export(self) -> tuple[dict[str, Any], list[int]]:
        """(JSON-able state, descriptors that it refers to by index); the descriptors stay ours."""
        fds = [self._sock.fileno()]

        def index(fd: int) -> int:
            if fd < 0:
                return -1
            fds.append(fd)
            return len(fds) - 1

        state = {
            "features": self._features,
            "protocol_features": self._protocol_features,
            "memory": [[*region, index(fd)] for region, fd in self._regions],
            "rings": [
                {
                    "layout": list(vring.layout),
                    "base": vring.base,
                    "kick": index(vring.kick),
                    "call": index(vring.call),
                    "enabled": vring.enabled,
                    "started": vring.started,
                }
                for vring in self._vrings
            ],
        }
        return state, fds

    def restore(self, state: dict[str, Any], fds: list[int]) -> None:
        """Take over what `export` gave (fds[0], the socket, excepted: the constructor got it).

        Running rings continue at their used index. Raises ProtocolError when the state makes no sense.
        """
        try:
            self._features = int(state["features"])
            self._protocol_features = int(state["protocol_features"])
            table = [(MemoryRegion(*map(int, row[:4])), fds[row[4]]) for row in state["memory"]]
            vrings = [
                Vring(
                    layout=RingLayout(*map(int, ring["layout"])),
                    base=int(ring["base"]),
                    kick=fds[ring["kick"]] if ring["kick"] >= 0 else -1,
                    call=fds[ring["call"]] if ring["call"] >= 0 else -1,
                    enabled=bool(ring["enabled"]),
                    started=bool(ring["started"]),
                )
                for ring in state["rings"]
            ]
        except (KeyError, IndexError, TypeError, ValueError) as exc:
            raise ProtocolError(f"unusable vsock state: {exc!r}") from exc
        if len(vrings) != RINGS:
            raise ProtocolError(f"vsock state of {len(vrings)} rings")
        if table:
            self._map([region for region, _ in table], [fd for _, fd in table])
        self._vrings = vrings
        for vring in vrings:
            if vring.kick >= 0:
                self._watch(vring.kick)
        self._stopped_at = [(vring.layout, vring.base) for vring in vrings]  # in case they do not run
        self._start_queues(resumed=True)
        for ring in range(RINGS):
            self.interrupt(ring)  # the predecessor may have died between publishing and signalling

    # ---- messages ----

    def _readable(self) -> None:
        error: ProtocolError | None = None
        try:
            for _ in range(_MESSAGES_PER_WAKE):
                if not self._read():
                    return
            return
        except EOFError:
            log.info("QEMU closed the vhost-user socket")
        except ProtocolError as exc:
            error = ProtocolError(str(exc))  # a copy: the traceback would keep guest memory mapped
        self._stop_queues()
        self.close()
        self._owner.session_ended(error)

    def _read(self) -> bool:
        """Read once; False when nothing is there. Raises EOFError, ProtocolError."""
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(
                self._reader.wanted, socket.CMSG_SPACE(4 * wire.MAX_FDS), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return False
        except OSError as exc:
            raise EOFError from exc
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(payload[: len(payload) - len(payload) % received.itemsize])
                self._fds += received
        if not data:
            raise EOFError
        if flags & socket.MSG_CTRUNC or len(self._fds) > wire.MAX_FDS:
            raise ProtocolError("too many descriptors in a vhost-user message")
        message = self._reader.feed(data)
        if message is not None:
            fds, self._fds = self._fds, []
            try:
                reply = self._serve(message, fds)
            finally:
                _close_all(fds)  # those that were kept have been taken out
            self._answer(message, reply)
        return not self._closed

    def _answer(self, message: Message, reply: bytes | None) -> None:
        if reply is None:
            if not message.need_reply or not self._protocol_features & wire.PROTOCOL_F_REPLY_ACK:
                return
            reply = bytes(8)
        data = wire.encode_reply(message.request, reply)
        try:
            sent = self._sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as exc:
            raise EOFError from exc
        if sent != len(data):
            raise ProtocolError("QEMU does not read its replies")

    def _serve(self, message: Message, fds: list[int]) -> bytes | None:
        """Handle one message; returns its reply, if it has one. Descriptors kept are removed from `fds`."""
        request, payload = message.request, message.payload
        if request is Request.GET_FEATURES:
            return struct.pack("<Q", wire.FEATURES)
        if request is Request.GET_PROTOCOL_FEATURES:
            return struct.pack("<Q", wire.PROTOCOL_FEATURES)
        if request is Request.GET_QUEUE_NUM:
            return struct.pack("<Q", RINGS)
        if request is Request.GET_CONFIG:
            return self._config(payload)
        if request is Request.GET_VRING_BASE:
            return self._stop_ring(payload)
        if request is Request.SET_FEATURES:
            self._features = _subset(wire.u64(payload), wire.FEATURES)
        elif request is Request.SET_PROTOCOL_FEATURES:
            self._protocol_features = _subset(wire.u64(payload), wire.PROTOCOL_FEATURES)
        elif request is Request.SET_MEM_TABLE:
            self._set_memory(payload, fds)
        elif request is Request.SET_VRING_NUM:
            index, size = self._ring_state(payload)
            self._change(index, layout=self._idle(index).layout._replace(size=size))
        elif request is Request.SET_VRING_ADDR:
            address = wire.vring_address(payload)
            old = self._ring(address.ring).layout
            layout = RingLayout(old.size, address.descriptors, address.available, address.used)
            if layout != old:
                self._idle(address.ring)
                self._change(address.ring, layout=layout)
        elif request is Request.SET_VRING_BASE:
            index, base = self._ring_state(payload)
            self._idle(index)
            self._change(index, base=base & 0xFFFF)
        elif request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
            self._set_eventfd(request, payload, fds)
        elif request is Request.SET_VRING_ENABLE:
            index, enabled = self._ring_state(payload)
            if not enabled:
                self._stop_queues()
            self._change(index, enabled=bool(enabled))
            self._start_queues()
        elif request is Request.RESET_OWNER:
            self._stop_queues()
        elif request is Request.SET_CONFIG:
            raise ProtocolError("the guest CID cannot be changed by the guest")
        return None

    def _config(self, payload: bytes) -> bytes:
        offset, size = wire.config_window(payload)
        config = struct.pack("<Q", self._cid)
        if offset + size > _CONFIG_SIZE:
            raise ProtocolError("GET_CONFIG beyond the guest CID")
        return payload[:12] + config[offset : offset + size]

    # ---- memory ----

    def _set_memory(self, payload: bytes, fds: list[int]) -> None:
        regions = wire.memory_table(payload)
        if len(regions) != len(fds):
            raise ProtocolError(f"{len(regions)} memory regions with {len(fds)} descriptors")
        old = [fd for _, fd in self._regions]
        self._map(regions, fds)
        fds.clear()
        _close_all(old)
        if self._queues is not None:
            self._remap_queues()
        self._owner.session_changed()

    def _map(self, regions: list[MemoryRegion], fds: list[int]) -> None:
        """Map the table; the old mappings go when the last view of them does."""
        views = []
        for region, fd in zip(regions, fds, strict=True):
            wire.check_region(region)
            views.append(Region(region.guest_address, region.user_address, _map_region(region, fd)))
        self._memory = GuestMemory(views)
        self._regions = list(zip(regions, fds, strict=True))

    # ---- rings ----

    def _ring(self, index: int) -> Vring:
        if not 0 <= index < RINGS:
            raise ProtocolError(f"ring {index} of {RINGS}")
        return self._vrings[index]

    def _idle(self, index: int) -> Vring:
        if self._ring(index).started:
            raise ProtocolError(f"ring {index} changed while it runs")
        return self._vrings[index]

    def _ring_state(self, payload: bytes) -> tuple[int, int]:
        index, number = wire.vring_state(payload)
        self._ring(index)
        return index, number

    def _change(self, index: int, **changes: Any) -> None:
        self._vrings[index] = replace(self._vrings[index], **changes)
        self._owner.session_changed()

    def _set_eventfd(self, request: Request, payload: bytes, fds: list[int]) -> None:
        value = wire.u64(payload)
        index, none = value & 0xFF, bool(value & wire.NO_FD)
        self._ring(index)
        if len(fds) != (0 if none else 1):
            raise ProtocolError(f"{request.name} with {len(fds)} descriptors")
        if request is Request.SET_VRING_ERR:
            return
        fd = -1
        if not none:
            fd = fds[0]
            _check_eventfd(fd)
            fds.clear()
        if request is Request.SET_VRING_CALL:
            self._replace_fds(index, call=fd)
            return
        if none:
            raise ProtocolError("rings without kicks are not served")
        self._replace_fds(index, kick=fd)
        self._change(index, started=True)
        self._start_queues()

    def _replace_fds(self, index: int, *, kick: int | None = None, call: int | None = None) -> None:
        vring = self._vrings[index]
        if kick is not None:
            if vring.kick >= 0:
                self._loop.remove_reader(vring.kick)
                os.close(vring.kick)
            self._vrings[index] = vring = replace(vring, kick=kick)
            if kick >= 0:
                self._watch(kick)
        if call is not None:
            if vring.call >= 0:
                os.close(vring.call)
            self._vrings[index] = replace(vring, call=call)
        if not self._closed:
            self._owner.session_changed()

    def _watch(self, kick: int) -> None:
        self._loop.add_reader(kick, self._kick, kick)

    def _kick(self, fd: int) -> None:
        try:
            os.eventfd_read(fd)
        except BlockingIOError:
            return
        if self._queues is not None:
            self._owner.kicked()

    def _runnable(self) -> bool:
        need_enable = bool(self._features & wire.F_PROTOCOL_FEATURES)
        return all(v.started and (v.enabled or not need_enable) for v in self._vrings)

    def _start_queues(self, *, resumed: bool = False) -> None:
        if self._queues is not None or not self._runnable():
            return
        place = [(vring.layout, vring.base) for vring in self._vrings]
        try:
            self._queues = self._make_queues(resumed)
        except ProtocolError as exc:
            # The guest chose the addresses: not QEMU's fault, and no reason to lose QEMU.
            log.warning("rings not started: %s", str(exc))
            self.break_rings()
            return
        continued = resumed or (place == self._stopped_at and not self._broken)
        self._broken = False
        self._owner.rings_started(*self._queues, continued=continued)

    def _make_queues(self, resumed: bool) -> tuple[Virtqueue, Virtqueue]:
        event_index = bool(self._features & wire.F_EVENT_INDEX)
        indirect = bool(self._features & wire.F_INDIRECT)
        rx, tx = (
            Virtqueue(
                self._memory,
                vring.layout,
                writable=writable,
                event_index=event_index,
                indirect=indirect,
                base=None if resumed else vring.base,
            )
            for vring, writable in zip(self._vrings, (True, False), strict=True)
        )
        return rx, tx

    def _remap_queues(self) -> None:
        assert self._queues is not None
        self._vrings = [
            replace(vring, base=queue.next_index)
            for vring, queue in zip(self._vrings, self._queues, strict=True)
        ]
        self._queues = None
        self._owner.rings_stopped()
        self._stopped_at = [(vring.layout, vring.base) for vring in self._vrings]
        self._start_queues()

    def _stop_ring(self, payload: bytes) -> bytes:
        index, _ = self._ring_state(payload)
        self._stop_queues()
        self._replace_fds(index, kick=-1)
        self._change(index, started=False)
        return struct.pack("<II", index, self._vrings[index].base)

    def _stop_queues(self) -> None:
        """Note where both rings stand: a restart at the same place means that the guest was only paused."""
        if self._queues is None:
            return
        bases = [queue.next_index for queue in self._queues]
        self._vrings = [replace(v, base=base) for v, base in zip(self._vrings, bases, strict=True)]
        self._stopped_at = [(vring.layout, vring.base) for vring in self._vrings]
        self._queues = None
        self._owner.rings_stopped()


def _map_region(region: MemoryRegion, fd: int) -> memoryview:
    """Map one region. Raises ProtocolError when it is not a file that can neither shrink nor be too short."""
    try:
        # A file that can be cut would let QEMU kill this process with SIGBUS.
        if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise ProtocolError("guest memory without F_SEAL_SHRINK")
        slack = region.offset % mmap.ALLOCATIONGRANULARITY
        area = mmap.mmap(fd, region.size + slack, offset=region.offset - slack)
        area.madvise(mmap.MADV_DONTDUMP)
    except (OSError, ValueError) as exc:
        raise ProtocolError(f"guest memory cannot be mapped: {exc}") from exc
    return memoryview(area)[slack:]


def _check_eventfd(fd: int) -> None:
    """Raises ProtocolError when a read of `fd` could block or give something else than a counter."""
    try:
        target = str(Path(f"/proc/self/fd/{fd}").readlink())
    except OSError as exc:
        raise ProtocolError(f"a descriptor of unknown kind: {exc}") from exc
    if target != "anon_inode:[eventfd]":
        raise ProtocolError("a kick or call descriptor that is no eventfd")
    os.set_blocking(fd, False)


def _subset(value: int, offered: int) -> int:
    if value & ~offered:
        raise ProtocolError(f"features {value:#x} beyond the offered {offered:#x}")
    return value


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
    fds.clear()
