"""Security and resource settings that pods and containers share (CRI v1 linux messages)."""

from __future__ import annotations

from enum import StrEnum

from hyperpod.model.base import Record


class NamespaceMode(StrEnum):
    """CRI NamespaceMode."""

    POD = "POD"
    CONTAINER = "CONTAINER"
    NODE = "NODE"
    TARGET = "TARGET"


class IdMapping(Record):
    """CRI IDMapping: the ids 0 to `length` - 1 of a container are those from `host_id` on."""

    host_id: int
    length: int


class UserNamespace(Record):
    """CRI UserNamespace of mode POD: the pod has one of its own."""

    uids: IdMapping
    gids: IdMapping


class NamespaceOptions(Record):
    """CRI NamespaceOption, echoed by the statuses (the kubelet recreates the sandbox otherwise)."""

    network: NamespaceMode = NamespaceMode.POD
    pid: NamespaceMode = NamespaceMode.POD
    ipc: NamespaceMode = NamespaceMode.POD
    target_id: str = ""
    userns_mode: NamespaceMode | None = None
    """As it was said, if it was: POD, and then `userns` is set, or NODE."""
    userns: UserNamespace | None = None
    """None: the host's, or the guest's first one."""


class SeccompKind(StrEnum):
    """CRI SecurityProfile.ProfileType; UNSET is an absent message."""

    UNSET = "unset"
    RUNTIME_DEFAULT = "RuntimeDefault"
    UNCONFINED = "Unconfined"
    LOCALHOST = "Localhost"


class SeccompProfile(Record):
    """CRI SecurityProfile for seccomp. `path`: of a Localhost profile, absolute, on the host."""

    kind: SeccompKind = SeccompKind.UNSET
    path: str = ""


class Device(Record):
    """CRI Device: a node of the guest that has the path `host_path` there too. `permissions`: some of "rwm"."""

    host_path: str
    container_path: str
    permissions: str


class User(Record):
    """CRI LinuxContainerUser. `groups` has `gid` too."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


class LinuxResources(Record):
    """CRI LinuxContainerResources: CPU in microseconds, memory in bytes, 0 is unset."""

    cpu_period: int = 0
    cpu_quota: int = 0
    cpu_shares: int = 0
    memory_limit: int = 0
    memory_swap_limit: int = 0
    oom_score_adj: int = 0
    cpuset_cpus: str = ""
    cpuset_mems: str = ""
    unified: dict[str, str] = {}
    hugepage_limits: tuple[tuple[str, int], ...] = ()
    """Page size as cgroup files name it (2MB), and bytes; 0 is a limit, none at all is no entry."""
