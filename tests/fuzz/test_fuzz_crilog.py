"""Output that is made to hurt: log records stay exact, memory bounded, and work in proportion to the bytes."""

from __future__ import annotations

import contextlib
import random
import sys

import pytest

from hyperpod.errors import ProtocolError
from hyperpod.wire.crilog import LINE_LIMIT, MAX_RECORD, LineFormatter, RecordScanner

NOW = 1_714_979_289_123_456_789
PREFIX = b"2024-05-06T07:08:09.123456789Z stdout "


def output(chance: random.Random) -> bytes:
    parts = []
    for _ in range(chance.randrange(1, 12)):
        size = chance.choice((0, 1, 50, LINE_LIMIT - 1, LINE_LIMIT, LINE_LIMIT + 1, 5 * LINE_LIMIT))
        match chance.randrange(4):
            case 0:
                parts.append(b"\n" * min(size, 5000))
            case 1:
                parts.append(chance.randbytes(size))
            case 2:
                parts.append(b"x" * size + b"\n")
            case _:
                parts.append(b"2024-05-06T07:08:09.123456789Z stdout F fake\n")
    return b"".join(parts)


@pytest.mark.parametrize("seed", range(20))
def test_any_output_any_kill(seed: int) -> None:
    """Write, die anywhere, scan, resume: the log stands for the output exactly."""
    chance = random.Random(seed)
    for _ in range(10):
        data, log, cursor = output(chance), b"", (0, 0)
        for _ in range(100):
            formatter = LineFormatter("stdout", cursor[1])
            fresh, position = b"", cursor[1]
            while position < len(data):
                step = (
                    chance.choice((1, 7, 1000, 100_000))
                    if len(data) < 3000
                    else chance.choice((1000, 100_000))
                )
                fresh += b"".join(formatter.feed([data[position : position + step]], NOW))
                position += step
            fresh += b"".join(formatter.finish(NOW))
            died = chance.random() < 0.7
            log += fresh[: chance.randrange(len(fresh) + 1)] if died else fresh
            scanner = RecordScanner()
            scanner.feed(log[cursor[0] :])
            cursor = cursor[0] + scanner.extent.length, cursor[1] + scanner.extent.stdout
            log = log[: cursor[0]]
            if not died:
                break
        assert cursor[1] == len(data) or died
        rest = LineFormatter("stdout", cursor[1])
        log += b"".join(rest.feed([data[cursor[1] :]], NOW)) + b"".join(rest.finish(NOW))
        *records, end = log.split(b"\n")
        assert end == b""
        assert all(record.startswith(PREFIX) for record in records)
        tags = (record[len(PREFIX) : len(PREFIX) + 2] for record in records)
        lines = (record[len(PREFIX) + 2 :] for record in records)
        ends = {b"F ": b"\n", b"P ": b""}
        assert b"".join(line + ends[tag] for line, tag in zip(lines, tags, strict=True)) == data
        scanner = RecordScanner()
        scanner.feed(log)
        assert scanner.extent == (len(log), len(data), 0)


@pytest.mark.parametrize("seed", range(20))
def test_a_scanner_takes_anything(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(50):
        formatter = LineFormatter("stderr")
        log = bytearray(b"".join(formatter.feed([output(chance)], NOW)) + b"".join(formatter.finish(NOW)))
        for _ in range(chance.randrange(3)):
            if log:
                log[chance.randrange(len(log))] = chance.randrange(256)
        scanner, fed = RecordScanner(), 0
        with contextlib.suppress(ProtocolError):
            while fed < len(log):
                scanner.feed(bytes(log[fed : fed + 10_000]))
                fed += 10_000
        length, stdout, stderr = scanner.extent
        assert length <= len(log)
        assert stdout + stderr <= length


@pytest.mark.parametrize(
    "hostile",
    [b"\n" * 131072, b"y" * 131072, (b"z" * (LINE_LIMIT + 1) + b"\n" + b"\n" * 100) * 8, b"a\n" * 65536],
    ids=["empty lines", "no newline", "long and short", "tiny lines"],
)
def test_no_output_costs_a_step_of_python_per_line(hostile: bytes) -> None:
    """Counted in calls and lines of Python, not in seconds: a guest must not hold up the loop."""
    formatter, steps = LineFormatter("stdout"), 0

    def count(frame: object, event: str, arg: object) -> object:
        nonlocal steps
        steps += 1
        return count

    sys.settrace(count)  # type: ignore[arg-type]  # the tracer counts whatever it is given
    try:
        records = formatter.feed([hostile], NOW)
    finally:
        sys.settrace(None)
    assert steps < 40 * (len(hostile) // LINE_LIMIT + 2)
    assert formatter.held <= LINE_LIMIT
    assert sum(map(len, records)) <= len(hostile) * (MAX_RECORD - LINE_LIMIT + 1)
