"""The command line's exec and port-forward as shells and impatient users have them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from tests.agentkit import TIMEOUT
from tests.daemonkit import ROOT, Cri, Daemon

FLOOD = "while true; do nc -l -p 7001 -e cat /dev/zero; done & while true; do nc -l -p 7000 -e cat; done"
"""Port 7001 sends without end, port 7000 echoes; one connection at a time."""


@pytest.fixture
async def container(cri_client: Cri, pod: str) -> str:
    return await cri_client.sh(pod, FLOOD)


def command(daemon: Daemon, name: str, *args: str) -> list[str]:
    return [sys.executable, "-m", "hyperpod", name, "--endpoint", f"unix://{daemon.socket}", *args]


async def ended(process: subprocess.Popen[bytes]) -> int:
    return await asyncio.to_thread(process.wait, TIMEOUT)


@contextlib.contextmanager
def started(argv: list[str], **how: int) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(argv, cwd=ROOT, **how) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            process.kill()


async def test_a_reader_that_goes_ends_the_command(host_daemon: Daemon, container: str) -> None:
    """`hyperpod exec CONTAINER yes | head`."""
    pipe = subprocess.PIPE
    with started(command(host_daemon, "exec", container, "yes"), stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None and process.stderr is not None
        assert await asyncio.to_thread(process.stdout.read, 2) == b"y\n"
        process.stdout.close()
        assert await ended(process) == 128 + signal.SIGPIPE
        assert process.stderr.read() == b""


async def test_output_that_cannot_be_written(host_daemon: Daemon, container: str) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        argv = command(host_daemon, "exec", container, "echo", "x")
        with started(argv, stdout=full, stderr=subprocess.PIPE) as process:
            assert await ended(process) == 1
            assert process.stderr is not None
            assert process.stderr.read() == b"hyperpod: cannot write to stdout: No space left on device\n"
    finally:
        os.close(full)


async def test_closed_standard_streams(host_daemon: Daemon, container: str) -> None:
    """Our own connection must not be taken for one of them."""
    argv = ["sh", "-c", '"$@" <&- >&-', "sh", *command(host_daemon, "exec", "-i", container, "sh", "-c")]
    with started([*argv, "cat; exit 3"]) as process:
        assert await ended(process) == 3
    with started([*argv, "echo x"], stderr=subprocess.PIPE) as process:
        assert await ended(process) == 1
        assert process.stderr is not None
        assert b"cannot write to stdout: Bad file descriptor" in process.stderr.read()


async def test_an_interrupt_while_nobody_takes_the_input(host_daemon: Daemon, container: str) -> None:
    zero = os.open("/dev/zero", os.O_RDONLY)
    script = "head -c 1 >/dev/null; echo blocked; exec sleep 1000"
    # Who runs the tests in the background may have it ignored, and what is ignored is so for children, too.
    heard = ("env", "--default-signal=INT")
    argv = [*heard, *command(host_daemon, "exec", "-i", container, "sh", "-c", script)]
    try:
        with started(argv, stdin=zero, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert await asyncio.to_thread(process.stdout.readline) == b"blocked\n"
            await asyncio.sleep(1.0)  # until every buffer on the way is full; too early is no failure
            process.send_signal(signal.SIGINT)
            assert await ended(process) == 130
    finally:
        os.close(zero)


@asynccontextmanager
async def forwarded(daemon: Daemon, pod: str, *ports: str) -> AsyncIterator[list[int]]:
    """The local ports."""
    with started(command(daemon, "port-forward", pod, *ports), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        lines = [await asyncio.to_thread(process.stdout.readline) for _ in ports]
        yield [int(line.split()[2].rpartition(b":")[2]) for line in lines]


async def talk(port: int, data: bytes) -> bytes:
    """What is answered; nothing by a port where just nobody listens, which breaks the connection off."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        with contextlib.suppress(OSError):
            writer.write(data)
            writer.write_eof()
            return await reader.read()
        return b""
    finally:
        writer.close()


async def begins(reader: asyncio.StreamReader) -> bytes:
    with contextlib.suppress(OSError):
        return await reader.read(1)
    return b""


@pytest.mark.usefixtures("container")
async def test_clients_that_break_off_leave_the_others(host_daemon: Daemon, pod: str) -> None:
    """What they have not read holds nobody up, and their connections in the pod end: the port is free again."""
    async with (
        forwarded(host_daemon, pod, "0:7000", "0:7001") as (echoing, flooding),
        asyncio.timeout(TIMEOUT),
    ):
        for _ in range(5):
            reader, writer = await asyncio.open_connection("127.0.0.1", flooding)
            while not await begins(reader):  # between two of its servers nobody listens
                writer.close()
                reader, writer = await asyncio.open_connection("127.0.0.1", flooding)
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            writer.transport.abort()
        while await talk(echoing, b"still there") != b"still there":
            await asyncio.sleep(0.1)
