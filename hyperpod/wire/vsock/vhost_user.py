"""Messages of the vhost-user protocol (QEMU's docs/interop/vhost-user.rst), as far as vsock needs them."""

from __future__ import annotations

import enum
import struct
from typing import Final, NamedTuple

from hyperpod.errors import ProtocolError

_HEADER: Final = struct.Struct("<III")  # request, flags, payload size
_VERSION: Final = 1
_VERSION_MASK: Final = 3
_REPLY: Final = 4
_NEED_REPLY: Final = 8
MAX_PAYLOAD: Final = 1024  # the largest that we serve is the memory table, 264 bytes
MAX_FDS: Final = 8
MAX_REGIONS: Final = 8
NO_FD: Final = 0x100  # in the payload of SET_VRING_KICK, CALL, ERR
_MAX_REGION: Final = 1 << 46

F_PROTOCOL_FEATURES: Final = 1 << 30
F_INDIRECT: Final = 1 << 28
F_EVENT_INDEX: Final = 1 << 29
F_VERSION_1: Final = 1 << 32
FEATURES: Final = F_VERSION_1 | F_PROTOCOL_FEATURES | F_EVENT_INDEX | F_INDIRECT
PROTOCOL_F_REPLY_ACK: Final = 1 << 3
PROTOCOL_FEATURES: Final = 1 << 0 | PROTOCOL_F_REPLY_ACK | 1 << 9  # MQ, REPLY_ACK, CONFIG


class Request(enum.IntEnum):
    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    GET_CONFIG = 24
    SET_CONFIG = 25


class Message(NamedTuple):
    request: Request
    need_reply: bool
    payload: bytes


class MemoryRegion(NamedTuple):
    """An entry of the memory table; its file descriptor comes beside it."""

    guest_address: int
    size: int
    user_address: int
    offset: int  # into the file


class VringAddress(NamedTuple):
    ring: int
    descriptors: int
    used: int
    available: int


class MessageReader:
    """Reads exactly one message at a time, so that descriptors stay with the message that they came with."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._size: int | None = None

    @property
    def wanted(self) -> int:
        """How many bytes to read next, at most."""
        return _HEADER.size + (self._size or 0) - len(self._buffer)

    def feed(self, data: bytes) -> Message | None:
        """Take at most `wanted` bytes; the message once it is complete. Raises ProtocolError."""
        self._buffer += data
        if self._size is None:
            if len(self._buffer) < _HEADER.size:
                return None
            _, flags, size = _HEADER.unpack_from(self._buffer)
            if flags & _VERSION_MASK != _VERSION or flags & _REPLY:
                raise ProtocolError(f"vhost-user message with flags {flags:#x}")
            if size > MAX_PAYLOAD:
                raise ProtocolError(f"vhost-user message of {size} bytes")
            self._size = size
        if self.wanted:
            return None
        number, flags, _ = _HEADER.unpack_from(self._buffer)
        payload = bytes(self._buffer[_HEADER.size :])
        self._buffer.clear()
        self._size = None
        try:
            request = Request(number)
        except ValueError as exc:
            raise ProtocolError(f"vhost-user request {number}") from exc
        return Message(request, bool(flags & _NEED_REPLY), payload)


def encode(request: int, payload: bytes, *, flags: int = 0) -> bytes:
    """A message of the frontend's; `flags` beside the version, 8 asks for a reply."""
    return _HEADER.pack(request, _VERSION | flags, len(payload)) + payload


def encode_reply(request: int, payload: bytes) -> bytes:
    return encode(request, payload, flags=_REPLY)


def u64(payload: bytes) -> int:
    """The payload of most requests. Raises ProtocolError on another size, as all below."""
    return int(_exactly("<Q", payload)[0])


def vring_state(payload: bytes) -> tuple[int, int]:
    """(ring index, number) of NUM, BASE and ENABLE."""
    index, number = _exactly("<II", payload)
    return index, number


def vring_address(payload: bytes) -> VringAddress:
    index, _flags, descriptors, used, available, _log = _exactly("<IIQQQQ", payload)
    return VringAddress(index, descriptors, used, available)


def config_window(payload: bytes) -> tuple[int, int]:
    """(offset, size) of a GET_CONFIG."""
    if len(payload) < 12:
        raise ProtocolError("short GET_CONFIG")
    offset, size, _flags = struct.unpack_from("<III", payload)
    if len(payload) != 12 + size:
        raise ProtocolError("GET_CONFIG of the wrong size")
    return offset, size


def memory_table(payload: bytes) -> list[MemoryRegion]:
    if len(payload) < 8:
        raise ProtocolError("short memory table")
    count, _ = struct.unpack_from("<II", payload)
    if not 0 < count <= MAX_REGIONS or len(payload) < 8 + 32 * count:
        raise ProtocolError(f"memory table of {count} regions in {len(payload)} bytes")
    regions = [MemoryRegion(*struct.unpack_from("<QQQQ", payload, 8 + 32 * i)) for i in range(count)]
    for region in regions:
        check_region(region)
    return regions


def check_region(region: MemoryRegion) -> None:
    """Raises ProtocolError unless sizes and addresses are possible ones."""
    if not 0 < region.size <= _MAX_REGION or not 0 <= region.offset <= _MAX_REGION:
        raise ProtocolError("memory region of an impossible size")
    if max(region.guest_address, region.user_address) + region.size > 1 << 64:
        raise ProtocolError("memory region beyond the end of the address space")


def _exactly(layout: str, payload: bytes) -> tuple[int, ...]:
    if len(payload) != struct.calcsize(layout):
        raise ProtocolError(f"vhost-user payload of {len(payload)} bytes")
    return struct.unpack(layout, payload)
