"""The command line's exec, attach and port-forward against a daemon whose streaming server has TLS."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.agentkit import TIMEOUT
from tests.certkit import Authority
from tests.daemonkit import ROOT, Daemon
from tests.host.conftest import host_daemon_of

ECHO = "while true; do nc -l -p 7000 -e cat; done"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority(tmp_path_factory.mktemp("ca"))
    made.issue("server")
    made.issue("named", "DNS:node.example")
    made.issue("client")
    return made


def tls_daemon_of(authority: Authority, server: str, *more: str) -> str:
    folder = authority.folder
    lines = (f'tls_cert = "{folder}/{server}.pem"', f'tls_key = "{folder}/{server}.key"', *more)
    return 'host_pods = ["test"]\n---\n[streaming]\n' + "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def strict_daemon(authority: Authority) -> Iterator[Daemon]:
    """One that wants client certificates."""
    config = tls_daemon_of(authority, "server", f'tls_client_ca = "{authority.folder}/ca.pem"')
    with host_daemon_of(config) as one:
        yield one


@pytest.fixture
async def pod(strict_daemon: Daemon) -> AsyncIterator[str]:
    async with strict_daemon.client() as client:
        client.handler = "host"
        await client.load_busybox()
        ident = await client.run_pod()
        yield ident
        await client.remove_pod(ident)
    assert strict_daemon.leftovers() == []


@pytest.fixture
async def container(strict_daemon: Daemon, pod: str) -> str:
    """It echoes on port 7000."""
    async with strict_daemon.client() as client:
        return await client.sh(pod, ECHO)


def command(daemon: Daemon, name: str, *args: str | Path) -> list[str]:
    endpoint = ["--endpoint", f"unix://{daemon.socket}"]
    return [sys.executable, "-m", "hyperpod", name, *endpoint, *map(str, args)]


async def cli(
    daemon: Daemon, name: str, *args: str | Path, stdin: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    return await asyncio.to_thread(
        subprocess.run, command(daemon, name, *args), input=stdin, capture_output=True, cwd=ROOT,
        timeout=TIMEOUT, check=False,
    )  # fmt: skip


def options(authority: Authority, *, client: bool = True) -> list[str]:
    folder = authority.folder
    ours = ["--tls-cert", f"{folder}/client.pem", "--tls-key", f"{folder}/client.key"]
    return ["--tls-ca", f"{folder}/ca.pem", *(ours if client else [])]


async def test_exec_byte_for_byte(strict_daemon: Daemon, authority: Authority, container: str) -> None:
    data = bytes(range(256)) * 8000
    given = options(authority)
    done = await cli(strict_daemon, "exec", "-i", *given, container, "cat", stdin=data)
    assert (done.returncode, done.stdout, done.stderr) == (0, data, b"")
    done = await cli(strict_daemon, "exec", *given, container, "sh", "-c", "echo out; echo err >&2; exit 4")
    assert (done.returncode, done.stdout, done.stderr) == (4, b"out\n", b"err\n")


async def test_attach(strict_daemon: Daemon, authority: Authority, pod: str) -> None:
    async with strict_daemon.client() as client:
        other = await client.sh(pod, "while read x; do echo got $x; done", stdin=True)
    done = await cli(strict_daemon, "attach", "-i", *options(authority), other, stdin=b"one\n")
    assert (done.returncode, done.stdout) == (0, b"got one\n")


@pytest.mark.usefixtures("container")
async def test_port_forward(strict_daemon: Daemon, authority: Authority, pod: str) -> None:
    argv = command(strict_daemon, "port-forward", *options(authority), pod, "0:7000")
    process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(TIMEOUT):
            local = int((await process.stdout.readline()).split()[2].rpartition(b":")[2])
            data, answer = bytes(range(256)) * 400, b""
            while answer != data:  # until it listens
                reader, writer = await asyncio.open_connection("127.0.0.1", local)
                with contextlib.suppress(OSError):
                    writer.write(data)
                    writer.write_eof()
                    answer = await reader.read(-1)
                writer.close()
    finally:
        process.terminate()
        await process.wait()


async def test_a_configuration_in_the_place_of_options(
    strict_daemon: Daemon, authority: Authority, container: str, tmp_path: Path
) -> None:
    folder, file = authority.folder, tmp_path / "config.toml"
    file.write_text(
        f'[client]\ntls_ca = "{folder}/ca.pem"\ntls_cert = "{folder}/client.pem"\ntls_key = "{folder}/client.key"\n'
    )
    done = await cli(strict_daemon, "exec", "--config", file, container, "echo", "hi")
    assert (done.returncode, done.stdout) == (0, b"hi\n")


async def test_what_is_refused_says_what_to_do(
    strict_daemon: Daemon, authority: Authority, container: str, tmp_path: Path
) -> None:
    unknown = await cli(strict_daemon, "exec", container, "true")
    assert unknown.returncode == 1
    assert b"certificate is not accepted" in unknown.stderr and b"--tls-ca" in unknown.stderr
    without = await cli(strict_daemon, "exec", *options(authority, client=False), container, "true")
    assert without.returncode == 1
    assert b"client certificate" in without.stderr and b"--tls-cert" in without.stderr
    other = Authority(tmp_path)
    other.issue("client")
    foreign = ["--tls-cert", f"{tmp_path}/client.pem", "--tls-key", f"{tmp_path}/client.key"]
    wrong = await cli(strict_daemon, "exec", *options(authority, client=False), *foreign, container, "true")
    assert wrong.returncode == 1
    assert b"client certificate" in wrong.stderr
    for given, word in (
        (["--tls-ca", "/none"], b"--tls-ca /none"),
        (["--tls-cert", "/none"], b"belong together"),
        (
            [*options(authority, client=False), "--tls-cert", "/none", "--tls-key", "/none"],
            b"--tls-cert /none",
        ),
    ):
        done = await cli(strict_daemon, "exec", *given, container, "true")
        assert (done.returncode, word in done.stderr) == (1, True), done.stderr


async def test_the_name_counts_unless_told_otherwise(authority: Authority) -> None:
    with host_daemon_of(tls_daemon_of(authority, "named")) as own:
        async with own.client() as client:
            client.handler = "host"
            await client.load_busybox()
            pod = await client.run_pod()
            container = await client.sh(pod, ECHO)
            given = options(authority, client=False)
            done = await cli(own, "exec", *given, container, "echo", "hi")
            assert done.returncode == 1
            assert b"IP address mismatch" in done.stderr and b"--tls-server-name" in done.stderr
            done = await cli(
                own, "exec", *given, "--tls-server-name", "node.example", container, "echo", "hi"
            )
            assert (done.returncode, done.stdout) == (0, b"hi\n")
            done = await cli(own, "exec", "--insecure-skip-tls-verify", container, "echo", "hi")
            assert (done.returncode, done.stdout) == (0, b"hi\n")
            done = await cli(own, "exec", container, "echo", "hi")
            assert b"not accepted" in done.stderr
            await client.remove_pod(pod)
        assert own.leftovers() == []
