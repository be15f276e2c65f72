"""What an agent tells of its guest, made harmless: a guest may lie, but not with impossible numbers.

A lie within the bounds is the tenant's own loss (it is billed or evicted for it) or gain of nothing: no decision
about another pod rests on it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hyperpod.errors import GuestError

COUNTER_MAX = 2**63 - 1
"""Of counters that nothing else bounds: fits every signed reader."""

PIDS_MAX = 1 << 22
"""Linux: PID_MAX_LIMIT."""

MAX_INTERFACES = 64
MAX_HUGETLB = 8
_NAME_CHARACTERS = frozenset(map(chr, range(0x21, 0x7F))) - {"/"}
_NAME_LENGTH = 15
"""Bytes of an interface's name: IFNAMSIZ - 1."""


@dataclass(frozen=True)
class Bounds:
    """What a VM of its size and age can have at most: bytes of memory and disk, CPU time in nanoseconds.

    `interfaces`: 0 for a pod in the node's network, whose interfaces are not the pod's."""

    memory: int
    disk: int
    cpu_ns: int
    interfaces: int = MAX_INTERFACES


@dataclass(frozen=True, slots=True)
class Stall:
    """One line of pressure stall information; averages in per cent."""

    total_ns: int
    avg10: float
    avg60: float
    avg300: float


@dataclass(frozen=True, slots=True)
class Pressure:
    some: Stall
    full: Stall


@dataclass(frozen=True, slots=True)
class CgroupFigures:
    """Bytes and nanoseconds; a limit of 0 is none. See CgroupStats in agent.proto."""

    cpu_usage_ns: int
    cpu_user_ns: int
    cpu_system_ns: int
    cpu_periods: int
    cpu_throttled_periods: int
    cpu_throttled_ns: int
    memory_usage: int
    memory_inactive_file: int
    memory_anon: int
    memory_file: int
    memory_kernel: int
    memory_mapped_file: int
    memory_limit: int
    page_faults: int
    major_page_faults: int
    swap_usage: int
    oom_kills: int
    pids: int
    cpu_pressure: Pressure | None
    memory_pressure: Pressure | None
    io_pressure: Pressure | None

    @property
    def working_set(self) -> int:
        """What cannot be had back by dropping cache: the number that evictions go by."""
        return max(self.memory_usage - self.memory_inactive_file, 0)


@dataclass(frozen=True, slots=True)
class DetailFigures:
    """See DetailStats in agent.proto; `hugetlb`: page size, bytes in use, bytes at most."""

    memory_peak: int
    memory_limit_hits: int
    read_bytes: int
    write_bytes: int
    reads: int
    writes: int
    processes: int
    threads: int
    threads_max: int
    file_descriptors: int
    sockets: int
    files_max: int
    hugetlb: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, slots=True)
class ContainerFigures:
    """`writable`: bytes and inodes. None is what does not exist or cannot be told."""

    cgroup: CgroupFigures | None
    writable: tuple[int, int] | None
    details: DetailFigures | None


@dataclass(frozen=True, slots=True)
class InterfaceFigures:
    """One network interface of the guest."""

    name: str
    rx_bytes: int
    rx_packets: int
    rx_errors: int
    rx_dropped: int
    tx_bytes: int
    tx_packets: int
    tx_errors: int
    tx_dropped: int


@dataclass(frozen=True, slots=True)
class GuestFigures:
    """`containers`: all of them together, as their common limits see them."""

    memory_total: int
    memory_free: int
    memory_available: int
    cpu_usage_ns: int
    containers: CgroupFigures | None
    interfaces: tuple[InterfaceFigures, ...]
    disk_size: int
    disk_free: int
    disk_inodes: int
    disk_inodes_free: int


@dataclass(frozen=True, slots=True)
class SandboxFigures:
    """One answer: the guest, and its containers by id."""

    guest: GuestFigures
    containers: dict[str, ContainerFigures]


def _stall(pressure: Any, kind: str) -> Stall:
    averages = (min(getattr(pressure, f"{kind}_avg{span}"), 10_000) / 100 for span in (10, 60, 300))
    return Stall(min(getattr(pressure, f"{kind}_total_ns"), COUNTER_MAX), *averages)


def _pressure(pressure: Any) -> Pressure | None:
    return None if pressure is None else Pressure(_stall(pressure, "some"), _stall(pressure, "full"))


