"""The operator's shell in a guest: the guest's own root, whatever has become of the containers."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from hyperpod.api.gen.hyperpod.admin.v1 import ShellRequest
from tests.agentkit import TIMEOUT
from tests.daemonkit import ROOT, daemon
from tests.streamkit import TTY, Command, exit_code

pytestmark = pytest.mark.vm

SCRIPT = """
hostname
ps | grep -c 'init[.]pyc'
ls /run/hyperpod/b | wc -l
cat /proc/self/cgroup
cat /sys/fs/cgroup/hyperpod-operator/memory.max
ip -o link show eth0 | wc -l
touch /x
exit 6
"""


async def test_a_shell_in_the_guest() -> None:
    with daemon("operator_shell = true\n---") as own:
        async with own.client() as client:
            await client.load_busybox()
            pod = await client.run_pod(client.pod_config("shelled"))
            container = await client.run(pod, "false")
            await client.wait(container)
            endpoint = ["--endpoint", f"unix://{own.socket}"]
            done = await asyncio.to_thread(
                subprocess.run,
                [sys.executable, "-m", "hyperpod", "console", *endpoint, "--shell", pod],
                input=SCRIPT, capture_output=True, text=True, cwd=ROOT, timeout=TIMEOUT, check=False,
            )  # fmt: skip
            assert done.returncode == 6, done.stderr
            lines = done.stdout.splitlines()
            assert lines[:3] == ["shelled", "1", "1"]
            assert lines[3].startswith("0::/hyperpod-operator/")
            assert lines[4:] == [str(24 << 20), "1"]
            assert "Read-only" in done.stderr
            await with_a_terminal((await client.admin.shell(ShellRequest(pod_sandbox_id=pod, tty=True))).url)
            await client.remove_pod(pod)
        assert own.leftovers() == []


async def with_a_terminal(url: str) -> None:
    command = await Command.open(url, TTY)
    async with asyncio.timeout(TIMEOUT):
        await command.until(b"# ")
        await command.write(b"sh -c 'tty; exec sleep 1000'\n")
        await command.until(b"\r\n/dev/pts/0")
        await command.write(b"\x03")
        await command.until(b"# ")
        await command.write(b"exit 2\n")
    _, _, status = await command.result()
    assert exit_code(status) == 2
