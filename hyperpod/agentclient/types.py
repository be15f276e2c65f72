"""What the agent API's calls take and give, without protobuf. Times: ns since the epoch, the agent's clock."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


@dataclass(frozen=True)
class HelloInfo:
    """The agent's answer to Hello. All text is escaped and bounded."""

    api_version: int
    agent_version: str
    kernel_release: str
    boot_id: str
    crun_version: str
    memory_total_bytes: int
    cpus: int
    event_seq: int


@dataclass(frozen=True)
class Layer:
    """One image layer: `serial` of its LUN; for a host agent also the `path` of its image file."""

    serial: str
    path: str
    fstype: str


@dataclass(frozen=True)
class ImageVolume:
    """An image, or a folder in it, for the OCI mount at `destination`. `layers`: topmost last."""

    destination: str
    layers: tuple[Layer, ...]
    sub_path: str = ""


@dataclass(frozen=True)
class Device:
    """A device node of the guest. `permissions`: some of "rwm"."""

    path: str
    container_path: str
    permissions: str


@dataclass(frozen=True)
class Security:
    """What the agent decides of a container's security; see Security in agent.proto."""

    user: str = ""
    strict_groups: bool = False
    pid_target: str = ""
    devices: tuple[Device, ...] = ()
    all_devices: bool = False


@dataclass(frozen=True)
class UserInfo:
    """Whom a container runs as, in the agent's words. `groups` has `gid` too."""

    uid: int
    gid: int
    groups: tuple[int, ...]


class AgentContainerState(IntEnum):
    """Numbers of agent.proto."""

    CREATED = 1
    RUNNING = 2
    EXITED = 3


@dataclass(frozen=True)
class ContainerInfo:
    """A container as its agent sees it."""

    id: str
    state: AgentContainerState
    pid: int
    exit_code: int
    """0..255; 128 + number for a signal."""
    oom_killed: bool
    started_at_ns: int
    finished_at_ns: int

    @property
    def exited(self) -> bool:
        return self.state is AgentContainerState.EXITED


@dataclass(frozen=True)
class ExitEvent:
    """The exit number `seq` of this agent."""

    seq: int
    exited: ContainerInfo
