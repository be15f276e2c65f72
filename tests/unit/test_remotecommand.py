"""Exec and attach sessions, each protocol against a client made of the libraries' other side."""

from __future__ import annotations

import base64
import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Event, Ping, Pong, TextMessage

from hyperpod.errors import ProtocolError
from hyperpod.wire import spdy
from hyperpod.wire.outcome import Outcome
from hyperpod.wire.remotecommand import (
    Channel,
    CommandEvent,
    Left,
    Ready,
    RemoteCommand,
    Resized,
    Sizes,
    SpdyCommand,
    Stdin,
    StdinEnded,
    Wanted,
    WebSocketCommand,
    remote_command,
)
from hyperpod.wire.upgrade import Transport

ALL = Wanted(stdin=True, stdout=True, stderr=True)
TTY = Wanted(stdin=True, stdout=True, tty=True)


def sent(session: RemoteCommand) -> bytes:
    return b"".join(session.data_to_send())


class SpdyClient:
    def __init__(self, session: SpdyCommand) -> None:
        self.session, self.connection = session, spdy.Connection(spdy.Role.CLIENT)
        self.got: dict[int, bytes] = {}
        self.ended: set[int] = set()

    def open(self, kind: str) -> int:
        return self.connection.open_stream((("streamtype", kind),))

    def talk(self) -> list[CommandEvent]:
        """Both ways until nothing is left to say."""
        events: list[CommandEvent] = []
        while True:
            events += self.session.receive(b"".join(self.connection.data_to_send()))
            if not (data := sent(self.session)):
                return events
            for event in self.connection.receive_data(data):
                if isinstance(event, spdy.DataReceived):
                    self.got[event.stream] = self.got.get(event.stream, b"") + event.data
                elif isinstance(event, spdy.StreamEnded):
                    self.ended.add(event.stream)


def test_spdy_v4() -> None:
    client = SpdyClient(SpdyCommand("v4.channel.k8s.io", ALL))
    error, stdin, stdout = (client.open(kind) for kind in ("error", "stdin", "stdout"))
    assert client.talk() == []
    stderr = client.open("stderr")
    assert client.talk() == [Ready()]
    client.connection.send_data(stdin, b"input")
    client.connection.end(stdin)
    assert client.talk() == [Stdin(b"input"), StdinEnded()]
    client.session.send(Channel.STDOUT, b"out")
    client.session.send(Channel.STDERR, b"err")
    client.session.end(Channel.STDERR)
    client.session.finish(Outcome(7))
    client.talk()
    assert (client.got[stdout], client.got[stderr]) == (b"out", b"err")
    assert json.loads(client.got[error])["details"]["causes"] == [{"reason": "ExitCode", "message": "7"}]
    assert client.ended == {error, stdin, stdout, stderr}
    assert client.connection.streams == 3  # the client's own halves


@pytest.mark.parametrize(("version", "resizes"), [("v3.", True), ("v2.", False), ("", False)])
def test_older_versions_tell_in_words(version: str, resizes: bool) -> None:
    session = SpdyCommand(f"{version}channel.k8s.io", TTY)
    client = SpdyClient(session)
    error, *_ = (client.open(kind) for kind in ("error", "stdin", "stdout"))
    assert client.talk() == ([] if resizes else [Ready()])
    if resizes:
        resize = client.open("resize")
        assert client.talk() == [Ready()]
        client.connection.send_data(resize, b'{"Width":80,"Height":24}\n{"Width":')
        assert client.talk() == [Resized(24, 80)]
        client.connection.send_data(resize, b'100,"Height":50}')
        assert client.talk() == [Resized(50, 100)]
    session.finish(Outcome(1))
    client.talk()
    assert client.got[error] == b"command terminated with non-zero exit code: 1"


