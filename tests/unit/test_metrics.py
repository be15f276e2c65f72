"""Statistics and metrics as CRI messages, out of figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hyperpod.agentclient import figures
from hyperpod.agentclient.figures import Bounds, SandboxFigures
from hyperpod.api.gen.hyperpod.agentstats import v1
from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.container.live import LiveContainer
from hyperpod.container.stats import Sample
from hyperpod.cri import metrics, stats_replies
from hyperpod.model.container import ContainerStatus
from hyperpod.model.sandbox import SandboxPhase
from hyperpod.model.security import LinuxResources
from hyperpod.sandbox.live import LiveSandbox
from tests.unit.test_list_codec import _container, _sandbox

MOST = Bounds(memory=1 << 40, disk=1 << 40, cpu_ns=1 << 60)
POD, ONE, TWO = "a" * 64, "b" * 64, "c" * 64
AT = 5_000_000_000

NAMES = """
blkio_device_usage_total cpu_cfs_periods_total cpu_cfs_throttled_periods_total
cpu_cfs_throttled_seconds_total cpu_system_seconds_total cpu_usage_seconds_total cpu_user_seconds_total
file_descriptors fs_inodes_free fs_inodes_total fs_limit_bytes fs_reads_bytes_total fs_reads_total
fs_usage_bytes fs_writes_bytes_total fs_writes_total hugetlb_usage_bytes last_seen memory_cache
memory_failcnt memory_failures_total memory_kernel_usage memory_mapped_file memory_max_usage_bytes
memory_rss memory_swap memory_usage_bytes memory_working_set_bytes network_receive_bytes_total
network_receive_errors_total network_receive_packets_dropped_total network_receive_packets_total
network_transmit_bytes_total network_transmit_errors_total network_transmit_packets_dropped_total
network_transmit_packets_total oom_events_total pressure_cpu_stalled_seconds_total
pressure_cpu_waiting_seconds_total pressure_io_stalled_seconds_total pressure_io_waiting_seconds_total
pressure_memory_stalled_seconds_total pressure_memory_waiting_seconds_total processes sockets
spec_cpu_period spec_cpu_quota spec_cpu_shares spec_memory_limit_bytes spec_memory_swap_limit_bytes
start_time_seconds threads threads_max ulimits_soft
"""


def _live(ident: str, name: str, status: ContainerStatus) -> LiveContainer:
    made = _container(ident, POD, name, "busybox", 1, {"l": "1"}, {"a": "2"}, 3, status)
    return LiveContainer(made.record, made.status)


def _made() -> tuple[LiveSandbox, list[LiveContainer], Sample]:
    record = _sandbox(POD, "web", 1, {"app": "x"}, {}, 0, SandboxPhase.READY)
    sandbox = LiveSandbox(record.record, record.status, Path("/nowhere"), None)  # type: ignore[arg-type]
    resources = LinuxResources(cpu_quota=20_000, memory_limit=1000, memory_swap_limit=1000)
    running = _live(ONE, "main", ContainerStatus(started_at=3_000_000_000, resources=resources))
    created = _live(TWO, "init", ContainerStatus())
    pressure = v1.Pressure(some_total_ns=2_000_000_000, some_avg10=150, full_total_ns=1_000_000_000)
    cgroup = v1.CgroupStats(
        cpu_usage_ns=7_500_000_000, memory_usage=900, memory_inactive_file=200, memory_anon=300,
        memory_limit=1000, page_faults=4, major_page_faults=1, oom_kills=2, pids=6, cpu_pressure=pressure,
        memory_pressure=pressure, io_pressure=pressure,
    )  # fmt: skip
    details = v1.DetailStats(
        memory_peak=950, processes=5, threads=6, files_max=1024,
        hugetlb=[v1.HugetlbStats(page_size="2MB", usage=4)],
    )  # fmt: skip
    stats = v1.ContainerStats(
        id=ONE, cgroup=cgroup, details=details, writable_layer=v1.DiskStats(used_bytes=4096, inodes=2)
    )
    guest = v1.GuestStats(
        containers=cgroup, disk_size=1 << 30,
        interfaces=[
            v1.InterfaceStats(name="tun0", rx_bytes=1),
            v1.InterfaceStats(name="eth0", rx_bytes=5, tx_errors=6),
        ],
    )  # fmt: skip
    told = SandboxFigures(
        figures.guest(guest, MOST),
        {
            ONE: figures.container(stats, MOST),
            TWO: figures.container(v1.ContainerStats(id=TWO, writable_layer=v1.DiskStats()), MOST),
        },
    )
    return sandbox, [running, created], Sample(AT, told, {ONE: 123, "": 456})


def test_the_names_are_cadvisors() -> None:
    described = metrics.descriptors()
    assert sorted(d.name for d in described) == sorted(f"container_{name}" for name in NAMES.split())
    assert all(d.help and d.label_keys[:5] == list(metrics.BASE_LABELS) for d in described)


def test_every_metric_has_a_value_and_its_labels() -> None:
    sandbox, containers, sample = _made()
    told = metrics.pod(sandbox, containers, sample)
    [one] = told.container_metrics
    assert one.container_id == ONE, "what does not run has no metrics"
    keys = {d.name: d.label_keys for d in metrics.descriptors()}
    everything = [*told.metrics, *one.metrics]
    assert {m.name for m in everything} == set(keys)
    assert all(len(m.label_values) == len(keys[m.name]) for m in everything)
    assert all(m.timestamp == AT and m.value is not None for m in everything)
    values = {(m.name, *m.label_values[5:]): m.value.value for m in everything if m.value}
    assert values["container_cpu_usage_seconds_total",] == 7
    assert values["container_memory_working_set_bytes",] == 700
    assert values["container_network_receive_bytes_total", "eth0"] == 5
    assert values["container_memory_failures_total", "pgmajfault", "container"] == 1
    assert values["container_pressure_cpu_waiting_seconds_total",] == 2
    assert values["container_spec_cpu_quota",] == 20_000
    assert values["container_spec_cpu_period",] == 100_000
    assert values["container_hugetlb_usage_bytes", "2MB"] == 4
    assert values["container_start_time_seconds",] == 3
    assert one.metrics[0].label_values == ["web", "n", "main", ONE, "main"]
    assert told.metrics[0].label_values == ["web", "n", "", POD, "", "tun0"]
    kinds = {m.name: m.metric_type for m in everything}
    assert kinds["container_oom_events_total"] == cri.MetricType.COUNTER
    assert kinds["container_memory_rss"] == cri.MetricType.GAUGE


def test_statistics() -> None:
    sandbox, containers, sample = _made()
    whole = stats_replies.pod(sandbox, containers, sample, "/m")
    assert whole.linux is not None
    running, created = whole.linux.containers
    assert running.attributes is not None and running.attributes.metadata is not None
    assert (running.attributes.id, running.attributes.metadata.attempt) == (ONE, 3)
    assert running.cpu is not None and running.memory is not None and running.writable_layer is not None
    assert running.cpu.usage_nano_cores == cri.UInt64Value(value=123)
    assert running.cpu.psi is not None and running.cpu.psi.some is not None
    assert running.cpu.psi.some.avg_10 == 1.5
    assert running.memory.available_bytes == cri.UInt64Value(value=300)
    assert running.writable_layer.fs_id == cri.FilesystemIdentifier(mountpoint="/m")
    assert (created.cpu, created.memory) == (None, None)
    assert created.writable_layer is not None
    assert created.writable_layer.used_bytes == cri.UInt64Value(value=0)
    assert whole.linux.network is not None and whole.linux.network.default_interface is not None
    assert whole.linux.network.default_interface.name == "eth0"
    assert whole.linux.process is not None
    assert whole.linux.process.process_count == cri.UInt64Value(value=6)
    alone = replace(sample.figures, guest=replace(sample.figures.guest, interfaces=()))
    bare = stats_replies.pod(sandbox, containers, replace(sample, figures=alone), "/m")
    assert bare.linux is not None and bare.linux.network is None, "kubelets count on a default interface"
    silent = stats_replies.pod(sandbox, containers, None, "/m")
    assert silent.linux is not None and silent.linux.cpu is None
    assert [c.cpu for c in silent.linux.containers] == [None, None]
