"""A container's limits: what is valid, what a VM of a size can give, and their OCI form (linux.resources)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hyperpod.errors import InvalidArgument
from hyperpod.model.sandbox import VmSize
from hyperpod.model.security import LinuxResources

MIB = 1 << 20
MAX_CPU = 8191
"""Linux: CONFIG_NR_CPUS is at most 8192."""

MIN_SHARES = 2
MAX_UNIFIED = 64
MAX_UNIFIED_VALUE = 4096
"""Bytes: a cgroup file takes a page at most."""

CONTROLLERS = ("cpu", "cpuset", "hugetlb", "io", "memory", "misc", "pids", "rdma")
"""Of cgroup v2. "cgroup" is none: its files move and kill processes, they limit nothing."""

_KEY = re.compile(r"([a-z]+)\.[A-Za-z0-9_.]{1,64}\Z")
_PAGE_SIZE = re.compile(r"[1-9][0-9]{0,3}[KMG]B\Z")
_RANGE = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?\Z")


def numbers(where: str, text: str) -> frozenset[int]:
    """The kernel's list format: `0-2,7`. Raises InvalidArgument."""
    found: set[int] = set()
    for part in text.split(",") if text else ():
        match = _RANGE.match(part)
        first = int(match[1]) if match else -1
        last = int(match[2] or first) if match else -1
        if not 0 <= first <= last <= MAX_CPU:
            raise InvalidArgument(f"{where} {text[:100]!r} is no list of numbers such as 0-2,7")
        found.update(range(first, last + 1))
    return frozenset(found)


def unified(where: str, values: Mapping[str, str]) -> dict[str, str]:
    """cgroup v2 files with what is written to them. Raises InvalidArgument that names the key."""
    if len(values) > MAX_UNIFIED:
        raise InvalidArgument(f"{where} has {len(values)} items, at most {MAX_UNIFIED} are taken")
    for key, value in values.items():
        match = _KEY.match(key)
        if match is None or match[1] not in CONTROLLERS:
            raise InvalidArgument(
                f"{where} key {key[:100]!r} is no cgroup v2 file of {', '.join(CONTROLLERS)}, "
                "such as memory.high"
            )
        if not value.isprintable() or len(value.encode()) > MAX_UNIFIED_VALUE:
            raise InvalidArgument(f"{where}[{key}] is too long, or not a line of printable text")
    return dict(values)


def page_size(where: str, value: str) -> str:
    """As cgroup files name it: 2MB, 1GB. Raises InvalidArgument."""
    if not _PAGE_SIZE.match(value):
        raise InvalidArgument(f"{where} {value[:100]!r} is no size of a huge page, such as 2MB")
    return value


def merge(old: LinuxResources, new: LinuxResources) -> LinuxResources:
    """An update: what is unset stays. The OOM score is a process's, and is not changed."""
    changes = {name: value for name in type(new).model_fields if (value := getattr(new, name))}
    changes.pop("oom_score_adj", None)
    pages = {**dict(old.hugepage_limits), **dict(new.hugepage_limits)}
    files = {**old.unified, **new.unified}
    if new.memory_limit and 0 < old.memory_swap_limit < new.memory_limit and not new.memory_swap_limit:
        changes["memory_swap_limit"] = new.memory_limit  # memory and swap together
    return old.model_copy(update=changes | {"hugepage_limits": tuple(pages.items()), "unified": files})


def fit(where: str, resources: LinuxResources, size: VmSize | None) -> LinuxResources:
    """What a VM of this size gives: a higher memory limit is cut to its RAM. `size` is None for the host, whose
    kernel knows best which CPUs and memory nodes there are.

    Raises InvalidArgument for CPUs and memory nodes that it has not, and for contradictions.
    """
    cpus = numbers(f"{where}.cpuset_cpus", resources.cpuset_cpus)
    if size and cpus and max(cpus) >= size.vcpus:
        raise InvalidArgument(
            f"{where}.cpuset_cpus {resources.cpuset_cpus[:100]!r}: there is no CPU {max(cpus)} in the pod's "
            f"virtual machine, which has {size.vcpus} (0 to {size.vcpus - 1})"
        )
    nodes = numbers(f"{where}.cpuset_mems", resources.cpuset_mems)
    if size and nodes and max(nodes) > 0:
        raise InvalidArgument(
            f"{where}.cpuset_mems {resources.cpuset_mems[:100]!r}: the pod's virtual machine has memory node 0"
        )
    limit, swap = resources.memory_limit, resources.memory_swap_limit
    if 0 < swap < limit:
        raise InvalidArgument(
            f"{where}.memory_swap_limit_in_bytes {swap} is memory and swap together: it cannot be below "
            f"memory_limit_in_bytes {limit}"
        )
    if size is None:
        return resources
    return resources.model_copy(update={"memory_limit": min(limit, size.memory_mib * MIB)})


def oci(resources: LinuxResources) -> dict[str, Any]:
    """Their form in linux.resources; what is unset stays unset."""
    cpu = {
        # The kernel's least; crun's way to a weight of cgroup v2 begins there.
        "shares": max(resources.cpu_shares, MIN_SHARES) if resources.cpu_shares else 0,
        "quota": resources.cpu_quota,
        "period": resources.cpu_period,
        "cpus": resources.cpuset_cpus,
        "mems": resources.cpuset_mems,
    }
    memory = {
        "limit": resources.memory_limit,
        # Alone it says nothing (there is no swap), and crun refuses it.
        "swap": resources.memory_swap_limit if resources.memory_limit else 0,
    }
    pages = [{"pageSize": size, "limit": limit} for size, limit in resources.hugepage_limits]
    built: dict[str, Any] = {
        "cpu": {name: value for name, value in cpu.items() if value},
        "memory": {name: value for name, value in memory.items() if value},
        "hugepageLimits": pages,
        "unified": dict(resources.unified),
    }
    return {name: value for name, value in built.items() if value}
