"""Exec and attach, from the URL to the container and back, over SPDY and WebSocket."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hyperpod.cli.upgrade import upgraded
from hyperpod.config import StreamingConfig
from hyperpod.errors import HyperpodError
from hyperpod.wire import spdy
from hyperpod.wire.remotecommand import Wanted
from tests.agentkit import TIMEOUT, AgentKit, agent_pid
from tests.shimkit import WAIT, eventually, payload
from tests.streamkit import ALL, OUT, TTY, Command, StreamPod, WebSocket, exit_code, stream_pod


@pytest.fixture(params=["host", "guest"])
async def pod(agent: AgentKit, request: pytest.FixtureRequest) -> AsyncIterator[StreamPod]:
    """Of the host, whose agent hands pipes and sockets over, and as a VM, where all goes in frames."""
    config = StreamingConfig()
    async with stream_pod(agent, config, guest=request.param == "guest") as made:
        yield made


async def test_exec(pod: StreamPod) -> None:
    container = await pod.run("sleep", "1000")
    command = await Command.open(pod.exec_url(container, "sh", "-c", "echo out; echo err >&2; exit 7"))
    out, err, status = await command.result()
    assert (out, err, exit_code(status)) == (b"out\n", b"err\n", 7)
    command = await Command.open(pod.exec_url(container, "true"))
    assert await command.result() == (b"", b"", {"metadata": {}, "status": "Success"})


async def test_a_client_that_heeds_windows_both_ways(pod: StreamPod) -> None:
    """Its news of its own windows come behind its input, and must be read whatever becomes of that."""
    container = await pod.run("sleep", "1000")
    sock, early = await upgraded(
        pod.exec_url(container, "cat", wanted=ALL),
        [
            ("Connection", "Upgrade"),
            ("Upgrade", "SPDY/3.1"),
            ("X-Stream-Protocol-Version", "v4.channel.k8s.io"),
        ],
    )
    data = os.urandom(8_000_000)
    client = spdy.Connection(spdy.Role.CLIENT)
    _, stdin, stdout, _ = (
        client.open_stream((("streamtype", n),)) for n in ("error", "stdin", "stdout", "stderr")
    )
    sent, got, sending = 0, bytearray(), bytearray()

    def fill() -> None:
        nonlocal sent
        while (room := min(client.window(stdin), len(data) - sent)) and len(sending) < 1_000_000:
            client.send_data(stdin, data[sent : sent + room])
            sent += room
            sending.extend(b"".join(client.data_to_send()))
        sending.extend(b"".join(client.data_to_send()))

    sock.setblocking(False)
    async with asyncio.timeout(TIMEOUT):
        while len(got) < len(data):
            fill()
            with contextlib.suppress(BlockingIOError):
                del sending[: sock.send(sending)]
            try:
                early += sock.recv(262144)
            except BlockingIOError:
                await asyncio.sleep(0.001)
            for event in client.receive_data(early):
                if isinstance(event, spdy.DataReceived) and event.stream == stdout:
                    got += event.data
                    client.acknowledge(stdout, len(event.data))
            early = b""
    assert bytes(got) == data
    sock.close()
    await asyncio.sleep(0)


async def test_exec_with_a_large_command(pod: StreamPod) -> None:
    container = await pod.run("sleep", "1000")
    words = [f"{index:0100000d}" for index in range(8)]
    command = await Command.open(
        pod.exec_url(container, "sh", "-c", 'for x; do echo "$x"; done', "sh", *words)
    )
    out, _, status = await command.result()
    assert (out.decode().split(), exit_code(status)) == (words, 0)


async def test_exec_with_input_to_its_end(pod: StreamPod) -> None:
    container = await pod.run("sleep", "1000")
    data = os.urandom(5_000_000)
    command = await Command.open(pod.exec_url(container, "cat", wanted=ALL), ALL)

    async def write() -> None:
        for start in range(0, len(data), 70_000):
            await command.write(data[start : start + 70_000])
        await command.end()

    writing = asyncio.ensure_future(write())
    out, _, status = await command.result()
    await writing
    assert hashlib.sha256(out).digest() == hashlib.sha256(data).digest()
    assert exit_code(status) == 0


async def test_exec_that_closes_its_input(pod: StreamPod) -> None:
    container = await pod.run("sleep", "1000")
    script = "exec <&-; sleep 0.3; echo done"
    command = await Command.open(pod.exec_url(container, "sh", "-c", script, wanted=ALL), ALL)
    for _ in range(50):
        await command.write(bytes(100_000))
    await command.end()
    out, _, status = await command.result()
    assert (out, exit_code(status)) == (b"done\n", 0)


async def test_who_reads_what_an_exec_prints(pod: StreamPod) -> None:
    """On the host the shim, from the process's own pipe, and nothing of it is left afterwards."""
    container, pid = await pod.run("sleep", "1000"), (await pod.shim.hello()).pid
    before = pipes(pid)
    script = "readlink /proc/self/fd/1; cat"
    command = await Command.open(pod.exec_url(container, "sh", "-c", script, wanted=ALL), ALL)
    name = (await command.until(b"\n")).decode().strip()
    assert name.startswith("pipe:")
    assert (name in pipes(pid)) == pod.hands_over
    await eventually(lambda: len(pipes(pid) - before) == (3 if pod.hands_over else 0))
    await command.end()
    assert (await command.result())[0] == b""
    await eventually(lambda: pipes(pid) == before)


