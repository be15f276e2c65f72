"""Flow control of SPDY/3.1: how much may be sent, and what is given back to the sender (section 2.6.8).

moby/spdystream, which the kubelet, kubectl and crictl speak, has no flow control: it sends no WINDOW_UPDATE,
ignores those that it gets, and sends past any window. A peer that waited for it would wait for ever. Hence
AUTO: windows are counted from the first byte, but heeded only once the peer has shown that it counts as well.
"""

from __future__ import annotations

from enum import Enum, auto

from hyperpod.wire.spdy.frames import INITIAL_WINDOW, MAX_WINDOW


class FlowControl(Enum):
    OBEYED = auto()
    """As the specification has it: a peer that sends too much loses the stream."""
    AUTO = auto()
    """Obeyed towards a peer that sends WINDOW_UPDATE or an initial window size; given to every peer, and not
    enforced: npm's spdy-transport, which does wait, oversteps by a frame per stream."""
    NONE = auto()
    """As spdystream: neither sent nor heeded."""


class SendWindow:
    """What the peer still takes; below zero after it was not heeded, or made smaller."""

    def __init__(self, size: int = INITIAL_WINDOW) -> None:
        self.left = size

    def open(self, delta: int) -> bool:
        """False when it would be larger than the protocol allows."""
        if self.left + delta > MAX_WINDOW:
            return False
        self.left += delta
        return True


class ReceiveWindow:
    """What the peer may still send: first the protocol's size, from the first update on `size`."""

    def __init__(self, size: int = INITIAL_WINDOW) -> None:
        self._size = self.left = INITIAL_WINDOW
        self._growth = max(0, size - INITIAL_WINDOW)
        self._consumed = 0

    def consume(self, count: int) -> int:
        """`count` bytes more have been dealt with; gives how many to give back now: half a window or none."""
        self._consumed += count
        if self._consumed * 2 < self._size:
            return 0
        delta = self._consumed + self._growth
        self._size += self._growth
        self._consumed = self._growth = 0
        self.left += delta
        return delta
