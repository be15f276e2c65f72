"""Statistics as CRI messages, with the meanings that containerd gives them. No input or output.

CPU and memory of a pod are those of its containers together, in the guest: what their limits hold for, and what
the kubelet ranks pods by. What the virtual machine costs the host beside them is in the verbose PodSandboxStatus.
"""

from __future__ import annotations

from collections.abc import Iterable

from hyperpod.agentclient.figures import (
    CgroupFigures,
    ContainerFigures,
    GuestFigures,
    InterfaceFigures,
    Pressure,
    Stall,
)
from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.container.live import LiveContainer
from hyperpod.container.stats import Sample
from hyperpod.model.base import now_ns
from hyperpod.model.container import ContainerState
from hyperpod.sandbox.live import LiveSandbox

DEFAULT_INTERFACE = "eth0"


def _value(number: int) -> cri.UInt64Value:
    return cri.UInt64Value(value=number)


def _stall(stall: Stall) -> cri.PsiData:
    return cri.PsiData(total=stall.total_ns, avg_10=stall.avg10, avg_60=stall.avg60, avg_300=stall.avg300)


def _psi(pressure: Pressure | None) -> cri.PsiStats | None:
    return None if pressure is None else cri.PsiStats(full=_stall(pressure.full), some=_stall(pressure.some))


def _cpu(figures: CgroupFigures, nano_cores: int | None, at: int) -> cri.CpuUsage:
    return cri.CpuUsage(
        timestamp=at,
        usage_core_nano_seconds=_value(figures.cpu_usage_ns),
        usage_nano_cores=None if nano_cores is None else _value(nano_cores),
        psi=_psi(figures.cpu_pressure),
    )


def _memory(figures: CgroupFigures, at: int) -> cri.MemoryUsage:
    limit = figures.memory_limit
    return cri.MemoryUsage(
        timestamp=at,
        working_set_bytes=_value(figures.working_set),
        available_bytes=_value(max(limit - figures.working_set, 0)) if limit else None,
        usage_bytes=_value(figures.memory_usage),
        rss_bytes=_value(figures.memory_anon),
        page_faults=_value(figures.page_faults),
        major_page_faults=_value(figures.major_page_faults),
        psi=_psi(figures.memory_pressure),
    )


def _io(figures: CgroupFigures, at: int) -> cri.IoUsage | None:
    return None if figures.io_pressure is None else cri.IoUsage(timestamp=at, psi=_psi(figures.io_pressure))


def _attributes(container: LiveContainer) -> cri.ContainerAttributes:
    config = container.record.config
    return cri.ContainerAttributes(
        id=container.id,
        metadata=cri.ContainerMetadata(name=config.metadata.name, attempt=config.metadata.attempt),
        labels=config.labels,
        annotations=config.annotations,
    )


def container(item: LiveContainer, sample: Sample | None, mountpoint: str) -> cri.ContainerStats:
    """What is not running has a writable layer alone; without a sample it has its attributes alone."""
    stats = cri.ContainerStats(attributes=_attributes(item))
    figures = None if sample is None else sample.figures.containers.get(item.id)
    if sample is None or figures is None:
        return stats
    at = sample.at_ns
    stats.writable_layer = _writable(figures, at, mountpoint)
    # The sample may be older than the container's end.
    if figures.cgroup is not None and item.state is ContainerState.RUNNING:
        stats.cpu = _cpu(figures.cgroup, sample.nano_cores.get(item.id), at)
        stats.memory = _memory(figures.cgroup, at)
        stats.swap = cri.SwapUsage(
            timestamp=at, swap_available_bytes=_value(0), swap_usage_bytes=_value(figures.cgroup.swap_usage)
        )
        stats.io = _io(figures.cgroup, at)
    return stats


def _writable(figures: ContainerFigures, at: int, mountpoint: str) -> cri.FilesystemUsage | None:
    if figures.writable is None:
        return None
    used, inodes = figures.writable
    return cri.FilesystemUsage(
        timestamp=at,
        fs_id=cri.FilesystemIdentifier(mountpoint=mountpoint),
        used_bytes=_value(used),
        inodes_used=_value(inodes),
    )


def _interface(figures: InterfaceFigures) -> cri.NetworkInterfaceUsage:
    return cri.NetworkInterfaceUsage(
        name=figures.name,
        rx_bytes=_value(figures.rx_bytes),
        rx_errors=_value(figures.rx_errors),
        tx_bytes=_value(figures.tx_bytes),
        tx_errors=_value(figures.tx_errors),
    )


def _network(guest: GuestFigures, at: int) -> cri.NetworkUsage | None:
    """eth0 is the default interface, else the first one; `interfaces` has the others (api.proto).

    Without one there is no message: the kubelet counts on a default interface, and a guest can have moved its own
    away."""
    found = [_interface(figures) for figures in guest.interfaces]
    if not found:
        return None
    default = next((item for item in found if item.name == DEFAULT_INTERFACE), found[0])
    others = [item for item in found if item is not default]
    return cri.NetworkUsage(timestamp=at, default_interface=default, interfaces=others)


def pod(
    sandbox: LiveSandbox, containers: Iterable[LiveContainer], sample: Sample | None, mountpoint: str
) -> cri.PodSandboxStats:
    """`containers`: those of this sandbox."""
    config = sandbox.record.config
    meta = config.metadata
    linux = cri.LinuxPodSandboxStats(containers=[container(item, sample, mountpoint) for item in containers])
    if sample is not None:
        at, guest = sample.at_ns, sample.figures.guest
        linux.network = _network(guest, at)
        if guest.containers is not None:
            linux.cpu = _cpu(guest.containers, sample.nano_cores.get(""), at)
            linux.memory = _memory(guest.containers, at)
            linux.process = cri.ProcessUsage(timestamp=at, process_count=_value(guest.containers.pids))
            linux.io = _io(guest.containers, at)
    return cri.PodSandboxStats(
        attributes=cri.PodSandboxAttributes(
            id=sandbox.id,
            metadata=cri.PodSandboxMetadata(
                name=meta.name, uid=meta.uid, namespace=meta.namespace, attempt=meta.attempt
            ),
            labels=config.labels,
            annotations=config.annotations,
        ),
        linux=linux,
    )


def filesystem(mountpoint: str, used_bytes: int, inodes: int) -> cri.FilesystemUsage:
    """Of ImageFsInfo."""
    return cri.FilesystemUsage(
        timestamp=now_ns(),
        fs_id=cri.FilesystemIdentifier(mountpoint=mountpoint),
        used_bytes=_value(used_bytes),
        inodes_used=_value(inodes),
    )
