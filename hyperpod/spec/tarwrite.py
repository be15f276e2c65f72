"""Headers of the canonical tar that the image builder reads: ustar, and PAX where ustar is too small."""

from __future__ import annotations

from hyperpod.spec.tarindex import BLOCK

END = bytes(2 * BLOCK)
_OCTAL_ID = 0o7777777
_OCTAL_SIZE = 0o77777777777


def padding(size: int) -> bytes:
    """Zeros that fill the last block of `size` bytes of contents."""
    return bytes(-size % BLOCK)


def header(
    path: bytes,
    kind: int,
    *,
    mode: int,
    uid: int,
    gid: int,
    mtime: int,
    size: int = 0,
    link: bytes = b"",
    major: int = 0,
    minor: int = 0,
    xattrs: dict[bytes, bytes] | None = None,
) -> bytes:
    """The header blocks of one entry; `kind` as in tarindex.Entry, times not negative."""
    records = b""
    if len(path) > 100:
        records += _record(b"path", path)
    if len(link) > 100:
        records += _record(b"linkpath", link)
    for key, value, bound in (
        (b"uid", uid, _OCTAL_ID),
        (b"gid", gid, _OCTAL_ID),
        (b"size", size, _OCTAL_SIZE),
    ):
        if value > bound:
            records += _record(key, b"%d" % value)
    for name, value_bytes in sorted((xattrs or {}).items()):
        records += _record(b"SCHILY.xattr." + name, value_bytes)
    before = b""
    if records:
        before = _block(b"pax", b"x", mode=0o644, size=len(records)) + records + padding(len(records))
    return before + _block(
        path[:100],
        b"%d" % kind,
        mode=mode,
        uid=uid if uid <= _OCTAL_ID else 0,
        gid=gid if gid <= _OCTAL_ID else 0,
        mtime=mtime,
        size=size if size <= _OCTAL_SIZE else 0,
        link=link[:100],
        major=major,
        minor=minor,
    )


def _block(
    name: bytes,
    kind: bytes,
    *,
    mode: int,
    uid: int = 0,
    gid: int = 0,
    mtime: int = 0,
    size: int = 0,
    link: bytes = b"",
    major: int = 0,
    minor: int = 0,
) -> bytes:
    block = bytearray(BLOCK)
    block[0 : len(name)] = name
    block[100:108] = b"%07o\0" % mode
    block[108:116] = b"%07o\0" % uid
    block[116:124] = b"%07o\0" % gid
    block[124:136] = b"%011o\0" % size
    block[136:148] = b"%011o\0" % mtime
    block[148:156] = b"        "
    block[156:157] = kind
    block[157 : 157 + len(link)] = link
    block[257:265] = b"ustar\00000"
    block[329:337] = b"%07o\0" % major
    block[337:345] = b"%07o\0" % minor
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _record(key: bytes, value: bytes) -> bytes:
    """A PAX record; its length counts its own digits."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    if rest + len(str(length)) != length:
        length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)
