"""Headers of virtio-vsock packets (virtio 1.2, section 5.10.6): 44 bytes, little endian."""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

HEADER: Final = struct.Struct("<QQIIIHHIII")
HEADER_SIZE: Final = 44
MAX_PAYLOAD: Final = 64 * 1024  # Linux guests never send more in one packet

HOST_CID: Final = 2
TYPE_STREAM: Final = 1

OP_REQUEST: Final = 1
OP_RESPONSE: Final = 2
OP_RST: Final = 3
OP_SHUTDOWN: Final = 4
OP_RW: Final = 5
OP_CREDIT_UPDATE: Final = 6
OP_CREDIT_REQUEST: Final = 7

SHUTDOWN_RECEIVE: Final = 1  # the sender of the packet will receive no more
SHUTDOWN_SEND: Final = 2  # the sender of the packet will send no more
SHUTDOWN_BOTH: Final = 3


class Packet(NamedTuple):
    """A header as it stands on the wire; `length` is the payload's, `buf_alloc` and `fwd_cnt` are credit."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    length: int
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int


def decode(header: bytes | memoryview) -> Packet:
    """Parse the first 44 bytes; the caller has checked that they are there."""
    return Packet._make(HEADER.unpack_from(header))


def encode(packet: Packet) -> bytes:
    """The 44 bytes of `packet`."""
    return HEADER.pack(*packet)
