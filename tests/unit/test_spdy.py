"""SPDY/3.1: round trips between the two roles, any cuts give the same events, every rule has its refusal."""

from __future__ import annotations

import zlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperpod.wire import spdy
from hyperpod.wire.spdy import (
    Connection,
    DataReceived,
    Event,
    FlowControl,
    GoAwayStatus,
    GoneAway,
    HeadersReceived,
    Limits,
    LocalProtocolError,
    PingAnswered,
    RemoteProtocolError,
    ResetStatus,
    Role,
    SettingsReceived,
    StreamEnded,
    StreamOpened,
    StreamReplied,
    StreamReset,
    WindowOpened,
    frames,
)
from hyperpod.wire.spdy.dictionary import ADLER32, DICTIONARY
from hyperpod.wire.spdy.headers import HeaderCompressor, HeaderDecompressor
from hyperpod.wire.spdy.states import TRANSITIONS, Half, Sends

HEADERS = (("streamtype", "stdin"), ("port", "80"), ("port", "81"))


def sent(connection: Connection) -> bytes:
    return b"".join(connection.data_to_send())


def merged(events: list[Event]) -> list[Event]:
    """Neighbouring payloads of one stream put together: where they are cut says nothing."""
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        if isinstance(event, DataReceived):
            if isinstance(last, DataReceived) and last.stream == event.stream:
                out[-1] = DataReceived(event.stream, bytes(last.data) + bytes(event.data))
            else:
                out.append(DataReceived(event.stream, bytes(event.data)))
        else:
            out.append(event)
    return out


def pair(flow: FlowControl = FlowControl.AUTO) -> tuple[Connection, Connection]:
    return Connection(Role.CLIENT, flow_control=flow), Connection(Role.SERVER, flow_control=flow)


def opened(flow: FlowControl = FlowControl.AUTO) -> tuple[Connection, Connection, int]:
    """A stream of the client's that the server has replied to."""
    client, server = pair(flow)
    stream = client.open_stream(HEADERS)
    assert server.receive_data(sent(client)) == [StreamOpened(stream, HEADERS)]
    server.reply(stream)
    assert client.receive_data(sent(server)) == [StreamReplied(stream, ())]
    return client, server, stream


def test_the_dictionary_is_the_one_of_the_specification() -> None:
    assert (len(DICTIONARY), zlib.adler32(DICTIONARY)) == (1423, ADLER32)


def test_a_whole_life() -> None:
    client, server, stream = opened()
    client.send_data(stream, b"question")
    client.end(stream)
    assert server.receive_data(sent(client)) == [DataReceived(stream, b"question"), StreamEnded(stream)]
    server.send_headers(stream, (("x", "y"),))
    server.send_data(stream, b"answer", fin=True)
    assert client.receive_data(sent(server)) == [
        HeadersReceived(stream, (("x", "y"),)), DataReceived(stream, b"answer"), StreamEnded(stream),
    ]  # fmt: skip
    assert client.streams == server.streams == 0
    ident = client.ping()
    assert server.receive_data(sent(client)) == []
    assert client.receive_data(sent(server)) == [PingAnswered(ident)]
    client.close()
    client.close()
    assert server.receive_data(sent(client)) == [GoneAway(0, GoAwayStatus.OK)]
    with pytest.raises(LocalProtocolError):
        server.open_stream(())


def test_the_server_opens_streams_too() -> None:
    client, server = pair()
    stream = server.open_stream((), fin=True, priority=3)
    assert stream == 2
    assert client.receive_data(sent(server)) == [StreamOpened(2, (), 0, 3), StreamEnded(2)]
    client.reply(2, fin=True)
    assert server.receive_data(sent(client)) == [StreamReplied(2, ()), StreamEnded(2)]
    assert client.streams == server.streams == 0


