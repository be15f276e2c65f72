"""SPDY/3.1 as a sans-IO library: both roles, nothing of hyperpod but itself.

Specification: SPDY protocol, drafts 3 and 3.1; sections are named after draft 3. SPDY is what kubelet, kubectl
and crictl speak for exec, attach and port-forward. `Connection` is the whole interface: bytes in, events out,
calls in, buffers out. Any bytes lead to events or to RemoteProtocolError; any call to buffers or to
LocalProtocolError.
"""

from hyperpod.wire.spdy.connection import Connection, Limits, Role
from hyperpod.wire.spdy.errors import (
    GoAwayStatus,
    LocalProtocolError,
    RemoteProtocolError,
    ResetStatus,
    SpdyError,
)
from hyperpod.wire.spdy.events import (
    DataReceived,
    Event,
    GoneAway,
    HeadersReceived,
    PingAnswered,
    SettingsReceived,
    StreamEnded,
    StreamOpened,
    StreamReplied,
    StreamReset,
    WindowOpened,
)
from hyperpod.wire.spdy.headers import Headers, find
from hyperpod.wire.spdy.windows import FlowControl

__all__ = [
    "Connection",
    "DataReceived",
    "Event",
    "FlowControl",
    "GoAwayStatus",
    "GoneAway",
    "Headers",
    "HeadersReceived",
    "Limits",
    "LocalProtocolError",
    "PingAnswered",
    "RemoteProtocolError",
    "ResetStatus",
    "Role",
    "SettingsReceived",
    "SpdyError",
    "StreamEnded",
    "StreamOpened",
    "StreamReplied",
    "StreamReset",
    "WindowOpened",
    "find",
]
