"""Figures of the guest and its containers, out of their cgroups (v2 in a guest, v1 on some hosts) and /proc."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os

from hyperpod.agent import figures
from hyperpod.agent.cgroups import ROOT, Cgroups
from hyperpod.agent.container import Container
from hyperpod.agent.containers import Containers
from hyperpod.agent.events import State
from hyperpod.api.gen.hyperpod.agentstats import v1

PAGE = 32
"""Containers of one answer: 400 bytes each, with pressure and details 600; an answer has 64 KiB at most."""

FILE_LIMIT = 16 * 1024
MAX_LINKS = 4096
"""Open files of one container that are looked at to count sockets."""

_TICKS = os.sysconf("SC_CLK_TCK")


def _read(path: str) -> str:
    """The first FILE_LIMIT bytes, or nothing: cgroups and processes go away at any time."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.read(fd, FILE_LIMIT).decode("ascii", "replace")
    except OSError:
        return ""
    finally:
        os.close(fd)


def _number(path: str) -> int:
    text = _read(path).strip()
    return int(text) if text.isdecimal() else 0


class Stats:
    """Answers Stats."""

    def __init__(self, containers: Containers) -> None:
        self._containers = containers
        self._cgroups = containers.tools.cgroups

    async def page(self, after: str, details: bool) -> v1.Page:
        """The containers whose ids come after `after`, PAGE at most; with the first page the guest."""
        found = sorted(ident for ident in self._containers.ids() if ident > after)
        answer = v1.Page(more=len(found) > PAGE)
        if not after:
            answer.guest = self._guest()
        for ident in found[:PAGE]:
            container = self._containers.find(ident)
            if container is not None:
                answer.containers.append(await self._container(container, details))
            await asyncio.sleep(0)  # output flows meanwhile
        return answer

    async def _container(self, container: Container, details: bool) -> v1.ContainerStats:
        answer = v1.ContainerStats(id=container.id)
        usage = await self._containers.tools.quota.usage(container.id)
        if usage is not None:
            answer.writable_layer = v1.DiskStats(used_bytes=usage[0], inodes=usage[1])
        if container.status.state is not State.RUNNING:
            return answer
        answer.cgroup = cgroup_stats(self._cgroups, container.cgroup)
        if answer.cgroup is not None:
            answer.cgroup.oom_kills = container.oom_kills
        if details:
            answer.details = _details(self._cgroups, container)
        return answer

    def _guest(self) -> v1.GuestStats:
        memory = figures.flat(_read("/proc/meminfo"))
        disk = os.statvfs(self._containers.tools.layout.scratch)
        return v1.GuestStats(
            memory_total=memory.get("MemTotal", 0) * 1024,
            memory_free=memory.get("MemFree", 0) * 1024,
            memory_available=memory.get("MemAvailable", 0) * 1024,
            cpu_usage_ns=figures.busy_ns(_read("/proc/stat"), _TICKS),
            containers=cgroup_stats(self._cgroups, self._cgroups.parent),
            interfaces=figures.interfaces(_read("/proc/net/dev")),
            disk_size=disk.f_blocks * disk.f_frsize,
            disk_free=disk.f_bavail * disk.f_frsize,
            disk_inodes=disk.f_files,
            disk_inodes_free=disk.f_ffree,
        )


def cgroup_stats(cgroups: Cgroups, path: str) -> v1.CgroupStats | None:
    """Of a cgroup and all below it; None when it is gone."""
    if not os.path.isdir(f"{ROOT if cgroups.unified else f'{ROOT}/memory'}{path}"):
        return None
    return _unified(path) if cgroups.unified else _v1(path)


def _lowest(limits: list[int]) -> int:
    return min((limit for limit in limits if limit), default=0)


