"""Control frames out of their payloads (section 2.6): layouts and what is wrong with them."""

from __future__ import annotations

import struct
from typing import NamedTuple

from hyperpod.wire.spdy.errors import RemoteProtocolError
from hyperpod.wire.spdy.frames import FLAG_FIN, FLAG_UNIDIRECTIONAL, MAX_ID, FrameType
from hyperpod.wire.spdy.headers import HeaderDecompressor, Headers, InvalidHeaders

_ONE, _PAIR, _SYN = struct.Struct("!I"), struct.Struct("!II"), struct.Struct("!IIBB")
_MAX_SETTINGS = 256


class HeaderFrame(NamedTuple):
    """SYN_STREAM, SYN_REPLY or HEADERS."""

    kind: FrameType
    flags: int
    stream: int
    headers: Headers | InvalidHeaders
    associated: int = 0
    priority: int = 0


class ResetFrame(NamedTuple):
    stream: int
    status: int


class SettingsFrame(NamedTuple):
    values: tuple[tuple[int, int], ...]


class PingFrame(NamedTuple):
    ident: int


class GoawayFrame(NamedTuple):
    last_stream: int
    status: int


class WindowFrame(NamedTuple):
    stream: int
    delta: int


Frame = HeaderFrame | ResetFrame | SettingsFrame | PingFrame | GoawayFrame | WindowFrame

_FLAGS = {FrameType.SYN_STREAM: FLAG_FIN | FLAG_UNIDIRECTIONAL, FrameType.SYN_REPLY: FLAG_FIN,
          FrameType.HEADERS: FLAG_FIN, FrameType.SETTINGS: 1}  # fmt: skip
_HEADER_OFFSET = {FrameType.SYN_STREAM: 10, FrameType.SYN_REPLY: 4, FrameType.HEADERS: 4}


class ControlDecoder:
    """Keeps what runs through a session: the zlib stream of its header blocks."""

    def __init__(self, max_block: int, max_headers: int) -> None:
        self._headers = HeaderDecompressor(max_block, max_headers)

    def decode(self, number: int, flags: int, payload: memoryview) -> Frame | None:
        """None for a type that there is not. Raises RemoteProtocolError."""
        try:
            kind = FrameType(number)
        except ValueError:
            return None
        if flags & ~_FLAGS.get(kind, 0):
            raise RemoteProtocolError(f"{kind.name} with flags {flags:#x}")
        if kind in _HEADER_OFFSET:
            return self._with_headers(kind, flags, payload)
        if kind is FrameType.SETTINGS:
            return _settings(payload)
        if kind is FrameType.PING:
            (ident,) = _exactly(kind, _ONE, payload)
            return PingFrame(ident)
        first, second = _exactly(kind, _PAIR, payload)
        first &= MAX_ID
        if kind is FrameType.RST_STREAM:
            if first == 0:
                raise RemoteProtocolError("RST_STREAM of stream 0")
            return ResetFrame(first, second)
        if kind is FrameType.GOAWAY:
            return GoawayFrame(first, second)
        return WindowFrame(first, second & MAX_ID)

    def _with_headers(self, kind: FrameType, flags: int, payload: memoryview) -> HeaderFrame:
        offset = _HEADER_OFFSET[kind]
        if len(payload) < offset:
            raise RemoteProtocolError(f"{kind.name} of {len(payload)} bytes")
        associated = priority = 0
        if kind is FrameType.SYN_STREAM:
            stream, associated, priority, _ = _SYN.unpack_from(payload)
        else:
            (stream,) = _ONE.unpack_from(payload)
        stream &= MAX_ID
        if stream == 0:
            raise RemoteProtocolError(f"{kind.name} of stream 0")
        headers: Headers | InvalidHeaders
        try:
            headers = self._headers.decode(payload[offset:])
        except InvalidHeaders as exc:
            headers = exc
        return HeaderFrame(kind, flags, stream, headers, associated & MAX_ID, priority >> 5)


def _exactly(kind: FrameType, layout: struct.Struct, payload: memoryview) -> tuple[int, ...]:
    if len(payload) != layout.size:
        raise RemoteProtocolError(f"{kind.name} of {len(payload)} bytes")
    return layout.unpack(payload)


def _settings(payload: memoryview) -> SettingsFrame:
    count = _ONE.unpack_from(payload)[0] if len(payload) >= _ONE.size else -1
    if not 0 <= count <= _MAX_SETTINGS or len(payload) != _ONE.size + count * _PAIR.size:
        raise RemoteProtocolError(f"SETTINGS of {len(payload)} bytes with {count} values")
    pairs = _PAIR.iter_unpack(payload[_ONE.size :])
    return SettingsFrame(tuple((key & 0xFFFFFF, value) for key, value in pairs))
