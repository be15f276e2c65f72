"""Capabilities of a container: containerd's default set, changed by the request."""

from __future__ import annotations

from hyperpod.errors import InvalidArgument

DEFAULT = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
)

ALL = (
    *DEFAULT,
    "CAP_DAC_READ_SEARCH",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_LEASE",
    "CAP_AUDIT_CONTROL",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
)

NUMBERS = {
    name: number
    for number, name in enumerate(
        (
            *("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL"),
            *("CAP_SETGID", "CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE"),
            *("CAP_NET_BROADCAST", "CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER"),
            *("CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT", "CAP_SYS_PTRACE", "CAP_SYS_PACCT"),
            *("CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE", "CAP_SYS_TIME"),
            *("CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL"),
            *("CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM"),
            *("CAP_BLOCK_SUSPEND", "CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE"),
        )
    )
}
"""The kernel's (linux/capability.h), as bits of /proc/<pid>/status."""


def _names(requested: tuple[str, ...]) -> set[str]:
    names: set[str] = set()
    for item in requested:
        upper = item.upper()
        if upper == "ALL":
            names |= set(ALL)
            continue
        name = upper if upper.startswith("CAP_") else f"CAP_{upper}"
        if name not in ALL:
            raise InvalidArgument(f"unknown capability {item[:60]!r}")
        names.add(name)
    return names


def of_container(
    add: tuple[str, ...],
    drop: tuple[str, ...],
    add_ambient: tuple[str, ...] = (),
    *,
    privileged: bool = False,
) -> list[str]:
    """The set, sorted. ALL in either list comes first, single names after it, as containerd does it.

    What is to be ambient is in the set too. Raises InvalidArgument for an unknown name."""
    wanted = set(DEFAULT)
    add_all = any(x.upper() == "ALL" for x in add)
    drop_all = any(x.upper() == "ALL" for x in drop)
    if add_all:
        wanted = set(ALL)
    if drop_all:
        wanted = set()
    wanted |= _names(tuple(x for x in add if x.upper() != "ALL"))
    wanted -= _names(tuple(x for x in drop if x.upper() != "ALL"))
    return sorted(ALL if privileged else wanted | set(ambient(add_ambient)))


def ambient(add_ambient: tuple[str, ...]) -> list[str]:
    """Those that programs keep which do not run as root, sorted. Raises InvalidArgument."""
    return sorted(_names(add_ambient))