def cgroup(stats: Any, most: Bounds) -> CgroupFigures | None:
    """From a CgroupStats message."""
    if stats is None:
        return None
    return CgroupFigures(
        cpu_usage_ns=min(stats.cpu_usage_ns, most.cpu_ns),
        cpu_user_ns=min(stats.cpu_user_ns, most.cpu_ns),
        cpu_system_ns=min(stats.cpu_system_ns, most.cpu_ns),
        cpu_periods=min(stats.cpu_periods, COUNTER_MAX),
        cpu_throttled_periods=min(stats.cpu_throttled_periods, COUNTER_MAX),
        cpu_throttled_ns=min(stats.cpu_throttled_ns, COUNTER_MAX),
        memory_usage=min(stats.memory_usage, most.memory),
        memory_inactive_file=min(stats.memory_inactive_file, most.memory),
        memory_anon=min(stats.memory_anon, most.memory),
        memory_file=min(stats.memory_file, most.memory),
        memory_kernel=min(stats.memory_kernel, most.memory),
        memory_mapped_file=min(stats.memory_mapped_file, most.memory),
        memory_limit=min(stats.memory_limit, most.memory),
        page_faults=min(stats.page_faults, COUNTER_MAX),
        major_page_faults=min(stats.major_page_faults, COUNTER_MAX),
        swap_usage=min(stats.swap_usage, most.memory),
        oom_kills=min(stats.oom_kills, COUNTER_MAX),
        pids=min(stats.pids, PIDS_MAX),
        cpu_pressure=_pressure(stats.cpu_pressure),
        memory_pressure=_pressure(stats.memory_pressure),
        io_pressure=_pressure(stats.io_pressure),
    )


def details(stats: Any, most: Bounds) -> DetailFigures | None:
    """From a DetailStats message."""
    if stats is None:
        return None
    pages = {
        name(item.page_size): (min(item.usage, most.memory), min(item.max_usage, most.memory))
        for item in stats.hugetlb[:MAX_HUGETLB]
    }
    return DetailFigures(
        memory_peak=min(stats.memory_peak, most.memory),
        memory_limit_hits=min(stats.memory_limit_hits, COUNTER_MAX),
        read_bytes=min(stats.read_bytes, COUNTER_MAX),
        write_bytes=min(stats.write_bytes, COUNTER_MAX),
        reads=min(stats.reads, COUNTER_MAX),
        writes=min(stats.writes, COUNTER_MAX),
        processes=min(stats.processes, PIDS_MAX),
        threads=min(stats.threads, PIDS_MAX),
        threads_max=min(stats.threads_max, PIDS_MAX),
        file_descriptors=min(stats.file_descriptors, COUNTER_MAX),
        sockets=min(stats.sockets, COUNTER_MAX),
        files_max=min(stats.files_max, COUNTER_MAX),
        hugetlb=tuple((size, *used) for size, used in pages.items()),
    )


def container(stats: Any, most: Bounds) -> ContainerFigures:
    """From a ContainerStats message."""
    disk = stats.writable_layer
    return ContainerFigures(
        cgroup=cgroup(stats.cgroup, most),
        writable=None if disk is None else (min(disk.used_bytes, most.disk), min(disk.inodes, most.disk)),
        details=details(stats.details, most),
    )


def name(value: str) -> str:
    """Of an interface or a page size. Raises GuestError for what an agent does not tell."""
    if not 0 < len(value) <= _NAME_LENGTH or not _NAME_CHARACTERS.issuperset(value):
        raise GuestError("the agent reports a name that cannot be one")
    return value


def _interface(stats: Any) -> InterfaceFigures:
    counters = (
        min(getattr(stats, f"{way}_{what}"), COUNTER_MAX)
        for way in ("rx", "tx")
        for what in ("bytes", "packets", "errors", "dropped")
    )
    return InterfaceFigures(name(stats.name), *counters)


def _interfaces(stats: Iterable[Any]) -> tuple[InterfaceFigures, ...]:
    """Each name once: of two series alike Prometheus takes none."""
    return tuple({item.name: item for item in map(_interface, stats)}.values())


def guest(stats: Any, most: Bounds) -> GuestFigures:
    """From a GuestStats message. Raises GuestError."""
    if stats is None:
        raise GuestError("the agent reports nothing of its guest")
    return GuestFigures(
        memory_total=min(stats.memory_total, most.memory),
        memory_free=min(stats.memory_free, most.memory),
        memory_available=min(stats.memory_available, most.memory),
        cpu_usage_ns=min(stats.cpu_usage_ns, most.cpu_ns),
        containers=cgroup(stats.containers, most),
        interfaces=_interfaces(stats.interfaces[: most.interfaces]),
        disk_size=min(stats.disk_size, most.disk),
        disk_free=min(stats.disk_free, most.disk),
        disk_inodes=min(stats.disk_inodes, most.disk),
        disk_inodes_free=min(stats.disk_inodes_free, most.disk),
    )
