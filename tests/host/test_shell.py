"""`hyperpod console --shell` against a real daemon: off unless allowed, for root alone, on a socket of its own."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from hyperpod.api.gen.hyperpod.admin.v1 import ShellRequest
from hyperpod.api.gen.runtime import v1 as cri
from tests.agentkit import TIMEOUT, processes_with
from tests.daemonkit import ROOT, Cri, Daemon
from tests.host.conftest import ALLOWED, host_daemon_of

ON = f"operator_shell = true\n{ALLOWED}"


@pytest.fixture(scope="module")
def open_daemon() -> Iterator[Daemon]:
    with host_daemon_of(ON) as one:
        yield one


def shell_argv(daemon: Daemon, pod: str) -> list[str]:
    endpoint = ["--endpoint", f"unix://{daemon.socket}"]
    return [sys.executable, "-m", "hyperpod", "console", *endpoint, "--shell", pod]


def shell(daemon: Daemon, pod: str, script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        shell_argv(daemon, pod), input=script, capture_output=True, text=True, cwd=ROOT, timeout=TIMEOUT,
        check=False,
    )  # fmt: skip


async def test_off_is_the_default(cri_client: Cri, host_daemon: Daemon, pod: str) -> None:
    with pytest.raises(GRPCError, match="operator_shell = true") as info:
        await cri_client.admin.shell(ShellRequest(pod_sandbox_id=pod))
    assert info.value.status is Status.PERMISSION_DENIED
    done = await asyncio.to_thread(shell, host_daemon, pod, "true\n")
    assert done.returncode == 1
    assert "operator_shell = true" in done.stderr
    assert not (host_daemon.run_dir / "operator.sock").exists()


async def test_a_shell_when_all_containers_are_dead(open_daemon: Daemon) -> None:
    async with open_daemon.client() as client:
        client.handler = "host"
        await client.load_busybox()
        pod = await client.run_pod()
        container = await client.run(pod, "true")
        await client.wait(container)
        done = await asyncio.to_thread(
            shell, open_daemon, pod, "hostname; grep -c : /proc/net/dev; cat /proc/self/cgroup; exit 5\n"
        )
        assert done.returncode == 5, done.stderr
        status = await client.runtime.pod_sandbox_status(cri.PodSandboxStatusRequest(pod_sandbox_id=pod))
        assert status.status is not None and status.status.metadata is not None
        name, *rest = done.stdout.splitlines()
        assert name == status.status.metadata.name  # the pod's UTS namespace
        assert rest[0] == "2"  # its network: lo and eth0
        assert f"{pod[:12]}/pod-operator/" in done.stdout
        assert re.search(
            rf"sandbox {pod[:12]} \(.*\): operator's shell [0-9a-f]{{32}} for pid \d+ \(.*\), uid 0",
            open_daemon.text(),
        )
        await client.remove_pod(pod)
    assert open_daemon.leftovers() == []


async def test_with_a_terminal(open_daemon: Daemon) -> None:
    async with open_daemon.client() as client:
        client.handler = "host"
        pod = await client.run_pod()
        master, slave = pty.openpty()
        process = await asyncio.create_subprocess_exec(
            *shell_argv(open_daemon, pod), stdin=slave, stdout=slave, stderr=slave, cwd=ROOT,
            start_new_session=True, env={**os.environ, "TERM": "vt100"},
        )  # fmt: skip
        os.close(slave)
        got = b""
        for word, answer in ((pod[:12].encode(), b"echo $TERM; tty\n"), (b"vt100\r\n/dev/pts/", b"exit 4\n")):
            async with asyncio.timeout(TIMEOUT):
                while word not in got:
                    got += await asyncio.to_thread(os.read, master, 4096)
            os.write(master, answer)
        assert await asyncio.wait_for(process.wait(), TIMEOUT) == 4
        os.close(master)
        await client.remove_pod(pod)


async def test_no_other_way_leads_to_one(open_daemon: Daemon) -> None:
    async with open_daemon.client() as client:
        client.handler = "host"
        pod = await client.run_pod()
        url = (await client.admin.shell(ShellRequest(pod_sandbox_id=pod))).url
        path = unquote(urlsplit(url).netloc)
        assert path == str(open_daemon.run_dir / "operator.sock")
        assert Path(path).stat().st_mode & 0o777 == 0o600
        # The server that kubelets are sent to knows neither the kind nor the token.
        container = await client.run(pod, "sleep", "1000")
        reply = await client.runtime.exec(
            cri.ExecRequest(container_id=container, cmd=["true"], stdout=True, stderr=True)
        )
        base = reply.url.rpartition("/exec/")[0]
        token = url.rpartition("/")[2]
        for kind in ("shell", "exec", "attach"):
            done = await asyncio.to_thread(ask, f"{base}/{kind}/{token}")
            assert done == "404"
        done = await asyncio.to_thread(ask, f"http://x/exec/{token}", "--unix-socket", path)
        assert done == "404"
        # Who is not root is turned away, token or not; a folder that only root may enter keeps them off before.
        mode = open_daemon.run_dir.stat().st_mode & 0o777
        Path(path).chmod(0o666)
        open_daemon.run_dir.chmod(0o755)
        try:
            done = await asyncio.to_thread(
                ask, f"http://x/shell/{token}", "--unix-socket", path, user="nobody"
            )
            assert done == "000"  # curl: no answer
        finally:
            open_daemon.run_dir.chmod(mode)
            Path(path).chmod(0o600)
        assert "wanted an operator's shell" in open_daemon.text()
        with pytest.raises(GRPCError, match="no terminal's name"):
            await client.admin.shell(ShellRequest(pod_sandbox_id=pod, term="x\ny"))
        with pytest.raises(GRPCError) as info:
            await client.admin.shell(ShellRequest(pod_sandbox_id="none"))
        assert info.value.status is Status.NOT_FOUND
        await client.remove_pod(pod)


def ask(url: str, *options: str, user: str = "") -> str:
    """The HTTP status that an upgrade to SPDY gets."""
    argv = ["curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "-m", "10", "-X", "POST", *options]
    for header in (
        "Connection: Upgrade",
        "Upgrade: SPDY/3.1",
        "X-Stream-Protocol-Version: v4.channel.k8s.io",
    ):
        argv += ["-H", header]
    if user:
        argv = ["setpriv", f"--reuid={user}", "--clear-groups", *argv]
    return subprocess.run([*argv, url], capture_output=True, text=True, check=False).stdout


async def test_a_killed_daemon_and_a_killed_shim(open_daemon: Daemon) -> None:
    """The session outlives the daemon; with its shim it ends, and so does the shell."""
    async with open_daemon.client() as client:
        client.handler = "host"
        pod = await client.run_pod()
    marker = f"{secrets.randbelow(10**9) + 10**9}"
    process = await asyncio.create_subprocess_exec(
        *shell_argv(open_daemon, pod), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    assert process.stdin is not None and process.stdout is not None
    async with asyncio.timeout(TIMEOUT):
        process.stdin.write(b"echo one\n")
        assert await process.stdout.readline() == b"one\n"
        await asyncio.to_thread(open_daemon.kill_daemon)
        process.stdin.write(f"sleep {marker} & echo two\n".encode())
        assert await process.stdout.readline() == b"two\n"
        while not processes_with(marker):
            await asyncio.sleep(0.01)
        [shim] = [p for p in open_daemon.processes() if "hyperpod-shim" in p and pod[:12] in p]
        os.kill(int(shim.split()[0]), 9)
        assert await process.wait() == 1
        while processes_with(marker):
            await asyncio.sleep(0.05)
    async with open_daemon.client() as client:
        await client.remove_pod(pod)
    assert open_daemon.leftovers() == []
