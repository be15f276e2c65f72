"""What the processes of one pod and its daemon hold: to be compared between two quiet moments."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from tests.daemonkit import Daemon
from tests.execsoak import children, descriptors
from tests.soak.pod import need

SLACK = 2
"""Descriptors, children and tasks that may be more at one moment: a timer's, a connection that is being closed."""

ANSWER = 10.0


@dataclass(frozen=True)
class Held:
    """Of one process. `tasks`: of its event loop, -1 where it cannot be asked."""

    descriptors: int
    children: int
    private_mib: float
    tasks: int = -1
    what: str = ""

    def __str__(self) -> str:
        tasks = "" if self.tasks < 0 else f" {self.tasks} tasks"
        return f"{self.descriptors} fds {self.children} children{tasks} {self.private_mib:.1f} MiB"


@dataclass(frozen=True)
class Figures:
    """By process: daemon, supervisor, shim, agent; and how many processes and cgroups the pod has."""

    held: dict[str, Held]
    processes: int
    cgroups: int

    def __str__(self) -> str:
        parts = [f"{name} {held}" for name, held in self.held.items()]
        return ", ".join([*parts, f"{self.processes} processes, {self.cgroups} cgroups of the pod"])

    def need_no_more_than(self, first: Figures, growth_mib: float) -> None:
        """Raises Broken."""
        for name, now in self.held.items():
            was = first.held[name]
            for what in ("descriptors", "children", "tasks"):
                old, new = getattr(was, what), getattr(now, what)
                need(new <= old + SLACK, f"{name} has {new} {what}, at first {old}: {was.what} -> {now.what}")
            need(
                now.private_mib <= was.private_mib + growth_mib,
                f"{name} has {now.private_mib:.0f} MiB, at first {was.private_mib:.0f}",
            )
        need(self.processes <= first.processes, f"{self.processes} processes, at first {first.processes}")
        need(self.cgroups <= first.cgroups, f"{self.cgroups} cgroups, at first {first.cgroups}")


async def figures_of(daemon: Daemon, pod: str) -> Figures:
    """Now."""
    assert daemon.process is not None
    pids = {"daemon": daemon.pid(), "supervisor": daemon.process.pid}
    for name, word in (("shim", "hyperpod-shim"), ("agent", "hyperpod-agent")):
        [line] = [p for p in daemon.processes() if word in p and pod[:12] in p]
        pids[name] = int(line.split()[0])
    held = {}
    for name, pid in pids.items():
        tasks, what = (-1, "") if name == "supervisor" else await _tasks(daemon, pid)
        held[name] = Held(descriptors(pid), children(pid), _private_mib(pid), tasks, what)
    folders = daemon.cgroups()
    members: set[str] = set()
    for top in folders:
        for folder, _, _ in os.walk(top):
            members.update((Path(folder) / "cgroup.procs").read_text().split())
    return Figures(held, len(members), sum(1 for top in folders for _ in os.walk(top)))


def _private_mib(pid: int) -> float:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(map(int, re.findall(r"^Private_\w+: +(\d+) kB", text, re.MULTILINE))) / 1024


async def _tasks(daemon: Daemon, pid: int) -> tuple[int, str]:
    """Of its event loop, which it writes into the log when it is asked."""
    pattern = re.compile(rf"pid {pid}: (\d+) tasks, (.*)")
    before = len(pattern.findall(daemon.text()))
    os.kill(pid, signal.SIGUSR1)
    deadline = time.monotonic() + ANSWER
    while len(found := pattern.findall(daemon.text())) <= before:
        need(time.monotonic() < deadline, f"pid {pid} does not tell its tasks")
        await asyncio.sleep(0.05)
    number, what = found[-1]
    return int(number), what