operations = st.lists(
    st.one_of(
        st.tuples(st.just("open"), st.booleans()),
        st.tuples(st.just("data"), st.integers(0, 9), st.binary(max_size=300), st.booleans()),
        st.tuples(st.just("headers"), st.integers(0, 9)),
        st.tuples(st.just("reset"), st.integers(0, 9)),
        st.tuples(st.just("ping")),
        st.tuples(st.just("junk"), st.integers(0, 2**31 - 1), st.binary(max_size=20)),
    ),
    max_size=30,
)


def script(steps: list[tuple[object, ...]]) -> tuple[bytes, list[int]]:
    """Bytes of a client that does this, and the streams that it opened."""
    client, streams, raw = Connection(Role.CLIENT, flow_control=FlowControl.NONE), [], bytearray()
    for step in steps:
        try:
            match step:
                case ("open", bool(fin)):
                    streams.append(client.open_stream(HEADERS, fin=fin))
                case ("data", int(index), bytes(data), bool(fin)):
                    client.send_data(streams[index], data, fin=fin)
                case ("headers", int(index)):
                    client.send_headers(streams[index], HEADERS)
                case ("reset", int(index)):
                    client.reset(streams[index])
                case ("ping",):
                    client.ping()
                case ("junk", int(number), bytes(data)):
                    raw += sent(client) + frames.data_header(number or 1, len(data), fin=False) + data
        except (LocalProtocolError, IndexError):
            pass
        raw += sent(client)
    return bytes(raw), streams


@given(operations, st.lists(st.integers(0, 2**20), max_size=9))
def test_cuts_do_not_matter(steps: list[tuple[object, ...]], cuts: list[int]) -> None:
    raw, _ = script(steps)
    whole = Connection(Role.SERVER)
    expected = merged(whole.receive_data(raw))
    reply = sent(whole)
    places = [0, *sorted(c % (len(raw) + 1) for c in cuts), len(raw)]
    for pieces in ([raw[a:b] for a, b in pairwise(places)], [raw[i : i + 1] for i in range(len(raw))]):
        connection, events = Connection(Role.SERVER), list[Event]()
        for piece in pieces:
            events += connection.receive_data(piece)
        assert merged(events) == expected
        assert sent(connection) == reply


@given(operations)
def test_what_is_sent_arrives(steps: list[tuple[object, ...]]) -> None:
    steps = [step for step in steps if step[0] != "junk"]
    raw, streams = script(steps)
    events = Connection(Role.SERVER).receive_data(raw)
    assert [e.stream for e in events if isinstance(e, StreamOpened)] == streams
    assert not [e for e in events if isinstance(e, StreamReset) and e.ours]


names = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
                min_size=1, max_size=20)  # fmt: skip
values = st.text(st.characters(min_codepoint=1, max_codepoint=255), max_size=50)


@given(st.lists(st.lists(st.tuples(names, values), max_size=8, unique_by=lambda pair: pair[0]), max_size=5))
def test_header_blocks(blocks: list[list[tuple[str, str]]]) -> None:
    compressor, decompressor = HeaderCompressor(), HeaderDecompressor(65536, 128)
    for block in blocks:
        assert decompressor.decode(compressor.encode(block)) == tuple(block)


def test_a_header_bomb_is_not_expanded() -> None:
    bomb = zlib.compressobj(zdict=DICTIONARY)
    block = bomb.compress(b"\0\0\0\1" + b"\x7f\0\0\0" + bytes(2**26)) + bomb.flush(zlib.Z_SYNC_FLUSH)
    server = Connection(Role.SERVER, limits=Limits(control_frame=2**20))
    with pytest.raises(RemoteProtocolError, match="more than 65536"):
        server.receive_data(frames.syn_stream(1, 0, 0, block, 0))


