"""ListPodSandboxMetrics: cAdvisor's metrics by its names, out of the same answers as the statistics.

One table. A metric's value is a whole number (CRI has no other), seconds among them. What no container of ours has
(maximum of huge pages in use, memory reservations) is not in the table, so it is not announced either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from hyperpod.agentclient.figures import (
    CgroupFigures,
    ContainerFigures,
    DetailFigures,
    GuestFigures,
    InterfaceFigures,
    Pressure,
)
from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.container.live import LiveContainer
from hyperpod.container.stats import Sample
from hyperpod.model.container import ContainerState
from hyperpod.model.security import LinuxResources
from hyperpod.sandbox.live import LiveSandbox
from hyperpod.spec.resources import DEFAULT_PERIOD

BASE_LABELS = ("pod", "namespace", "container", "id", "image")
DEFAULT_SHARES = 1024
_NANO = 10**9
_DISK = "scratch"
"""The device of every writable layer of a pod."""

Values = Iterable[tuple[tuple[str, ...], int]]
"""Values of the additional labels, and the number."""


@dataclass(frozen=True)
class Source:
    """A running container with all that is known of it."""

    container: LiveContainer
    guest: GuestFigures
    writable: tuple[int, int]
    cgroup: CgroupFigures
    details: DetailFigures
    at_ns: int

    @property
    def resources(self) -> LinuxResources:
        return self.container.resources


@dataclass(frozen=True)
class Kind:
    """A metric. `read` gives its values for a container."""

    name: str
    help: str
    counter: bool
    read: Callable[[Source], Values]
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class NetworkKind:
    """A counter of the pod's interfaces, told of the pod and not of its containers."""

    name: str
    help: str
    read: Callable[[InterfaceFigures], int]
    labels: tuple[str, ...] = field(default=("interface",))


def _one(read: Callable[[Source], int]) -> Callable[[Source], Values]:
    return lambda source: (((), read(source)),)


def _counter(name: str, text: str, read: Callable[[Source], int]) -> Kind:
    return Kind(name, text, counter=True, read=_one(read))


def _gauge(name: str, text: str, read: Callable[[Source], int]) -> Kind:
    return Kind(name, text, counter=False, read=_one(read))


def _disk(name: str, text: str, read: Callable[[Source], int], *, counter: bool = False) -> Kind:
    return Kind(name, text, counter, lambda source: (((_DISK,), read(source)),), ("device",))


def _stall(resource: str, what: str, pick: Callable[[CgroupFigures], Pressure | None]) -> Kind:
    def read(source: Source) -> Values:
        if (pressure := pick(source.cgroup)) is not None:
            stall = pressure.full if what == "stalled" else pressure.some
            yield (), stall.total_ns // _NANO

    who = "all of its" if what == "stalled" else "some of its"
    name = f"container_pressure_{resource}_{what}_seconds_total"
    return Kind(name, f"Seconds that {who} tasks waited for {resource}.", True, read)


def _faults(source: Source) -> Values:
    for scope in ("container", "hierarchy"):
        yield ("pgfault", scope), source.cgroup.page_faults
        yield ("pgmajfault", scope), source.cgroup.major_page_faults


def _operations(source: Source) -> Values:
    yield (_DISK, "Read"), source.details.read_bytes
    yield (_DISK, "Write"), source.details.write_bytes