async def test_a_shim_that_is_killed_ends_its_execs(pod: StreamPod) -> None:
    """In their own way: what they still say finds a reader, the agent, and nobody's pipe is broken."""
    container, agent = await pod.run("sleep", "1000"), agent_pid(pod.agent.place)
    before = len(pipes(agent))
    script = "trap 'seq 100000 && echo $? > /tmp/said; exit' HUP; echo $$; while :; do sleep 0.1; done"
    command = await Command.open(pod.exec_url(container, "sh", "-c", script, wanted=ALL), ALL)
    await command.until(b"\n")
    os.kill((await pod.shim.hello()).pid, signal.SIGKILL)
    async with asyncio.timeout(WAIT):
        while b"trap" in await processes(pod, container):
            await asyncio.sleep(0.1)
    await eventually(lambda: len(pipes(agent)) <= before)
    exec_id = await pod.agent.exec(container, "cat", "/tmp/said")
    async with pod.agent.output(container, exec_id) as stream:
        assert await stream.read_all() == b"0\n"
    await pod.agent.client.remove_exec(container, exec_id)
    await command.client.close()


def pipes(pid: int) -> set[str]:
    """Of the process's descriptors."""
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(str(entry.readlink()))
    return {link for link in found if link.startswith("pipe:")}


async def test_exec_on_a_terminal(pod: StreamPod) -> None:
    container = await pod.run("sleep", "1000")
    command = await Command.open(pod.exec_url(container, "sh", wanted=TTY), TTY)
    await command.resize(33, 99)
    await command.until(b"#")
    # Sizes and input come on connections of their own, in any order.
    for rows, columns in ((33, 99), (44, 111)):
        await command.resize(rows, columns)
        await command.write(b"until stty size | grep '^%d %d'; do sleep 0.01; done\n" % (rows, columns))
        await command.until(b"\r\n%d %d" % (rows, columns))
    await command.write(b"test -t 1 && exit 3\n")
    _, _, status = await command.result()
    assert exit_code(status) == 3


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        ("/no/such/program", 127),
        ("nowhere", 127),
        ("/etc/notes", 126),
        ("/etc", 126),
        ("/etc/notes/x", 126),
        ("", 126),
        ("x" * 300, 126),
    ],
)
async def test_a_command_that_cannot_run(pod: StreamPod, argv: str, code: int) -> None:
    container = await pod.run("sleep", "1000")
    async with asyncio.timeout(TIMEOUT):
        out, err, status = await (await Command.open(pod.exec_url(container, argv))).result()
    assert exit_code(status) == code
    assert argv.rpartition("/")[2][:200] in err.decode()
    assert out == b""


async def test_exec_in_what_has_ended(pod: StreamPod) -> None:
    container = await pod.run("sh", "-c", "exit 0")
    await pod.agent.exit_of(container)
    _, _, status = await (await Command.open(pod.exec_url(container, "true"))).result()
    assert "not RUNNING" in status["message"]
    await pod.agent.client.remove_container(container)
    _, _, status = await (await Command.open(pod.exec_url(container, "true"))).result()
    assert "no container" in status["message"]


async def test_exec_while_the_container_ends_loses_nothing(pod: StreamPod) -> None:
    container = await pod.run("sh", "-c", "read x", stdin=True)
    command = await Command.open(pod.exec_url(container, "sh", "-c", "echo here; exec sleep 1000"))
    assert await command.until(b"here") == b"here\n"
    async with pod.agent.input(container) as stdin:
        await stdin.write(b"go\n")
    out, _, status = await command.result()
    assert exit_code(status) in (137, -1)
    assert out == b""


async def test_what_an_exec_leaves_in_the_background(pod: StreamPod) -> None:
    """It neither holds the session up nor dies with it; it ends with its container."""
    container = await pod.run("sleep", "1000")
    script = "(while sleep 0.1; do touch /tmp/alive; done) & echo started"
    async with asyncio.timeout(TIMEOUT):
        out, _, status = await (await Command.open(pod.exec_url(container, "sh", "-c", script))).result()
    assert (out, exit_code(status)) == (b"started\n", 0)
    check = "rm -f /tmp/alive; while [ ! -e /tmp/alive ]; do sleep 0.1; done"
    _, _, status = await (await Command.open(pod.exec_url(container, "sh", "-c", check))).result()
    assert exit_code(status) == 0
    await pod.agent.client.remove_container(container)


