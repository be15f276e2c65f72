"""HTTP/2 spoken with an agent that may be hostile: what grpclib 0.4.9 keeps without bound is bounded here.

* Frames cost the daemon's only loop 30 us each and the guest 9 bytes. `Budget` makes reading rest for as long
  as a guest is over what any honest agent sends, so that other pods' calls are served.
* Answers to PING and SETTINGS pile up when the peer does not read: over a bound the connection is closed.
* Empty DATA frames are outside flow control, yet grpclib would queue each of them: they are dropped.
* What h2 or grpclib stumble over closes the connection instead of reaching the loop's exception handler.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from grpclib.config import Configuration
from grpclib.protocol import H2Protocol
from h2.events import (
    AlternativeServiceAvailable,
    DataReceived,
    InformationalResponseReceived,
    UnknownFrameReceived,
)
from h2.exceptions import FrameTooLargeError, H2Error

log = logging.getLogger(__name__)

RATE = 256 * 1024
"""Units per second; a byte is one, a frame that means something FRAME_COST more."""

BURST = 1024 * 1024
FRAME_COST = 200
READ_SIZE = 16 * 1024
"""Bytes taken at once: bounds one stay of the loop here to some 50 ms."""

MAX_UNSENT = 1024 * 1024
"""Bytes that wait to be read by the peer. Requests wait for the transport themselves, at 64 KiB."""

MAX_FRAME = 9 + 16 * 1024
"""Bytes of a frame that is not complete: h2 looks at the announced length only when it has all of it."""

_IGNORED = (AlternativeServiceAvailable, InformationalResponseReceived, UnknownFrameReceived)

_STUMBLES = (
    H2Error,
    NotImplementedError,  # grpclib: an event that it has no case for, such as PUSH_PROMISE
    ValueError,  # a header that is not ASCII
    LookupError,
    AttributeError,
    AssertionError,
    TypeError,
)


class Budget:
    """A token bucket that may go into debt. Times in seconds of one clock."""

    def __init__(self, now: float) -> None:
        self._left, self._at = float(BURST), now

    def spend(self, cost: int, now: float) -> float:
        """Seconds to rest before taking more; 0.0 mostly."""
        self._left = min(self._left + (now - self._at) * RATE, BURST) - cost
        self._at = now
        return max(-self._left / RATE, 0.0)


class AgentProtocol(H2Protocol):
    """One connection to an agent."""

    def __init__(self, handler: Any, config: Configuration, h2_config: Any) -> None:
        super().__init__(handler, config, h2_config)
        self._loop = asyncio.get_running_loop()
        self._budget = Budget(self._loop.time())
        self._rest: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.max_size = READ_SIZE
        self._transport = transport
        handlers: dict[Any, Any] = self.processor.processors
        handlers.update(dict.fromkeys(_IGNORED, lambda _: None))
        handlers[DataReceived] = self._data

    def _data(self, event: DataReceived) -> None:
        if event.flow_controlled_length:
            self.processor.process_data_received(event)

    def data_received(self, data: bytes) -> None:
        """Never raises: the connection is closed for what is no HTTP/2."""
        if self.connection.is_closing():
            return
        try:
            events = self.connection.feed(data)
            for event in events:
                self.processor.process(event)
            if not self.connection.is_closing():
                self.connection.flush()
            if len(self.connection._connection.incoming_buffer._data) > MAX_FRAME:
                raise FrameTooLargeError("a frame that is too large")
        except _STUMBLES as exc:
            log.info("closing the connection to an agent: %s: %.200r", type(exc).__name__, str(exc))
            self._give_up("the agent broke HTTP/2")
            return
        if self.connection.is_closing():
            return
        if self._transport.get_write_buffer_size() > MAX_UNSENT:
            log.info("closing the connection to an agent: it does not read")
            self._give_up("the agent does not read")
        elif rest := self._budget.spend(len(data) + FRAME_COST * len(events), self._loop.time()):
            self._transport.pause_reading()
            self._rest = self._loop.call_later(rest, self._resume)

    def _give_up(self, reason: str) -> None:
        # Not close(): what the peer does not read would keep the socket, and its buffer, open for ever.
        self._transport.abort()
        self.processor.close(reason)

    def abort(self) -> None:
        """Close the socket; nothing more is sent."""
        self._transport.abort()

    def _resume(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._rest is not None:
            self._rest.cancel()
        super().connection_lost(exc)
        # Calls that wait to write would wait for ever.
        self.connection.write_ready.set()
