"""Limits as this place can apply them: crun fails for a cgroup file that is not there."""

from __future__ import annotations

import os
from typing import Any

from hyperpod.agent.cgroups import ROOT, Cgroups
from hyperpod.errors import InvalidArgument


def adapt(cgroups: Cgroups, resources: dict[str, Any]) -> dict[str, Any]:
    """linux.resources without what means nothing here: limits of 0 on huge pages that there are none of, swap
    where swap is not accounted, and, with cgroup v1, no CPU quota: see `lifts_quota`.

    Raises InvalidArgument for huge pages that there are none of, and for cgroup v2's files with v1."""
    fitted = dict(resources)
    if fitted.get("unified") and not cgroups.unified:
        raise InvalidArgument("unified has files of cgroup v2, but this host has cgroup v1")
    if lifts_quota(cgroups, fitted):
        fitted["cpu"] = {name: value for name, value in fitted["cpu"].items() if name != "quota"}
    memory = dict(fitted.get("memory") or {})
    if "swap" in memory and not os.path.exists(_swap_file(cgroups)):
        del memory["swap"]
        fitted["memory"] = memory
    pages = []
    for item in fitted.get("hugepageLimits") or []:
        if os.path.exists(_huge_file(cgroups, item["pageSize"])):
            pages.append(item)
        elif item["limit"]:
            raise InvalidArgument(f"there are no huge pages of {item['pageSize']} here")
    fitted["hugepageLimits"] = pages
    return fitted


def lifts_quota(cgroups: Cgroups, resources: dict[str, Any]) -> bool:
    """Whether a CPU quota is to end that crun cannot end: 1.8 writes the -1 of cgroup v1 without its sign."""
    return not cgroups.unified and (resources.get("cpu") or {}).get("quota") == -1


def _swap_file(cgroups: Cgroups) -> str:
    if cgroups.unified:
        return f"{ROOT}{cgroups.parent}/memory.swap.max"
    return f"{ROOT}/memory{cgroups.parent}/memory.memsw.limit_in_bytes"


def _huge_file(cgroups: Cgroups, size: str) -> str:
    if cgroups.unified:
        return f"{ROOT}{cgroups.parent}/hugetlb.{size}.max"
    return f"{ROOT}/hugetlb{cgroups.parent}/hugetlb.{size}.limit_in_bytes"
