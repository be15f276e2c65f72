"""Containers: configuration, durable record, status derived from timestamps."""

from __future__ import annotations

from enum import StrEnum

from hyperpod.model.base import Record
from hyperpod.model.images import ImageConfig
from hyperpod.model.mounts import ImageVolume, Mount
from hyperpod.model.security import Device, LinuxResources, NamespaceOptions, SeccompProfile, User


class ContainerMetadata(Record):
    """CRI ContainerMetadata."""

    name: str
    attempt: int = 0


class Capabilities(Record):
    """CRI Capability: names with or without CAP_, or ALL."""

    add: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    add_ambient: tuple[str, ...] = ()


class ContainerConfig(Record):
    """CRI ContainerConfig as far as it is honoured. `image` is the user's string, given back as it came."""

    metadata: ContainerMetadata
    image: str
    user_specified_image: str = ""
    image_annotations: dict[str, str] = {}
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    working_dir: str = ""
    envs: tuple[tuple[str, bytes], ...] = ()
    mounts: tuple[Mount, ...] = ()
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    log_path: str = ""
    stdin: bool = False
    stdin_once: bool = False
    tty: bool = False
    resources: LinuxResources = LinuxResources()
    devices: tuple[Device, ...] = ()
    has_security_context: bool = False
    """Without one, the containers' defaults are the safe ones; with one, what is unset in it is off (CRI)."""
    privileged: bool = False
    capabilities: Capabilities = Capabilities()
    namespaces: NamespaceOptions = NamespaceOptions()
    run_as_user: int | None = None
    run_as_group: int | None = None
    run_as_username: str = ""
    readonly_rootfs: bool = False
    supplemental_groups: tuple[int, ...] = ()
    strict_groups: bool = False
    no_new_privs: bool = False
    masked_paths: tuple[str, ...] = ()
    readonly_paths: tuple[str, ...] = ()
    seccomp: SeccompProfile = SeccompProfile()
    stop_signal: str = ""
    """A CRI Signal name such as SIGTERM or SIGRTMIN+3; empty: the image's, else SIGTERM."""


class ContainerState(StrEnum):
    """CRI ContainerState."""

    CREATED = "created"
    RUNNING = "running"
    EXITED = "exited"
    UNKNOWN = "unknown"


class Reason(StrEnum):
    """Why a container ended; the kubelet shows it to users."""

    COMPLETED = "Completed"
    ERROR = "Error"
    OOM_KILLED = "OOMKilled"
    START_ERROR = "StartError"
    UNKNOWN = "Unknown"


START_ERROR_CODE = 128
"""Exit code of a container that could not be started, as containerd reports it."""

OOM_CODE = 137
"""128 and SIGKILL: how the kernel ends what takes too much memory."""

UNKNOWN_CODE = 255
"""Exit code of a container whose true one is lost with its VM, as containerd reports it."""


class ContainerRecord(Record):
    """Frozen at creation."""

    id: str
    sandbox_id: str
    config: ContainerConfig
    image_id: str
    image_ref: str
    """The repo digest that users know its image by, or else the id."""
    image_tag: str = ""
    """The tag, if there is one; `config.image` is an id when it comes from a kubelet."""
    created_at: int
    log_path: str
    layers: tuple[str, ...]
    stop_signal: str
    image_config: ImageConfig
    """A copy: the image may be removed while the container lives."""
    image_volumes: tuple[ImageVolume, ...] = ()

    @property
    def image_ids(self) -> list[str]:
        """Of every image that it uses, its own first."""
        return [self.image_id, *(volume.image_id for volume in self.image_volumes)]

    @property
    def all_layers(self) -> tuple[str, ...]:
        """Of every image that it uses; one may be there twice."""
        return self.layers + tuple(layer for volume in self.image_volumes for layer in volume.layers)


class ContainerStatus(Record):
    """The state is derived from the timestamps (nanoseconds since the epoch, host clock; 0 is not yet)."""

    version: int = 0
    prepared: bool = False
    """The container was announced to the agent: rootfs and bundle exist in the guest."""
    started_at: int = 0
    finished_at: int = 0
    exit_code: int = 0
    reason: str = ""
    message: str = ""
    pid: int = 0
    user: User | None = None
    """As the guest resolved it."""
    removing: bool = False
    resources: LinuxResources | None = None
    """What holds now: as asked for at creation, cut to the VM's size, and as updated since."""

    @property
    def state(self) -> ContainerState:
        if self.finished_at:
            return ContainerState.EXITED
        if self.started_at:
            return ContainerState.RUNNING
        return ContainerState.CREATED

    def next(self, **changes: object) -> ContainerStatus:
        return self.model_copy(update={"version": self.version + 1, **changes})


class Container(Record):
    """A container as lists and statuses see it."""

    record: ContainerRecord
    status: ContainerStatus

    @property
    def id(self) -> str:
        return self.record.id


class ExecResult(Record):
    """Outcome of an ExecSync."""

    stdout: bytes
    stderr: bytes
    exit_code: int
