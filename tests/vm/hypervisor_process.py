"""A process that owns a LibvirtHypervisor, and its parent: what daemon and supervisor are in production.

`parent COMMAND...` is the subreaper (libvirt waits until a QEMU's pid has vanished) and starts the command again
when a signal killed it. `owner` is such a command: it takes commands as JSON lines on stdin and answers, and tells
events, on stdout.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def parent(argv: list[str]) -> int:
    """Reaps everything; ends when the command has exited by itself."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    child = subprocess.Popen(argv).pid
    while True:
        pid, status = os.wait()
        if pid == child:
            if not os.WIFSIGNALED(status):
                return os.waitstatus_to_exitcode(status)
            child = subprocess.Popen(argv).pid


class Owner:
    """Runs commands; one JSON object per line each way."""

    def __init__(self, run_dir: str, instance: str, uri: str) -> None:
        from hyperpod.hypervisor.libvirt import LibvirtHypervisor

        self.hypervisor = LibvirtHypervisor(
            run_dir=Path(run_dir), instance_id=instance, uri=uri, accelerator="tcg"
        )
        self._running: dict[int, asyncio.Task[None]] = {}

    @staticmethod
    def say(message: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()

    async def main(self) -> None:
        start = time.monotonic()
        await self.hypervisor.open()
        opened = time.monotonic() - start
        self.hypervisor.subscribe(lambda event: self.say({"event": asdict(event)}))
        self.say({"ready": os.getpid(), "seconds": opened, "facts": asdict(self.hypervisor.facts())})
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=1 << 20)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := await reader.readline():
            command = json.loads(line)
            task = loop.create_task(self.run(command), name=f"command-{command['id']}")
            self._running[command["id"]] = task
        await self.hypervisor.close()

    async def run(self, command: dict[str, Any]) -> None:
        from hyperpod.errors import HyperpodError

        start = time.monotonic()
        reply: dict[str, Any] = {"id": command["id"]}
        try:
            reply["result"] = await self.execute(command)
        except HyperpodError as exc:
            reply |= {"error": type(exc).__name__, "text": str(exc), "phase": getattr(exc, "phase", "")}
        except asyncio.CancelledError:
            reply["error"] = "CancelledError"
        reply["seconds"] = time.monotonic() - start
        self.say(reply)

    async def execute(self, command: dict[str, Any]) -> Any:
        from hyperpod.spec.domain import Disk, DomainSpec

        match command:
            case {"op": "create", "spec": spec}:
                await self.hypervisor.create(DomainSpec(**spec))
            case {"op": "attach", "name": name, "disk": disk}:
                await self.hypervisor.attach_disk(name, Disk(**disk))
            case {"op": "detach", "name": name, "serial": serial}:
                await self.hypervisor.detach_disk(name, serial)
            case {"op": "replug", "name": name, "path": path}:
                await self.hypervisor.replug_vsock(name, path)
            case {"op": "destroy", "name": name}:
                await self.hypervisor.destroy(name)
            case {"op": "cancel", "target": target}:
                self._running[target].cancel()
            case {"op": "list"}:
                return [asdict(info) for info in await self.hypervisor.list()]
            case _:
                raise AssertionError(command)
        return None


if __name__ == "__main__":
    if sys.argv[1] == "owner":
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        from hyperpod import logs

        logs.setup("debug", "owner")
        asyncio.run(Owner(*sys.argv[2:]).main())
    else:
        sys.exit(parent(sys.argv[2:]))
