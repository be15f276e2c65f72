"""The size of a VM follows DESIGN section 3's formula."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperpod.errors import InvalidArgument
from hyperpod.model.sandbox import VmSize
from hyperpod.model.security import LinuxResources
from hyperpod.spec.resources import MIB, vm_size

DEFAULTS: dict[str, Any] = {
    "base_mib": 96, "floor_mib": 160, "default_mib": 416, "default_vcpus": 1, "max_vcpus": 8,
    "max_memory_mib": 0, "host_memory_mib": 16384, "host_cpus": 4,
}  # fmt: skip


def size(resources: LinuxResources, overhead: LinuxResources | None = None, **changes: Any) -> VmSize:
    return vm_size(resources, overhead or LinuxResources(), **{**DEFAULTS, **changes})


def test_default() -> None:
    got = size(LinuxResources())
    assert (got.memory_mib, got.vcpus, got.max_memory_mib, got.max_vcpus) == (512, 1, 1024, 4)


def test_limit_and_floor_and_overhead() -> None:
    assert size(LinuxResources(memory_limit=1024 * MIB)).memory_mib == 1120
    assert size(LinuxResources(memory_limit=1)).memory_mib == 256
    small = size(LinuxResources(memory_limit=1), LinuxResources(memory_limit=32 * MIB))
    assert small.memory_mib == 256, (
        "the pod's cgroup has room for limit and overhead, so the base is overhead"
    )
    assert "overhead of 32 MiB is less" in small.reason
    enough = size(LinuxResources(memory_limit=1), LinuxResources(memory_limit=160 * MIB))
    assert "overhead" not in enough.reason


@pytest.mark.parametrize("overhead", [160, 287, 288])
def test_an_emulator_keeps_translated_code_in_the_pods_cgroup(overhead: int) -> None:
    emulated = size(
        LinuxResources(memory_limit=1), LinuxResources(memory_limit=overhead * MIB), emulated=True
    )
    assert ("the 192 MiB of QEMU and shim" in emulated.reason) == (overhead < 288)


def test_a_container_without_a_limit_beside_one_that_has_one() -> None:
    sidecar = LinuxResources(memory_limit=64 * MIB)
    assert size(sidecar).memory_mib == 256
    assert size(sidecar, bounded=False).memory_mib == 512
    assert size(LinuxResources(memory_limit=1024 * MIB), bounded=False).memory_mib == 1120


@pytest.mark.parametrize(
    ("quota", "period", "cpus"), [(1, 0, 1), (100_000, 0, 1), (150_000, 100_000, 2), (50_000, 10_000, 4)]
)
def test_vcpus(quota: int, period: int, cpus: int) -> None:
    assert size(LinuxResources(cpu_quota=quota, cpu_period=period)).vcpus == cpus


def test_clamp_is_told() -> None:
    assert "is the most here" in size(LinuxResources(cpu_quota=900_000)).reason
    got = size(LinuxResources(cpu_quota=200_000), only_cpu="emulated")
    assert (got.vcpus, got.max_vcpus) == (1, 1)
    assert got.reason.endswith("2 vCPUs asked for, 1 is the most here (emulated)")
    assert "emulated" not in size(LinuxResources(cpu_quota=100_000), only_cpu="emulated").reason


def test_more_than_the_host() -> None:
    with pytest.raises(InvalidArgument, match="this host has 16384 MiB"):
        size(LinuxResources(memory_limit=64 << 30))


@given(st.integers(0, 15 << 30), st.integers(0, 10**9), st.integers(0, 10**6))
def test_invariants(memory: int, quota: int, period: int) -> None:
    got = size(LinuxResources(memory_limit=memory, cpu_quota=quota, cpu_period=period))
    assert got.memory_mib % 16 == 0
    assert got.memory_mib * MIB >= memory + 96 * MIB
    assert got.memory_mib <= got.max_memory_mib <= 16384
    assert 1 <= got.vcpus <= got.max_vcpus <= 4