async def processes(pod: StreamPod, container: str) -> bytes:
    exec_id = await pod.agent.exec(container, "ps")
    async with pod.agent.output(container, exec_id) as stream:
        out = await stream.read_all()
    await pod.agent.client.remove_exec(container, exec_id)
    return out


async def test_a_client_that_goes_away_ends_its_exec(pod: StreamPod) -> None:
    container = await pod.run("sleep", "1000")
    script = "trap 'echo hup > /tmp/hup; exit' HUP; echo $$; while :; do sleep 0.1; done"
    command = await Command.open(pod.exec_url(container, "sh", "-c", script, wanted=ALL), ALL)
    await command.until(b"\n")
    command.client.abort()
    async with asyncio.timeout(WAIT):
        while b"trap" in await processes(pod, container):
            await asyncio.sleep(0.1)
    out, _, _ = await (await Command.open(pod.exec_url(container, "cat", "/tmp/hup"))).result()
    assert out == b"hup\n"


async def test_a_slow_reader_holds_the_process_up_and_gets_all(pod: StreamPod) -> None:
    container = await pod.run("sleep", "1000")
    client = await Command.open(
        pod.exec_url(container, "sh", "-c", "seq 2000000; touch /tmp/done", wanted=OUT)
    )
    client.client._reader.cancel()  # reads nothing for now
    await asyncio.sleep(1.0)
    out, _, status = await (await Command.open(pod.exec_url(container, "test", "-e", "/tmp/done"))).result()
    assert exit_code(status) == 1
    client.client._reader = asyncio.ensure_future(client.client._read(b""))
    client.client.failure = None
    for stream in client.streams.values():
        stream.ended = stream.was_reset = False
    out, _, status = await client.result()
    assert out == b"".join(b"%d\n" % i for i in range(1, 2_000_001))


async def test_hundred_at_once(pod: StreamPod) -> None:
    container = await pod.run("sleep", "1000")

    async def one(index: int) -> bytes:
        command = await Command.open(pod.exec_url(container, "cat", wanted=ALL), ALL)
        await command.write(b"%d" % index * 1000)
        await command.end()
        out, _, status = await command.result()
        assert exit_code(status) == 0
        return out

    results = await asyncio.gather(*(one(index) for index in range(100)))
    assert results == [b"%d" % index * 1000 for index in range(100)]


async def test_websocket_exec_v5(pod: StreamPod) -> None:
    container = await pod.run("sleep", "1000")
    socket = await WebSocket.connect(
        pod.exec_url(container, "sh", "-c", "cat; exit 5", wanted=ALL), "v5.channel.k8s.io"
    )
    await socket.send(b"\x00some input")
    await socket.send(b"\xff\x00")
    got = await socket.channels()
    assert got[1] == b"some input"
    assert exit_code(json.loads(got[3])) == 5
    assert socket.code == 1000
    socket.close()


async def test_attach_shows_what_comes_and_leaves_the_container(pod: StreamPod) -> None:
    container = await pod.run("sh", "-c", "echo before; while read x; do echo got $x; done", stdin=True)
    await eventually(lambda: b"before" in pod.log(container))
    first = await Command.open(pod.attach_url(container, ALL), ALL)
    second = await Command.open(pod.attach_url(container, ALL), ALL)
    await first.write(b"one\n")
    assert await first.until(b"\n") == await second.until(b"\n") == b"got one\n"
    await second.write(b"two\n")
    assert await first.until(b"\n") == await second.until(b"\n") == b"got two\n"
    first.client.abort()
    await second.write(b"three\n")
    assert await second.until(b"\n") == b"got three\n"
    await second.end()  # not once: the client leaves, the container's input stays open
    assert await second.result() == (b"", b"", {"metadata": {}, "status": "Success"})
    third = await Command.open(pod.attach_url(container, ALL), ALL)
    await third.write(b"four\n")
    assert await third.until(b"\n") == b"got four\n"
    await third.client.close()
    assert payload(pod.log(container)) == b"before\n" + b"".join(
        b"got %s\n" % n for n in (b"one", b"two", b"three", b"four")
    )


async def test_attach_sees_what_its_input_leads_to_however_slowly_that_is_taken(pod: StreamPod) -> None:
    container, agent = await pod.run("sh", "-c", "while read x; do echo got $x; done", stdin=True), pod.agent
    os.kill(agent_pid(agent.place), signal.SIGSTOP)
    try:
        command = await Command.open(pod.attach_url(container, ALL), ALL)
        await command.write(b"one\n")
        await command.end()
        await asyncio.sleep(1.5)
    finally:
        os.kill(agent_pid(agent.place), signal.SIGCONT)
    out, _, status = await command.result()
    assert (out, status["status"]) == (b"got one\n", "Success")


