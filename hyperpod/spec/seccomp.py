"""Seccomp: what no container with a filter may do, whatever its profile says.

A filter sees the calls of a process, and not what the kernel does for it by io_uring, which makes sockets too.

The families are told by the low 32 bits of socket()'s first argument, as the kernel does: a comparison of all 64
lets 2**32 + 40 pass, which the kernel then takes as 40.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

AF_ALG, AF_VSOCK = 38, 40
DENIED_FAMILIES = frozenset({AF_ALG, AF_VSOCK})
"""AF_VSOCK is how the host talks to the agent; AF_ALG is a wide door into the kernel's crypto code."""

ENOSYS, EAFNOSUPPORT = 38, 97
UNTOLD = {"io_uring_setup": ENOSYS, "socketcall": EAFNOSUPPORT}
"""System calls by which sockets are made whose family a filter cannot see, and what their callers get."""

ALLOW_ALL: dict[str, Any] = {"defaultAction": "SCMP_ACT_ALLOW"}

_FAMILIES = 64
"""Linux 6.12 knows 46. Those above are not allowed one by one: there are none."""

_INT = 0xFFFFFFFF
_PERMITTING = ("SCMP_ACT_ALLOW", "SCMP_ACT_LOG", "SCMP_ACT_TRACE")
"""TRACE leaves it to whoever traces the process, which may be one of its own."""


def without_host_sockets(profile: dict[str, Any]) -> dict[str, Any]:
    """`profile` (an OCI seccomp object) with socket() of the denied families refused.

    socketcall(2), which some other syscall ABIs have, and io_uring cannot be filtered by family: they are never
    allowed.
    """
    result: dict[str, Any] = copy.deepcopy(profile)
    default = result["defaultAction"]
    rules: list[dict[str, Any]] = []
    permitted = default in _PERMITTING
    for rule in result.get("syscalls", []):
        if rule["action"] not in _PERMITTING or not {"socket", *UNTOLD} & set(rule["names"]):
            rules.append(rule)
            continue
        if others := [name for name in rule["names"] if name != "socket" and name not in UNTOLD]:
            rules.append({**rule, "names": others})
        if "socket" in rule["names"] and rule["action"] != default:
            rules += _narrowed(rule)
            permitted = True
    if permitted:
        rules += [
            {"names": ["socket"], **_refusal(EAFNOSUPPORT), "args": [_masked(_INT, family)]}
            for family in sorted(DENIED_FAMILIES)
        ]
    if default in _PERMITTING:
        rules += [{"names": [name], **_refusal(number)} for name, number in UNTOLD.items()]
    result["syscalls"] = rules
    return result


def _refusal(number: int) -> dict[str, Any]:
    return {"action": "SCMP_ACT_ERRNO", "errnoRet": number}


def _narrowed(rule: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A rule that permits socket(), as rules that do so for the families that are not denied.

    libseccomp takes one condition for each argument, so what the rule says of the family is part of the set.
    """
    args = rule.get("args") or []
    if len({arg["index"] for arg in args}) < len(args):
        # Two conditions on one argument are two rules to OCI runtimes, of which either permits.
        for arg in args:
            yield from _narrowed({**rule, "args": [arg]})
        return
    of_family = [arg for arg in args if arg["index"] == 0]
    rest = [arg for arg in args if arg["index"] != 0]
    families = {
        family
        for family in range(_FAMILIES)
        if family not in DENIED_FAMILIES and all(_holds(arg, family) for arg in of_family)
    }
    for mask, value in _blocks(families, 0, _FAMILIES):
        yield {**rule, "names": ["socket"], "args": [_masked(mask, value), *rest]}


def _holds(arg: dict[str, Any], value: int) -> bool:
    limit: int = arg["value"]
    results: dict[str, bool] = {
        "SCMP_CMP_NE": value != limit,
        "SCMP_CMP_LT": value < limit,
        "SCMP_CMP_LE": value <= limit,
        "SCMP_CMP_EQ": value == limit,
        "SCMP_CMP_GE": value >= limit,
        "SCMP_CMP_GT": value > limit,
        "SCMP_CMP_MASKED_EQ": value & limit == arg.get("valueTwo", 0),
    }
    return results[arg["op"]]


def _blocks(wanted: set[int], low: int, size: int) -> Iterator[tuple[int, int]]:
    """`wanted` below low + size as the fewest aligned blocks of a power of two: mask and value of each."""
    count = sum(low <= item < low + size for item in wanted)
    if count == size:
        yield _INT & ~(size - 1), low
    elif count:
        yield from _blocks(wanted, low, size // 2)
        yield from _blocks(wanted, low + size // 2, size // 2)


def _masked(mask: int, value: int) -> dict[str, Any]:
    """socket()'s family under a mask is `value`."""
    return {"index": 0, "value": mask, "valueTwo": value, "op": "SCMP_CMP_MASKED_EQ"}
