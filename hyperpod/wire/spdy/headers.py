"""Header blocks: name/value pairs, compressed by one zlib stream per direction and session (section 2.6.10)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable

from hyperpod.wire.spdy.dictionary import DICTIONARY
from hyperpod.wire.spdy.errors import LocalProtocolError, RemoteProtocolError

Headers = tuple[tuple[str, str], ...]
"""Names in lower case; one with several values comes several times. Bytes as Latin-1."""

_LENGTH = struct.Struct("!I")

_WINDOW_BITS, _MEMORY_LEVEL = 12, 2
"""18 KiB of compressor per session instead of zlib's 256: the dictionary fits and our blocks are small."""


class InvalidHeaders(Exception):
    """A block that is whole, so that the session can go on, with content that its stream cannot have."""


def find(headers: Headers, name: str) -> str:
    """The first value of `name` (lower case), or empty."""
    return next((value for key, value in headers if key == name), "")


class HeaderCompressor:
    """One direction of a session: every block must go through it, in the order in which they are sent."""

    def __init__(self) -> None:
        self._zlib = zlib.compressobj(
            zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, _WINDOW_BITS, _MEMORY_LEVEL, zdict=DICTIONARY
        )

    def encode(self, headers: Iterable[tuple[str, str]]) -> bytes:
        """Raises LocalProtocolError for names or values that cannot be sent."""
        merged: dict[bytes, list[bytes]] = {}
        for name, value in headers:
            try:
                raw_name, raw_value = name.lower().encode("latin-1"), value.encode("latin-1")
            except UnicodeEncodeError as exc:
                raise LocalProtocolError(f"header {name!r} cannot be sent") from exc
            if not raw_name or b"\0" in raw_name or b"\0" in raw_value:
                raise LocalProtocolError(f"header {name!r} is empty or has a NUL")
            merged.setdefault(raw_name, []).append(raw_value)
        block = bytearray(_LENGTH.pack(len(merged)))
        for raw_name, values in merged.items():
            joined = b"\0".join(values)
            block += _LENGTH.pack(len(raw_name)) + raw_name + _LENGTH.pack(len(joined)) + joined
        return self._zlib.compress(bytes(block)) + self._zlib.flush(zlib.Z_SYNC_FLUSH)


class HeaderDecompressor:
    """The other direction. At most `max_bytes` come out of one block, however small it is: no bombs."""

    def __init__(self, max_bytes: int, max_headers: int) -> None:
        self._zlib = zlib.decompressobj(zdict=DICTIONARY)
        self._max_bytes, self._max_headers = max_bytes, max_headers

    def decode(self, block: bytes | memoryview) -> Headers:
        """Raises RemoteProtocolError (the zlib stream is lost then), InvalidHeaders."""
        try:
            raw = self._zlib.decompress(block, self._max_bytes + 1)
        except zlib.error as exc:
            raise RemoteProtocolError("header block is not compressed as it should be") from exc
        if len(raw) > self._max_bytes or self._zlib.unconsumed_tail:
            raise RemoteProtocolError(f"header block of more than {self._max_bytes} bytes")
        if self._zlib.eof:
            raise RemoteProtocolError("the zlib stream of header blocks has ended")
        return self._parse(raw)

    def _parse(self, raw: bytes) -> Headers:
        if len(raw) < 4:
            raise RemoteProtocolError("header block is cut")
        (count,) = _LENGTH.unpack_from(raw)
        if count > self._max_headers:
            raise RemoteProtocolError(f"header block with {count} headers")
        position, pairs, problem, seen = 4, [], "", set()
        for _ in range(count):
            name, position = _field(raw, position)
            value, position = _field(raw, position)
            if not name or name != name.lower() or b"\0" in name:
                problem = "a header's name is empty, not in lower case or has a NUL"
            if name in seen:
                problem = "a header comes twice"
            seen.add(name)
            for part in value.split(b"\0"):
                pairs.append((name.decode("latin-1"), part.decode("latin-1")))
        if position != len(raw):
            raise RemoteProtocolError("header block with more than its headers")
        if problem:
            raise InvalidHeaders(problem)
        return tuple(pairs)


def _field(raw: bytes, position: int) -> tuple[bytes, int]:
    if len(raw) - position < 4:
        raise RemoteProtocolError("header block is cut")
    (length,) = _LENGTH.unpack_from(raw, position)
    position += 4
    if len(raw) - position < length:
        raise RemoteProtocolError("header block is cut")
    return raw[position : position + length], position + length
