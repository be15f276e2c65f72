"""Reads the headers of a tar stream, sans IO: bytes in, entries out; file contents are skipped, never kept.

POSIX ustar and PAX (pax(1), IEEE 1003.1-2017), GNU long names and base-256 numbers, V7. Everything else is
refused by name rather than guessed at. Where readers differ this follows Go's archive/tar, which is what
other runtimes apply layers with.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hyperpod.errors import ImageError, ResourceExhausted
from hyperpod.logs import printable

BLOCK = 512
MAX_EXTENSION = 1 << 20
"""Bytes of one PAX or GNU long-name header; Go's limit too."""
_ZERO = bytes(BLOCK)
_HEADER_ONLY = b"123456"
_XATTR = b"SCHILY.xattr."


@dataclass(slots=True)
class Entry:
    """One tar entry. `kind`: 0 file, 1 hard link, 2 symlink, 3 char, 4 block device, 5 folder, 6 fifo."""

    name: bytes
    kind: int
    mode: int
    uid: int
    gid: int
    mtime: int
    size: int = 0
    offset: int = 0
    """Of the contents in the uncompressed stream, bytes."""
    link: bytes = b""
    major: int = 0
    minor: int = 0
    xattrs: dict[bytes, bytes] = field(default_factory=dict)


def show(name: bytes) -> str:
    """A name of the tar for an error message: escaped and bounded."""
    return repr(printable(name, 200))


class TarParser:
    """Feed it the stream in pieces of any size; `finish` at its end. Any error makes it unusable."""

    def __init__(self, *, max_entries: int, max_metadata: int) -> None:
        self.entries = 0
        self.metadata = 0
        self._max_entries, self._max_metadata = max_entries, max_metadata
        self._position = 0  # of the first byte not consumed yet
        self._buffer = bytearray()
        self._skip = 0  # bytes of contents and padding still to pass over
        self._extension: tuple[int, int] | None = None  # type flag and size of an extension being collected
        self._pax: dict[bytes, bytes] = {}
        self._long_name = self._long_link = b""
        self._dangling = False  # an extension header waits for its entry
        self._zeros = 0
        self.ended = False

    def feed(self, data: bytes | memoryview) -> list[Entry]:
        """Entries completed by `data`. Raises ImageError or ResourceExhausted."""
        view = memoryview(data)
        out: list[Entry] = []
        while view and not self.ended:
            if self._skip:
                step = min(self._skip, len(view))
                self._skip -= step
                self._position += step
                view = view[step:]
                continue
            need = _padded(self._extension[1]) if self._extension else BLOCK
            take = need - len(self._buffer)
            self._buffer += view[:take]
            view = view[take:]
            if len(self._buffer) < need:
                break
            block = bytes(self._buffer)
            self._buffer.clear()
            self._position += need
            if self._extension:
                self._read_extension(block)
            elif (entry := self._read_header(block)) is not None:
                out.append(entry)
        return out

    def finish(self) -> None:
        """The stream is over. Raises ImageError when it was cut off."""
        if self._skip or self._buffer or self._extension or self._dangling:
            raise ImageError(f"the tar is cut off near byte {self._position}")

    def _read_header(self, block: bytes) -> Entry | None:
        if block == _ZERO:
            self._zeros += 1
            self.ended = self._zeros == 2
            return None
        at = self._position - BLOCK
        if self._zeros:
            raise ImageError(f"the tar goes on after its end mark, at byte {at}")
        want = _number(block[148:156], at)
        unsigned = sum(block) - sum(block[148:156]) + 8 * 32
        signed = unsigned - 256 * sum(b > 127 for b in (*block[:148], *block[156:]))
        if want not in (unsigned, signed):
            raise ImageError(f"the tar has a header with a wrong checksum at byte {at}")
        kind = block[156:157]
        size = _number(block[124:136], at)
        if kind in b"xgLK":
            if not 0 <= size <= MAX_EXTENSION:
                raise ImageError(f"the tar has an extension header of {size} bytes at byte {at}")
            self._extension = (kind[0], size)
            if size == 0:
                self._read_extension(b"")
            return None
        return self._entry(block, kind, size, at)

    def _entry(self, block: bytes, kind: bytes, size: int, at: int) -> Entry:
        pax, self._pax = self._pax, {}
        self._dangling = False
        name = _text(block[:100])
        if block[257:263] == b"ustar\0" and (prefix := _text(block[345:500])):
            name = prefix + b"/" + name
        name = pax.get(b"path") or name
        link = pax.get(b"linkpath") or _text(block[157:257])
        name, self._long_name = self._long_name or name, b""
        link, self._long_link = self._long_link or link, b""
        if kind == b"\0":
            kind = b"5" if name.endswith(b"/") else b"0"
        elif kind == b"7":
            kind = b"0"
        if kind == b"S" or any(key.startswith(b"GNU.sparse.") for key in pax):
            raise ImageError(f"tar entry {show(name)} is stored sparse, which is not supported")
        if kind not in b"0123456":
            raise ImageError(f"tar entry {show(name)} has the unknown type {show(kind)}")
        if raw := pax.get(b"size"):
            size = _decimal(raw, at)
        if size < 0:
            raise ImageError(f"tar entry {show(name)} has a negative size")
        if kind in _HEADER_ONLY:
            size = 0
        uid = _decimal(raw, at) if (raw := pax.get(b"uid")) else _number(block[108:116], at)
        gid = _decimal(raw, at) if (raw := pax.get(b"gid")) else _number(block[116:124], at)
        mtime = _decimal(raw, at) if (raw := pax.get(b"mtime")) else _number(block[136:148], at)
        device = kind in b"34"
        xattrs = {key.removeprefix(_XATTR): val for key, val in pax.items() if key.startswith(_XATTR)}
        self.entries += 1
        self.metadata += len(name) + len(link) + sum(len(k) + len(v) for k, v in xattrs.items())
        if self.entries > self._max_entries:
            raise ResourceExhausted(f"the layer has more than {self._max_entries} entries")
        if self.metadata > self._max_metadata:
            raise ResourceExhausted(f"the layer's names and attributes exceed {self._max_metadata} bytes")
        self._skip = _padded(size)
        return Entry(
            name=name,
            kind=kind[0] - 48,
            mode=_number(block[100:108], at) & 0o7777,
            uid=uid,
            gid=gid,
            mtime=mtime,
            size=size,
            offset=self._position,
            link=link if kind in b"12" else b"",
            major=_number(block[329:337], at) if device else 0,
            minor=_number(block[337:345], at) if device else 0,
            xattrs=xattrs,
        )

    def _read_extension(self, block: bytes) -> None:
        assert self._extension is not None
        kind, size = self._extension
        self._extension = None
        data = block[:size]
        if kind == ord("g"):
            return  # global headers carry comments; other runtimes ignore them as well
        self._dangling = True
        if kind == ord("L"):
            self._long_name = _text(data)
        elif kind == ord("K"):
            self._long_link = _text(data)
        else:
            self._pax = _pax_records(data, self._position)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _text(raw: bytes) -> bytes:
    return raw.partition(b"\0")[0]


