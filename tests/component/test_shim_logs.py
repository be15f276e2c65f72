"""A container's output is in its log exactly once: over reconnects, rotations, crashes and full disks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hyperpod.errors import FailedPrecondition, NotFound, Unavailable
from hyperpod.shim.dialer import AgentDialer
from hyperpod.shim.fdstore import FdStore
from hyperpod.shim.logfile import LogFile
from hyperpod.shim.logs import LogService
from hyperpod.wire import stdio
from hyperpod.wire.crilog import LineFormatter
from tests.shimkit import WAIT, Pod, SupervisorProcess, eventually, opened, payload, pod, supervisor
from tests.stdiopeer import Source, of_bytes


@pytest.fixture(scope="module")
def parent() -> Iterator[SupervisorProcess]:
    with supervisor() as one:
        yield one


@pytest.fixture
async def one(parent: SupervisorProcess) -> AsyncIterator[Pod]:
    async with pod(parent) as made:
        await made.spawn()
        yield made
        await made.client.drop(made.id)


def numbered(total: int) -> tuple[Source, bytes]:
    """About `total` bytes of numbered lines of many lengths, as a source and as a whole."""
    lines, size, number = [], 0, 0
    while size < total:
        line = b"line %d %s\n" % (number, b"." * (number * 7919 % 180 if number % 1000 else 40_000))
        lines.append(line)
        size += len(line)
        number += 1
    whole = b"".join(lines)
    return of_bytes(whole), whole


async def finish(made: Pod, container: str, timeout: float = WAIT) -> tuple[bool, int]:
    assert made.shim is not None
    end = await made.shim.log_finish(container, timeout)
    return end.complete, end.gap_bytes


async def test_both_streams_and_an_open_last_line(one: Pod) -> None:
    container = secrets.token_hex(32)
    one.peer.add(container, "stdout", of_bytes(b"one\ntwo\nopen end"))
    one.peer.add(container, "stderr", of_bytes(b"bad\n" + b"x" * 20000 + b"\n"))
    await one.log_start(container)
    assert await finish(one, container) == (True, 0)
    log = one.path(container).read_bytes()
    assert payload(log) == b"one\ntwo\nopen end"
    assert payload(log, b"stderr") == b"bad\n" + b"x" * 20000 + b"\n"
    assert b" stdout P open end\n" in log


async def test_a_terminal_has_one_stream(one: Pod) -> None:
    container = secrets.token_hex(32)
    one.peer.add(container, "stdout", of_bytes(b"hello\r\n"))
    await one.log_start(container, tty=True)
    assert await finish(one, container) == (True, 0)
    assert payload(one.path(container).read_bytes()) == b"hello\r\n"


async def test_without_a_log_the_output_is_drained(one: Pod) -> None:
    container = secrets.token_hex(32)
    source, whole = numbered(2_000_000)
    stream = one.peer.add(container, "stdout", source)
    one.peer.add(container, "stderr", of_bytes(b""))
    assert one.shim is not None
    await one.shim.log_start(container, tty=False, fd=None)
    assert await finish(one, container) == (True, 0)
    await eventually(lambda: stream.sender.base == len(whole))  # the last acknowledgement goes another way


async def test_broken_connections_lose_and_repeat_nothing(one: Pod) -> None:
    container = secrets.token_hex(32)
    source, whole = numbered(3_000_000)
    one.peer.drop_after = 7
    one.peer.add(container, "stdout", source)
    one.peer.add(container, "stderr", of_bytes(b""))
    await one.log_start(container)
    assert await finish(one, container) == (True, 0)
    assert payload(one.path(container).read_bytes()) == whole
    assert len(one.peer.opened) > 2  # how often depends on how much each acknowledgement covers


async def test_rotation_under_load_loses_nothing(one: Pod) -> None:
    container = secrets.token_hex(32)
    source, whole = numbered(60_000_000)
    one.peer.add(container, "stdout", source)
    one.peer.add(container, "stderr", of_bytes(b"some\n"))
    await one.log_start(container)
    assert one.shim is not None
    path = one.path(container)
    rotated: list[tuple[Path, int]] = []
    while not one.peer.streams[container, "", "stdout"].sender.finished:
        old = path.with_name(f"{path.name}.{len(rotated)}")
        path.rename(old)
        with opened(path) as fd:
            await one.shim.log_reopen(container, fd)
        rotated.append((old, old.stat().st_size))
        await asyncio.sleep(0.01)
    assert await finish(one, container) == (True, 0)
    assert sum(size > 0 for _, size in rotated) > 1
    assert [old.stat().st_size for old, _ in rotated] == [size for _, size in rotated], (
        "written after the reply"
    )
    log = b"".join(old.read_bytes() for old, _ in rotated) + path.read_bytes()
    assert payload(log) == whole


async def test_kill_9_at_random_moments_is_not_seen_in_the_log(one: Pod) -> None:
    """50 MB of numbered lines, the shim killed again and again, the log rotated in between as well."""
    container = secrets.token_hex(32)
    source, whole = numbered(50_000_000)
    stream = one.peer.add(container, "stdout", source)
    one.peer.add(container, "stderr", of_bytes(b"some\n"))
    await one.log_start(container)
    assert one.shim is not None
    path, kills, chance = one.path(container), 0, random.Random(7)
    files = [path]
    while not stream.sender.drained:
        # Longer lives with time: on a busy machine none would be long enough to get anywhere otherwise.
        await asyncio.sleep(chance.random() * 0.02 * (1 + kills / 20))
        await one.kill()
        kills += 1
        if chance.random() < 0.5:
            # The kubelet does not wait for a shim to come back before it rotates.
            files.insert(-1, path.with_name(f"{path.name}.{kills}"))
            path.rename(files[-2])
        await one.spawn(resume=True)
        await one.log_start(container)
    assert await finish(one, container) == (True, 0)
    assert kills > 5
    assert payload(b"".join(file.read_bytes() for file in files)) == whole
    assert payload(b"".join(file.read_bytes() for file in files), b"stderr") == b"some\n"


@pytest.mark.parametrize("rotated", [False, True])
async def test_what_was_written_after_the_last_cursor_is_counted_and_a_torn_record_cut(
    one: Pod, rotated: bool
) -> None:
    """The states in which a kill between write(2), cursor and acknowledgement leaves the log.

    Rotated before the successor came, the old file is found through the supervisor, not by its path.
    """
    container = secrets.token_hex(32)
    stream = one.peer.add(container, "stdout", of_bytes(b"first\nsecond\nthird\n"))
    one.peer.add(container, "stderr", of_bytes(b""))
    stream.paused.clear()
    stream.sender.feed(stream.source(6))
    await one.log_start(container)
    path = one.path(container)
    await eventually(lambda: stream.sender.base == 6)
    await one.kill()
    record = path.read_bytes()
    with path.open("ab") as log:
        log.write(record.replace(b"first", b"second") + record.replace(b"first", b"third")[:-3])
    stream.sender.feed(stream.source(100))
    stream.paused.set()
    old = path.with_suffix(".old")
    if rotated:
        path.rename(old)
    await one.spawn(resume=True)
    await one.log_start(container)
    assert await finish(one, container) == (True, 0)
    if rotated:
        assert payload(old.read_bytes()) == b"first\nsecond\n"
        assert payload(path.read_bytes()) == b"third\n"
    else:
        assert payload(path.read_bytes()) == b"first\nsecond\nthird\n"
    assert one.peer.opened[-1].from_offset in (0, 13), "stdout resumes behind the counted record"


async def test_foreign_lines_in_a_log_stay(one: Pod) -> None:
    container = secrets.token_hex(32)
    stream = one.peer.add(container, "stdout", of_bytes(b"first\nsecond\n"))
    one.peer.add(container, "stderr", of_bytes(b""))
    stream.paused.clear()
    stream.sender.feed(stream.source(6))
    one.path(container).write_bytes(b"an older file without an end")
    await one.log_start(container)
    await eventually(lambda: stream.sender.base == 6)
    await one.kill()
    with one.path(container).open("ab") as log:
        log.write(b"somebody was here\n")
    stream.paused.set()
    await one.spawn(resume=True)
    await one.log_start(container)
    assert await finish(one, container) == (True, 0)
    older, first, foreign, second = one.path(container).read_bytes().splitlines(keepends=True)
    assert (older, foreign) == (b"an older file without an end\n", b"somebody was here\n")
    assert payload(first + second) == b"first\nsecond\n"


async def test_a_repeated_start_changes_nothing_but_the_file(one: Pod) -> None:
    container = secrets.token_hex(32)
    stream = one.peer.add(container, "stdout", of_bytes(b"a\n" * 10))
    one.peer.add(container, "stderr", of_bytes(b""))
    stream.paused.clear()
    await one.log_start(container)
    await one.log_start(container)
    await one.connect()
    await one.log_start(container)
    path = one.path(container)
    path.rename(path.with_suffix(".old"))
    await one.log_start(container)
    stream.paused.set()
    assert await finish(one, container) == (True, 0)
    assert path.with_suffix(".old").read_bytes() == b""
    assert payload(path.read_bytes()) == b"a\n" * 10


async def test_a_gap_is_counted(one: Pod) -> None:
    container = secrets.token_hex(32)
    stream = one.peer.add(container, "stdout", of_bytes(b"0123456789\nabc\n"))
    one.peer.add(container, "stderr", of_bytes(b""))
    stream.fill()
    stream.sender.attach(0)
    stream.sender.take()
    stream.sender.ack(5)
    await one.log_start(container)
    assert await finish(one, container) == (True, 5)
    assert payload(one.path(container).read_bytes()) == b"56789\nabc\n"


async def test_gaps_in_mid_stream_and_at_its_end(one: Pod) -> None:
    """Scripted: our agent loses nothing, but what a guest sends must not confuse the log."""
    container = secrets.token_hex(32)
    script = b"".join(
        (
            stdio.encode_opened(0),
            *stdio.encode_data(0, b"one\ncut o"),
            stdio.encode_gap(100),
            *stdio.encode_data(100, b"ff\n"),
            stdio.encode_gap(110),
            stdio.encode_eof(110),
        )
    )
    one.peer.scripts[container, "", "stdout"] = script
    one.peer.add(container, "stderr", of_bytes(b""))
    await one.log_start(container)
    assert await finish(one, container) == (True, 91 + 7)
    log = one.path(container).read_bytes()
    assert payload(log) == b"one\ncut off\n"
    assert log.count(b" P cut o\n") == 1


async def test_an_agent_that_is_gone_leaves_the_log_incomplete_but_whole(one: Pod) -> None:
    container = secrets.token_hex(32)
    stream = one.peer.add(container, "stdout", of_bytes(b"never"))
    one.peer.add(container, "stderr", of_bytes(b""))
    stream.paused.clear()
    # In one frame: what is in the log says that the rest has come, too.
    stream.sender.feed(b"line\nhalf a li")
    await one.log_start(container)
    await eventually(lambda: one.path(container).stat().st_size > 0)
    assert await finish(one, container, 0.2) == (False, 0)
    assert payload(one.path(container).read_bytes()) == b"line\nhalf a li"


async def test_stop_forgets(one: Pod) -> None:
    container = secrets.token_hex(32)
    one.peer.add(container, "stdout", of_bytes(b"x\n"))
    one.peer.add(container, "stderr", of_bytes(b""))
    await one.log_start(container)
    await finish(one, container)
    assert one.shim is not None
    assert (one.directory / "cursors" / container).exists()
    await one.shim.log_stop(container)
    await one.shim.log_stop(container)
    assert not (one.directory / "cursors" / container).exists()
    for call in (one.shim.log_finish(container, 1.0), one.shim.log_reopen(container, 0)):
        with pytest.raises(NotFound):
            await call


async def test_a_log_that_cannot_be_read_back_is_refused(one: Pod) -> None:
    assert one.shim is not None
    path = one.path("ff" * 32)
    for flags in (os.O_WRONLY | os.O_APPEND, os.O_RDWR):
        fd = os.open(path, flags | os.O_CREAT, 0o640)
        try:
            with pytest.raises(FailedPrecondition, match="O_RDWR"):
                await one.shim.log_start(secrets.token_hex(32), tty=False, fd=fd)
        finally:
            os.close(fd)


@contextlib.contextmanager
def small_disk(size: str) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="hp-shimtest-disk-"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
        folder.rmdir()


@pytest.mark.parametrize("killed", [False, True])
async def test_a_full_disk_holds_the_output_back_and_loses_nothing(one: Pod, killed: bool) -> None:
    container, other = secrets.token_hex(32), secrets.token_hex(32)
    source, whole = numbered(3_000_000)
    with small_disk("1M") as disk:
        stream = one.peer.add(container, "stdout", source)
        one.peer.add(container, "stderr", of_bytes(b""))
        assert one.shim is not None
        with opened(disk / "log") as fd:
            await one.shim.log_start(container, tty=False, fd=fd)
        await eventually(lambda: f"log of {container[:12]}: No space left" in one.supervisor.text())
        # The disk holds whole records only, but for the moment of a try; and another container's log goes on.
        async with asyncio.timeout(WAIT):
            while not (held := (disk / "log").read_bytes()).endswith(b"\n"):
                await asyncio.sleep(0.01)
        assert whole.startswith(payload(held))
        one.peer.add(other, "stdout", of_bytes(b"fine\n"))
        one.peer.add(other, "stderr", of_bytes(b""))
        await one.log_start(other)
        assert await finish(one, other) == (True, 0)
        assert not stream.sender.drained
        if killed:
            await one.kill()
            await one.spawn(resume=True)
            await one.log_start(other)
        with opened(one.path(container)) as fd:
            if killed:
                await one.shim.log_start(container, tty=False, fd=fd)
            else:
                await one.shim.log_reopen(container, fd)
        assert await finish(one, container) == (True, 0)
        first, second = (disk / "log").read_bytes(), one.path(container).read_bytes()
        assert payload(first + second) == whole
        assert first
        await one.shim.log_stop(container)
        await one.client.drop(one.id)


async def test_a_dead_shim_is_noticed(one: Pod) -> None:
    assert one.shim is not None
    pid = (await one.shim.hello()).pid
    waiting = asyncio.ensure_future(one.shim.log_finish("ab" * 32, 5.0))
    os.kill(pid, signal.SIGKILL)
    with pytest.raises((Unavailable, NotFound)):
        await waiting
    await one.shim.closed.wait()
    with pytest.raises(Unavailable):
        await one.shim.hello()


def test_a_log_that_somebody_has_cut_is_not_made_longer_by_a_full_disk(tmp_path: Path) -> None:
    """What does not fit is cut off where this batch began, which is not where the log once was."""
    lines, formatter = b"x" * 99 + b"\n", LineFormatter("stdout")
    with small_disk("64K") as disk, opened(disk / "log") as fd:
        log = LogFile(str(tmp_path / "cursor"), os.dup(fd), None)
        log.write("stdout", 20_000, formatter.feed([lines * 200], 1))
        os.truncate(disk / "log", 0)
        with pytest.raises(OSError, match="No space"):
            log.write("stdout", 1_020_000, formatter.feed([lines * 10_000], 1))
            log.flush()
        held = (disk / "log").read_bytes()
        assert b"\0" not in held and held.endswith(b"\n")
        assert len(set(held.splitlines())) == 1
        log.close()


class SlowStore(FdStore):
    """A supervisor that takes its time."""

    def __init__(self) -> None:
        super().__init__("", "", "")
        self.asked, self.taken = asyncio.Event(), asyncio.Event()

    async def flush(self, timeout: float) -> None:
        self.asked.set()
        await self.taken.wait()


@pytest.mark.parametrize("first", ["finish", "close"])
async def test_a_log_that_has_just_begun_can_end(tmp_path: Path, first: str) -> None:
    container, store = secrets.token_hex(32), SlowStore()
    with ThreadPoolExecutor(1) as executor:
        logs = LogService(tmp_path / "cursors", AgentDialer("a" * 64), store, executor, {})
        with opened(tmp_path / "log") as fd:
            beginning = asyncio.ensure_future(logs.start(container, tty=False, fd=os.dup(fd)))
            await store.asked.wait()
            if first == "finish":
                assert await logs.finish(container, timeout=0.1) == (False, 0)
            await logs.close()
            store.taken.set()
            await beginning
