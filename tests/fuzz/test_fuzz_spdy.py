"""Whatever bytes a SPDY peer sends: events or RemoteProtocolError, the same for any cuts, in bounded memory."""

from __future__ import annotations

import contextlib
import random
import tracemalloc

import pytest

from hyperpod.wire.spdy import (
    Connection,
    DataReceived,
    Event,
    FlowControl,
    LocalProtocolError,
    RemoteProtocolError,
    Role,
    StreamOpened,
    frames,
)


def session(chance: random.Random, role: Role) -> bytearray:
    """A plausible peer's bytes, then damaged."""
    peer = Connection(Role.SERVER if role is Role.CLIENT else Role.CLIENT, flow_control=FlowControl.NONE)
    streams, out = [0, 1, 2], bytearray()
    for _ in range(chance.randrange(12)):
        with contextlib.suppress(LocalProtocolError):
            match chance.randrange(9):
                case 0 | 1:
                    streams.append(peer.open_stream((("streamtype", "data"), ("n", str(chance.random())))))
                case 2 | 3:
                    data = chance.randbytes(chance.choice((0, 1, 100, 5000)))
                    peer.send_data(chance.choice(streams), data, fin=chance.random() < 0.3)
                case 4:
                    peer.reset(chance.choice(streams))
                case 5:
                    peer.ping()
                case 6:
                    out += frames.window_update(chance.choice(streams), chance.getrandbits(32))
                case 7:
                    out += frames.settings([(chance.randrange(9), chance.getrandbits(32))])
                case _:
                    block = chance.randbytes(chance.randrange(30))
                    kind = chance.choice((frames.FrameType.SYN_REPLY, frames.FrameType.HEADERS))
                    out += frames.with_headers(kind, chance.choice(streams), block, fin=False)
        out += b"".join(peer.data_to_send())
    for _ in range(chance.randrange(4)):
        place = chance.randrange(len(out) + 1)
        match chance.randrange(4):
            case 0 if place < len(out):
                out[place] ^= 1 << chance.randrange(8)
            case 1:
                del out[place : place + chance.randrange(30)]
            case 2:
                out[place:place] = chance.randbytes(chance.randrange(30))
            case _:
                out[place:place] = frames.control(
                    frames.FrameType(chance.choice(list(frames.FrameType))),
                    chance.randbytes(chance.randrange(20)),
                )
    return out


def run(role: Role, flow: FlowControl, raw: bytes, steps: list[int]) -> tuple[list[Event], bytes, bool]:
    """Feed in pieces; every stream is replied to. Gives events with payloads merged, what is sent, the failure."""
    connection, events, failed = Connection(role, flow_control=flow), list[Event](), False
    sent, position, index = bytearray(), 0, 0
    while position < len(raw) and not failed:
        step = steps[index % len(steps)]
        index += 1
        try:
            got = connection.receive_data(raw[position : position + step])
        except RemoteProtocolError as exc:
            failed, got = True, exc.events
        for event in got:
            last = events[-1] if events else None
            if not isinstance(event, DataReceived):
                events.append(event)
            elif isinstance(last, DataReceived) and last.stream == event.stream:
                events[-1] = DataReceived(event.stream, bytes(last.data) + bytes(event.data))
            else:
                events.append(DataReceived(event.stream, bytes(event.data)))
        position += step
        sent += b"".join(connection.data_to_send())
        assert len(connection._rest) < 33 * 1024
    return events, bytes(sent), failed


@pytest.mark.parametrize("flow", list(FlowControl))
@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("seed", range(8))
def test_any_bytes(role: Role, flow: FlowControl, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(60):
        raw = bytes(session(chance, role))
        by_byte = run(role, flow, raw, [1])
        assert run(role, flow, raw, [chance.randrange(1, 200) for _ in range(7)]) == by_byte
        assert run(role, flow, raw, [len(raw) + 1]) == by_byte


def test_replies_to_a_hostile_peer() -> None:
    """Calls in any order while bytes come in raise nothing but LocalProtocolError."""
    chance = random.Random(99)
    for _ in range(300):
        server = Connection(Role.SERVER)
        raw, position, streams = bytes(session(chance, Role.SERVER)), 0, [1]
        with contextlib.suppress(RemoteProtocolError):
            while position < len(raw):
                step = chance.choice((1, 20, 500))
                for event in server.receive_data(raw[position : position + step]):
                    if isinstance(event, StreamOpened):
                        streams.append(event.stream)
                    if isinstance(event, DataReceived):
                        server.acknowledge(event.stream, len(event.data))
                position += step
                with contextlib.suppress(LocalProtocolError):
                    server.reply(chance.choice(streams))
                with contextlib.suppress(LocalProtocolError):
                    server.send_data(chance.choice(streams), b"x" * 100, fin=chance.random() < 0.2)
                server.data_to_send()


def test_memory_is_bounded() -> None:
    """64 MiB of frames of every kind, none of which is kept."""
    server, client = Connection(Role.SERVER), Connection(Role.CLIENT, flow_control=FlowControl.NONE)
    stream = client.open_stream(())
    server.receive_data(b"".join(client.data_to_send()))
    server.reply(stream)
    client.receive_data(b"".join(server.data_to_send()))
    tracemalloc.start()
    try:
        base = tracemalloc.get_traced_memory()[0]
        piece = bytes(64 * 1024)
        for _ in range(1000):
            client.send_data(stream, piece)
            more = client.open_stream((("x", "y" * 1000),))
            client.reset(more)
            client.ping()
            for buffer in client.data_to_send():
                server.receive_data(bytes(buffer))
            server.data_to_send()
        assert tracemalloc.get_traced_memory()[0] - base < 1 << 20
    finally:
        tracemalloc.stop()
