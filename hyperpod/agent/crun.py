"""Calls of crun, the OCI runtime. Its errors come from its JSON log, which no container can write to."""

from __future__ import annotations

import json
import os

from hyperpod.agent.layout import Layout
from hyperpod.agent.reaper import Reaper
from hyperpod.agent.rootfs import remove_tree
from hyperpod.errors import FailedPrecondition, HyperpodError, NotFound, Unavailable
from hyperpod.logs import printable

RUN_TIMEOUT = 60.0
"""Seconds for a crun call: 0.5 s is usual on an emulated CPU; a starved guest may take long."""

LOG_LIMIT = 16 * 1024

_MISSING = "executable file"
"""crun: "executable file `x` not found in $PATH: No such file or directory"."""


class Crun:
    """Each method is one call; all raise FailedPrecondition or NotFound with crun's reason.

    `child`: the descriptors that the process gets, as 0, 1, 2 and on.
    """

    def __init__(self, layout: Layout, reaper: Reaper) -> None:
        self._layout, self._reaper = layout, reaper
        self._calls = 0

    async def version(self) -> str:
        """As `crun --version` says, or empty."""
        try:
            _, out = await self._reaper.run(["crun", "--version"], 10.0)
        except HyperpodError:
            return ""
        first = out.split(b"\n", 1)[0].decode("ascii", "replace")
        return first.removeprefix("crun version ").strip()

    async def run(self, container: str, child: list[int], console: str | None) -> int:
        """Create and start; the pid of the first process, which is our child by then."""
        return await self._make(["run", "--detach"], container, child, console)

    async def create(self, container: str, child: list[int], console: str | None) -> int:
        """As `run`, but its first process waits for `start` before it becomes the program."""
        return await self._make(["create"], container, child, console)

    async def start(self, container: str) -> None:
        """A created one."""
        await self._bare(["start", container])

    async def _make(self, argv: list[str], container: str, child: list[int], console: str | None) -> int:
        bundle = self._layout.bundle(container)
        pid_file = f"{bundle}/pid"
        argv = [*argv, "--bundle", bundle, "--pid-file", pid_file, *_preserved(child)]
        if console:
            argv += ["--console-socket", console]
        await self._call([*argv, container], child)
        return _read_pid(pid_file)

    async def exec(
        self,
        container: str,
        cgroup: str,
        process_file: str,
        child: list[int],
        console: str | None,
        *,
        oom_score_adj: int | None,
    ) -> int:
        """Start one more process; gives its pid. It inherits the score from crun, which sets it for a container's
        first process only."""
        pid_file = f"{process_file}.pid"
        argv = ["exec", "--detach", "--cgroup", cgroup, "--process", process_file, "--pid-file", pid_file]
        argv += _preserved(child)
        if console:
            argv += ["--console-socket", console]
        try:
            await self._call([*argv, container], child, oom_score_adj)
            return _read_pid(pid_file)
        finally:
            if os.path.exists(pid_file):
                os.unlink(pid_file)

    async def update(self, container: str, resources_file: str) -> None:
        """Apply limits to a running container."""
        await self._bare(["update", f"--resources={resources_file}", container])

    def forget(self, container: str) -> None:
        """Drop crun's state of a container whose processes are gone; an unknown one is fine.

        `crun delete` would do no more for us (the cgroup is ours to remove, there are no hooks), and is one
        more program to start in a guest that may be starved.
        """
        remove_tree(f"{self._layout.crun_root}/{container}")

    async def _bare(self, argv: list[str]) -> None:
        """A call that starts no process."""
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            await self._call(argv, [null] * 3)
        finally:
            os.close(null)

    async def _call(self, argv: list[str], child: list[int], oom_score_adj: int | None = None) -> None:
        self._calls += 1
        log = f"{self._layout.root}/crun{self._calls}.log"
        full = [
            "crun",
            "--root",
            self._layout.crun_root,
            "--cgroup-manager=cgroupfs",
            "--log-format=json",
            f"--log={log}",
            *argv,
        ]
        try:
            stdin, stdout, stderr, *more = child
            code, _ = await self._reaper.run(
                full,
                RUN_TIMEOUT,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                more=more,
                oom_score_adj=oom_score_adj,
            )
            if code:
                raise failure(argv[0], code, _read_log(log))
        finally:
            if os.path.exists(log):
                os.unlink(log)


def _preserved(child: list[int]) -> list[str]:
    """The option for descriptors beyond the first three."""
    return [f"--preserve-fds={len(child) - 3}"] if len(child) > 3 else []


def failure(what: str, code: int, log: bytes) -> HyperpodError:
    """The error for a failed call: NotFound when the program to run is not there or not runnable."""
    messages = []
    for line in log.splitlines():
        try:
            messages.append(str(json.loads(line)["msg"]))
        except (ValueError, KeyError, TypeError):
            messages.append(line.decode("utf-8", "replace"))
    text = printable("; ".join(m.strip() for m in messages if m.strip()), 1024)
    if not text:
        return Unavailable(f"crun {what} ended with code {code} and no reason")
    return NotFound(text) if _MISSING in text else FailedPrecondition(text)


def _read_log(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(LOG_LIMIT)
    except OSError:
        return b""


def _read_pid(path: str) -> int:
    try:
        with open(path) as file:
            return int(file.read())
    except (OSError, ValueError) as exc:
        raise Unavailable("crun left no pid") from exc
