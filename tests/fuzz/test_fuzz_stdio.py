"""Whatever a hostile guest sends as stdio frames: a ProtocolError or good frames, in bounded memory."""

from __future__ import annotations

import contextlib
import random

import pytest

from hyperpod.errors import ProtocolError
from hyperpod.wire import stdio
from hyperpod.wire.stdio import HEADER, MAX_PAYLOAD, WINDOW, Frame, FrameDecoder, Open
from hyperpod.wire.stdioends import AgentSender, HostReader, StdinReceiver, StdinSender

CONTAINER = "ab" * 32


def session(chance: random.Random) -> bytearray:
    """A plausible stream, then damaged."""
    out, offset = bytearray(stdio.encode_opened(0)), 0
    for _ in range(chance.randrange(8)):
        kind = chance.randrange(10)
        if kind < 7:
            data = chance.randbytes(chance.choice((1, 10, 1000, MAX_PAYLOAD)))
            out += b"".join(stdio.encode_data(offset, data))
            offset += len(data)
        elif kind == 7:
            offset += chance.randrange(2**40)
            out += stdio.encode_gap(offset)
        elif kind == 8:
            out += stdio.encode_eof(offset)
        else:
            out += stdio.encode_error("x" * chance.randrange(3000))
    for _ in range(chance.randrange(4)):
        place = chance.randrange(max(1, len(out)))
        if place >= len(out):
            break
        match chance.randrange(4):
            case 0:
                out[place] ^= 1 << chance.randrange(8)
            case 1:
                del out[place : place + chance.randrange(30)]
            case 2:
                out[place:place] = chance.randbytes(chance.randrange(30))
            case _:
                header = (
                    chance.randrange(10),
                    0,
                    chance.choice((0, 1, MAX_PAYLOAD, 2**32 - 1)),
                    chance.getrandbits(64),
                )
                out[place:place] = HEADER.pack(*header)
    return out


@pytest.mark.parametrize("seed", range(20))
def test_a_reader(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(100):
        raw, reader = bytes(session(chance)), HostReader(Open(CONTAINER, "stdout"))
        received = acknowledged = 0
        with contextlib.suppress(ProtocolError):
            position = 0
            while position < len(raw):
                step = chance.choice((1, 13, 1000, len(raw)))
                for frame in reader.feed(raw[position : position + step]):
                    assert frame.payload
                    assert frame.offset + len(frame.payload) <= reader.offset
                    received += len(frame.payload)
                position += step
                assert received + reader.gap_bytes == reader.offset
                assert received - acknowledged <= WINDOW
                if chance.random() < 0.3 and not reader.gap_bytes:
                    reader.ack(reader.offset)
                    acknowledged = received


@pytest.mark.parametrize("seed", range(20))
def test_the_guests_side_against_a_hostile_host(seed: int) -> None:
    chance = random.Random(1000 + seed)
    for _ in range(100):
        raw, decoder = bytes(session(chance)), FrameDecoder()
        sender, receiver, host_stdin = AgentSender(), StdinReceiver(), StdinSender(Open(CONTAINER, "stdin"))
        sender.feed(chance.randbytes(chance.randrange(5000)))
        frames: list[Frame] = []
        with contextlib.suppress(ProtocolError):
            host_stdin.feed(raw)
        with contextlib.suppress(ProtocolError):
            frames = decoder.feed(raw)
        for frame in frames:
            with contextlib.suppress(ProtocolError):
                stdio.decode_open(frame)
            with contextlib.suppress(ProtocolError):
                sender.receive(frame)
            with contextlib.suppress(ProtocolError):
                sender.attach(frame.offset)
                sender.take()
            with contextlib.suppress(ProtocolError):
                receiver.receive(frame)
            assert 0 <= sender.base <= sender.sent <= sender.end
            assert receiver.offset - receiver.acked <= WINDOW
            assert 0 <= host_stdin.acked <= host_stdin.offset
