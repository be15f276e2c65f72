"""One connection of the stdio port: OPEN names a stream, then its frames go to and fro."""

from __future__ import annotations

import asyncio
import logging
import os
import select
import socket
from collections.abc import Callable, Sequence

from hyperpod.agent.streams import Stream
from hyperpod.errors import HyperpodError
from hyperpod.wire.stdio import Frame, FrameDecoder, Open, decode_open, encode_error

log = logging.getLogger(__name__)

HIGH_WATER = 256 * 1024
"""Bytes queued in the transport before a stream stops sending."""

OPEN_TIMEOUT = 10.0
LOOK = 1.0
"""Seconds between looks at a connection that is not read from."""

Find = Callable[[Open], Stream]


class StdioConnection(asyncio.Protocol):
    """Speaks frames for one stream that `find` gives; implements streams.Peer."""

    def __init__(self, find: Find) -> None:
        self._find = find
        self._decoder = FrameDecoder()
        self._stream: Stream | None = None
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._watch: asyncio.TimerHandle | None = None
        self.writable = True

    # -- asyncio.Protocol ---------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=HIGH_WATER)
        self._timer = asyncio.get_running_loop().call_later(OPEN_TIMEOUT, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._watch is not None:
            self._watch.cancel()
        self._transport = None
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.detach(self)

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True
        if self._stream is not None:
            self._stream.flush()

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._decoder.feed(data):
                if self._transport is None or self._transport.is_closing():
                    return
                self._receive(frame)
        except HyperpodError as exc:
            self.drop(str(exc))

    # -- streams.Peer -------------------------------------------------------------------------------------

    def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        # A transport that the peer has cut, but that has not told us yet, is not to be written to: Python 3.12 to
        # 3.13.7 would watch its descriptor on and on, also once that is the next connection's (gh-136234).
        if self._transport is not None and not self._transport.is_closing():
            self._transport.writelines(buffers)

    def hold(self, held: bool) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if held:
            self._transport.pause_reading()
            self._look()
        else:
            self._transport.resume_reading()

    def _look(self) -> None:
        """Who does not read is not told that the host has gone, and would hold on for ever."""
        if self._transport is None or self._transport.is_closing():
            return
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket"), 0)  # its end and errors are always told
        if poll.poll(0):
            self._transport.abort()
        else:
            self._watch = asyncio.get_running_loop().call_later(LOOK, self._look)

    def finish(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def send_with(self, frame: bytes, fd: int) -> bool:
        transport = self._transport
        if transport is None or transport.is_closing() or transport.get_write_buffer_size():
            return False
        own = transport.get_extra_info("socket")
        if own.family != socket.AF_UNIX:
            return False
        with socket.socket(
            fileno=os.dup(own.fileno())
        ) as sock:  # asyncio's own face of it sends no descriptors
            try:
                return socket.send_fds(sock, [frame], [fd]) == len(frame)
            except OSError:
                return False

    def drop(self, why: str) -> None:
        log.info("stdio connection dropped: %s", why)
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.detach(self)
        if self._transport is not None:
            self._transport.write(encode_error(why))
            self._transport.close()

    # -- frames -------------------------------------------------------------------------------------------

    def _receive(self, frame: Frame) -> None:
        stream = self._stream
        if stream is None:
            self._open(decode_open(frame))
        else:
            stream.receive(frame)

    def _open(self, what: Open) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        stream = self._find(what)
        self._stream = stream
        try:
            stream.attach(self, what)
        except HyperpodError:
            self._stream = None
            raise
