"""Port-forward sessions over all three transports."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, TextMessage

from hyperpod.errors import InvalidArgument, ProtocolError
from hyperpod.wire import spdy
from hyperpod.wire.portforward import (
    Dial,
    Dropped,
    Forward,
    ForwardEnded,
    ForwardEvent,
    ForwardLeft,
    PortForward,
    SpdyForward,
    TunnelForward,
    WebSocketForward,
    port_forward,
)
from hyperpod.wire.upgrade import Transport


class Client:
    """SPDY, in a tunnel or not."""

    def __init__(self, session: PortForward) -> None:
        self.session, self.connection = session, spdy.Connection(spdy.Role.CLIENT)
        self.tunnel = Connection(ConnectionType.CLIENT) if isinstance(session, TunnelForward) else None
        self.got: dict[int, bytes] = {}
        self.over: dict[int, str] = {}

    def open(self, kind: str, port: object, request: str = "") -> int:
        extra = (("requestid", request),) if request else ()
        return self.connection.open_stream((("streamtype", kind), ("port", str(port)), *extra))

    def talk(self) -> list[ForwardEvent]:
        events: list[ForwardEvent] = []
        while True:
            data = b"".join(self.connection.data_to_send())
            if self.tunnel is not None:
                data = self.tunnel.send(BytesMessage(data)) if data else b""
            events += self.session.receive(data)
            back = b"".join(self.session.data_to_send())
            if not back:
                return events
            if self.tunnel is not None:
                self.tunnel.receive_data(back)
                back = b"".join(e.data for e in self.tunnel.events() if isinstance(e, BytesMessage))
            for event in self.connection.receive_data(back):
                match event:
                    case spdy.DataReceived(stream, payload):
                        self.got[stream] = self.got.get(stream, b"") + payload
                    case spdy.StreamEnded(stream):
                        self.over[stream] = "ended"
                    case spdy.StreamReset(stream):
                        self.over[stream] = "reset"


@pytest.fixture(params=[SpdyForward, TunnelForward])
def client(request: pytest.FixtureRequest) -> Client:
    session: PortForward = request.param()
    assert session.start() == []
    return Client(session)


def test_connections_side_by_side(client: Client) -> None:
    error, other = client.open("error", 80, "0"), client.open("error", 81, "1")
    data2 = client.open("data", 81, "1")
    data = client.open("data", 80, "0")
    assert client.talk() == [Dial(data2, 81), Dial(data, 80)]
    client.connection.send_data(data, b"GET")
    client.connection.end(data)
    assert client.talk() == [Forward(data, b"GET"), ForwardEnded(data)]
    client.session.send(data, b"200")
    client.session.end(data)
    client.session.close(data)
    client.session.send(data2, b"x")
    client.talk()
    assert client.got == {data: b"200", data2: b"x"}
    assert client.over == {data: "ended", error: "ended"}
    assert client.connection.is_open(other)


def test_the_ports_end_is_the_error_streams_too(client: Client) -> None:
    """Who waits for it before the connection is closed would wait for ever; the other direction goes on."""
    error, data = client.open("error", 80, "0"), client.open("data", 80, "0")
    client.talk()
    client.session.end(data)
    client.talk()
    assert client.over == {data: "ended", error: "ended"}
    client.connection.send_data(data, b"more", fin=True)
    assert client.talk() == [Forward(data, b"more"), ForwardEnded(data)]
    client.session.fail(data, "it broke")
    client.talk()


def test_a_refused_port_leaves_the_others(client: Client) -> None:
    error, data = client.open("error", 80, "0"), client.open("data", 80, "0")
    assert client.talk() == [Dial(data, 80)]
    client.session.fail(data, "connection refused")
    client.talk()
    assert client.got == {error: b"connection refused"}
    assert client.over == {error: "ended", data: "reset"}
    client.open("error", 81, "1")
    again = client.open("data", 81, "1")
    assert client.talk() == [Dial(again, 81)]


def test_a_connection_that_the_port_resets(client: Client) -> None:
    error, data = client.open("error", 80, "0"), client.open("data", 80, "0")
    client.talk()
    client.session.send(data, b"before")
    client.session.broke(data, "reset by peer")
    client.talk()
    assert client.got == {data: b"before"}
    assert client.over == {data: "reset", error: "reset"}
    client.session.broke(data, "again")
    assert client.talk() == []


def test_a_dropped_connection(client: Client) -> None:
    error, data = client.open("error", 80, "0"), client.open("data", 80, "0")
    client.talk()
    client.connection.reset(data)
    assert client.talk() == [Dropped(data)]
    assert client.over == {error: "ended"}
    client.session.send(data, b"late")
    client.session.close(data)
    client.connection.close()
    assert client.talk() == [ForwardLeft()]


def test_old_clients_without_ids_and_data_first(client: Client) -> None:
    client.open("error", 80)
    data = client.open("data", 80)
    assert client.talk() == [Dial(data, 80)]
    early = client.open("data", 90, "x")
    client.connection.send_data(early, b"early", fin=True)
    assert client.talk() == []
    client.open("error", 90, "x")
    assert client.talk() == [Dial(early, 90), Forward(early, b"early"), ForwardEnded(early)]


def test_early_data_is_bounded(client: Client) -> None:
    early = client.open("data", 90, "x")
    client.talk()
    client.connection.send_data(early, bytes(65_536))
    client.talk()
    assert client.over == {}
    client.session.expire()
    client.session.expire()
    client.talk()
    assert client.over == {early: "reset"}


@pytest.mark.parametrize("port", ["", "0", "65536", "-1", "x", "8\u00b2", "999999"])
def test_a_bad_port_is_refused(client: Client, port: str) -> None:
    stream = client.open("error", port, "0")
    assert client.talk() == []
    assert client.over == {stream: "reset"}


def test_mismatched_streams_are_refused(client: Client) -> None:
    client.open("error", 80, "0")
    twice, other, odd = client.open("error", 80, "0"), client.open("data", 81, "0"), client.open("x", 80, "1")
    client.talk()
    assert client.over == {twice: "reset", other: "reset", odd: "reset"}


def test_incomplete_connections_expire(client: Client) -> None:
    error = client.open("error", 80, "0")
    client.talk()
    client.session.expire()
    client.talk()
    assert client.over == {}
    client.session.expire()
    client.talk()
    assert b"timed out" in client.got[error]
    assert client.over == {error: "ended"}


def test_goodbye(client: Client) -> None:
    client.open("error", 80, "0")
    client.open("data", 80, "0")
    client.talk()
    client.session.finish()
    client.talk()
    assert set(client.over.values()) == {"ended"}


def hear(client: Connection, session: PortForward) -> list[object]:
    client.receive_data(b"".join(session.data_to_send()))
    return [e.data if isinstance(e, BytesMessage | TextMessage) else type(e) for e in client.events()]


def test_websocket_channels() -> None:
    session, client = WebSocketForward("v4.channel.k8s.io", (80, 8080)), Connection(ConnectionType.CLIENT)
    assert session.start() == [Dial(0, 80), Dial(1, 8080)]
    assert hear(client, session) == [b"\0\x50\0", b"\1\x50\0", b"\2\x90\x1f", b"\3\x90\x1f"]
    raw = (
        client.send(BytesMessage(b"\2hello"))
        + client.send(BytesMessage(b"\1no"))
        + client.send(BytesMessage(b"\4no"))
    )
    assert session.receive(raw) == [Forward(1, b"hello")]
    session.send(1, b"back")
    session.fail(0, "refused")
    session.send(0, b"nothing")
    assert hear(client, session) == [b"\2back", b"\1refused"]
    session.close(1)
    assert hear(client, session) == [CloseConnection]


def test_websocket_base64() -> None:
    session, client = WebSocketForward("v4.base64.channel.k8s.io", (80,)), Connection(ConnectionType.CLIENT)
    session.start()
    assert hear(client, session) == ["0UAA=", "1UAA="]
    assert session.receive(client.send(TextMessage("0aGk="))) == [Forward(0, b"hi")]
    assert session.receive(client.send(CloseConnection(1000))) == [ForwardLeft()]


@given(st.binary(max_size=400), st.sampled_from(list(Transport)))
def test_any_bytes(data: bytes, transport: Transport) -> None:
    session = port_forward(transport, "v4.channel.k8s.io", (80,))
    session.start()
    try:
        for start in range(0, len(data), 5):
            session.receive(data[start : start + 5])
    except ProtocolError:
        pass
    session.expire()
    session.finish()
    session.data_to_send()


def test_ports_that_the_protocol_has_no_channels_for() -> None:
    for protocol, most in (("v4.base64.channel.k8s.io", 40), ("v4.channel.k8s.io", 128)):
        session = WebSocketForward(protocol, (80,) * most)
        assert len(session.start()) == most
        assert session.data_to_send()
        with pytest.raises(InvalidArgument, match="cannot carry"):
            WebSocketForward(protocol, (80,) * (most + 1))
