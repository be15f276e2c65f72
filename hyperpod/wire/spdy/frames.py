"""Frames as bytes (section 2.6): numbers, layouts, encoding. Decoding is in `connection`."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from enum import IntEnum

VERSION = 3
HEADER = struct.Struct("!II")
"""DATA: stream, flags and length. Control: 1, version and type; flags and length."""
MAX_LENGTH = 2**24 - 1
MAX_ID = 2**31 - 1
MAX_WINDOW = 2**31 - 1
INITIAL_WINDOW = 64 * 1024

FLAG_FIN = 1
FLAG_UNIDIRECTIONAL = 2

_CONTROL = 0x80000000 | VERSION << 16
_PAIR = struct.Struct("!II")
_ONE = struct.Struct("!I")
_SYN = struct.Struct("!IIBB")


class FrameType(IntEnum):
    SYN_STREAM = 1
    SYN_REPLY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PING = 6
    GOAWAY = 7
    HEADERS = 8
    WINDOW_UPDATE = 9


class Setting(IntEnum):
    """The two that a connection heeds."""

    MAX_CONCURRENT_STREAMS = 4
    INITIAL_WINDOW_SIZE = 7


def control(kind: FrameType, payload: bytes, flags: int = 0) -> bytes:
    return HEADER.pack(_CONTROL | kind, flags << 24 | len(payload)) + payload


def data_header(stream: int, length: int, *, fin: bool) -> bytes:
    return HEADER.pack(stream, (FLAG_FIN << 24 if fin else 0) | length)


def syn_stream(stream: int, associated: int, priority: int, block: bytes, flags: int) -> bytes:
    return control(FrameType.SYN_STREAM, _SYN.pack(stream, associated, priority << 5, 0) + block, flags)


def with_headers(kind: FrameType, stream: int, block: bytes, *, fin: bool) -> bytes:
    """SYN_REPLY or HEADERS."""
    return control(kind, _ONE.pack(stream) + block, FLAG_FIN if fin else 0)


def rst_stream(stream: int, status: int) -> bytes:
    return control(FrameType.RST_STREAM, _PAIR.pack(stream, status))


def ping(ident: int) -> bytes:
    return control(FrameType.PING, _ONE.pack(ident))


def goaway(last_stream: int, status: int) -> bytes:
    return control(FrameType.GOAWAY, _PAIR.pack(last_stream, status))


def window_update(stream: int, delta: int) -> bytes:
    return control(FrameType.WINDOW_UPDATE, _PAIR.pack(stream, delta))


def settings(values: Iterable[tuple[int, int]]) -> bytes:
    pairs = list(values)
    return control(
        FrameType.SETTINGS, _ONE.pack(len(pairs)) + b"".join(_PAIR.pack(key, value) for key, value in pairs)
    )
