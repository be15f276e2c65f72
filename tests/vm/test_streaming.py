"""Exec, attach and port-forward with the whole runtime: daemon, shim, VM."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from hyperpod.api.gen.runtime import v1 as cri
from tests.agentkit import TIMEOUT
from tests.daemonkit import ROOT, Cri, Daemon
from tests.streamkit import ALL, OUT, Command, WebSocket, exit_code, forwarded

ECHO = "while true; do nc -l -p 7000 -e cat; done"


async def exec_url(client: Cri, container: str, *argv: str, stdin: bool = False, tty: bool = False) -> str:
    request = cri.ExecRequest(
        container_id=container, cmd=list(argv), stdin=stdin, stdout=True, stderr=not tty, tty=tty
    )
    return (await client.runtime.exec(request)).url


async def test_exec_over_both_transports(cri_client: Cri, pod: str) -> None:
    container = await cri_client.run(pod, "sleep", "1000")
    data = os.urandom(1_000_000)
    command = await Command.open(await exec_url(cri_client, container, "cat", stdin=True), ALL)

    async def write() -> None:
        for start in range(0, len(data), 50_000):
            await command.write(data[start : start + 50_000])
        await command.end()

    writing = asyncio.ensure_future(write())
    out, _, status = await command.result()
    await writing
    assert out == data
    assert exit_code(status) == 0
    socket = await WebSocket.connect(
        await exec_url(cri_client, container, "sh", "-c", "id -u; exit 9"), "v5.channel.k8s.io"
    )
    got = await socket.channels()
    socket.close()
    assert got[1] == b"0\n"
    assert exit_code(json.loads(got[3])) == 9
    _, _, status = await (await Command.open(await exec_url(cri_client, container, "/no/such"))).result()
    assert exit_code(status) == 127


async def test_attach(cri_client: Cri, pod: str) -> None:
    container = await cri_client.run(pod, "sh", "-c", "while read x; do echo got $x; done", stdin=True)
    request = cri.AttachRequest(container_id=container, stdin=True, stdout=True, stderr=True)
    command = await Command.open((await cri_client.runtime.attach(request)).url, ALL)
    await command.write(b"one\n")
    async with asyncio.timeout(TIMEOUT):
        assert await command.until(b"\n") == b"got one\n"
    await command.client.close()


async def test_port_forward_to_what_listens_in_the_pod(cri_client: Cri, pod: str) -> None:
    container = await cri_client.run(pod, "sh", "-c", ECHO)
    url = (await cri_client.runtime.port_forward(cri.PortForwardRequest(pod_sandbox_id=pod))).url
    data = os.urandom(300_000)
    assert await forwarded(url, 7000, data) == data
    await cri_client.stop(container)


async def test_what_cannot_be_streamed(cri_client: Cri, pod: str) -> None:
    container = await cri_client.run(pod, "sleep", "1000")
    for request in (
        cri.ExecRequest(container_id=container, cmd=["true"]),
        cri.ExecRequest(container_id=container, cmd=["true"], stdout=True, stderr=True, tty=True),
        cri.ExecRequest(container_id=container, stdout=True),
    ):
        with pytest.raises(GRPCError) as info:
            await cri_client.runtime.exec(request)
        assert info.value.status is Status.INVALID_ARGUMENT
    with pytest.raises(GRPCError) as info:
        await cri_client.runtime.port_forward(cri.PortForwardRequest(pod_sandbox_id="none"))
    assert info.value.status is Status.NOT_FOUND
    url = await exec_url(cri_client, container, "true")
    await cri_client.stop(container)
    with pytest.raises(Exception, match="409"):
        await Command.open(url)


async def test_sessions_outlive_the_daemon(cri_client: Cri, shared_daemon: Daemon, pod: str) -> None:
    container = await cri_client.run(pod, "sleep", "1000")
    command = await Command.open(await exec_url(cri_client, container, "cat", stdin=True), ALL)
    await command.write(b"before\n")
    async with asyncio.timeout(TIMEOUT):
        assert await command.until(b"\n") == b"before\n"
        await asyncio.to_thread(shared_daemon.kill_daemon)
        await command.write(b"after\n")
        assert await command.until(b"\n") == b"after\n"
    await command.end()
    _, _, status = await command.result()
    assert exit_code(status) == 0


async def test_a_pod_that_goes_ends_its_sessions(cri_client: Cri) -> None:
    pod = await cri_client.run_pod()
    container = await cri_client.run(pod, "sleep", "1000")
    command = await Command.open(
        await exec_url(cri_client, container, "sh", "-c", "echo here; sleep 1000"), OUT
    )
    async with asyncio.timeout(TIMEOUT):
        assert await command.until(b"\n") == b"here\n"
        await cri_client.remove_pod(pod)
        await command.client.closed.wait()
    await command.client.close()


def cli(daemon: Daemon, *args: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command, *rest = args
    return subprocess.run(
        [sys.executable, "-m", "hyperpod", command, "--endpoint", f"unix://{daemon.socket}", *rest],
        input=stdin, capture_output=True, cwd=ROOT, timeout=TIMEOUT, check=False,
    )  # fmt: skip


async def test_the_command_line(cri_client: Cri, shared_daemon: Daemon, pod: str) -> None:
    container = await cri_client.run(pod, "sh", "-c", ECHO)
    done = await asyncio.to_thread(
        cli, shared_daemon, "exec", container, "sh", "-c", "echo out; echo err >&2; exit 4"
    )
    assert (done.returncode, done.stdout, done.stderr) == (4, b"out\n", b"err\n")
    done = await asyncio.to_thread(cli, shared_daemon, "exec", "-i", container, "cat", stdin=b"x" * 300_000)
    assert (done.returncode, done.stdout) == (0, b"x" * 300_000)
    done = await asyncio.to_thread(cli, shared_daemon, "exec", "nothing", "true")
    assert done.returncode == 1
    assert b"NOT_FOUND" in done.stderr
    done = await asyncio.to_thread(cli, shared_daemon, "console", pod)
    assert b"hyperpod-agent" in done.stdout
    forward = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "hyperpod", "port-forward",
        "--endpoint", f"unix://{shared_daemon.socket}", pod, "0:7000",
        stdout=asyncio.subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    assert forward.stdout is not None
    try:
        async with asyncio.timeout(TIMEOUT):
            line = await forward.stdout.readline()
            local = int(line.split()[2].rpartition(b":")[2])
            answer = b""
            while answer != b"hello":  # until it listens
                reader, writer = await asyncio.open_connection("127.0.0.1", local)
                with contextlib.suppress(ConnectionError):
                    writer.write(b"hello")
                    writer.write_eof()
                    answer = await reader.read()
                writer.close()
    finally:
        forward.terminate()
        await forward.wait()