def _number(raw: bytes, at: int) -> int:
    """A numeric header field: octal text, or base-256 when the top bit is set (GNU)."""
    if raw[0] & 0x80:
        value = int.from_bytes(raw, "big") & ((1 << (8 * len(raw) - 1)) - 1)
        return value - (1 << (8 * len(raw) - 1)) if raw[0] & 0x40 else value
    text = raw.strip(b" \0").partition(b"\0")[0]
    if not text:
        return 0
    if text.strip(b"01234567"):
        raise ImageError(f"the tar has a header field {show(raw)} that is no number, at byte {at}")
    return int(text, 8)


def _decimal(raw: bytes, at: int) -> int:
    """The whole part of a PAX number such as 1700000000.25."""
    whole = raw.partition(b".")[0]
    if not whole.removeprefix(b"-").isdigit() or len(whole) > 20:
        raise ImageError(f"the tar has a PAX number {show(raw)} before byte {at}")
    return int(whole)


def _pax_records(data: bytes, at: int) -> dict[bytes, bytes]:
    """`<length> <key>=<value>\\n`, the length counting the whole record; an empty value takes a key back."""
    records: dict[bytes, bytes] = {}
    while data:
        digits, space, _ = data[:12].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        key, equals, value = data[len(digits) + 1 : length - 1].partition(b"=")
        if not equals or length > len(data) or data[length - 1 : length] != b"\n":
            raise ImageError(f"the tar has a malformed PAX record before byte {at}")
        data = data[length:]
        if b"\0" in key or (b"\0" in value and not key.startswith(_XATTR)):
            raise ImageError(f"the tar has a PAX record {show(key)} with a NUL before byte {at}")
        if value or key.startswith(_XATTR):
            records[key] = value
        else:
            records.pop(key, None)
    return records