def test_streams_that_were_not_asked_for_are_refused() -> None:
    client = SpdyClient(SpdyCommand("v4.channel.k8s.io", Wanted(stdout=True)))
    error, twice, stdin, odd, stdout = (client.open(k) for k in ("error", "error", "stdin", "x", "stdout"))
    assert client.talk() == [Ready()]
    assert [client.connection.is_open(s) for s in (error, twice, stdin, odd, stdout)] == [1, 0, 0, 0, 1]


def test_a_client_that_resets_or_leaves() -> None:
    client = SpdyClient(SpdyCommand("v4.channel.k8s.io", ALL))
    streams = [client.open(kind) for kind in ("error", "stdin", "stdout", "stderr")]
    client.talk()
    client.connection.reset(streams[2])
    client.connection.reset(streams[1])
    client.connection.close()
    assert client.talk() == [StdinEnded(), Left()]
    client.session.send(Channel.STDOUT, b"nobody reads this")
    client.session.finish(Outcome(0))
    client.talk()
    assert streams[2] not in client.got


def test_broken_spdy_is_a_protocol_error() -> None:
    session = SpdyCommand("v4.channel.k8s.io", ALL)
    with pytest.raises(ProtocolError, match="SPDY"):
        session.receive(b"\x80\x09\0\1\0\0\0\0")
    assert sent(session)


class WebClient:
    def __init__(self, session: RemoteCommand) -> None:
        self.session, self.connection = session, Connection(ConnectionType.CLIENT)

    def say(self, *events: Event) -> list[CommandEvent]:
        return self.session.receive(b"".join(self.connection.send(event) for event in events))

    def hear(self) -> list[bytes | str | int]:
        """Messages, and the code of a goodbye."""
        self.connection.receive_data(sent(self.session))
        out: list[bytes | str | int] = []
        for event in self.connection.events():
            if isinstance(event, BytesMessage | TextMessage):
                out.append(event.data if isinstance(event.data, str) else bytes(event.data))
            elif isinstance(event, CloseConnection):
                out.append(int(event.code))
            elif isinstance(event, Pong):
                out.append("pong")
        return out


def test_websocket_v5() -> None:
    client = WebClient(WebSocketCommand("v5.channel.k8s.io", ALL))
    assert client.hear() == [b"\x01"]
    assert client.say(BytesMessage(b"\x00abc"), Ping()) == [Ready(), Stdin(b"abc")]
    assert client.hear() == ["pong"]
    assert client.say(BytesMessage(b"\x00d", message_finished=False), BytesMessage(b"ef")) == [
        Stdin(b"d"),
        Stdin(b"ef"),
    ]
    assert client.say(BytesMessage(b"\xff\x00"), BytesMessage(b"\x00late"), BytesMessage(b"\xff\x01")) == [
        StdinEnded()
    ]
    client.session.send(Channel.STDOUT, b"out")
    client.session.end(Channel.STDOUT)
    client.session.finish(Outcome(0))
    assert client.hear() == [b"\x01out", b'\x03{"metadata":{},"status":"Success"}', 1000]
    assert client.say(CloseConnection(1000)) == [Left()]


def test_a_ping_behind_our_goodbye_breaks_nothing() -> None:
    """client-go pings all the time, also while it has yet to read how the command ended."""
    client = WebClient(WebSocketCommand("v5.channel.k8s.io", ALL))
    client.session.finish(Outcome(0))
    assert client.say(Ping(b"there?"), Ping()) == [Ready()]
    assert client.hear() == [b"\x01", b'\x03{"metadata":{},"status":"Success"}', 1000]
    assert client.say(CloseConnection(1000)) == [Left()]


def test_websocket_v4_has_no_close_signal() -> None:
    client = WebClient(WebSocketCommand("v4.channel.k8s.io", Wanted(stdout=True, stdin=True)))
    assert client.say(BytesMessage(b"\xff\x00"), TextMessage("\0text")) == [Ready(), Stdin(b"text")]


@pytest.mark.parametrize("signal", [b"\xff", b"\xff\x05", b"\xff\x00\x00"])
def test_a_bad_close_signal(signal: bytes) -> None:
    client = WebClient(WebSocketCommand("v5.channel.k8s.io", ALL))
    with pytest.raises(ProtocolError):
        client.say(BytesMessage(signal))


