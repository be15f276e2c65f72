"""Standard streams of containers and execs over stdio connections: nothing lost, nothing doubled."""

from __future__ import annotations

import asyncio
import hashlib

import pytest

from hyperpod.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from hyperpod.spec.oci import ContainerSpecInput
from hyperpod.wire.stdio import WINDOW
from tests.agentkit import TIMEOUT, AgentKit

TEN_MB = "head -c 10000000 /dev/zero | tr '\\0' x"


async def test_ten_megabytes_that_nobody_reads_wait_and_then_arrive_whole(agent: AgentKit) -> None:
    # Numbers, so that every byte has its place; the container cannot end before somebody reads.
    ident = await agent.start("sh", "-c", "seq 1500000; echo written >&2; exec sleep 1000")
    expected = b"".join(b"%d\n" % i for i in range(1, 1500001))
    assert len(expected) > 10_000_000
    async with agent.output(ident, stream="stderr") as err, agent.output(ident) as unread:
        held = await unread.read_exactly(WINDOW, ack=False)
        assert held == expected[:WINDOW]
        assert not unread.protocol.eof
        waiting = asyncio.ensure_future(err.chunk())
        # The window is full and not acknowledged: an exec still works, the writer stands.
        exec_id = await agent.exec(ident, "sh", "-c", "cat /proc/1/wchan; sleep 0.2")
        assert await agent.client.wait_exec(ident, exec_id, timeout=TIMEOUT) == 0
        assert not waiting.done()
        async with agent.output(ident) as out:
            got = await out.read_exactly(len(expected))
            assert len(got) == len(expected)
            assert hashlib.sha256(got).digest() == hashlib.sha256(expected).digest()
        assert await waiting == b"written\n"


async def test_exit_is_reported_after_the_output_was_read(agent: AgentKit) -> None:
    ident = await agent.start("sh", "-c", TEN_MB)
    async with agent.output(ident) as out:
        assert len(await out.read_all()) == 10_000_000
        assert out.protocol.offset == 10_000_000
    assert (await agent.exit_of(ident)).exit_code == 0


async def test_a_reader_that_comes_after_the_end_gets_all(agent: AgentKit) -> None:
    ident = await agent.start("sh", "-c", "echo late; echo more >&2")
    await agent.exit_of(ident)
    async with agent.output(ident) as out, agent.output(ident, stream="stderr") as err:
        assert await out.read_all() == b"late\n"
        assert await err.read_all() == b"more\n"


async def test_reconnecting_resumes_at_the_offset(agent: AgentKit) -> None:
    ident = await agent.start("sh", "-c", "seq 200000")
    expected = b"".join(b"%d\n" % i for i in range(1, 200001))
    got = bytearray()
    for _ in range(200):
        async with agent.output(ident, from_offset=len(got)) as out:
            # What came unacknowledged is forgotten: as a shim does that dies before it has written.
            got += await out.read_exactly(20_000)
            if not await out.chunk(ack=False) and out.protocol.eof:
                break
    assert bytes(got) == expected


async def test_a_newer_connection_ends_the_older(agent: AgentKit) -> None:
    ident = await agent.start("sh", "-c", "echo one; exec sleep 1000")
    async with agent.output(ident) as older:
        assert await older.read_until(b"one") == b"one\n"
        async with agent.output(ident, from_offset=4) as newer:
            await newer.opened()
            assert "newer connection" in await older.refused()


async def test_acknowledged_bytes_are_a_gap_for_who_asks_for_them(agent: AgentKit) -> None:
    ident = await agent.start("sh", "-c", "seq 100000; exec sleep 1000")
    async with agent.output(ident) as out:
        before = len(await out.read_exactly(300_000))
        async with agent.output(ident, from_offset=10) as again:
            rest = await again.read_exactly(10)
            assert again.protocol.gap_bytes >= before - WINDOW - 10 > 0
            assert again.protocol.gap_bytes + 10 <= before
            assert rest


async def test_offsets_that_do_not_exist_are_refused(agent: AgentKit) -> None:
    ident = await agent.start("sh", "-c", "echo hello; exec sleep 1000")
    async with agent.output(ident) as out:
        await out.read_until(b"hello")
    async with agent.output(ident, from_offset=1000) as out:
        assert "1000" in await out.refused()


