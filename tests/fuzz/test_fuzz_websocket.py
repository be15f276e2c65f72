"""Whatever bytes a WebSocket client sends: what wsproto alone makes of them, the same for any cuts."""

from __future__ import annotations

import contextlib
import random
import struct
import tracemalloc

import pytest
from websockets.utils import apply_mask
from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping, TextMessage
from wsproto.frame_protocol import CloseReason
from wsproto.utilities import LocalProtocolError

from hyperpod.errors import ProtocolError
from hyperpod.wire import websocket
from hyperpod.wire.websocket import MessageCodec

Messages = list[tuple[bytes, bool]]
"""What has come of each, and whether it is whole."""

_OPCODES = (0, 0, 0, 1, 2, 2, 2, 8, 9, 10, 3, 11)
_TRAILER = bytes(20)
"""Whatever header the random bytes end in, it is whole, and some of its payload has come."""


def frame(chance: random.Random) -> bytes:
    """Of a client; now and then what none may send."""
    first = (0x80 if chance.random() < 0.5 else 0) | chance.choice(_OPCODES)
    length = chance.choice((0, 1, 2, 3, 4, 7, 60, 125, 126, 127, 500))
    if chance.random() < 0.02:
        first |= 0x40
    form = 0 if length < 126 else 1
    if chance.random() < 0.03:
        form = chance.randrange(3)
    mask, masked = chance.randbytes(4), 0 if chance.random() < 0.02 else 0x80
    header = (
        bytes((first, masked | length & 127)),
        struct.pack("!BBH", first, masked | 126, length),
        struct.pack("!BBQ", first, masked | 127, length | (1 << 63 if chance.random() < 0.3 else 0)),
    )[form]
    payload = chance.choice(
        (chance.randbytes(length), b"\x03\xe8" + b"a" * (length - 2), b"\xc3\xa9" * length)
    )
    return header + mask + apply_mask(payload[:length], mask)


def session(chance: random.Random) -> bytes:
    client, out = Connection(ConnectionType.CLIENT), bytearray()
    for _ in range(chance.randrange(12)):
        with contextlib.suppress(LocalProtocolError, TypeError):  # another kind within a message
            match chance.randrange(8):
                case 0 | 1 | 2:
                    data = chance.randbytes(chance.choice((0, 1, 5, 125, 126, 400)))
                    out += client.send(BytesMessage(data, message_finished=chance.random() < 0.6))
                case 3:
                    out += client.send(
                        TextMessage("é" * chance.randrange(90), message_finished=chance.random() < 0.6)
                    )
                case 4:
                    out += client.send(Ping(chance.randbytes(chance.randrange(126))))
                case 5 if chance.random() < 0.3:
                    out += client.send(CloseConnection(1000, "bye"))
                case _ if chance.random() < 0.3:
                    out += frame(chance)
    if out and chance.random() < 0.3:
        out[chance.randrange(len(out))] ^= 1 << chance.randrange(8)
    return bytes(out) + _TRAILER


def collect(messages: Messages, data: bytes, *, last: bool) -> None:
    if messages and not messages[-1][1]:
        data = messages.pop()[0] + data
    messages.append((data, last))


def ours(raw: bytes, step: int) -> tuple[Messages, bytes, bool]:
    """Messages, what is sent, and whether it failed."""
    codec, messages, sent, failed = MessageCodec(), Messages(), bytearray(), False
    for start in range(0, len(raw), step):
        try:
            for piece in codec.receive(raw[start : start + step]):
                assert piece.first == (not messages or messages[-1][1])
                collect(messages, piece.data, last=piece.last)
        except ProtocolError:
            failed = True
            assert codec.closed
        sent += b"".join(codec.data_to_send())
        assert len(codec._frames._rest) < 14
    return messages, bytes(sent), failed


def theirs(raw: bytes) -> tuple[Messages, bytes, bool]:
    """By byte: of what comes together with invalid UTF-8 wsproto tells nothing."""
    connection, messages, sent = Connection(ConnectionType.SERVER), Messages(), bytearray()
    for start in range(len(raw)):
        connection.receive_data(raw[start : start + 1])
        for event in connection.events():
            if isinstance(event, BytesMessage | TextMessage):
                data = event.data.encode() if isinstance(event.data, str) else bytes(event.data)
                collect(messages, data, last=event.message_finished)
            elif isinstance(event, Ping):
                sent += connection.send(event.response())
            elif isinstance(event, CloseConnection):
                broken = connection.state is ConnectionState.OPEN
                goodbye = CloseConnection(CloseReason(event.code)) if broken else event.response()
                return messages, bytes(sent + connection.send(goodbye)), broken
    return messages, bytes(sent), False


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("in_python", [False, True])
def test_any_bytes(monkeypatch: pytest.MonkeyPatch, seed: int, in_python: bool) -> None:
    """`in_python`: as where websockets has no extension module."""
    if in_python:
        monkeypatch.setattr(websocket, "apply_mask", apply_mask)
    chance, ends = random.Random(seed), set()
    for _ in range(80):
        raw = session(chance)
        expected = theirs(raw)
        assert ours(raw, 1) == expected
        for step in (chance.randrange(1, 200), chance.randrange(200, 2000), len(raw)):
            messages, sent, failed = ours(raw, step)
            assert (sent, failed) == expected[1:]
            # What came together with the mistake is not told.
            assert failed or messages == expected[0]
        ends.add((expected[2], bool(expected[0])))
    assert len(ends) == 4


def test_the_extension_module_is_there() -> None:
    """Locked wheels have it for all that these tests run on."""
    assert vars(websocket)["apply_mask"] is not apply_mask


def test_memory_is_bounded() -> None:
    """64 MiB of one message, with pings in between."""
    codec = MessageCodec()
    piece = b"\0\xfe" + (60_000).to_bytes(2, "big") + b"mask" + bytes(60_000)
    assert codec.receive(b"\x02\x80mask")
    tracemalloc.start()
    try:
        base = tracemalloc.get_traced_memory()[0]
        for _ in range(1100):
            for part in (piece[:3], piece[3:40_000], piece[40_000:]):
                codec.receive(part)
            codec.receive(b"\x89\x80mask")
            codec.data_to_send()
        assert tracemalloc.get_traced_memory()[0] - base < 1 << 20
    finally:
        tracemalloc.stop()
