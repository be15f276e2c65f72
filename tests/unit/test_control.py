"""Control messages: requests, replies and errors cross unchanged; anything else is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperpod import errors
from hyperpod.errors import HyperpodError, InvalidArgument, ProtocolError
from hyperpod.wire.control import (
    MAX_MESSAGE,
    Request,
    decode_reply,
    decode_request,
    encode_error,
    encode_reply,
    encode_request,
)

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
fields = st.dictionaries(
    st.text(max_size=8).filter(lambda k: k not in ("id", "op", "ok")), values, max_size=4
)


@given(st.integers(0, 2**53), st.text(max_size=20), fields)
def test_requests_cross(ident: int, op: str, args: dict[str, Any]) -> None:
    assert decode_request(encode_request(ident, op, args)) == Request(ident, op, args)


@given(st.integers(0, 2**53), fields)
def test_replies_cross(ident: int, args: dict[str, Any]) -> None:
    reply = decode_reply(encode_reply(ident, args))
    assert (reply.id, reply.fields, reply.error) == (ident, args, None)


@pytest.mark.parametrize(
    "error",
    [
        errors.NotFound("no x"), errors.FailedPrecondition("not y"), errors.Unavailable("z"),
        errors.InvalidArgument(""), errors.DeadlineExceeded("ä\ud800"), HyperpodError("?"),
    ],
)  # fmt: skip
def test_errors_cross_as_their_class(error: HyperpodError) -> None:
    reply = decode_reply(encode_error(3, error))
    assert type(reply.error) is type(error)
    assert str(reply.error) == str(error)


def test_an_error_without_a_code_of_its_own_crosses_as_its_base() -> None:
    reply = decode_reply(encode_error(3, errors.BootError("kernel", "panic")))
    assert type(reply.error) is errors.GuestError
    assert "panic" in str(reply.error)
    assert len(encode_error(3, HyperpodError("x" * 10 * MAX_MESSAGE))) < MAX_MESSAGE


@given(st.binary(max_size=200))
def test_garbage_is_a_protocol_error(data: bytes) -> None:
    for decode in (decode_request, decode_reply):
        with pytest.raises(ProtocolError):
            decode(data)


@pytest.mark.parametrize(
    "data",
    [
        b'{"id":true,"op":"x"}', b'{"id":1.0,"op":"x"}', b'{"id":-1,"op":"x"}', b'{"id":1,"op":2}', b'{"op":"x"}',
        b'{"id":%d,"op":"x"}' % 2**64, b"[" * 60_000, b" " * MAX_MESSAGE + b'{"id":1,"op":"x"}', b"null",
    ],
)  # fmt: skip
def test_a_malformed_request_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_request(data)


@pytest.mark.parametrize("data", [b'{"id":1}', b'{"id":1,"ok":1}', b'{"id":1,"error":"x"}', b'{"ok":true}'])
def test_a_malformed_reply_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_reply(data)


def test_what_does_not_fit_is_refused_before_it_is_sent() -> None:
    with pytest.raises(InvalidArgument, match="bytes"):
        encode_request(1, "x", {"y": "z" * MAX_MESSAGE})


def test_accessors_name_the_field() -> None:
    request = Request(1, "op", {"n": True, "t": 5, "f": 1, "i": "AB" * 32, "l": [1], "m": [], "big": 2**60})
    for call in (
        lambda: request.number("n"),
        lambda: request.number("big"),
        lambda: request.text("t"),
        lambda: request.flag("f"),
        lambda: request.ident("i"),
        lambda: request.ident("gone"),
        lambda: request.texts("l"),
        lambda: request.mapping("m"),
    ):
        with pytest.raises(InvalidArgument, match="op: "):
            call()
