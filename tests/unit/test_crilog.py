"""Records of the CRI log stand for exactly the bytes that came, however they came and wherever they are cut."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperpod.errors import ProtocolError
from hyperpod.wire.crilog import LINE_LIMIT, MAX_RECORD, LineFormatter, RecordScanner, timestamp

NOW = 1_714_979_289_123_456_789
RECORD = re.compile(rb"2024-05-06T07:08:09\.123456789Z (stdout|stderr) ([FP]) ([^\n]*)\n")

lines = st.one_of(
    st.binary(max_size=80).map(lambda b: b.replace(b"\n", b"x") + b"\n"),
    st.integers(LINE_LIMIT - 2, LINE_LIMIT + 2).map(lambda n: b"y" * n + b"\n"),
    st.integers(1, 3 * LINE_LIMIT).map(lambda n: b"z" * n),
    st.just(b"\n"),
)
streams = st.lists(lines, max_size=12).map(b"".join)


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted(c % (len(data) + 1) for c in cuts), len(data)]
    return [data[a:b] for a, b in pairwise(places)]


def records(log: bytes) -> list[tuple[bytes, bytes, bytes]]:
    found = [(m[1], m[2], m[3]) for m in RECORD.finditer(log)]
    assert b"".join(m[0] for m in RECORD.finditer(log)) == log
    return found


def payload(log: bytes) -> bytes:
    return b"".join(text + (b"\n" if tag == b"F" else b"") for _, tag, text in records(log))


def formatted(data: bytes, cuts: list[int], stream: str = "stdout") -> bytes:
    formatter, out = LineFormatter(stream), b""
    for piece in cut(data, cuts):
        out += b"".join(formatter.feed([piece], NOW))
        assert formatter.held <= LINE_LIMIT
    out += b"".join(formatter.finish(NOW))
    assert formatter.offset == len(data)
    return out


@given(streams, st.lists(st.integers(0, 2**20), max_size=8))
def test_payloads_are_the_input_and_chunking_changes_nothing(data: bytes, cuts: list[int]) -> None:
    log = formatted(data, cuts)
    assert payload(log) == data
    assert log == formatted(data, [])
    assert all(len(text) <= LINE_LIMIT for _, _, text in records(log))


@given(streams, streams, st.integers(0, 2**20))
def test_any_cut_log_tells_where_to_resume(out: bytes, err: bytes, where: int) -> None:
    first, second = formatted(out, []), formatted(err, [], "stderr")
    log = first + second
    torn = log[: where % (len(log) + 1)]
    scanner = RecordScanner()
    for start in range(0, len(torn), 5000):
        scanner.feed(torn[start : start + 5000])
    length, stdout, stderr = scanner.extent
    assert length == torn.rfind(b"\n") + 1
    # Resumed from there, the log is whole again.
    rest_out = LineFormatter("stdout", stdout)
    rest_err = LineFormatter("stderr", stderr)
    whole = torn[:length]
    for formatter, data in ((rest_out, out[stdout:]), (rest_err, err[stderr:])):
        whole += b"".join(formatter.feed([data], NOW)) + b"".join(formatter.finish(NOW))
    for name, data in ((b"stdout", out), (b"stderr", err)):
        mine = [
            text + (b"\n" if tag == b"F" else b"") for stream, tag, text in records(whole) if stream == name
        ]
        assert b"".join(mine) == data


@given(streams, st.integers(1, 2**40))
def test_offsets_reach_to_what_is_in_records(data: bytes, start: int) -> None:
    formatter = LineFormatter("stdout", start)
    log = b"".join(formatter.feed([data], NOW))
    assert formatter.offset == start + len(payload(log))
    assert formatter.offset + formatter.held == start + len(data)


def test_the_format() -> None:
    formatter = LineFormatter("stderr")
    log = b"".join(formatter.feed([b"one\n\ntw", memoryview(b"o\nopen")], NOW)) + b"".join(
        formatter.finish(NOW)
    )
    stamp = b"2024-05-06T07:08:09.123456789Z stderr "
    assert log == stamp + b"F one\n" + stamp + b"F \n" + stamp + b"F two\n" + stamp + b"P open\n"


def test_a_line_of_the_limit_is_whole_and_one_more_is_cut() -> None:
    assert [tag for _, tag, _ in records(formatted(b"a" * LINE_LIMIT + b"\n", []))] == [b"F"]
    assert [(tag, len(text)) for _, tag, text in records(formatted(b"a" * (LINE_LIMIT + 1) + b"\n", []))] == [
        (b"P", LINE_LIMIT),
        (b"F", 1),
    ]


def test_a_gap_ends_the_held_line() -> None:
    formatter = LineFormatter("stdout")
    assert formatter.feed([b"half"], NOW) == []
    assert payload(b"".join(formatter.skip_to(100, NOW))) == b"half"
    assert formatter.offset == 100
    with pytest.raises(ProtocolError):
        formatter.skip_to(99, NOW)


def test_timestamps_are_padded_utc() -> None:
    assert timestamp(5) == b"1970-01-01T00:00:00.000000005Z"
    assert timestamp(NOW) == b"2024-05-06T07:08:09.123456789Z"


@pytest.mark.parametrize("foreign", [b"hello\n", b"2024 stdout X a\n", b"\n", b"\0" * (MAX_RECORD + 1)])
def test_a_foreign_line_is_noticed(foreign: bytes) -> None:
    scanner = RecordScanner()
    good = formatted(b"line\n", [])
    with pytest.raises(ProtocolError):
        scanner.feed(good + foreign + good)
    assert scanner.extent.length == len(good)


def test_half_a_record_is_not_counted() -> None:
    good = formatted(b"line\n", [])
    scanner = RecordScanner()
    scanner.feed(good + good[:-1])
    assert scanner.extent == (len(good), 5, 0)
