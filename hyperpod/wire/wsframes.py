"""WebSocket frames of a client, told apart: payloads of binary messages, and all other bytes, which wsproto reads.

Payloads of binary messages are what there is much of, and wsproto copies each of their bytes four times. Here they
stay where they came. What a header may not be is left to wsproto to tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from wsproto.frame_protocol import Opcode

from hyperpod.errors import ProtocolError

_FIN, _RESERVED, _MASKED, _SHORT = 0x80, 0x70, 0x80, 0x7F
_EXTENDED = {126: 2, 127: 8}
"""Bytes of a length that does not fit the header's seven bits (RFC 6455, section 5.2)."""
_LEAST = {126: 126, 127: 65536}
"""Shorter ones must not be written so."""
_ENDLESS = 1 << 63
"""More than a payload can have."""


class Masked(NamedTuple):
    """A part of a binary message, as far as it has come; `mask` begins with what its first byte wants."""

    data: memoryview
    mask: bytes
    last: bool


class FrameSplitter:
    """Keeps nothing but a header that has not come whole: 13 bytes."""

    def __init__(self) -> None:
        self._rest = b""
        self._left = 0
        """Bytes of the frame's payload still to come."""
        self._mask = b""
        """Empty: the frame is wsproto's."""
        self._final = False
        self._message = 0
        """The opcode of a message whose last frame has not come yet; 0: there is none."""

    def feed(self, data: bytes) -> Iterator[Masked | memoryview]:
        """To be iterated to the end. Raises ProtocolError."""
        if self._rest:
            data, self._rest = self._rest + data, b""
        view, position = memoryview(data), 0
        while position < len(data):
            if self._left:
                part = view[position : position + self._left]
                position += len(part)
                yield self._part(part)
                continue
            start = self._begin(data, position)
            if start is None:
                self._rest = data[position:]
                return
            if not self._mask:
                yield view[position:start]
            elif not self._left:
                yield self._part(view[start:start])
            position = start

    def _part(self, part: memoryview) -> Masked | memoryview:
        self._left -= len(part)
        if not self._mask:
            return part
        made = Masked(part, self._mask, self._final and not self._left)
        turn = len(part) % 4
        self._mask = self._mask[turn:] + self._mask[:turn]
        return made

    def _begin(self, data: bytes, position: int) -> int | None:
        """Read a header; gives where the payload starts, None while the header is not whole."""
        if len(data) - position < 2:
            return None
        first, second = data[position], data[position + 1]
        if first & _RESERVED or not second & _MASKED:  # not to wait for what such a peer may never send
            self._mask, self._left = b"", _ENDLESS
            return position
        short, begin = second & _SHORT, position + 2
        key = begin + _EXTENDED.get(short, 0)
        if len(data) < key + 4:
            return None
        opcode = first & 0x0F
        if self._message and opcode in (Opcode.TEXT, Opcode.BINARY):
            raise ProtocolError("a message begins within another one")
        kind = opcode or self._message
        length = int.from_bytes(data[begin:key], "big") if key > begin else short
        ours = kind == Opcode.BINARY and _LEAST.get(short, 0) <= length < _ENDLESS
        self._left, self._final = length, bool(first & _FIN)
        self._mask = data[key : key + 4] if ours else b""
        if opcode < Opcode.CLOSE:
            self._message = 0 if self._final else kind
        return key + 4
