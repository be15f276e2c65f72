"""The data path: packets between the guest's two rings and the clients' sockets.

One pass (`_pass`) serves a bounded number of packets each way, publishes, interrupts the guest at most once
per ring, and asks to be called again when work is left. Payload goes straight between guest memory and
sockets.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import select
import socket
from collections import deque
from collections.abc import Callable
from typing import Final

from hyperpod.errors import ProtocolError
from hyperpod.vsock.connection import WATCH_IN, BadHandshake, Connection, Phase
from hyperpod.vsock.journal import SLOTS, Journal
from hyperpod.wire.vsock import packet as wire
from hyperpod.wire.vsock.buffers import scatter, split, split_writable, trim
from hyperpod.wire.vsock.packet import HEADER, HEADER_SIZE, HOST_CID, MAX_PAYLOAD, TYPE_STREAM, Packet
from hyperpod.wire.vsock.stream import Event, Stream
from hyperpod.wire.vsock.virtqueue import Chain, Virtqueue

log = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = SLOTS
# Bytes of the guest's held per stream. The sum over all streams stays below 64 MiB whatever the guest does.
BUFFER: Final = 256 * 1024
SMALL_BUFFER: Final = 32 * 1024
MANY_CONNECTIONS: Final = 128  # beyond this, streams get the small buffer

HANDSHAKE_SECONDS: Final = 5.0
REQUEST_SECONDS: Final = 30.0
LINGER_SECONDS: Final = 10.0  # without progress, after the client closed

# Per pass: at most 4 MiB from the guest and half a MiB to it, a few milliseconds of the loop.
_TX_PACKETS: Final = 64
_RX_PACKETS: Final = 128
_BURST: Final = 16  # receive buffers per read of a client's socket
_EVENTS: Final = 256
# Answers to packets of unknown streams that may wait for receive buffers; then the transmit ring waits too.
_MAX_RESETS: Final = 256
# The same with those that we begin: a guest that takes none for days is not owed all of them.
_MAX_OWED: Final = 4096

RX: Final = 0
TX: Final = 1


class Switch:
    """Connections of one guest. `interrupt(ring)` signals it, `failed(error)` reports a ring violation."""

    def __init__(
        self,
        guest_cid: int,
        journal: Journal,
        interrupt: Callable[[int], None],
        failed: Callable[[ProtocolError], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._cid, self._journal = guest_cid, journal
        self._interrupt, self._failed = interrupt, failed
        self._rx: Virtqueue | None = None
        self._tx: Virtqueue | None = None
        self._streams: dict[int, Connection] = {}  # by host port
        self._clients: dict[int, Connection] = {}  # by descriptor; the streams' and those without one
        self._ready: deque[Connection] = deque()  # may have bytes for the guest
        self._control: deque[tuple[Connection, int, int]] = deque()  # connection, operation, flags
        self._resets: deque[tuple[int, int]] = deque()  # host port, guest port of unknown streams
        # A predecessor's streams may live on in the guest: start somewhere else than it did.
        self._next_port = 1 << 16 | secrets.randbelow(1 << 30)
        self._stale = {port for port, _ in journal.entries()}
        self._resets.extend(journal.entries())
        journal.clear()
        self._again = False
        self._passing = False
        self._epoll = select.epoll()
        self._loop.add_reader(self._epoll.fileno(), self._poll)

    def close(self) -> None:
        """Close every client; the guest is told nothing."""
        self.stop()
        for connection in list(self._clients.values()):
            self._close(connection)
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    # ---- rings ----

    @property
    def running(self) -> bool:
        return self._rx is not None

    def start(self, rx: Virtqueue, tx: Virtqueue) -> None:
        """The guest's driver is up (again)."""
        self._rx, self._tx = rx, tx
        self._loop.call_soon(self.wake)

    def stop(self) -> None:
        """The rings may not be touched from here on. Streams stay: a paused guest comes back."""
        self._rx = self._tx = None

    def drop_all(self) -> None:
        """The guest has forgotten all streams: it was reset, or is gone. What it sent is still handed out."""
        for connection in list(self._clients.values()):
            self._forget(connection)
            self._drain_or_close(connection)
        self._resets.clear()
        self._control.clear()
        self._ready.clear()

    def wake(self) -> None:
        """Run a pass now; called when the guest has kicked."""
        if self._passing:
            self._again = True
            return
        self._passing = True
        try:
            more = self._pass()
        except ProtocolError as exc:
            self._passing = False
            self._failed(exc)
            return
        self._passing = False
        if more or self._again:
            self._again = False
            self._loop.call_soon(self.wake)

    def _pass(self) -> bool:
        rx, tx = self._rx, self._tx
        if rx is None or tx is None:
            return False
        try:
            unsent = self._transmit(tx)
            more = self._receive(rx)
        finally:
            # What was taken is published even when the guest then broke the rules.
            if tx.flush():
                self._interrupt(TX)
            if rx.flush():
                self._interrupt(RX)
        # While answers wait for receive buffers, the guest's next kick goes on from here.
        return more or (unsent and len(self._resets) < _MAX_RESETS)

    # ---- guest to host ----

    def _transmit(self, tx: Virtqueue) -> bool:
        for _ in range(_TX_PACKETS):
            if len(self._resets) >= _MAX_RESETS:
                return True
            chain = tx.pop()
            if chain is None:
                if tx.enable_kicks():
                    continue
                return False
            self._take(chain)
            tx.push(chain.head, 0)
        return True

    def _take(self, chain: Chain) -> None:
        header, payload = split(chain.pieces)
        packet = wire.decode(header)
        if packet.length:
            if packet.length > MAX_PAYLOAD:
                raise ProtocolError(f"packet of {packet.length} bytes")
            payload = trim(payload, packet.length)
        if packet.src_cid != self._cid or packet.dst_cid != HOST_CID:
            return  # nobody we could answer
        connection = self._streams.get(packet.dst_port)
        stream = connection.stream if connection is not None else None
        if (
            connection is None
            or stream is None
            or stream.peer_port != packet.src_port
            or packet.type != TYPE_STREAM
        ):
            # Also every connection attempt of the guest's own: only the host dials.
            if packet.op != wire.OP_RST:
                self._resets.append((packet.dst_port, packet.src_port))
            return
        try:
            event = stream.receive(packet)
        except ProtocolError as exc:
            log.warning("stream to guest port %d reset: %s", stream.peer_port, str(exc))
            self._reset(connection)
            return
        self._handle(connection, stream, packet, event, payload)

    def _handle(
        self, connection: Connection, stream: Stream, packet: Packet, event: Event, payload: list[memoryview]
    ) -> None:
        if event is Event.DATA:
            if packet.length:
                self._consumed(connection, connection.write(payload, packet.length))
        elif event is Event.CREDIT_WANTED:
            self._queue_credit(connection)
        elif event is Event.CONNECTED:
            self._connected(connection, stream)
        elif event is Event.RESET:
            self._forget(connection)
            self._drain_or_close(connection)
            return
        elif event is Event.SHUTDOWN:
            if stream.peer_shutdown == wire.SHUTDOWN_BOTH:
                self._reset(connection)
                return
            if stream.peer_shutdown & wire.SHUTDOWN_SEND:
                connection.end_writing()
            if stream.peer_shutdown & wire.SHUTDOWN_RECEIVE:
                connection.end_reading()
        if connection.readable and stream.open:
            self._queue_ready(connection)

    def _connected(self, connection: Connection, stream: Stream) -> None:
        connection.cancel_deadline()
        connection.phase = Phase.OPEN
        connection.readable = True
        answer = memoryview(b"OK %d\n" % stream.local_port)
        connection.write([answer], len(answer))
        if connection.host_gone:
            self._linger(connection)

    def _consumed(self, connection: Connection, count: int) -> None:
        stream = connection.stream
        if count and stream is not None and stream.consumed(count):
            self._queue_credit(connection)

    # ---- host to guest ----

    def _receive(self, rx: Virtqueue) -> bool:
        budget = _RX_PACKETS
        while budget > 0:
            if self._control or self._resets:
                chain = rx.pop()
                if chain is None:
                    if rx.enable_kicks():
                        continue
                    return False
                scatter(chain.pieces, self._next_control())
                rx.push(chain.head, HEADER_SIZE)
                budget -= 1
            elif self._ready:
                connection = self._ready.popleft()
                connection.in_ready = False
                filled = self._fill(rx, connection)
                if filled < 0:  # out of receive buffers
                    self._queue_ready(connection, first=True)
                    if rx.enable_kicks():
                        continue
                    return False
                budget -= max(1, filled)
            else:
                return False
        return True

    def _next_control(self) -> bytes:
        if not self._control:
            host_port, guest_port = self._resets.popleft()
            self._stale.discard(host_port)
            return HEADER.pack(
                HOST_CID, self._cid, host_port, guest_port, 0, TYPE_STREAM, wire.OP_RST, 0, 0, 0
            )
        connection, op, flags = self._control.popleft()
        stream = connection.stream
        assert stream is not None
        if op == wire.OP_CREDIT_UPDATE:
            connection.credit_queued = False
        stream.told()
        ports = stream.local_port, stream.peer_port
        return HEADER.pack(
            HOST_CID, self._cid, *ports, 0, TYPE_STREAM, op, flags, stream.buf_alloc, stream.fwd_cnt
        )

    def _fill(self, rx: Virtqueue, connection: Connection) -> int:
        """Read from one client into receive buffers. Returns how many were filled, -1 when there is none."""
        stream = connection.stream
        if stream is None or connection.phase is not Phase.OPEN or connection.host_eof:
            return 0
        room = stream.send_room()
        if not room:
            if stream.ask_credit():
                self._control.append((connection, wire.OP_CREDIT_REQUEST, 0))
            return 0
        chains: list[tuple[int, list[memoryview], int]] = []  # head, header pieces, payload room
        views: list[memoryview] = []
        while room and len(chains) < connection.burst:
            chain = rx.pop()
            if chain is None:
                if not chains:
                    return -1
                break
            header, payload = split_writable(chain.pieces)
            size = 0
            for piece in payload:
                take = min(len(piece), room, MAX_PAYLOAD - size)
                if take:
                    views.append(piece[:take])
                    size += take
                    room -= take
            chains.append((chain.head, header, size))
        try:
            count = connection.sock.recvmsg_into(views)[0]
        except BlockingIOError:
            rx.rewind(len(chains))
            connection.readable = False
            return 0
        except OSError:
            count = 0
        if not count:
            rx.rewind(len(chains))
            self._host_eof(connection)
            return 0
        return self._finish_fill(rx, connection, stream, chains, count)

    def _finish_fill(
        self,
        rx: Virtqueue,
        connection: Connection,
        stream: Stream,
        chains: list[tuple[int, list[memoryview], int]],
        count: int,
    ) -> int:
        stream.sent(count)
        stream.told()
        route = HOST_CID, self._cid, stream.local_port, stream.peer_port
        credit = stream.buf_alloc, stream.fwd_cnt
        filled = 0
        for head, header, size in chains:
            if not count:
                break
            take = min(size, count)
            count -= take
            if len(header) == 1:
                HEADER.pack_into(header[0], 0, *route, take, TYPE_STREAM, wire.OP_RW, 0, *credit)
            else:
                scatter(header, HEADER.pack(*route, take, TYPE_STREAM, wire.OP_RW, 0, *credit))
            rx.push(head, HEADER_SIZE + take)
            filled += 1
        unused = len(chains) - filled
        rx.rewind(unused)
        connection.burst = 1 if unused else min(_BURST, 2 * connection.burst)
        self._queue_ready(connection)
        return filled

    def _host_eof(self, connection: Connection) -> None:
        connection.host_eof = True
        self._shutdown(connection, wire.SHUTDOWN_BOTH if connection.host_gone else wire.SHUTDOWN_SEND)

    def _shutdown(self, connection: Connection, flags: int) -> None:
        stream = connection.stream
        if stream is not None and stream.open and flags & ~stream.shutdown:
            stream.shutdown |= flags
            self._control.append((connection, wire.OP_SHUTDOWN, stream.shutdown))

    def _queue_ready(self, connection: Connection, *, first: bool = False) -> None:
        if not connection.in_ready and not connection.host_eof:
            connection.in_ready = True
            (self._ready.appendleft if first else self._ready.append)(connection)

    def _queue_credit(self, connection: Connection) -> None:
        if not connection.credit_queued and connection.slot >= 0:
            connection.credit_queued = True
            self._control.append((connection, wire.OP_CREDIT_UPDATE, 0))

    # ---- clients ----

    def accept(self, sock: socket.socket) -> None:
        """Take over a connected client; closed at once when there is no room or the guest is not up."""
        if len(self._clients) >= MAX_CONNECTIONS or not self.running:
            sock.close()
            return
        sock.setblocking(False)
        connection = Connection(sock, self._epoll.modify)
        self._clients[connection.fd] = connection
        connection.deadline = self._loop.call_later(HANDSHAKE_SECONDS, self._close, connection)
        self._epoll.register(connection.fd, WATCH_IN)

    def _poll(self) -> None:
        for fd, mask in self._epoll.poll(0, _EVENTS):
            connection = self._clients.get(fd)
            if connection is not None:
                self._client_event(connection, mask)
        self.wake()

    def _client_event(self, connection: Connection, mask: int) -> None:
        if mask & (select.EPOLLHUP | select.EPOLLERR):
            connection.host_gone = True
        if connection.phase is Phase.HANDSHAKE:
            self._handshake(connection)
            return
        if mask & select.EPOLLOUT or connection.host_gone:
            if connection.host_gone:
                dropped = len(connection.backlog)
                connection.backlog.clear()
                self._consumed(connection, dropped)
            else:
                self._consumed(connection, connection.flush())
            if connection.phase is Phase.DRAINING and not connection.backlog:
                self._close(connection)
                return
        if not mask & ~select.EPOLLOUT:
            return
        connection.readable = True
        if connection.phase is Phase.OPEN:
            self._queue_ready(connection)
            if connection.host_gone:
                self._linger(connection)
        elif connection.phase is Phase.REQUESTED and connection.host_gone:
            self._reset(connection)

    def _handshake(self, connection: Connection) -> None:
        try:
            port = connection.read_line()
        except BadHandshake as exc:
            log.debug("client closed: %s", exc)
            self._close(connection)
            return
        if port is None:
            return
        if not self.running:
            self._close(connection)
            return
        connection.cancel_deadline()
        size = BUFFER if len(self._streams) < MANY_CONNECTIONS else SMALL_BUFFER
        connection.stream = stream = Stream(self._free_port(), port, size)
        connection.slot = self._journal.add(stream.local_port, port)
        connection.phase = Phase.REQUESTED
        connection.deadline = self._loop.call_later(REQUEST_SECONDS, self._expired, connection)
        self._streams[stream.local_port] = connection
        self._control.append((connection, wire.OP_REQUEST, 0))

    def _free_port(self) -> int:
        while True:
            port = self._next_port
            self._next_port = port + 1 if port < 0x7FFFFFFF else 1 << 16
            if port not in self._streams and port not in self._stale:
                return port

    def _linger(self, connection: Connection) -> None:
        """The client is closed: deliver what it wrote, then wait for the guest to be through."""
        stream = connection.stream
        assert stream is not None
        if connection.host_eof:
            self._shutdown(connection, wire.SHUTDOWN_BOTH)
        if connection.deadline is None:
            connection.progress = stream.unacknowledged
            connection.deadline = self._loop.call_later(LINGER_SECONDS, self._lingered, connection)

    def _lingered(self, connection: Connection) -> None:
        stream = connection.stream
        assert stream is not None
        connection.deadline = None
        if not self.running or stream.unacknowledged != connection.progress:
            self._linger(connection)
        else:
            self._expired(connection)

    def _expired(self, connection: Connection) -> None:
        self._reset(connection)
        self.wake()

    def _reset(self, connection: Connection) -> None:
        """Tell the guest that the stream is over; hand out to the client what was received."""
        stream = connection.stream
        assert stream is not None
        heard_of = (connection, wire.OP_REQUEST, 0) not in self._control
        self._forget(connection)
        if heard_of and len(self._resets) < _MAX_OWED:
            self._resets.append((stream.local_port, stream.peer_port))
        self._drain_or_close(connection)

    def _forget(self, connection: Connection) -> None:
        """Remove the stream; its queued packets must not follow a reset."""
        stream = connection.stream
        if stream is None or connection.slot < 0:
            return
        stream.open = False
        self._streams.pop(stream.local_port, None)
        self._journal.remove(connection.slot)
        connection.slot = -1
        if any(entry[0] is connection for entry in self._control):
            self._control = deque(entry for entry in self._control if entry[0] is not connection)

    def _drain_or_close(self, connection: Connection) -> None:
        connection.cancel_deadline()
        if connection.backlog and not connection.host_gone:
            connection.phase = Phase.DRAINING
        else:
            self._close(connection)

    def _close(self, connection: Connection) -> None:
        if connection.phase is Phase.CLOSED:
            return
        self._forget(connection)
        connection.cancel_deadline()
        connection.phase = Phase.CLOSED
        connection.backlog.clear()
        del self._clients[connection.fd]
        self._epoll.unregister(connection.fd)
        connection.sock.close()
