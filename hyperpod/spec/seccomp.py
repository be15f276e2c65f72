"""Seccomp: what no container may do, whatever its profile says."""

from __future__ import annotations

import copy
from typing import Any

AF_ALG, AF_VSOCK = 38, 40
DENIED_FAMILIES = (AF_ALG, AF_VSOCK)
"""AF_VSOCK is how the host talks to the agent; AF_ALG is a wide door into the kernel's crypto code."""

EAFNOSUPPORT = 97


def without_host_sockets(profile: dict[str, Any] | None) -> dict[str, Any]:
    """`profile` (an OCI seccomp object; None allows all) with socket() of the denied families refused.

    Other syscall ABIs of the machine are not listed as architectures, and libseccomp kills what uses an
    unlisted one: socketcall(2) of 32-bit x86 could not be filtered by family.
    """
    result: dict[str, Any] = copy.deepcopy(profile) if profile else {"defaultAction": "SCMP_ACT_ALLOW"}
    allow_socket: list[dict[str, Any]] = []
    for rule in result.get("syscalls", []):
        if "socket" in rule.get("names", []) and rule.get("action") == "SCMP_ACT_ALLOW":
            rule["names"] = [name for name in rule["names"] if name not in ("socket", "socketcall")]
            allow_socket.append(rule)
    rules = [rule for rule in result.get("syscalls", []) if rule.get("names")]
    if result["defaultAction"] == "SCMP_ACT_ALLOW":
        rules += [_socket_rule("SCMP_ACT_ERRNO", family, "SCMP_CMP_EQ") for family in DENIED_FAMILIES]
    elif allow_socket:
        # An allow list: socket() is allowed below, between and above the denied families.
        rules.append(_socket_rule("SCMP_ACT_ALLOW", AF_ALG, "SCMP_CMP_LT"))
        rules.append(_socket_rule("SCMP_ACT_ALLOW", AF_ALG + 1, "SCMP_CMP_EQ"))
        rules.append(_socket_rule("SCMP_ACT_ALLOW", AF_VSOCK, "SCMP_CMP_GT"))
    result["syscalls"] = rules
    return result


def _socket_rule(action: str, family: int, operator: str) -> dict[str, Any]:
    rule: dict[str, Any] = {
        "names": ["socket"],
        "action": action,
        "args": [{"index": 0, "value": family, "op": operator}],
    }
    if action == "SCMP_ACT_ERRNO":
        rule["errnoRet"] = EAFNOSUPPORT
    return rule
