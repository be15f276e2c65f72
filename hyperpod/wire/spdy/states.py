"""What each half of a stream may send, and when: one table for both roles, as in h11.

A half is one direction of a stream. The opener's half starts to send with SYN_STREAM, the other one's with
SYN_REPLY; a frame with FLAG_FIN is its half's last, RST_STREAM both halves'.
"""

from __future__ import annotations

from enum import Enum, auto

from hyperpod.wire.spdy.errors import ResetStatus


class Half(Enum):
    __hash__ = object.__hash__  # each frame looks it up, and an Enum's own is a function in Python

    IDLE = auto()
    """The stream does not exist."""
    MUST_REPLY = auto()
    """The other half has opened the stream: nothing goes before SYN_REPLY, but RST_STREAM."""
    OPEN = auto()
    DONE = auto()


class Sends(Enum):
    """What a half can do."""

    __hash__ = object.__hash__

    SYN = auto()
    SYN_FIN = auto()
    REPLY = auto()
    REPLY_FIN = auto()
    HEADERS = auto()
    HEADERS_FIN = auto()
    DATA = auto()
    DATA_FIN = auto()


TRANSITIONS: dict[Half, dict[Sends, Half]] = {
    Half.IDLE: {Sends.SYN: Half.OPEN, Sends.SYN_FIN: Half.DONE},
    Half.MUST_REPLY: {Sends.REPLY: Half.OPEN, Sends.REPLY_FIN: Half.DONE},
    Half.OPEN: {
        Sends.HEADERS: Half.OPEN,
        Sends.HEADERS_FIN: Half.DONE,
        Sends.DATA: Half.OPEN,
        Sends.DATA_FIN: Half.DONE,
    },
    Half.DONE: {},
}

VIOLATIONS: dict[Half, dict[Sends, ResetStatus]] = {
    Half.DONE: {
        Sends.DATA: ResetStatus.STREAM_ALREADY_CLOSED,
        Sends.DATA_FIN: ResetStatus.STREAM_ALREADY_CLOSED,
        Sends.REPLY: ResetStatus.STREAM_IN_USE,
        Sends.REPLY_FIN: ResetStatus.STREAM_IN_USE,
    },
    Half.OPEN: {Sends.REPLY: ResetStatus.STREAM_IN_USE, Sends.REPLY_FIN: ResetStatus.STREAM_IN_USE},
}
"""With what a stream is reset whose peer did what the table above does not have; else PROTOCOL_ERROR."""

FINAL = {Sends.SYN: Sends.SYN_FIN, Sends.REPLY: Sends.REPLY_FIN, Sends.HEADERS: Sends.HEADERS_FIN,
         Sends.DATA: Sends.DATA_FIN}  # fmt: skip


class NotAllowed(Exception):
    """The table has no such transition; `status` is the reset that fits."""

    def __init__(self, half: Half, sends: Sends) -> None:
        self.status = VIOLATIONS.get(half, {}).get(sends, ResetStatus.PROTOCOL_ERROR)
        super().__init__(f"{sends.name} by a half that is {half.name}")


def step(half: Half, sends: Sends) -> Half:
    """The half's state afterwards. Raises NotAllowed."""
    try:
        return TRANSITIONS[half][sends]
    except KeyError:
        raise NotAllowed(half, sends) from None