@pytest.mark.parametrize(
    ("container", "exec_id", "stream"),
    [("0" * 64, "", "stdout"), ("", "1" * 32, "stdout"), ("", "", "stdin")],
)
async def test_unknown_streams_are_refused(
    agent: AgentKit, container: str, exec_id: str, stream: str
) -> None:
    ident = await agent.start("sleep", "1000")
    async with agent.output(container or ident, exec_id, stream) as out:
        assert "no " in await out.refused()


async def test_stdin_of_a_container_ends_with_its_first_writer(agent: AgentKit) -> None:
    ident = await agent.start("sh", "-c", "cat; echo over", stdin=True, stdin_once=True)
    async with agent.output(ident) as out:
        async with agent.input(ident) as source:
            await source.write(b"some\x00 bytes\n")
        assert await out.read_all() == b"some\x00 bytes\nover\n"


async def test_stdin_stays_open_for_another_writer(agent: AgentKit) -> None:
    ident = await agent.start("sh", "-c", "read a; read b; echo $a $b", stdin=True)
    async with agent.output(ident) as out:
        for line in (b"one\n", b"two\n"):
            async with agent.input(ident) as source:
                await source.write(line)
                source.eof()
        assert await out.read_all() == b"one two\n"


async def test_without_stdin_it_is_empty(agent: AgentKit) -> None:
    _, info, out = await agent.run("sh", "-c", "cat; echo over")
    assert (info.exit_code, out) == (0, b"over\n")


async def test_large_stdin_through_a_slow_reader(agent: AgentKit) -> None:
    ident = await agent.start("sh", "-c", "sleep 0.3; wc -c; sleep 0.1", stdin=True, stdin_once=True)
    async with agent.output(ident) as out, agent.input(ident) as source:
        await source.write(bytes(3_000_000))
        source.eof()
        assert await out.read_all() == b"3000000\n"


async def test_stdin_of_a_process_that_does_not_read_is_swallowed_at_its_end(agent: AgentKit) -> None:
    ident = await agent.start("sh", "-c", "while [ ! -e /over ]; do sleep 0.1; done", stdin=True)
    async with agent.input(ident) as source:
        writing = asyncio.ensure_future(source.write(bytes(1_000_000)))
        assert (
            await agent.client.wait_exec(ident, await agent.exec(ident, "touch", "/over"), timeout=TIMEOUT)
            == 0
        )
        await writing
    assert (await agent.exit_of(ident)).exit_code == 0


async def test_terminal_of_a_container(agent: AgentKit) -> None:
    script = "stty size; test -t 0 && test -t 2 && echo tty; read x; stty size; echo got $x"
    spec = ContainerSpecInput(args=("sh", "-c", script), tty=True)
    ident = await agent.create(spec=spec, stdin=True)
    with pytest.raises(FailedPrecondition, match="no terminal"):
        await agent.client.resize_tty(ident, "", rows=1, cols=1)
    await agent.client.start_container(ident)
    async with agent.output(ident) as out, agent.input(ident) as source:
        assert b"tty" in await out.read_until(b"tty\r\n")
        await agent.client.resize_tty(ident, "", rows=33, cols=101)
        await source.write(b"word\n")
        rest = await out.read_all()
        assert b"33 101\r\n" in rest
        assert b"got word\r\n" in rest
    assert (await agent.exit_of(ident)).exit_code == 0
    async with agent.output(ident, stream="stderr") as err:
        assert "no stderr" in await err.refused()
    with pytest.raises(InvalidArgument):
        await agent.client.resize_tty(ident, "", rows=0, cols=70000)


async def test_exec_streams_and_codes(agent: AgentKit) -> None:
    ident = await agent.start("sleep", "1000")
    exec_id = await agent.exec(ident, "sh", "-c", "cat; echo err >&2; exit 9", stdin=True)
    async with agent.output(ident, exec_id) as out, agent.output(ident, exec_id, "stderr") as err:
        async with agent.input(ident, exec_id) as source:
            await source.write(b"through")
            source.eof()
            assert await out.read_all() == b"through"
        assert await err.read_all() == b"err\n"
    for _ in range(2):
        assert await agent.client.wait_exec(ident, exec_id, timeout=TIMEOUT) == 9
    await agent.client.remove_exec(ident, exec_id)
    await agent.client.remove_exec(ident, exec_id)
    with pytest.raises(NotFound):
        await agent.client.wait_exec(ident, exec_id, timeout=TIMEOUT)


