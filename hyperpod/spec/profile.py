"""Seccomp profiles as they lie on a host, to the OCI runtime spec's linux.seccomp. Pure.

Taken are OCI's own form and the one that Docker and containers/common ship, in which a rule may depend on
capabilities, machine and kernel (`includes`, `excludes`), architectures come as `archMap`, and an errno may be
a name. What a rule depends on is decided here, for one container: the runtime knows nothing of it.
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from typing import Any

from hyperpod.errors import InvalidArgument

ACTIONS = frozenset(
    f"SCMP_ACT_{name}"
    for name in ("KILL", "KILL_PROCESS", "KILL_THREAD", "TRAP", "ERRNO", "TRACE", "ALLOW", "LOG")
)
OPERATORS = frozenset(f"SCMP_CMP_{name}" for name in ("NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"))
FLAGS = frozenset(f"SECCOMP_FILTER_FLAG_{name}" for name in ("TSYNC", "LOG", "SPEC_ALLOW"))
MACHINES = {
    "x86_64": ("amd64", "SCMP_ARCH_X86_64"),
    "aarch64": ("arm64", "SCMP_ARCH_AARCH64"),
    "riscv64": ("riscv64", "SCMP_ARCH_RISCV64"),
    "s390x": ("s390x", "SCMP_ARCH_S390X"),
    "ppc64le": ("ppc64le", "SCMP_ARCH_PPC64LE"),
}
"""uname(2)'s machine to the names of the profiles' rules and of libseccomp."""

MAX_ERRNO = 4095
_U64 = 2**64 - 1
_RELEASE = re.compile(r"(\d+)\.(\d+)")
_NAME = re.compile(r"[a-z0-9_]{1,64}", re.ASCII)


@dataclass(frozen=True)
class Target:
    """What a profile is resolved for."""

    capabilities: frozenset[str]
    machine: str = "x86_64"
    kernel: str = "6.12"
    """A release; its first two numbers count."""


def resolve(document: object, target: Target) -> dict[str, Any]:
    """The OCI seccomp object. Raises InvalidArgument that names what is wrong, and where."""
    profile = _object("the profile", document)
    if profile.get("listenerPath"):
        raise InvalidArgument("listenerPath: a host's socket is not there in a pod's VM")
    result: dict[str, Any] = {
        "defaultAction": _one_of("defaultAction", profile.get("defaultAction"), ACTIONS)
    }
    number = _errno("default", profile, "defaultErrnoRet", "defaultErrno")
    if number is not None and result["defaultAction"] in ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE"):
        result["defaultErrnoRet"] = number
    if architectures := _architectures(profile, target):
        result["architectures"] = architectures
    if flags := _list("flags", profile.get("flags")):
        result["flags"] = [_one_of("flags", flag, FLAGS) for flag in flags]
    rules = []
    for index, item in enumerate(_list("syscalls", profile.get("syscalls"))):
        where = f"syscalls[{index}]"
        rule = _object(where, item)
        if _applies(where, rule, target):
            rules.append(_rule(where, rule))
    result["syscalls"] = rules
    return result


def _architectures(profile: dict[str, Any], target: Target) -> list[str]:
    known = [str(item) for item in _list("architectures", profile.get("architectures"))]
    native = MACHINES[target.machine][1]
    for item in _list("archMap", profile.get("archMap")):
        entry = _object("archMap", item)
        if entry.get("architecture") == native:
            known += [native, *map(str, _list("subArchitectures", entry.get("subArchitectures")))]
    for name in known:
        if not re.fullmatch(r"SCMP_ARCH_[A-Z0-9_]{1,32}", name):
            raise InvalidArgument(f"architectures: {name[:60]!r} is none")
    return list(dict.fromkeys(known))


def _applies(where: str, rule: dict[str, Any], target: Target) -> bool:
    """Docker's rule: all of `includes` hold, and nothing of `excludes` does."""
    includes = _object(f"{where}.includes", rule.get("includes") or {})
    excludes = _object(f"{where}.excludes", rule.get("excludes") or {})
    machine = MACHINES[target.machine][0]
    if target.capabilities & _names(f"{where}.excludes.caps", excludes.get("caps")):
        return False
    if machine in _names(f"{where}.excludes.arches", excludes.get("arches")):
        return False
    if excludes.get("minKernel") and _at_least(where, target.kernel, excludes["minKernel"]):
        return False
    if not target.capabilities >= _names(f"{where}.includes.caps", includes.get("caps")):
        return False
    arches = _names(f"{where}.includes.arches", includes.get("arches"))
    if arches and machine not in arches:
        return False
    return not includes.get("minKernel") or _at_least(where, target.kernel, includes["minKernel"])


def _at_least(where: str, release: str, wanted: object) -> bool:
    versions = []
    for text in (release, wanted):
        if not (found := _RELEASE.match(str(text))):
            raise InvalidArgument(f"{where}: {str(text)[:60]!r} is no kernel release")
        versions.append((int(found[1]), int(found[2])))
    return versions[0] >= versions[1]


def _rule(where: str, rule: dict[str, Any]) -> dict[str, Any]:
    single = [rule["name"]] if rule.get("name") else []  # Docker's older form
    names = _list(f"{where}.names", rule.get("names")) or single
    if not names:
        raise InvalidArgument(f"{where} has no names")
    for name in names:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InvalidArgument(f"{where}.names: {str(name)[:60]!r} is no system call")
    built: dict[str, Any] = {
        "names": names,
        "action": _one_of(f"{where}.action", rule.get("action"), ACTIONS),
    }
    number = _errno(where, rule, "errnoRet", "errno")
    if number is not None and built["action"] in ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE"):
        built["errnoRet"] = number
    if args := _list(f"{where}.args", rule.get("args")):
        built["args"] = [_arg(f"{where}.args[{i}]", item) for i, item in enumerate(args)]
    return built


def _arg(where: str, item: object) -> dict[str, Any]:
    arg = _object(where, item)
    built = {
        "index": _number(f"{where}.index", arg.get("index", 0), 5),
        "value": _number(f"{where}.value", arg.get("value", 0), _U64),
        "op": _one_of(f"{where}.op", arg.get("op"), OPERATORS),
    }
    if built["op"] == "SCMP_CMP_MASKED_EQ":
        built["valueTwo"] = _number(f"{where}.valueTwo", arg.get("valueTwo", 0), _U64)
    return built


def _errno(where: str, holder: dict[str, Any], number: str, name: str) -> int | None:
    if holder.get(number) is not None:
        return _number(f"{where}.{number}", holder[number], MAX_ERRNO)
    if not (text := holder.get(name)):
        return None
    value = getattr(errno, str(text), None)
    if not isinstance(value, int):
        raise InvalidArgument(f"{where}.{name}: {str(text)[:60]!r} is no errno")
    return value


def _object(where: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidArgument(f"{where} is not an object")
    return value


def _list(where: str, value: object) -> list[Any]:
    """An absent list is an empty one."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise InvalidArgument(f"{where} is not a list")
    return value


def _names(where: str, value: object) -> frozenset[str]:
    items = _list(where, value)
    if not all(isinstance(item, str) for item in items):
        raise InvalidArgument(f"{where} holds something that is no name")
    return frozenset(items)


def _one_of(where: str, value: object, known: frozenset[str]) -> str:
    if not isinstance(value, str) or value not in known:
        raise InvalidArgument(f"{where} is {str(value)[:60]!r}; {', '.join(sorted(known))} are taken")
    return value


def _number(where: str, value: object, limit: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= limit:
        raise InvalidArgument(f"{where} is {str(value)[:60]!r}; 0 to {limit} is possible")
    return value
