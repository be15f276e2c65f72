"""Remote commands and port-forwards against SPDY clients that do well-formed things in any order and pieces."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperpod.errors import ProtocolError
from hyperpod.wire import spdy
from hyperpod.wire.outcome import Outcome
from hyperpod.wire.portforward import Dial, Dropped, ForwardEvent, SpdyForward
from hyperpod.wire.remotecommand import Channel, CommandEvent, SpdyCommand, StdinEnded, Wanted
from hyperpod.wire.spdy import frames
from hyperpod.wire.spdy.headers import HeaderCompressor

OTHER = ("data", "reset", "headers", "reply", "window", "settings", "ping", "goaway")
Step = tuple[str, int, int]
STEPS = st.lists(
    st.tuples(
        st.sampled_from((*OTHER, *("open",) * 9)),
        st.integers(0, 7),
        st.integers(0, 7),
    ),
    max_size=16,
)  # fmt: skip
COMMAND = ("error", "stdin", "stdout", "resize", "stderr")
FORWARD = ("error", "data", "error", "data", "error", "data", "nonsense")
FLAGS = (0, 0, 0, 0, 0, frames.FLAG_FIN, frames.FLAG_UNIDIRECTIONAL, 3)


class Script:
    """A client's bytes for a list of steps; the numbers choose among streams and variants."""

    def __init__(self, kinds: Sequence[str] = ()) -> None:
        self._kinds, self._zlib = kinds, HeaderCompressor()
        self._next = 1

    def step(self, what: str, which: int, variant: int) -> bytes:
        stream = 2 * which + 1
        match what:
            case "open":
                return self.open(self._kinds[which % len(self._kinds)], str(which // 6), flags=FLAGS[variant])
            case "data":
                return frames.data_header(stream, variant, fin=variant % 2 == 1) + bytes(variant)
            case "headers" | "reply":
                kind = frames.FrameType.HEADERS if what == "headers" else frames.FrameType.SYN_REPLY
                return frames.with_headers(kind, stream, self._zlib.encode(()), fin=variant % 2 == 1)
            case "reset":
                return frames.rst_stream(stream, variant)
            case "window":
                return frames.window_update(stream if variant else 0, 1 + variant)
            case "settings":
                return frames.settings([(frames.Setting.INITIAL_WINDOW_SIZE, 20 * variant)])
            case "ping":
                return frames.ping(which)
            case _:
                return frames.goaway(stream, 0)

    def open(self, kind: str, request: str = "", port: int = 80, flags: int = 0) -> bytes:
        headers = [("streamtype", kind), ("port", str(port)), ("requestid", request)]
        number, self._next = self._next, self._next + 2
        return frames.syn_stream(number, 0, 0, self._zlib.encode(headers), flags)


def cut(data: bytes, step: int) -> list[bytes]:
    return [data[start : start + step] for start in range(0, len(data), step)] or [b""]


@given(STEPS, st.integers(1, 400), st.sampled_from(("v1", "v2", "v4")))
def test_a_command_raises_protocol_errors_only(steps: list[Step], step: int, version: str) -> None:
    script = Script(COMMAND)
    session = SpdyCommand(version, Wanted(stdin=True, stdout=True, tty=True))
    events: list[CommandEvent] = []
    try:
        for piece in cut(b"".join(script.step(*each) for each in steps), step):
            events += session.receive(piece)
            session.send(Channel.STDOUT, b"x"[: session.room(Channel.STDOUT)])
            session.consumed(1)
    except ProtocolError:
        pass
    session.finish(Outcome(1))
    assert b"".join(session.data_to_send()) or not steps


@given(STEPS, st.integers(1, 400))
def test_a_forward_raises_protocol_errors_only(steps: list[Step], step: int) -> None:
    script, session = Script(FORWARD), SpdyForward()
    dialled: set[int] = set()
    try:
        for piece in cut(b"".join(script.step(*each) for each in steps), step):
            for event in session.receive(piece):
                if isinstance(event, Dial):
                    assert event.ident not in dialled
                    dialled.add(event.ident)
                    session.send(event.ident, b"x"[: session.room(event.ident)])
                    session.end(event.ident)
                elif isinstance(event, Dropped):
                    assert event.ident in dialled
    except ProtocolError:
        pass
    session.expire()
    for ident in dialled:
        session.fail(ident, "why")
    session.finish()
    session.data_to_send()


def test_a_stream_that_is_reset_in_the_bytes_that_open_it() -> None:
    """A port-forward's client may give one connection up at once: its other connections must go on."""
    script, session = Script(), SpdyForward()
    events: list[ForwardEvent] = session.receive(script.open("error", "0") + script.open("data", "0"))
    assert events == [Dial(3, 80)]
    given_up = script.open("error", "1") + script.open("data", "1") + frames.rst_stream(7, 5)
    assert session.receive(given_up) == []
    answer = spdy.Connection(spdy.Role.CLIENT)
    for number in (1, 3, 5, 7):
        assert answer.open_stream((("streamtype", "x"),)) == number
    came = answer.receive_data(b"".join(session.data_to_send()))
    assert spdy.StreamEnded(5) in came  # nobody is kept waiting for the connection's end
    assert session.receive(frames.data_header(3, 1, fin=True) + b"x")


@pytest.mark.parametrize("flags", [frames.FLAG_UNIDIRECTIONAL, frames.FLAG_UNIDIRECTIONAL | frames.FLAG_FIN])
def test_a_stream_that_takes_no_answer_is_refused(flags: int) -> None:
    script = Script()
    assert SpdyForward().receive(script.open("data", "0", flags=flags)) == []
    script = Script()
    assert StdinEnded() not in SpdyCommand("v4", Wanted(stdin=True)).receive(
        script.open("stdin", flags=flags)
    )
