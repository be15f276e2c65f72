"""Packets over the scattered pieces of a chain: both of Linux's receive layouts occur; others may."""

from __future__ import annotations

from hyperpod.errors import ProtocolError
from hyperpod.wire.vsock.packet import HEADER_SIZE


def split(pieces: list[memoryview]) -> tuple[bytes | memoryview, list[memoryview]]:
    """The header and the payload of a chain. Raises ProtocolError when it is shorter than a header."""
    if pieces and len(pieces[0]) == HEADER_SIZE:
        return pieces[0], pieces[1:]
    header, payload = split_writable(pieces, room=0)
    return (header[0] if len(header) == 1 else b"".join(header)), payload


def split_writable(pieces: list[memoryview], room: int = 1) -> tuple[list[memoryview], list[memoryview]]:
    """The pieces of a chain that take the header, and those for at least `room` bytes of payload."""
    if pieces:
        first = pieces[0]
        if len(first) > HEADER_SIZE:
            return [first[:HEADER_SIZE]], [first[HEADER_SIZE:], *pieces[1:]]
    header: list[memoryview] = []
    payload: list[memoryview] = []
    missing = HEADER_SIZE
    for piece in pieces:
        if missing:
            header.append(piece[:missing])
            piece = piece[missing:]  # noqa: PLW2901  # the rest of it is payload
            missing -= len(header[-1])
        if piece:
            payload.append(piece)
    if missing or (room and not payload):
        raise ProtocolError(f"buffer of {sum(map(len, pieces))} bytes where a packet should fit")
    return header, payload


def trim(pieces: list[memoryview], length: int) -> list[memoryview]:
    """The first `length` bytes. Raises ProtocolError when there are fewer."""
    if len(pieces) == 1 and len(pieces[0]) >= length:
        return [pieces[0][:length]]
    kept: list[memoryview] = []
    for piece in pieces:
        if not length:
            break
        kept.append(piece[:length])
        length -= len(kept[-1])
    if length:
        raise ProtocolError("packet longer than its descriptors")
    return kept


def scatter(pieces: list[memoryview], data: bytes) -> None:
    """Write `data` over the pieces; raises ProtocolError when they are too short."""
    for piece in pieces:
        part = min(len(piece), len(data))
        piece[:part] = data[:part]
        data = data[part:]
        if not data:
            return
    raise ProtocolError("receive buffer too short for a header")