def test_header_limits() -> None:
    server = Connection(Role.SERVER)
    block = HeaderCompressor().encode([(f"h{i}", "") for i in range(129)])
    with pytest.raises(RemoteProtocolError, match="129 headers"):
        server.receive_data(frames.syn_stream(1, 0, 0, block, 0))
    with pytest.raises(RemoteProtocolError, match="control frame of"):
        Connection(Role.SERVER).receive_data(frames.control(frames.FrameType.PING, bytes(2**20)))


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_headers_that_cannot_be_sent(name: str) -> None:
    client = Connection(Role.CLIENT)
    with pytest.raises(LocalProtocolError):
        client.open_stream(((name, "x"),))
    with pytest.raises(LocalProtocolError):
        client.open_stream((("x", "\u20ac"),))
    assert sent(client) == b""


def raw_block(*fields: bytes, count: int | None = None, extra: bytes = b"") -> bytes:
    """A compressed block of names and values as they are."""
    plain = (len(fields) // 2 if count is None else count).to_bytes(4, "big")
    plain += b"".join(len(field).to_bytes(4, "big") + field for field in fields) + extra
    deflate = zlib.compressobj(zdict=DICTIONARY)
    return deflate.compress(plain) + deflate.flush(zlib.Z_SYNC_FLUSH)


@pytest.mark.parametrize("fields", [(b"Upper", b""), (b"", b""), (b"a", b"", b"a", b""), (b"a\0b", b"")])
def test_bad_headers_cost_their_stream_only(fields: tuple[bytes, ...]) -> None:
    server = Connection(Role.SERVER)
    assert server.receive_data(frames.syn_stream(1, 0, 0, raw_block(*fields), 0)) == []
    assert sent(server) == frames.rst_stream(1, ResetStatus.PROTOCOL_ERROR)
    assert server.receive_data(frames.ping(1)) == []


FINISHED = zlib.compressobj(zdict=DICTIONARY)
FATAL = [
    frames.syn_stream(1, 0, 0, b"not zlib", 0),
    frames.syn_stream(1, 0, 0, raw_block(b"a", b"b", count=2), 0),
    frames.syn_stream(1, 0, 0, raw_block(b"a", b"b", extra=b"!"), 0),
    frames.syn_stream(1, 0, 0, raw_block(count=2**31), 0),
    frames.syn_stream(1, 0, 0, FINISHED.compress(bytes(4)) + FINISHED.flush(), 0),
    frames.syn_stream(1, 0, 0, b"", 0),
    frames.syn_stream(0, 0, 0, raw_block(), 0),
    frames.syn_stream(2, 0, 0, raw_block(), 0),
    frames.syn_stream(1, 0, 0, raw_block(), 0x80),
    frames.control(frames.FrameType.SYN_STREAM, b"short"),
    frames.with_headers(frames.FrameType.SYN_REPLY, 0, raw_block(), fin=False),
    frames.control(frames.FrameType.SYN_REPLY, b""),
    frames.data_header(0, 0, fin=False),
    frames.rst_stream(0, 1),
    frames.control(frames.FrameType.RST_STREAM, bytes(9)),
    frames.control(frames.FrameType.PING, bytes(5)),
    frames.control(frames.FrameType.PING, bytes(4), flags=1),
    frames.control(frames.FrameType.GOAWAY, bytes(4)),
    frames.control(frames.FrameType.SETTINGS, b""),
    frames.control(frames.FrameType.SETTINGS, b"\0\0\0\2" + bytes(8)),
    frames.settings([(frames.Setting.INITIAL_WINDOW_SIZE, 2**31)]),
    frames.window_update(0, 0),
    frames.window_update(0, frames.MAX_WINDOW),
    b"\x80\x02\0\1\0\0\0\0",  # version 2
]


@pytest.mark.parametrize("raw", FATAL, ids=range(len(FATAL)))
def test_what_ends_a_session(raw: bytes) -> None:
    server = Connection(Role.SERVER)
    with pytest.raises(RemoteProtocolError):
        server.receive_data(raw)
    with pytest.raises(RemoteProtocolError):
        server.receive_data(frames.ping(1))
    assert sent(server) == frames.goaway(server._last_remote, GoAwayStatus.PROTOCOL_ERROR)


def test_stream_numbers_only_rise() -> None:
    server, block = Connection(Role.SERVER), HeaderCompressor()
    server.receive_data(frames.syn_stream(5, 0, 0, block.encode(()), 0))
    with pytest.raises(RemoteProtocolError, match="stream 3"):
        server.receive_data(frames.syn_stream(3, 0, 0, block.encode(()), 0))


def test_unknown_frames_are_ignored() -> None:
    server = Connection(Role.SERVER)
    assert server.receive_data(b"\x80\x03\0\x0a\0\0\0\3abc" + b"\x80\x03\x12\x34\0\0\0\0") == []
    assert sent(server) == b""


def test_what_a_stream_can_do_is_what_the_table_says() -> None:
    """The table against calls: whatever it does not have is refused, and changes nothing."""
    for half in (Half.MUST_REPLY, Half.OPEN, Half.DONE):
        for sends in Sends:
            client, server = pair()
            stream = client.open_stream(())
            server.receive_data(sent(client))
            if half is not Half.MUST_REPLY:
                server.reply(stream)
            if half is Half.DONE:
                server.end(stream)
            sent(server)
            allowed = sends in TRANSITIONS[half]
            if sends in (Sends.SYN, Sends.SYN_FIN):
                assert not allowed
                continue
            if allowed:
                act(server, stream, sends)
                assert sent(server)
            else:
                with pytest.raises(LocalProtocolError):
                    act(server, stream, sends)
                assert not sent(server)


def act(connection: Connection, stream: int, sends: Sends) -> None:
    fin = sends.name.endswith("_FIN")
    match sends.name.removesuffix("_FIN"):
        case "REPLY":
            connection.reply(stream, fin=fin)
        case "HEADERS":
            connection.send_headers(stream, (), fin=fin)
        case "DATA":
            connection.send_data(stream, b"x", fin=fin)


def test_violations_within_a_stream_end_it_alone() -> None:
    client, server, stream = opened()
    client.end(stream)
    server.receive_data(sent(client))
    assert server.receive_data(frames.data_header(stream, 3, fin=False) + b"abc") == [
        StreamReset(stream, ResetStatus.STREAM_ALREADY_CLOSED, ours=True)
    ]
    assert sent(server) == frames.rst_stream(stream, ResetStatus.STREAM_ALREADY_CLOSED)
    assert server.receive_data(frames.data_header(stream, 3, fin=True) + b"abc") == []
    assert sent(server) == b""  # it may have been under way
    server.receive_data(frames.data_header(99, 0, fin=True))
    assert sent(server) == frames.rst_stream(99, ResetStatus.INVALID_STREAM)
    client, server, stream = opened()
    server.reset(stream)
    with pytest.raises(LocalProtocolError):
        server.send_data(stream, b"x")
    assert client.receive_data(sent(server)) == [StreamReset(stream, ResetStatus.CANCEL)]
    compressor = HeaderCompressor()
    client = Connection(Role.CLIENT)
    stream = client.open_stream(())
    reply = frames.with_headers(frames.FrameType.SYN_REPLY, stream, compressor.encode(()), fin=False)
    client.receive_data(reply)
    again = frames.with_headers(frames.FrameType.SYN_REPLY, stream, compressor.encode(()), fin=False)
    assert client.receive_data(again) == [StreamReset(stream, ResetStatus.STREAM_IN_USE, ours=True)]


def test_too_many_streams_are_refused() -> None:
    server, client = Connection(Role.SERVER, limits=Limits(streams=2)), Connection(Role.CLIENT)
    streams = [client.open_stream(()) for _ in range(3)]
    server.receive_data(sent(client))
    assert client.receive_data(sent(server)) == [StreamReset(streams[2], ResetStatus.REFUSED_STREAM)]
    client.reset(streams[0])
    more = client.open_stream(())
    assert StreamOpened(more, ()) in server.receive_data(sent(client))


def test_after_goaway_streams_are_ignored() -> None:
    client, server, stream = opened()
    server.close()
    late = client.open_stream(HEADERS)
    client.send_data(stream, b"goes on")
    assert server.receive_data(sent(client)) == [DataReceived(stream, b"goes on")]
    assert not server.is_open(late)


def test_a_peer_that_counts_is_heeded() -> None:
    _, server, stream = opened()
    server.send_data(stream, bytes(100_000))  # more than a window, to a peer that has not counted so far
    assert server.window(stream) > 2**30
    assert server.receive_data(frames.window_update(stream, 50_000)) == [WindowOpened(stream)]
    assert server.window(stream) == 0  # the session's is used up
    with pytest.raises(LocalProtocolError, match="0 fit"):
        server.send_data(stream, b"x")
    assert server.receive_data(frames.window_update(0, 100_000)) == [WindowOpened(0)]
    assert server.window(stream) == 65536 - 100_000 + 50_000
    server.send_data(stream, bytes(server.window(stream)), fin=True)


def test_settings_change_windows() -> None:
    _, server, stream = opened(FlowControl.OBEYED)
    values = ((frames.Setting.INITIAL_WINDOW_SIZE, 1000), (frames.Setting.MAX_CONCURRENT_STREAMS, 1))
    assert server.receive_data(frames.settings(values)) == [SettingsReceived(values)]
    assert server.window(stream) == 1000
    server.open_stream(())
    with pytest.raises(LocalProtocolError, match="1 streams"):
        server.open_stream(())


def test_windows_are_given_back_also_to_who_ignores_them() -> None:
    client, server, stream = opened()
    client.send_data(stream, bytes(40_000))
    server.receive_data(sent(client))
    server.acknowledge(stream, 40_000)
    assert sent(server) == frames.window_update(0, 40_000) + frames.window_update(stream, 40_000)
    client.send_data(stream, bytes(100_000))
    [event] = server.receive_data(sent(client))
    assert isinstance(event, DataReceived)
    assert len(event.data) == 100_000
    server.acknowledge(stream, 100_000)
    assert sent(server) == frames.window_update(0, 100_000) + frames.window_update(stream, 100_000)
    _, server, stream = opened(FlowControl.NONE)
    server.acknowledge(stream, 100_000)
    assert sent(server) == b""


def test_an_obeyed_window_is_enforced() -> None:
    _, server, stream = opened(FlowControl.OBEYED)
    server.receive_data(frames.data_header(stream, 65536, fin=False) + bytes(65536))
    server.acknowledge(0, 65536)
    assert server.receive_data(frames.data_header(stream, 1, fin=False) + b"x") == [
        StreamReset(stream, ResetStatus.FLOW_CONTROL_ERROR, ours=True)
    ]
    _, server, stream = opened(FlowControl.OBEYED)
    server.receive_data(frames.data_header(stream, 65536, fin=False) + bytes(65536))
    with pytest.raises(RemoteProtocolError, match="session's window"):
        server.receive_data(frames.data_header(stream, 1, fin=False) + b"x")


def test_payloads_are_not_copied() -> None:
    client, server, stream = opened()
    payload = bytearray(3_000_000)
    client.send_data(stream, payload)
    buffers = client.data_to_send()
    assert sum(isinstance(b, memoryview) and b.obj is payload for b in buffers) == 3
    raw = b"".join(buffers)
    for event in server.receive_data(raw):
        assert isinstance(event, DataReceived)
        assert isinstance(event.data, memoryview)
        assert event.data.obj is raw


def test_a_header_by_name() -> None:
    assert spdy.find(HEADERS, "port") == "80"
    assert spdy.find(HEADERS, "nothing") == ""
