"""What a sandbox costs its host: the processes of its cgroup there, beside what its guest itself accounts for."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hyperpod.spec.cgroup import Hierarchy

_TICK_NS = 10**9 // os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class HostProcess:
    """`memory`: proportional set size in bytes, so that memory which QEMU and shim share counts once."""

    pid: int
    name: str
    memory: int
    cpu_ns: int


async def processes(path: str, hierarchies: Iterable[Hierarchy]) -> list[HostProcess]:
    """Those of the sandbox's cgroup. A page table walk of the guest's RAM: for verbose answers, not for lists."""
    return await asyncio.to_thread(_processes, path, list(hierarchies))


def _processes(path: str, hierarchies: list[Hierarchy]) -> list[HostProcess]:
    found = []
    for pid in _pids(path, hierarchies):
        with contextlib.suppress(OSError):  # it has ended
            found.append(_process(pid))
    return found


def _pids(path: str, hierarchies: list[Hierarchy]) -> list[int]:
    for hierarchy in hierarchies:
        with contextlib.suppress(OSError):
            return sorted(map(int, Path(f"{hierarchy.mount}{path}/cgroup.procs").read_text().split()))
    return []


def _process(pid: int) -> HostProcess:
    entry = Path(f"/proc/{pid}")
    name, _, rest = entry.joinpath("stat").read_text().partition("(")[2].rpartition(") ")
    fields = rest.split()
    lines = entry.joinpath("smaps_rollup").read_text().splitlines()
    memory = sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
    return HostProcess(pid, name, memory, (int(fields[11]) + int(fields[12])) * _TICK_NS)
