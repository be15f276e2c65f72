"""The kernel's figures as the agent reads them, and an agent's figures as the host believes them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperpod.agent import figures as kernel
from hyperpod.agentclient import figures
from hyperpod.agentclient.figures import COUNTER_MAX, Bounds
from hyperpod.api.gen.hyperpod.agentstats import v1
from hyperpod.container.stats import NANO, RATE_WINDOW, Rate
from hyperpod.errors import GuestError

MOST = Bounds(memory=1 << 30, disk=1 << 34, cpu_ns=10**12)
LINES = st.lists(st.text(st.characters(codec="ascii"), max_size=60), max_size=8).map("\n".join)


def test_flat_files() -> None:
    text = "usage_usec 1500\nnr_periods 3\nbad\nword word\nMemTotal:  2048 kB\n negative -5\n"
    assert kernel.flat(text) == {"usage_usec": 1500, "nr_periods": 3, "MemTotal": 2048}


@pytest.mark.parametrize(
    ("text", "value"),
    [("max\n", 0), ("4096\n", 4096), ("9223372036854771712\n", 0), ("", 0), ("-1", 0), ("x", 0)],
)
def test_limits(text: str, value: int) -> None:
    assert kernel.limit(text) == value


def test_pressure() -> None:
    text = "some avg10=1.25 avg60=0.00 avg300=100.00 total=5\nfull avg10=0.50 avg60=x avg300=0.01 total=7\n"
    assert kernel.pressure(text) == v1.Pressure(
        some_total_ns=5000, some_avg10=125, some_avg300=10_000, full_total_ns=7000, full_avg10=50,
        full_avg300=1,
    )  # fmt: skip
    assert kernel.pressure("") is None
    assert kernel.pressure("some avg10=inf avg60=nan total=1e9\n") is None


def test_io() -> None:
    text = "254:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n8:0 rbytes=5 wbytes=x\n"
    assert kernel.io_stat(text) == {"rbytes": 15, "wbytes": 20, "rios": 1, "wios": 2, "dbytes": 0, "dios": 0}


def test_busy_time() -> None:
    assert kernel.busy_ns("cpu  10 1 2 99 50 3 4 5 7 0\ncpu0 1\n", 100) == 25 * 10_000_000
    assert kernel.busy_ns("", 100) == kernel.busy_ns("cpu a b c d e f g h", 100) == 0


def test_interfaces() -> None:
    head = "Inter-|   Receive   |  Transmit\n face |bytes  packets ...\n"
    eth = "  eth0: 1 2 3 4 0 0 0 0 5 6 7 8 0 0 0 0\n"
    lo = "    lo: 9 9 9 9 0 0 0 0 9 9 9 9 0 0 0 0\n"
    odd = "  \ufffd\ufffd: 1 2 3 4 0 0 0 0 5 6 7 8 0 0 0 0\n"
    [found] = kernel.interfaces(head + lo + odd + eth + "junk\n  x: 1 2\n")
    assert found == v1.InterfaceStats(
        name="eth0", rx_bytes=1, rx_packets=2, rx_errors=3, rx_dropped=4, tx_bytes=5, tx_packets=6,
        tx_errors=7, tx_dropped=8,
    )  # fmt: skip


def test_soft_limits() -> None:
    text = "Max processes             1 2 processes\nMax open files            1024 4096 files\n"
    assert kernel.soft_limit(text, "Max open files") == 1024
    assert kernel.soft_limit(text, "Max cpu time") == kernel.soft_limit("Max x unlimited", "Max x") == 0


def test_names_that_an_agent_tells_can_be() -> None:
    """Else a container that names an interface would have no statistics, as a lying guest has none."""
    for name in ("eth0.5@if7", "a!b", "+x~", '"$(x)`'):
        [told] = kernel.interfaces(f"a\nb\n{name}: 1 2 3 4 0 0 0 0 5 6 7 8 0 0 0 0\n")
        [found] = figures.guest(v1.GuestStats(interfaces=[told]), MOST).interfaces
        assert found.name == name


@given(LINES)
def test_no_text_stops_the_readers(text: str) -> None:
    """All that they give fits the messages: they encode."""
    assert all(value >= 0 for value in kernel.flat(text).values())
    assert kernel.limit(text) >= 0
    bytes(kernel.pressure(text) or v1.Pressure())
    assert kernel.busy_ns(text, 100) >= 0
    for item in kernel.interfaces(text):
        bytes(item)
    assert all(value >= 0 for value in kernel.io_stat(text).values())


U64 = st.integers(0, 2**64 - 1)
U32 = st.integers(0, 2**32 - 1)
PRESSURE = st.none() | st.builds(
    v1.Pressure, some_total_ns=U64, some_avg10=U32, some_avg60=U32, full_avg300=U32, full_total_ns=U64
)
CGROUP = st.none() | st.builds(
    v1.CgroupStats,
    **{
        field.name: PRESSURE if field.name.endswith("pressure") else U64
        for field in dataclasses.fields(v1.CgroupStats)
    },
)


def _numbers(value: Any) -> list[float]:
    if dataclasses.is_dataclass(value):
        return [n for field in dataclasses.fields(value) for n in _numbers(getattr(value, field.name))]
    if isinstance(value, tuple):
        return [n for item in value for n in _numbers(item)]
    return [value] if isinstance(value, int | float) else []


@given(CGROUP, U64, U64)
def test_a_lying_guest_stays_within_its_vm(cgroup: v1.CgroupStats | None, used: int, inodes: int) -> None:
    stats = v1.ContainerStats(cgroup=cgroup, writable_layer=v1.DiskStats(used_bytes=used, inodes=inodes))
    got = figures.container(v1.ContainerStats.parse(bytes(stats)), MOST)
    assert (got.cgroup is None) == (cgroup is None)
    assert all(0 <= number <= COUNTER_MAX for number in _numbers(got))
    assert got.writable is not None and max(got.writable) <= MOST.disk
    if got.cgroup is not None:
        assert max(got.cgroup.memory_usage, got.cgroup.memory_limit, got.cgroup.memory_anon) <= MOST.memory
        assert 0 <= got.cgroup.working_set <= MOST.memory
        assert got.cgroup.cpu_usage_ns <= MOST.cpu_ns


@given(st.lists(st.builds(v1.InterfaceStats, name=st.just("eth0"), rx_bytes=U64), max_size=100), U64)
def test_a_lying_guest_has_few_interfaces_and_little_memory(
    interfaces: list[v1.InterfaceStats], memory: int
) -> None:
    got = figures.guest(v1.GuestStats(interfaces=interfaces, memory_total=memory), MOST)
    assert len(got.interfaces) <= figures.MAX_INTERFACES
    assert got.memory_total <= MOST.memory


def test_a_lying_guest_s_names_are_told_once() -> None:
    """Prometheus would take neither of two series with the same labels."""
    twice = [v1.InterfaceStats(name=name, rx_bytes=n) for n, name in enumerate(("eth0", "a", "eth0"))]
    got = figures.guest(v1.GuestStats(interfaces=twice), MOST)
    assert sorted(item.name for item in got.interfaces) == ["a", "eth0"]
    pages = [v1.HugetlbStats(page_size="2MB", usage=n) for n in range(3)]
    details = figures.details(v1.DetailStats(hugetlb=pages), MOST)
    assert details is not None and [size for size, _, _ in details.hugetlb] == ["2MB"]


def test_the_node_s_interfaces_are_not_a_pod_s() -> None:
    stats = v1.GuestStats(interfaces=[v1.InterfaceStats(name="eth0")])
    assert figures.guest(stats, dataclasses.replace(MOST, interfaces=0)).interfaces == ()


@pytest.mark.parametrize("name", ["", "x" * 16, "a/b", "a b", "\x1b[m", "é", "a\n"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(GuestError):
        figures.guest(v1.GuestStats(interfaces=[v1.InterfaceStats(name=name)]), MOST)


def test_rates() -> None:
    rate, cores = Rate(), 2 * NANO
    assert rate.update(100.0, 0, cores) is None
    assert rate.update(100.1, 10**8, cores) is None, "too short to tell"
    assert rate.update(101.0, NANO, cores) == NANO
    assert rate.update(102.0, NANO, cores) == NANO, "kept until the window is full"
    assert rate.update(110.0, 6 * NANO, cores) == round(0.6 * NANO)
    assert rate.update(110.0, 7 * NANO, cores) == round(0.6 * NANO)
    assert rate.update(120.0, 600 * NANO, cores) == cores, "a VM cannot use more than its CPUs"
    assert rate.update(121.0, 5, cores) is None, "a counter that began anew"
    assert rate.update(121.0 + RATE_WINDOW, 5, cores) == 0


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 2**63)), max_size=20))
def test_rates_are_never_negative_or_impossible(steps: list[tuple[float, int]]) -> None:
    rate, at = Rate(), 0.0
    for seconds, cpu_ns in steps:
        at += seconds
        value = rate.update(at, cpu_ns, NANO)
        assert value is None or 0 <= value <= NANO
