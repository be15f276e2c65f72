"""Gives the root folder of a squashfs its owner and time; sqfstar 4.5.1 puts its own user and clock there.

Works on images built with -noI, whose inode and id tables are not compressed (layout: the kernel's
fs/squashfs/squashfs_fs.h). Owners are indexes into the id table. sqfstar's own uid and gid have entries that
only the root uses, because files of theirs were given aliases; so those entries are free to become others,
and the aliases' entries become the true ids.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

from hyperpod.errors import ImageError

_SUPER = struct.Struct("<IIIIIHHHHHHQQQQQQQQ")
_MAGIC = 0x73717368
_BLOCK = 8192
_IDS_PER_BLOCK = _BLOCK // 4
_STORED = 0x8000


def set_root(
    file: BinaryIO, *, mode: int, uid: int, gid: int, mtime: int, own: set[int], aliases: dict[int, int]
) -> None:
    """Rewrite the root inode. Raises ImageError for what is no such image.

    `own`: the builder's uid and gid, which only the root has; `aliases`: id in the image to true id."""
    fields = _SUPER.unpack(_read(file, 0, _SUPER.size))
    if fields[0] != _MAGIC:
        raise ImageError("the image builder wrote no squashfs")
    count, root, id_start, inode_start = fields[8], fields[11], fields[13], fields[15]
    ids = [_id_at(file, id_start, n) for n in range(count)]
    free = [n for n, (value, _) in enumerate(ids) if value in own]
    for n in free:
        ids[n] = (-1, ids[n][1])
    for n, (value, at) in enumerate(ids):
        if value in aliases:
            ids[n] = (_put_id(file, at, aliases[value]), at)
    indexes = []
    for wanted in (uid, gid):
        index = next((n for n, (value, _) in enumerate(ids) if value == wanted), None)
        if index is None:
            if not free:
                raise ImageError(f"no way to give the root folder the owner {uid}:{gid}")
            index = free.pop()
            at = ids[index][1]
            ids[index] = (_put_id(file, at, wanted), at)
        indexes.append(index)
    # Behind the inode's type (2 bytes): mode, index of uid, index of gid, mtime.
    data = struct.pack("<HHHI", mode, *indexes, mtime)
    _write_metadata(file, inode_start + (root >> 16), (root & 0xFFFF) + 2, data)


def _put_id(file: BinaryIO, at: int, value: int) -> int:
    file.seek(at)
    file.write(struct.pack("<I", value))
    return value


def _id_at(file: BinaryIO, start: int, index: int) -> tuple[int, int]:
    """The id and the offset at which it is stored."""
    (block,) = struct.unpack("<Q", _read(file, start + 8 * (index // _IDS_PER_BLOCK), 8))
    _length(file, block)
    at = block + 2 + 4 * (index % _IDS_PER_BLOCK)
    return struct.unpack("<I", _read(file, at, 4))[0], at


def _write_metadata(file: BinaryIO, block: int, offset: int, data: bytes) -> None:
    """Overwrite bytes of a metadata stream, which may go on in the next block."""
    while data:
        length = _length(file, block)
        if offset >= length:
            block, offset = block + 2 + length, offset - length
            continue
        part = data[: length - offset]
        file.seek(block + 2 + offset)
        file.write(part)
        data, offset = data[len(part) :], offset + len(part)


def _length(file: BinaryIO, block: int) -> int:
    (header,) = struct.unpack("<H", _read(file, block, 2))
    if not header & _STORED:
        raise ImageError("the image builder compressed a table that must not be")
    return int(header & ~_STORED)


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise ImageError("the image builder's squashfs is cut off")
    return data
