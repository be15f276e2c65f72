"""Stdio frames: both ends agree on every byte, over any cuts and reconnects; anything malformed is refused."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperpod.errors import ProtocolError
from hyperpod.wire import stdio
from hyperpod.wire.portpipe import HostPort
from hyperpod.wire.stdio import (
    HEADER,
    MAX_PAYLOAD,
    WINDOW,
    Frame,
    FrameDecoder,
    FrameType,
    Open,
    StreamRefused,
)
from hyperpod.wire.stdioends import AgentSender, HostReader, StdinReceiver, StdinSender

CONTAINER, EXEC = "ab" * 32, "cd" * 16


def joined(buffers: list[bytes | memoryview]) -> bytes:
    return b"".join(buffers)


@given(
    st.binary(max_size=3 * MAX_PAYLOAD), st.integers(0, 2**60), st.lists(st.integers(0, 2**20), max_size=9)
)
def test_data_survives_any_cuts(data: bytes, offset: int, cuts: list[int]) -> None:
    raw = joined(stdio.encode_data(offset, data)) + stdio.encode_eof(offset + len(data))
    places = [0, *sorted(c % (len(raw) + 1) for c in cuts), len(raw)]
    decoder, frames = FrameDecoder(), []
    for a, b in pairwise(places):
        frames += decoder.feed(raw[a:b])
        assert decoder.pending < HEADER.size + MAX_PAYLOAD
    *middle, last = frames
    assert b"".join(f.payload for f in middle) == data
    assert last == Frame(FrameType.EOF, offset + len(data))
    assert decoder.pending == 0


def test_data_is_passed_on_as_it_comes() -> None:
    raw, decoder = joined(stdio.encode_data(7, b"abcdef")), FrameDecoder()
    assert decoder.feed(raw[:10]) == []
    assert decoder.feed(raw[10 : HEADER.size]) == []
    assert decoder.feed(raw[HEADER.size : -2]) == [Frame(FrameType.DATA, 7, b"abcd")]
    assert decoder.pending == 2
    assert decoder.feed(raw[-2:] + stdio.encode_eof(13)) == [
        Frame(FrameType.DATA, 11, b"ef"),
        Frame(FrameType.EOF, 13),
    ]


@given(st.sampled_from(["stdin", "stdout", "stderr"]), st.sampled_from(["", EXEC]), st.integers(0, 2**63 - 1))
def test_open_round_trip(stream: str, exec_id: str, offset: int) -> None:
    for request in (Open(CONTAINER, stream, exec_id, offset), Open(CONTAINER, stream, EXEC, direct=True)):
        [frame] = FrameDecoder().feed(stdio.encode_open(request))
        assert stdio.decode_open(frame) == request


@pytest.mark.parametrize(
    "request_",
    [
        Open("", "port", port=65535),
        Open(CONTAINER, "process", EXEC, tty=True),
        Open(CONTAINER, "process", stdin=True),
        Open("", "process", EXEC, tty=True),
        Open("", "stdout", EXEC),
    ],
)
def test_open_of_a_port_and_of_a_process(request_: Open) -> None:
    [frame] = FrameDecoder().feed(stdio.encode_open(request_))
    assert stdio.decode_open(frame) == request_


@pytest.mark.parametrize(
    "change",
    [
        {"container": "x"}, {"container": ""}, {"container": 1}, {"exec": "zz"}, {"exec": None},
        {"stream": "tty"}, {"stream": []},
        {"from_offset": -1}, {"from_offset": True}, {"from_offset": 1.5}, {"from_offset": 2**63},
        {"stream": "port"}, {"stream": "port", "container": "", "port": 0}, {"stream": "process", "tty": 1},
    ],
)  # fmt: skip
def test_a_malformed_open_is_refused(change: dict[str, object]) -> None:
    fields = {"container": CONTAINER, "exec": "", "stream": "stdout", "from_offset": 0, **change}
    with pytest.raises(ProtocolError):
        stdio.decode_open(Frame(FrameType.OPEN, 0, json.dumps(fields).encode()))


@pytest.mark.parametrize("payload", [b"{", b"[]", b"\xff", b"[" * 60000, b"1"])
def test_an_open_that_is_no_object_is_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        stdio.decode_open(Frame(FrameType.OPEN, 0, payload))


@pytest.mark.parametrize(
    "header",
    [
        (0, 0, 0, 0), (12, 0, 0, 0), (8, 0, 0, 0), (10, 0, 1, 0), (3, 1, 1, 0),
        (3, 0, MAX_PAYLOAD + 1, 0), (3, 0, 0, 0), (6, 0, 1, 0),
        (4, 0, 0, 2**63), (1, 0, 2, 1), (7, 0, 2, 1), (1, 0, 0, 0),
    ],
)  # fmt: skip
def test_a_malformed_frame_is_refused(header: tuple[int, int, int, int]) -> None:
    with pytest.raises(ProtocolError):
        FrameDecoder().feed(HEADER.pack(*header) + b"xx")


@given(st.data())
def test_exactly_once_over_reconnects(data: st.DataObject) -> None:
    """A sender and readers that come and go, acknowledging whatever part they like, lose and repeat nothing."""
    source = data.draw(st.binary(max_size=5000)) * data.draw(st.integers(1, 40))
    sender, written, fed = AgentSender(window=1000), b"", 0
    for _ in range(2000):
        reader = HostReader(Open(CONTAINER, "stdout", from_offset=len(written)))
        incoming, unwritten = sender.attach(len(written)), b""
        for _ in range(data.draw(st.integers(1, 6))):
            piece = source[fed : fed + min(sender.room, data.draw(st.integers(0, 700)) or 1000)]
            sender.feed(piece)
            fed += len(piece)
            if fed == len(source):
                sender.finish()
            incoming += joined(sender.take())
            unwritten += b"".join(f.payload for f in reader.feed(incoming))
            incoming = b""
            count = data.draw(st.integers(0, len(unwritten))) if not reader.eof else len(unwritten)
            written, unwritten = written + unwritten[:count], unwritten[count:]
            for frame in FrameDecoder().feed(reader.ack(len(written))):
                sender.receive(frame)
            assert sender.end - sender.base <= 1000
        sender.detach()
        assert reader.gap_bytes == 0
        if reader.eof:
            break
    assert written == source
    assert sender.drained
    # Whoever asks again is told the end again.
    again = HostReader(Open(CONTAINER, "stdout", from_offset=len(source)))
    assert again.feed(sender.attach(len(source)) + joined(sender.take())) == []
    assert again.eof


def test_a_stream_that_is_handed_over() -> None:
    """What was read before comes first; then nothing does, and what was not asked for is refused."""
    sender, reader = AgentSender(), HostReader(Open(CONTAINER, "stdout", EXEC, direct=True))
    sender.feed(b"before")
    frames = sender.attach(0) + joined(sender.take())
    assert [f.payload for f in reader.feed(frames)] == [b"before"]
    assert not reader.handed_over
    assert reader.feed(stdio.encode_handover(6)) == []
    assert (reader.handed_over, reader.eof) == (True, False)
    for more in (stdio.encode_handover(6), stdio.encode_eof(6), joined(stdio.encode_data(6, b"x"))):
        with pytest.raises(ProtocolError, match="after HANDOVER"):
            reader.feed(more)
    for late in (
        HostReader(Open(CONTAINER, "stdout", EXEC)),
        HostReader(Open(CONTAINER, "stdout", EXEC, direct=True)),
        StdinSender(Open(CONTAINER, "stdin", EXEC)),
        HostPort(80),
    ):
        offset = 1 if isinstance(late, HostReader) and late.request.direct else 0
        with pytest.raises(ProtocolError, match="HANDOVER"):
            late.feed(stdio.encode_opened(0) + stdio.encode_handover(offset))


def test_an_input_and_a_port_that_are_handed_over() -> None:
    frames = stdio.encode_opened(0) + stdio.encode_handover(0)
    for one in (StdinSender(Open(CONTAINER, "stdin", EXEC, direct=True)), HostPort(80, direct=True)):
        one.feed(frames)
        assert one.handed_over
        with pytest.raises(ProtocolError):
            one.feed(stdio.encode_handover(0))


@pytest.mark.parametrize(
    "request_",
    [Open(CONTAINER, "stdout", direct=True), Open(CONTAINER, "stdout", EXEC, 1, direct=True),
     Open(CONTAINER, "process", EXEC, direct=True)],
)  # fmt: skip
def test_what_cannot_be_handed_over(request_: Open) -> None:
    """A container's own output is kept until it is in the log."""
    [frame] = FrameDecoder().feed(stdio.encode_open(request_))
    with pytest.raises(ProtocolError, match="handed over"):
        stdio.decode_open(frame)


