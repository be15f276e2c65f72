"""What this package raises, and nothing else, whatever bytes it is given."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hyperpod.wire.spdy.events import Event


class GoAwayStatus(IntEnum):
    """Why a session ends (section 2.6.6)."""

    OK = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2


class ResetStatus(IntEnum):
    """Why a stream ends early (section 2.6.3)."""

    PROTOCOL_ERROR = 1
    INVALID_STREAM = 2
    REFUSED_STREAM = 3
    UNSUPPORTED_VERSION = 4
    CANCEL = 5
    INTERNAL_ERROR = 6
    FLOW_CONTROL_ERROR = 7
    STREAM_IN_USE = 8
    STREAM_ALREADY_CLOSED = 9
    INVALID_CREDENTIALS = 10
    FRAME_TOO_LARGE = 11


class SpdyError(Exception):
    """Base of the two below."""


class LocalProtocolError(SpdyError):
    """The caller asked for what the protocol forbids; nothing was changed by the call."""


class RemoteProtocolError(SpdyError):
    """The peer broke the protocol so that the session cannot go on: send what is queued (a GOAWAY), close.

    `events` are those that had come before, in the same bytes.
    """

    def __init__(self, text: str, status: GoAwayStatus = GoAwayStatus.PROTOCOL_ERROR) -> None:
        self.status = status
        self.events: list[Event] = []
        super().__init__(text)
