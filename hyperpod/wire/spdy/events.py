"""What `Connection.receive_data` returns."""

from __future__ import annotations

from typing import NamedTuple

from hyperpod.wire.spdy.headers import Headers


class StreamOpened(NamedTuple):
    """The peer's SYN_STREAM. Answer with `reply`, or `reset` it."""

    stream: int
    headers: Headers
    associated: int = 0
    priority: int = 0
    unidirectional: bool = False


class StreamReplied(NamedTuple):
    """The peer's SYN_REPLY to a stream of ours."""

    stream: int
    headers: Headers


class HeadersReceived(NamedTuple):
    stream: int
    headers: Headers


class DataReceived(NamedTuple):
    """Payload of a DATA frame, or as much of one as has come; `data` may point into what was fed.

    Tell `acknowledge` when it is consumed.
    """

    stream: int
    data: bytes | memoryview


class StreamEnded(NamedTuple):
    """The peer will send nothing more on this stream (FLAG_FIN)."""

    stream: int


class StreamReset(NamedTuple):
    """The stream is gone, both ways. `status` is a ResetStatus, or a number that none has.

    `ours`: we reset it, because the peer broke the protocol within it.
    """

    stream: int
    status: int
    ours: bool = False


class WindowOpened(NamedTuple):
    """More may be sent: on one stream, on all of them when `stream` is 0."""

    stream: int


class PingAnswered(NamedTuple):
    ident: int


class SettingsReceived(NamedTuple):
    """Pairs of id and value; those that concern the connection are heeded already."""

    values: tuple[tuple[int, int], ...]


class GoneAway(NamedTuple):
    """The peer opens no more streams, and has dealt with none of ours after `last_stream`."""

    last_stream: int
    status: int


Event = (
    StreamOpened
    | StreamReplied
    | HeadersReceived
    | DataReceived
    | StreamEnded
    | StreamReset
    | WindowOpened
    | PingAnswered
    | SettingsReceived
    | GoneAway
)