CONTAINER = (
    _gauge("container_last_seen", "Last time the container was seen, in seconds since the epoch.",
           lambda s: s.at_ns // _NANO),
    _gauge("container_start_time_seconds", "Start time of the container, in seconds since the epoch.",
           lambda s: s.container.status.started_at // _NANO),
    _counter("container_cpu_usage_seconds_total", "CPU time used, in seconds.",
             lambda s: s.cgroup.cpu_usage_ns // _NANO),
    _counter("container_cpu_user_seconds_total", "CPU time used in user mode, in seconds.",
             lambda s: s.cgroup.cpu_user_ns // _NANO),
    _counter("container_cpu_system_seconds_total", "CPU time used by the kernel for it, in seconds.",
             lambda s: s.cgroup.cpu_system_ns // _NANO),
    _counter("container_cpu_cfs_periods_total", "Enforcement periods of its CPU quota.",
             lambda s: s.cgroup.cpu_periods),
    _counter("container_cpu_cfs_throttled_periods_total", "Periods in which it was throttled.",
             lambda s: s.cgroup.cpu_throttled_periods),
    _counter("container_cpu_cfs_throttled_seconds_total", "Time that it was throttled, in seconds.",
             lambda s: s.cgroup.cpu_throttled_ns // _NANO),
    _gauge("container_memory_usage_bytes", "Memory in use, cache included.", lambda s: s.cgroup.memory_usage),
    _gauge("container_memory_working_set_bytes", "Memory in use without inactive file cache.",
           lambda s: s.cgroup.working_set),
    _gauge("container_memory_rss", "Anonymous memory.", lambda s: s.cgroup.memory_anon),
    _gauge("container_memory_cache", "Page cache.", lambda s: s.cgroup.memory_file),
    _gauge("container_memory_kernel_usage", "Memory of the kernel for it.", lambda s: s.cgroup.memory_kernel),
    _gauge("container_memory_mapped_file", "Mapped files.", lambda s: s.cgroup.memory_mapped_file),
    _gauge("container_memory_swap", "Swap in use.", lambda s: s.cgroup.swap_usage),
    _gauge("container_memory_max_usage_bytes", "Most memory ever in use.", lambda s: s.details.memory_peak),
    _counter("container_memory_failcnt", "How often the memory limit was met.",
             lambda s: s.details.memory_limit_hits),
    Kind("container_memory_failures_total", "Page faults.", True, _faults, ("failure_type", "scope")),
    _counter("container_oom_events_total", "Processes killed for want of memory.", lambda s: s.cgroup.oom_kills),
    _disk("container_fs_usage_bytes", "Bytes in its writable layer.", lambda s: s.writable[0]),
    _disk("container_fs_limit_bytes", "Size of the disk for writable layers.", lambda s: s.guest.disk_size),
    _disk("container_fs_inodes_total", "Inodes of that disk.", lambda s: s.guest.disk_inodes),
    _disk("container_fs_inodes_free", "Free inodes of that disk.", lambda s: s.guest.disk_inodes_free),
    _disk("container_fs_reads_bytes_total", "Bytes read from disks.", lambda s: s.details.read_bytes, counter=True),
    _disk("container_fs_reads_total", "Reads from disks.", lambda s: s.details.reads, counter=True),
    _disk("container_fs_writes_bytes_total", "Bytes written to disks.", lambda s: s.details.write_bytes,
          counter=True),
    _disk("container_fs_writes_total", "Writes to disks.", lambda s: s.details.writes, counter=True),
    Kind("container_blkio_device_usage_total", "Bytes read and written.", True, _operations,
         ("device", "operation")),
    _gauge("container_processes", "Processes.", lambda s: s.details.processes),
    _gauge("container_threads", "Threads.", lambda s: s.details.threads),
    _gauge("container_threads_max", "Most threads; 0 is no limit.", lambda s: s.details.threads_max),
    _gauge("container_file_descriptors", "Open files.", lambda s: s.details.file_descriptors),
    _gauge("container_sockets", "Open sockets.", lambda s: s.details.sockets),
    Kind("container_ulimits_soft", "Soft limits of its first process.", False,
         lambda s: ((("max_open_files",), s.details.files_max),), ("ulimit",)),
    Kind("container_hugetlb_usage_bytes", "Huge pages in use.", False,
         lambda s: (((size,), used) for size, used, _ in s.details.hugetlb), ("pagesize",)),
    _stall("cpu", "waiting", lambda c: c.cpu_pressure),
    _stall("cpu", "stalled", lambda c: c.cpu_pressure),
    _stall("memory", "waiting", lambda c: c.memory_pressure),
    _stall("memory", "stalled", lambda c: c.memory_pressure),
    _stall("io", "waiting", lambda c: c.io_pressure),
    _stall("io", "stalled", lambda c: c.io_pressure),
    _gauge("container_spec_cpu_period", "CPU period, in microseconds.",
           lambda s: s.resources.cpu_period or DEFAULT_PERIOD),
    Kind("container_spec_cpu_quota", "CPU quota per period, in microseconds.", False,
         lambda s: (((), s.resources.cpu_quota),) if s.resources.cpu_quota > 0 else ()),
    _gauge("container_spec_cpu_shares", "CPU shares.", lambda s: s.resources.cpu_shares or DEFAULT_SHARES),
    _gauge("container_spec_memory_limit_bytes", "Memory limit; 0 is none.", lambda s: s.resources.memory_limit),
    _gauge("container_spec_memory_swap_limit_bytes", "Limit of memory and swap together; 0 is none.",
           lambda s: max(s.resources.memory_swap_limit, 0)),
)  # fmt: skip

NETWORK = (
    NetworkKind("container_network_receive_bytes_total", "Bytes received.", lambda i: i.rx_bytes),
    NetworkKind("container_network_receive_packets_total", "Packets received.", lambda i: i.rx_packets),
    NetworkKind(
        "container_network_receive_packets_dropped_total", "Packets dropped.", lambda i: i.rx_dropped
    ),
    NetworkKind("container_network_receive_errors_total", "Errors while receiving.", lambda i: i.rx_errors),
    NetworkKind("container_network_transmit_bytes_total", "Bytes sent.", lambda i: i.tx_bytes),
    NetworkKind("container_network_transmit_packets_total", "Packets sent.", lambda i: i.tx_packets),
    NetworkKind(
        "container_network_transmit_packets_dropped_total", "Packets dropped.", lambda i: i.tx_dropped
    ),
    NetworkKind("container_network_transmit_errors_total", "Errors while sending.", lambda i: i.tx_errors),
)


def descriptors() -> list[cri.MetricDescriptor]:
    """Of every metric; its label values come in the order of these keys."""
    return [
        cri.MetricDescriptor(name=kind.name, help=kind.help, label_keys=[*BASE_LABELS, *kind.labels])
        for kind in (*CONTAINER, *NETWORK)
    ]


def _metric(kind: Kind | NetworkKind, at: int, labels: tuple[str, ...], value: int) -> cri.Metric:
    counter = not isinstance(kind, Kind) or kind.counter
    return cri.Metric(
        name=kind.name,
        timestamp=at,
        metric_type=cri.MetricType.COUNTER if counter else cri.MetricType.GAUGE,
        label_values=list(labels),
        value=cri.UInt64Value(value=value),
    )


def _of_container(
    sandbox: LiveSandbox, item: LiveContainer, sample: Sample, figures: ContainerFigures
) -> Iterator[cri.Metric]:
    if figures.cgroup is None or figures.details is None or item.state is not ContainerState.RUNNING:
        return
    config, pod = item.record.config, sandbox.record.config.metadata
    labels = (
        pod.name,
        pod.namespace,
        config.metadata.name,
        item.id,
        config.user_specified_image or config.image,
    )
    guest, writable = sample.figures.guest, figures.writable or (0, 0)
    source = Source(item, guest, writable, figures.cgroup, figures.details, sample.at_ns)
    for kind in CONTAINER:
        for more, value in kind.read(source):
            yield _metric(kind, sample.at_ns, (*labels, *more), value)


def pod(sandbox: LiveSandbox, containers: Iterable[LiveContainer], sample: Sample) -> cri.PodSandboxMetrics:
    """`sample`: one with details."""
    meta = sandbox.record.config.metadata
    labels = (meta.name, meta.namespace, "", sandbox.id, "")
    network = [
        _metric(kind, sample.at_ns, (*labels, interface.name), kind.read(interface))
        for interface in sample.figures.guest.interfaces
        for kind in NETWORK
    ]
    told = []
    for item in containers:
        figures = sample.figures.containers.get(item.id)
        if figures is not None and (metrics := list(_of_container(sandbox, item, sample, figures))):
            told.append(cri.ContainerMetrics(container_id=item.id, metrics=metrics))
    return cri.PodSandboxMetrics(pod_sandbox_id=sandbox.id, metrics=network, container_metrics=told)
