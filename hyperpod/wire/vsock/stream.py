"""The protocol state of one host-initiated stream: who may send how much, and who has finished.

Counters are free-running 32-bit numbers (virtio 1.2, section 5.10.6.3). Nothing that the guest says can make
us hold more than `buf_alloc` bytes of a stream; what it says about its own buffer can only stall itself.
"""

from __future__ import annotations

import enum

from hyperpod.errors import ProtocolError
from hyperpod.wire.vsock.packet import (
    OP_CREDIT_REQUEST,
    OP_CREDIT_UPDATE,
    OP_RESPONSE,
    OP_RST,
    OP_RW,
    OP_SHUTDOWN,
    SHUTDOWN_BOTH,
    SHUTDOWN_SEND,
    Packet,
)

_MASK = 0xFFFFFFFF


class Event(enum.Enum):
    """What a received packet means for the owner of the stream."""

    CONNECTED = enum.auto()
    DATA = enum.auto()  # `packet.length` bytes are to be kept until `consumed`
    SHUTDOWN = enum.auto()  # see `peer_shutdown`
    RESET = enum.auto()  # the guest has forgotten the stream
    CREDIT = enum.auto()  # `send_room` may have grown
    CREDIT_WANTED = enum.auto()  # answer with a CREDIT_UPDATE


class Stream:
    """One stream as the host sees it. Local is the host's side, peer the guest's."""

    __slots__ = (
        "_acked",
        "_credit_asked",
        "_received",
        "_sent",
        "_told",
        "buf_alloc",
        "fwd_cnt",
        "local_port",
        "open",
        "peer_alloc",
        "peer_port",
        "peer_shutdown",
        "shutdown",
    )

    def __init__(self, local_port: int, peer_port: int, buf_alloc: int) -> None:
        """`buf_alloc`: bytes of the guest's that we are ready to hold for this stream."""
        self.local_port, self.peer_port, self.buf_alloc = local_port, peer_port, buf_alloc
        self.open = False
        self.shutdown = self.peer_shutdown = 0  # SHUTDOWN_* bits sent, received
        self.fwd_cnt = 0  # bytes of the guest's handed on
        self.peer_alloc = 0
        self._received = self._told = self._sent = self._acked = 0
        self._credit_asked = False

    @property
    def held(self) -> int:
        """Bytes received and not yet handed on."""
        return (self._received - self.fwd_cnt) & _MASK

    @property
    def unacknowledged(self) -> int:
        """Bytes sent that the guest's reader has not taken yet."""
        return (self._sent - self._acked) & _MASK

    def receive(self, packet: Packet) -> Event:
        """Take in a packet of the guest's. Raises ProtocolError: then this stream is to be reset."""
        op = packet.op
        if op == OP_RST:
            self.open = False
            return Event.RESET
        self._credit(packet.buf_alloc, packet.fwd_cnt)
        if op == OP_RW:
            if not self.open or self.peer_shutdown & SHUTDOWN_SEND:
                raise ProtocolError("data outside an open stream")
            if packet.length > self.buf_alloc - self.held:
                raise ProtocolError("data beyond the credit given")
            self._received = (self._received + packet.length) & _MASK
            return Event.DATA
        if packet.length:
            raise ProtocolError(f"payload in a packet of operation {op}")
        if not self.open:
            if op != OP_RESPONSE:
                raise ProtocolError(f"operation {op} in answer to a connection request")
            self.open = True
            return Event.CONNECTED
        if op == OP_CREDIT_UPDATE:
            return Event.CREDIT
        if op == OP_CREDIT_REQUEST:
            return Event.CREDIT_WANTED
        if op == OP_SHUTDOWN:
            self.peer_shutdown |= packet.flags & SHUTDOWN_BOTH
            return Event.SHUTDOWN
        raise ProtocolError(f"operation {op} on an open stream")

    def _credit(self, buf_alloc: int, fwd_cnt: int) -> None:
        self.peer_alloc = buf_alloc
        # Two guest threads may queue their headers in the wrong order: an older count is no news. A count of
        # bytes that we never sent looks the same and is ignored as well.
        if (fwd_cnt - self._acked) & _MASK <= self.unacknowledged:
            self._acked = fwd_cnt
        if self.send_room():
            self._credit_asked = False

    def send_room(self) -> int:
        """How many bytes the guest will take now."""
        return max(0, self.peer_alloc - self.unacknowledged)

    def sent(self, count: int) -> None:
        """`count` bytes (at most `send_room`) are on their way to the guest."""
        self._sent = (self._sent + count) & _MASK

    def consumed(self, count: int) -> bool:
        """`count` bytes were handed on. True when the guest should be told so now.

        Guests limit themselves to the smaller of the two buffers, so half of that is the time to speak.
        """
        self.fwd_cnt = (self.fwd_cnt + count) & _MASK
        news = (self.fwd_cnt - self._told) & _MASK
        return news > 0 and 2 * news >= min(self.buf_alloc, self.peer_alloc)

    def told(self) -> None:
        """A header with the current `fwd_cnt` is on its way."""
        self._told = self.fwd_cnt

    def ask_credit(self) -> bool:
        """True once per exhaustion: then send a CREDIT_REQUEST (asking at every try floods the guest)."""
        if self._credit_asked:
            return False
        self._credit_asked = True
        return True