def test_what_is_gone_is_a_gap() -> None:
    sender = AgentSender()
    sender.feed(b"0123456789")
    sender.attach(0)
    sender.take()
    sender.ack(6)
    reader = HostReader(Open(CONTAINER, "stdout", from_offset=2))
    [frame] = reader.feed(sender.attach(2) + joined(sender.take()))
    assert (frame.offset, bytes(frame.payload), reader.gap_bytes) == (6, b"6789", 4)
    reader.feed(stdio.encode_gap(20))
    assert (reader.offset, reader.gap_bytes) == (20, 14)


def test_a_gap_takes_no_room_of_the_window() -> None:
    reader = HostReader(Open(CONTAINER, "stdout"))
    reader.feed(stdio.encode_opened(0) + joined(stdio.encode_data(0, b"x" * 10)) + stdio.encode_gap(2**40))
    reader.feed(joined(stdio.encode_data(2**40, b"x" * (WINDOW - 10))))
    with pytest.raises(ProtocolError):
        reader.feed(joined(stdio.encode_data(2**40 + WINDOW - 10, b"x")))


@pytest.mark.parametrize(
    "frames",
    [
        stdio.encode_eof(0),
        stdio.encode_opened(0) * 2,
        stdio.encode_opened(0) + joined(stdio.encode_data(1, b"x")),
        stdio.encode_opened(5) + joined(stdio.encode_data(4, b"x")),
        stdio.encode_opened(0) + stdio.encode_eof(1),
        stdio.encode_opened(0) + stdio.encode_eof(0) + joined(stdio.encode_data(0, b"x")),
        stdio.encode_opened(0) + stdio.encode_eof(0) * 2,
        stdio.encode_opened(0) + stdio.encode_eof(0) + stdio.encode_gap(4),
        stdio.encode_opened(9) + stdio.encode_gap(4),
        stdio.encode_opened(0) + stdio.encode_ack(0),
        stdio.encode_opened(0) + joined(stdio.encode_data(0, b"x" * (WINDOW + 1))),
    ],
)
def test_a_reader_refuses_what_makes_no_sense(frames: bytes) -> None:
    with pytest.raises(ProtocolError):
        HostReader(Open(CONTAINER, "stdout")).feed(frames)