async def test_exec_with_a_terminal(agent: AgentKit) -> None:
    ident = await agent.start("sleep", "1000")
    exec_id = await agent.exec(ident, "sh", "-c", "test -t 1 && echo tty; exit 3", tty=True)
    async with agent.output(ident, exec_id) as out:
        assert await out.read_all() == b"tty\r\n"
    assert await agent.client.wait_exec(ident, exec_id, timeout=TIMEOUT) == 3


async def test_exec_of_a_missing_program(agent: AgentKit) -> None:
    ident = await agent.start("sleep", "1000")
    with pytest.raises(NotFound, match="nothing-like-it"):
        await agent.exec(ident, "nothing-like-it")
    assert await agent.client.wait_exec(ident, await agent.exec(ident, "true"), timeout=TIMEOUT) == 0


async def test_exec_in_a_stopped_container(agent: AgentKit) -> None:
    ident, _, _ = await agent.run("true")
    with pytest.raises(FailedPrecondition, match="EXITED"):
        await agent.exec(ident, "true")


async def test_kill_of_an_exec_takes_its_grandchildren_and_nothing_else(agent: AgentKit) -> None:
    ident = await agent.start("sh", "-c", "sleep 1000 & wait")
    script = "(setsid sh -c 'trap \"\" TERM HUP; sleep 777' &) ; sleep 778 & echo ready; wait"
    exec_id = await agent.exec(ident, "sh", "-c", script.replace("setsid ", ""))
    async with agent.output(ident, exec_id) as out:
        await out.read_until(b"ready")
        await agent.client.kill_exec(ident, exec_id)
        assert await agent.client.wait_exec(ident, exec_id, timeout=TIMEOUT) == 137
        assert await out.read_all() == b""  # EOF: whoever held the pipe is gone
    # Not ps: what it shows without options differs among busyboxes.
    look = await agent.exec(ident, "sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
    async with agent.output(ident, look) as out:
        listing = await out.read_all()
    assert b"sleep 77" not in listing
    assert b"sleep 1000" in listing


async def test_wait_for_an_exec_has_a_deadline_and_survives_it(agent: AgentKit) -> None:
    from hyperpod.errors import DeadlineExceeded

    ident = await agent.start("sleep", "1000")
    exec_id = await agent.exec(ident, "sh", "-c", "read x; exit 4", stdin=True)
    with pytest.raises(DeadlineExceeded):
        await agent.client.wait_exec(ident, exec_id, timeout=0.05)
    async with agent.input(ident, exec_id) as source:
        await source.write(b"end\n")
    assert await agent.client.wait_exec(ident, exec_id, timeout=TIMEOUT) == 4


async def test_removing_an_exec_that_runs_kills_it_and_ends_its_waiters(agent: AgentKit) -> None:
    ident = await agent.start("sleep", "1000")
    exec_id = await agent.exec(ident, "sleep", "999")
    waiter = asyncio.ensure_future(agent.client.wait_exec(ident, exec_id))
    await asyncio.sleep(0.05)
    await agent.client.remove_exec(ident, exec_id)
    (outcome,) = await asyncio.gather(waiter, return_exceptions=True)
    assert outcome == 137 or isinstance(outcome, NotFound)


async def test_an_exec_id_is_used_once(agent: AgentKit) -> None:
    ident = await agent.start("sleep", "1000")
    exec_id = await agent.exec(ident, "true")
    with pytest.raises(AlreadyExists):
        await agent.client.start_exec(ident, exec_id, process_json=b'{"args":["true"],"cwd":"/"}')


async def test_a_grandchild_with_the_pipe_does_not_hold_up_the_exit_for_long(agent: AgentKit) -> None:
    # An exec's child keeps the container's stdout open only through its own pipe: the exit comes regardless.
    ident = await agent.start("sh", "-c", "echo x; read x", stdin=True)
    await agent.exec(ident, "sleep", "1000")
    async with agent.input(ident) as source:
        await source.write(b"end\n")
    info = await agent.exit_of(ident)
    assert info.exit_code == 0
