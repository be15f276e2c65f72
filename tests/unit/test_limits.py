"""Limits of containers: validated, cut to the VM, merged by updates, and in OCI's form."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.cri import convert
from hyperpod.errors import InvalidArgument
from hyperpod.model.sandbox import VmSize
from hyperpod.model.security import LinuxResources
from hyperpod.spec import limits

MIB = 1 << 20
SIZE = VmSize(memory_mib=256, vcpus=2, max_memory_mib=512, max_vcpus=4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", set()), ("0", {0}), ("0-2,7", {0, 1, 2, 7}), ("3,1", {1, 3}), ("5-5", {5}), ("8191", {8191})],
)
def test_lists_of_numbers(text: str, expected: set[int]) -> None:
    assert limits.numbers("x", text) == expected


@pytest.mark.parametrize(
    "text", ["-1", "1-", "a", "2-1", "0,", "3, 1", ",", "8192", "0-99999", "1--2", "٣", "1\n"]
)
def test_what_is_no_list_of_numbers(text: str) -> None:
    with pytest.raises(InvalidArgument, match="no list of numbers"):
        limits.numbers("x", text)


@given(st.frozensets(st.integers(0, limits.MAX_CPU), min_size=1, max_size=50))
def test_every_set_has_a_list(wanted: frozenset[int]) -> None:
    assert limits.numbers("x", ",".join(map(str, wanted))) == wanted


@given(st.text(max_size=40))
def test_any_text_is_a_list_or_refused(text: str) -> None:
    with contextlib.suppress(InvalidArgument):
        assert all(0 <= number <= limits.MAX_CPU for number in limits.numbers("x", text))


@pytest.mark.parametrize("key", ["memory.high", "pids.max", "io.max", "hugetlb.2MB.max", "cpu.max.burst"])
def test_unified_keys(key: str) -> None:
    assert limits.unified("u", {key: "max"}) == {key: "max"}


@pytest.mark.parametrize(
    "key",
    ["", "memory", "cgroup.procs", "cgroup.kill", "../memory.max", "memory./x", "memory.max\n", "Memory.max",
     "memory.", "devices.allow", "memory.a/../../b", "memory.max "],
)  # fmt: skip
def test_unified_keys_that_are_none(key: str) -> None:
    with pytest.raises(InvalidArgument, match="is no cgroup v2 file of cpu"):
        limits.unified("u", {key: "max"})


def test_unified_values() -> None:
    for value in ("a\nb", "\0", "x" * 5000):
        with pytest.raises(InvalidArgument, match=r"u\[memory.max\]"):
            limits.unified("u", {"memory.max": value})


def test_a_limit_above_the_vm_is_cut() -> None:
    assert limits.fit("r", LinuxResources(memory_limit=1 << 40), SIZE).memory_limit == 256 * MIB
    assert limits.fit("r", LinuxResources(memory_limit=MIB), SIZE).memory_limit == MIB
    assert limits.fit("r", LinuxResources(), SIZE) == LinuxResources()


def test_a_host_has_what_its_kernel_says() -> None:
    """More CPUs than are online, more memory nodes than one: no size of a VM knows better."""
    wanted = LinuxResources(cpuset_cpus="0-40", cpuset_mems="0-1", memory_limit=1 << 50)
    assert limits.fit("r", wanted, None) == wanted
    with pytest.raises(InvalidArgument, match="no list of numbers"):
        limits.fit("r", LinuxResources(cpuset_mems="x"), None)


@pytest.mark.parametrize(
    ("resources", "text"),
    [
        (LinuxResources(cpuset_cpus="0-2"), r"r.cpuset_cpus '0-2': there is no CPU 2 .* has 2 \(0 to 1\)"),
        (LinuxResources(cpuset_mems="0,1"), "r.cpuset_mems '0,1': .* memory node 0"),
        (
            LinuxResources(memory_limit=5, memory_swap_limit=4),
            "memory_swap_limit_in_bytes 4 .* memory_limit_in_bytes 5",
        ),
    ],
)
def test_what_the_vm_has_not(resources: LinuxResources, text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        limits.fit("r", resources, SIZE)


def test_an_update_keeps_what_it_does_not_set() -> None:
    old = LinuxResources(
        cpu_shares=512, memory_limit=8 * MIB, memory_swap_limit=8 * MIB, oom_score_adj=900,
        unified={"pids.max": "5"}, hugepage_limits=(("2MB", 0),),
    )  # fmt: skip
    new = LinuxResources(
        cpu_quota=-1, memory_limit=9 * MIB, oom_score_adj=-1, unified={"memory.high": "1"},
        hugepage_limits=(("1GB", 0),),
    )  # fmt: skip
    assert limits.merge(old, new) == LinuxResources(
        cpu_shares=512, cpu_quota=-1, memory_limit=9 * MIB, memory_swap_limit=9 * MIB, oom_score_adj=900,
        unified={"pids.max": "5", "memory.high": "1"}, hugepage_limits=(("2MB", 0), ("1GB", 0)),
    )  # fmt: skip
    assert limits.merge(old, LinuxResources()) == old


def test_the_form_for_crun() -> None:
    assert limits.oci(LinuxResources()) == {}
    full = LinuxResources(
        cpu_period=1000, cpu_quota=-1, cpu_shares=2, memory_limit=5, memory_swap_limit=6, cpuset_cpus="0",
        cpuset_mems="0", unified={"pids.max": "7"}, hugepage_limits=(("2MB", 0),),
    )  # fmt: skip
    assert limits.oci(full) == {
        "cpu": {"shares": 2, "quota": -1, "period": 1000, "cpus": "0", "mems": "0"},
        "memory": {"limit": 5, "swap": 6},
        "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
        "unified": {"pids.max": "7"},
    }
    assert limits.oci(LinuxResources(memory_swap_limit=6)) == {}, "crun refuses swap without a memory limit"


def test_fewer_shares_than_the_kernel_has_are_its_fewest() -> None:
    assert limits.oci(LinuxResources(cpu_shares=1)) == {"cpu": {"shares": 2}}


def test_from_the_request() -> None:
    pages = [cri.HugepageLimit(page_size="2MB", limit=0), cri.HugepageLimit(page_size="1GB", limit=1 << 30)]
    got = convert.resources("r", cri.LinuxContainerResources(hugepage_limits=pages))
    assert got.hugepage_limits == (("2MB", 0), ("1GB", 1 << 30))
    with pytest.raises(InvalidArgument, match=r"r.hugepage_limits\[0\].page_size '../x'"):
        convert.resources(
            "r", cri.LinuxContainerResources(hugepage_limits=[cri.HugepageLimit(page_size="../x")])
        )
