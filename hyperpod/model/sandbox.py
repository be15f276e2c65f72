"""Sandboxes: configuration, durable record, versioned status."""

from __future__ import annotations

from enum import StrEnum

from hyperpod.model.base import Record
from hyperpod.model.network import PodNetwork
from hyperpod.model.security import LinuxResources, NamespaceOptions


class SandboxMetadata(Record):
    """CRI PodSandboxMetadata: the identity of a pod attempt."""

    name: str
    uid: str
    namespace: str
    attempt: int = 0

    @property
    def key(self) -> str:
        """The reservation name: one live sandbox per key."""
        return f"{self.name}_{self.namespace}_{self.uid}_{self.attempt}"


class DnsConfig(Record):
    """CRI DNSConfig."""

    servers: tuple[str, ...] = ()
    searches: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


class PortMapping(Record):
    """CRI PortMapping; host_port 0 means none."""

    protocol: str = "TCP"
    container_port: int = 0
    host_port: int = 0
    host_ip: str = ""


class SandboxConfig(Record):
    """CRI PodSandboxConfig as far as it is honoured."""

    metadata: SandboxMetadata
    hostname: str = ""
    log_directory: str = ""
    dns: DnsConfig | None = None
    port_mappings: tuple[PortMapping, ...] = ()
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    has_linux: bool = True
    cgroup_parent: str = ""
    namespaces: NamespaceOptions = NamespaceOptions()
    run_as_user: int | None = None
    run_as_group: int | None = None
    readonly_rootfs: bool = False
    supplemental_groups: tuple[int, ...] = ()
    privileged: bool = False
    """Whether its containers may be."""
    sysctls: dict[str, str] = {}
    resources: LinuxResources = LinuxResources()
    overhead: LinuxResources = LinuxResources()


class SandboxPhase(StrEnum):
    """Where a sandbox stands; see `SANDBOX_TRANSITIONS`."""

    CREATING = "creating"
    READY = "ready"
    STOPPING = "stopping"
    STOPPED = "stopped"
    REMOVING = "removing"


SANDBOX_TRANSITIONS: dict[SandboxPhase, frozenset[SandboxPhase]] = {
    SandboxPhase.CREATING: frozenset({SandboxPhase.READY, SandboxPhase.STOPPING, SandboxPhase.STOPPED}),
    SandboxPhase.READY: frozenset({SandboxPhase.STOPPING, SandboxPhase.STOPPED}),
    SandboxPhase.STOPPING: frozenset({SandboxPhase.STOPPED}),
    SandboxPhase.STOPPED: frozenset({SandboxPhase.REMOVING, SandboxPhase.STOPPING}),
    SandboxPhase.REMOVING: frozenset({SandboxPhase.STOPPED}),
}


class Kind(StrEnum):
    """The place that a sandbox is."""

    VM = "vm"
    HOST = "host"

    @property
    def words(self) -> str:
        """For messages: whose end is the end of the pod."""
        return "virtual machine" if self is Kind.VM else "agent"


class Artifact(Record):
    """A guest kernel or root image: what a VM was started with stays known after an upgrade."""

    version: str
    path: str
    initrd: str = ""
    cmdline: str = ""
    fstype: str = ""


class VmSize(Record):
    """Decided once at creation (DESIGN section 3): MiB and counts."""

    memory_mib: int
    vcpus: int
    max_memory_mib: int
    max_vcpus: int
    reason: str = ""


class SandboxRecord(Record):
    """Frozen at creation, written before the first side effect."""

    id: str
    config: SandboxConfig
    runtime_handler: str
    created_at: int
    host_boot_id: str
    slot: int
    uid: int
    gid: int
    cid: int
    token: bytes
    domain: str
    domain_uuid: str
    kernel: Artifact
    guest: Artifact
    size: VmSize
    vsock: str = "vhost-user"
    kind: Kind = Kind.VM
    """Of a host pod, `kernel` and `size` are the host's own; what a VM alone has is empty."""
    virtiofs: str = "off"
    """`boot`, `demand` or `off`, as the configuration said; sandboxes of before there were mounts: off."""


class SandboxStatus(Record):
    """Changes over time; `version` grows by one at each write."""

    version: int = 0
    phase: SandboxPhase = SandboxPhase.CREATING
    reason: str = ""
    message: str = ""
    timings: dict[str, float] = {}
    stopped_at: int = 0
    guest_facts: dict[str, str] = {}
    network: PodNetwork | None = None
    """Set while the pod is in its network."""

    def to(self, phase: SandboxPhase, **changes: object) -> SandboxStatus:
        """The next status. Raises ValueError for a transition that the table does not have."""
        if phase != self.phase and phase not in SANDBOX_TRANSITIONS[self.phase]:
            raise ValueError(f"no transition from {self.phase} to {phase}")
        return self.model_copy(update={"phase": phase, "version": self.version + 1, **changes})


class Sandbox(Record):
    """A sandbox as lists and statuses see it."""

    record: SandboxRecord
    status: SandboxStatus

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def ready(self) -> bool:
        return self.status.phase is SandboxPhase.READY