def _with_parents(path: str) -> list[str]:
    parts = path.strip("/").split("/")
    return ["/" + "/".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _unified(path: str) -> v1.CgroupStats:
    folder = ROOT + path
    cpu, memory = figures.flat(_read(f"{folder}/cpu.stat")), figures.flat(_read(f"{folder}/memory.stat"))
    return v1.CgroupStats(
        cpu_usage_ns=cpu.get("usage_usec", 0) * 1000,
        cpu_user_ns=cpu.get("user_usec", 0) * 1000,
        cpu_system_ns=cpu.get("system_usec", 0) * 1000,
        cpu_periods=cpu.get("nr_periods", 0),
        cpu_throttled_periods=cpu.get("nr_throttled", 0),
        cpu_throttled_ns=cpu.get("throttled_usec", 0) * 1000,
        memory_usage=_number(f"{folder}/memory.current"),
        memory_inactive_file=memory.get("inactive_file", 0),
        memory_anon=memory.get("anon", 0),
        memory_file=memory.get("file", 0),
        memory_kernel=memory.get("kernel", 0),
        memory_mapped_file=memory.get("file_mapped", 0),
        memory_limit=_lowest([figures.limit(_read(f"{ROOT}{p}/memory.max")) for p in _with_parents(path)]),
        page_faults=memory.get("pgfault", 0),
        major_page_faults=memory.get("pgmajfault", 0),
        swap_usage=_number(f"{folder}/memory.swap.current"),
        pids=_number(f"{folder}/pids.current"),
        cpu_pressure=figures.pressure(_read(f"{folder}/cpu.pressure")),
        memory_pressure=figures.pressure(_read(f"{folder}/memory.pressure")),
        io_pressure=figures.pressure(_read(f"{folder}/io.pressure")),
    )


def _v1(path: str) -> v1.CgroupStats:
    memory = figures.flat(_read(f"{ROOT}/memory{path}/memory.stat"))
    throttled = figures.flat(_read(f"{ROOT}/cpu{path}/cpu.stat"))
    ticks = figures.flat(_read(f"{ROOT}/cpuacct{path}/cpuacct.stat"))
    return v1.CgroupStats(
        cpu_usage_ns=_number(f"{ROOT}/cpuacct{path}/cpuacct.usage"),
        cpu_user_ns=ticks.get("user", 0) * (figures.NANO // _TICKS),
        cpu_system_ns=ticks.get("system", 0) * (figures.NANO // _TICKS),
        cpu_periods=throttled.get("nr_periods", 0),
        cpu_throttled_periods=throttled.get("nr_throttled", 0),
        cpu_throttled_ns=throttled.get("throttled_time", 0),
        memory_usage=_number(f"{ROOT}/memory{path}/memory.usage_in_bytes"),
        memory_inactive_file=memory.get("total_inactive_file", 0),
        memory_anon=memory.get("total_rss", 0),
        memory_file=memory.get("total_cache", 0),
        memory_kernel=_number(f"{ROOT}/memory{path}/memory.kmem.usage_in_bytes"),
        memory_mapped_file=memory.get("total_mapped_file", 0),
        memory_limit=_lowest(
            [figures.limit(_read(f"{ROOT}/memory{p}/memory.limit_in_bytes")) for p in _with_parents(path)]
        ),
        page_faults=memory.get("total_pgfault", 0),
        major_page_faults=memory.get("total_pgmajfault", 0),
        swap_usage=memory.get("total_swap", 0),
        pids=_number(f"{ROOT}/pids{path}/pids.current"),
    )


def _details(cgroups: Cgroups, container: Container) -> v1.DetailStats:
    pids = cgroups.pids(container.cgroup)
    files, sockets = open_files(pids)
    details = v1.DetailStats(
        processes=len(pids),
        file_descriptors=files,
        sockets=sockets,
        files_max=figures.soft_limit(_read(f"/proc/{container.status.pid}/limits"), "Max open files"),
    )
    folder = ROOT + container.cgroup
    if not cgroups.unified:
        details.threads = _number(f"{ROOT}/pids{container.cgroup}/pids.current")
        details.threads_max = figures.limit(_read(f"{ROOT}/pids{container.cgroup}/pids.max"))
        details.memory_peak = _number(f"{ROOT}/memory{container.cgroup}/memory.max_usage_in_bytes")
        details.memory_limit_hits = _number(f"{ROOT}/memory{container.cgroup}/memory.failcnt")
        return details
    io = figures.io_stat(_read(f"{folder}/io.stat"))
    details.threads = _number(f"{folder}/pids.current")
    details.threads_max = figures.limit(_read(f"{folder}/pids.max"))
    details.memory_peak = _number(f"{folder}/memory.peak")
    details.memory_limit_hits = figures.flat(_read(f"{folder}/memory.events")).get("max", 0)
    details.read_bytes, details.write_bytes = io.get("rbytes", 0), io.get("wbytes", 0)
    details.reads, details.writes = io.get("rios", 0), io.get("wios", 0)
    for name in cgroups.huge_page_sizes():
        details.hugetlb.append(
            v1.HugetlbStats(page_size=name, usage=_number(f"{folder}/hugetlb.{name}.current"))
        )
    return details


def open_files(pids: list[int]) -> tuple[int, int]:
    """Open files, and how many of the first MAX_LINKS are sockets. A server may have a hundred thousand: the kernel
    is asked for their number (Linux 6.2), and they are listed only where it does not know."""
    files = sockets = looked = 0
    for pid in pids:
        folder = f"/proc/{pid}/fd"
        with contextlib.suppress(OSError):
            files += os.stat(folder).st_size or len(os.listdir(folder))
            if looked < MAX_LINKS:
                with os.scandir(folder) as entries:
                    for entry in itertools.islice(entries, MAX_LINKS - looked):
                        looked += 1
                        with contextlib.suppress(OSError):
                            sockets += os.readlink(entry.path).startswith("socket:")
    return files, sockets
