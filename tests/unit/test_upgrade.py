"""Which requests become streams, with which protocol, and what the others are told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperpod.wire.outcome import Outcome, as_status, as_text
from hyperpod.wire.upgrade import HeaderList, Refused, Transport, Upgrade, negotiate

KEY = b"dGhlIHNhbXBsZSBub25jZQ=="


def spdy(*protocols: bytes) -> HeaderList:
    offers = [(b"x-stream-protocol-version", p) for p in protocols]
    return [(b"connection", b"Upgrade"), (b"upgrade", b"SPDY/3.1"), *offers]


def websocket(protocols: bytes | None = None, key: bytes = KEY, version: bytes = b"13") -> HeaderList:
    offers = [] if protocols is None else [(b"sec-websocket-protocol", protocols)]
    return [(b"connection", b"keep-alive, Upgrade"), (b"upgrade", b"websocket"), (b"sec-websocket-key", key),
            (b"sec-websocket-version", version), *offers]  # fmt: skip


def test_spdy_takes_the_clients_first_choice() -> None:
    got = negotiate(spdy(b"v5.channel.k8s.io", b"v3.channel.k8s.io, v4.channel.k8s.io"), forward=False)
    assert got == Upgrade(Transport.SPDY, "v3.channel.k8s.io", (
        ("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1"), ("X-Stream-Protocol-Version", "v3.channel.k8s.io"),
    ))  # fmt: skip
    assert negotiate(spdy(b"portforward.k8s.io"), forward=True).protocol == "portforward.k8s.io"


@pytest.mark.parametrize(
    ("offers", "forward", "transport", "protocol"),
    [
        (b"v5.channel.k8s.io", False, Transport.WEBSOCKET, "v5.channel.k8s.io"),
        (b"v9.channel.k8s.io, base64.channel.k8s.io", False, Transport.WEBSOCKET, "base64.channel.k8s.io"),
        (None, False, Transport.WEBSOCKET, ""),
        (b"SPDY/3.1+portforward.k8s.io", True, Transport.TUNNEL, "SPDY/3.1+portforward.k8s.io"),
        (b"v4.channel.k8s.io", True, Transport.WEBSOCKET, "v4.channel.k8s.io"),
    ],
)
def test_websocket(offers: bytes | None, forward: bool, transport: Transport, protocol: str) -> None:
    got = negotiate(websocket(offers), forward=forward)
    assert (got.transport, got.protocol) == (transport, protocol)
    assert ("Sec-WebSocket-Accept", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=") in got.headers  # RFC 6455's own example
    assert (("Sec-WebSocket-Protocol", protocol) in got.headers) == bool(protocol)


@pytest.mark.parametrize(
    ("headers", "forward", "status"),
    [
        ([], False, 400),
        ([(b"upgrade", b"SPDY/3.1")], False, 400),
        (spdy(), False, 400),
        (spdy(b" , "), False, 400),
        (spdy(b"v5.channel.k8s.io"), False, 403),
        (spdy(b"v4.channel.k8s.io"), True, 403),
        (websocket(b"v9.channel.k8s.io"), False, 403),
        (websocket(b"v5.channel.k8s.io"), True, 403),
        (websocket(b"SPDY/3.1+portforward.k8s.io"), False, 403),
        (websocket(key=b"x"), False, 400),
        (websocket(key=b"\xff" * 24), False, 400),
        (websocket(version=b"8"), False, 400),
    ],
)
def test_refusals(headers: HeaderList, forward: bool, status: int) -> None:
    with pytest.raises(Refused) as caught:
        negotiate(headers, forward=forward)
    assert caught.value.status == status


def test_who_is_refused_hears_what_would_do() -> None:
    with pytest.raises(Refused) as caught:
        negotiate(spdy(b"v9"), forward=False)
    assert [value for _, value in caught.value.headers] == [
        "v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io",
    ]  # fmt: skip


names = st.sampled_from([b"connection", b"upgrade", b"sec-websocket-key", b"sec-websocket-protocol",
                         b"sec-websocket-version", b"x-stream-protocol-version"])  # fmt: skip
texts = st.one_of(
    st.binary(max_size=20), st.sampled_from([b"websocket", b"SPDY/3.1", b"13", KEY, b"Upgrade"])
)


@given(st.lists(st.tuples(names, texts), max_size=12), st.booleans())
def test_any_headers(headers: list[tuple[bytes, bytes]], forward: bool) -> None:
    try:
        negotiate(headers, forward=forward)
    except Refused as exc:
        assert exc.status in (400, 403)


def test_outcomes() -> None:
    assert as_status(Outcome(0)) == b'{"metadata":{},"status":"Success"}'
    assert as_text(Outcome(0)) == as_text(Outcome()) == b""
    assert as_status(Outcome(3)) == (
        b'{"metadata":{},"status":"Failure","message":"command terminated with non-zero exit code: 3",'
        b'"reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"3"}]}}'
    )
    assert as_text(Outcome(127, "no such file")).endswith(b"exit code: 127: no such file")
    assert b'"reason":"InternalError"' in as_status(Outcome(None, "container is gone"))
    assert as_text(Outcome(None, "container is gone")) == b"container is gone"