def test_a_refusal_carries_its_reason() -> None:
    with pytest.raises(StreamRefused, match="no such container"):
        HostReader(Open(CONTAINER, "stdout")).feed(stdio.encode_error("no such container"))


def test_a_sender_refuses_what_makes_no_sense() -> None:
    sender = AgentSender()
    sender.feed(b"abc")
    with pytest.raises(ProtocolError):
        sender.attach(4)
    sender.attach(0)
    with pytest.raises(ProtocolError):
        sender.receive(Frame(FrameType.ACK, 1))  # not sent yet
    sender.take()
    sender.receive(Frame(FrameType.ACK, 2))
    for frame in (Frame(FrameType.ACK, 1), Frame(FrameType.ACK, 4), Frame(FrameType.EOF, 3)):
        with pytest.raises(ProtocolError):
            sender.receive(frame)
    with pytest.raises(ValueError, match="room"):
        sender.feed(b"x" * WINDOW)


@given(st.binary(max_size=600_000), st.integers(1, 90_000))
def test_stdin(data: bytes, step: int) -> None:
    sender, receiver, decoder, got = (
        StdinSender(Open(CONTAINER, "stdin")),
        StdinReceiver(),
        FrameDecoder(),
        b"",
    )
    assert sender.room == 0
    sender.feed(stdio.encode_opened(0))
    position = 0
    while True:
        piece = data[position : position + min(step, sender.room)]
        position += len(piece)
        for frame in decoder.feed(joined(sender.data(piece)) if piece else sender.finish()):
            got += receiver.receive(frame)
        if receiver.eof:
            break
        sender.feed(receiver.ack(receiver.offset))
    assert got == data


def test_stdin_is_checked() -> None:
    sender = StdinSender(Open(CONTAINER, "stdin"))
    sender.feed(stdio.encode_opened(0))
    sender.data(b"abc")
    with pytest.raises(ProtocolError):
        sender.feed(stdio.encode_ack(4))
    with pytest.raises(ProtocolError):
        StdinReceiver().receive(Frame(FrameType.DATA, 1, b"x"))
    with pytest.raises(ProtocolError):
        StdinReceiver().receive(Frame(FrameType.OPENED, 0))