@pytest.mark.parametrize("protocol", ["base64.channel.k8s.io", "v4.base64.channel.k8s.io"])
def test_base64(protocol: str) -> None:
    client = WebClient(WebSocketCommand(protocol, TTY))
    assert client.hear() == ["1"]
    size = "4" + base64.b64encode(b'{"Width":9,"Height":8}').decode()
    said = TextMessage("0" + base64.b64encode(b"foo\n").decode()), TextMessage(size), TextMessage("0")
    assert client.say(*said) == [Ready(), Stdin(b"foo\n"), Resized(8, 9)]
    client.session.send(Channel.STDOUT, b"bar")
    assert client.hear() == ["1" + base64.b64encode(b"bar").decode()]
    with pytest.raises(ProtocolError):
        client.say(TextMessage("0!!!!"))


def test_no_protocol_is_the_first() -> None:
    client = WebClient(WebSocketCommand("", Wanted(stderr=True)))
    assert client.hear() == [b"\x02"]
    client.session.finish(Outcome(None, "gone"))
    assert client.hear() == [b"\x03gone", 1000]


def test_input_that_was_not_asked_for_is_ignored() -> None:
    client = WebClient(WebSocketCommand("v4.channel.k8s.io", Wanted(stdout=True)))
    assert client.say(
        BytesMessage(b"\x00x"), BytesMessage(b'\x04{"Width":9,"Height":8}'), BytesMessage(b"")
    ) == [Ready()]


def test_broken_websocket_is_a_protocol_error() -> None:
    session = WebSocketCommand("v4.channel.k8s.io", ALL)
    with pytest.raises(ProtocolError, match="WebSocket"):
        session.receive(b"\x82\x05hello")  # not masked
    assert sent(session)
    assert session.receive(b"anything") == [Left()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b'{"width":80,"height":24}', [Resized(24, 80)]),
        (b'{"Width":0,"Height":24}{"Width":1,"Height":65536}', []),
        (b'[]{"Width":"80"}7 {"Width":80,"Height":24}', [Resized(24, 80)]),
        (b'{"Width":8', []),
        (b"x" * 5000 + b'{"Width":80,"Height":24}', []),
    ],
)
def test_sizes(text: bytes, expected: list[Resized]) -> None:
    assert Sizes().feed(text) == expected
    by_byte = Sizes()
    assert [size for i in range(len(text)) for size in by_byte.feed(text[i : i + 1])] == expected


PROTOCOLS = ["v5.channel.k8s.io", "v4.channel.k8s.io", "base64.channel.k8s.io"]


@given(st.binary(max_size=400), st.sampled_from(PROTOCOLS), st.booleans())
def test_any_bytes(data: bytes, protocol: str, is_spdy: bool) -> None:
    transport = Transport.SPDY if is_spdy else Transport.WEBSOCKET
    session = remote_command(transport, protocol.replace("base64.", "") if is_spdy else protocol, TTY)
    try:
        for a, b in pairwise([*range(0, len(data), 7), len(data)]):
            session.receive(data[a:b])
            session.send(Channel.STDOUT, b"x")
    except ProtocolError:
        pass
    session.finish(Outcome(0))
    session.data_to_send()


@given(st.lists(st.binary(max_size=70_000), max_size=6), st.integers(1, 40_000))
def test_input_arrives_whatever_the_cuts(messages: list[bytes], step: int) -> None:
    client = Connection(ConnectionType.CLIENT)
    raw = b"".join(client.send(BytesMessage(b"\0" + message)) for message in messages)
    session, got = WebSocketCommand("v4.channel.k8s.io", ALL), b""
    for start in range(0, len(raw), step):
        for event in session.receive(raw[start : start + step]):
            got += event.data if isinstance(event, Stdin) else b""
    assert got == b"".join(messages)