async def test_attach_with_stdin_once(pod: StreamPod) -> None:
    container = await pod.run("cat", stdin=True, stdin_once=True)
    command = await Command.open(pod.attach_url(container, ALL), ALL)
    data = os.urandom(3_000_000)
    for start in range(0, len(data), 100_000):
        await command.write(data[start : start + 100_000])
    await command.end()
    out, _, status = await command.result()
    assert out == data
    assert status["status"] == "Success"
    assert (await pod.agent.exit_of(container)).exit_code == 0


async def test_stdin_once_ends_with_a_client_that_goes(pod: StreamPod) -> None:
    """Without a word, as one that is killed: its input has ended, and what it sent is there."""
    container = await pod.run("wc", "-c", stdin=True, stdin_once=True)
    command = await Command.open(pod.attach_url(container, ALL), ALL)
    await command.write(b"x" * 1000)
    command.client.abort()
    assert (await pod.agent.exit_of(container)).exit_code == 0
    await eventually(lambda: b" 1000\n" in pod.log(container))


async def test_attach_to_a_terminal_again_and_again(pod: StreamPod) -> None:
    container = await pod.run("sh", tty=True, stdin=True, stdin_once=True)
    for size in (30, 40):
        command = await Command.open(pod.attach_url(container, TTY), TTY)
        await command.resize(size, 100)
        await command.write(b"until stty size | grep '^%d 100'; do sleep 0.01; done\n" % size)
        await command.until(b"\r\n%d 100" % size)
        await command.client.close()
    command = await Command.open(pod.attach_url(container, TTY), TTY)
    await command.write(b"exit\n")
    await command.result()
    assert (await pod.agent.exit_of(container)).exit_code == 0


async def test_attach_to_what_has_ended(pod: StreamPod) -> None:
    container = await pod.run("echo", "x")
    await pod.agent.exit_of(container)
    await eventually(lambda: b"x" in pod.log(container))
    async with asyncio.timeout(TIMEOUT):
        assert (await (await Command.open(pod.attach_url(container))).result())[2]["status"] == "Success"
    with pytest.raises(HyperpodError, match="409"):
        await Command.open(pod.attach_url("ab" * 32))


async def test_a_removed_container_ends_its_attach(pod: StreamPod) -> None:
    container = await pod.run("sleep", "1000")
    command = await Command.open(pod.attach_url(container))
    await pod.shim.log_stop(container)
    await pod.agent.client.remove_container(container)
    async with asyncio.timeout(TIMEOUT):
        assert (await command.result())[2]["status"] == "Success"


async def test_a_stopped_attach_does_not_stop_the_log(pod: StreamPod) -> None:
    container = await pod.run("sh", "-c", "read x; seq 1000000", stdin=True)
    idle = await Command.open(pod.attach_url(container, OUT))
    idle.client._reader.cancel()
    async with pod.agent.input(container) as stdin:
        await stdin.write(b"go\n")
        end = await pod.shim.log_finish(container, TIMEOUT)
    assert end.complete
    assert payload(pod.log(container)) == b"".join(b"%d\n" % i for i in range(1, 1_000_001))
    idle.client.abort()


async def test_a_client_that_opens_no_streams_is_dropped(pod: StreamPod) -> None:
    container = await pod.run("sleep", "1000")
    pod.creation = 2.0
    command = await Command.open(pod.exec_url(container, "true", wanted=ALL), OUT)
    async with asyncio.timeout(TIMEOUT):
        await command.client.closed.wait()
    await command.client.close()


async def test_broken_clients(pod: StreamPod) -> None:
    container = await pod.run("sleep", "1000")
    command = await Command.open(pod.exec_url(container, "sleep", "4321"))
    command.client._socket.write([b"\x80\x09\0\1\0\0\0\0"])
    async with asyncio.timeout(TIMEOUT):
        await command.client.closed.wait()
    await command.client.close()
    async with asyncio.timeout(WAIT):
        while b"sleep 4321" in await processes(pod, container):
            await asyncio.sleep(0.2)


async def test_only_what_was_asked_for(pod: StreamPod) -> None:
    container = await pod.run("sleep", "1000")
    wanted = Wanted(stderr=True)
    out, err, status = await (
        await Command.open(
            pod.exec_url(container, "sh", "-c", "seq 200000; echo e >&2", wanted=wanted), wanted
        )
    ).result()
    assert (out, err, exit_code(status)) == (b"", b"e\n", 0)
