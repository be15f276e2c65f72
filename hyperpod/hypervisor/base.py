"""What the rest of hyperpod knows of a hypervisor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from hyperpod.spec.domain import Disk, DomainSpec

__all__ = ["Disk", "DomainEvent", "DomainInfo", "DomainSpec", "HostFacts", "Hypervisor"]


@dataclass(frozen=True)
class DomainInfo:
    """A domain of the host. `ours`: its metadata carries this state folder's instance id."""

    name: str
    uuid: str
    sandbox_id: str
    instance_id: str
    running: bool
    ours: bool


@dataclass(frozen=True)
class DomainEvent:
    """`kind`: started, stopped, crashed, paused, resumed. `detail` says why in words.

    `stopped` is the last event of a domain, also of one that destroy() ended.
    """

    sandbox_id: str
    name: str
    kind: str
    detail: str


@dataclass(frozen=True)
class HostFacts:
    """Found once, at open(). `hypervisor_version` is the newest machine type, for example pc-q35-7.2.

    `tsc_khz` is what an emulated guest must be told of its time-stamp counter; 0: nothing."""

    accelerator: str
    accelerator_reason: str
    vhost_vsock: bool
    libvirt_version: str
    hypervisor_version: str
    tsc_khz: int


class Hypervisor(Protocol):
    """Every coroutine raises hyperpod errors only. A cancelled call may still take effect: look again."""

    async def open(self) -> None:
        """Connect. Raises Unavailable with the mend."""

    async def close(self) -> None:
        """Disconnect; domains go on."""

    def facts(self) -> HostFacts:
        """What open() found."""

    async def create(self, spec: DomainSpec) -> None:
        """Start a transient domain. Raises BootError of phase `domain` with QEMU's last words.

        A cancelled or failed create may still start the domain: destroy() by name waits for that as well.
        """

    async def destroy(self, name: str) -> None:
        """End it at once, also while it is being created; fine when there is none. Then its process is gone."""

    async def last_words(self, name: str) -> str:
        """The last lines that a domain's emulator wrote, escaped; empty when there are none."""

    async def list(self) -> list[DomainInfo]:
        """All domains of the connection, ours or not."""

    async def attach_disk(self, name: str, disk: Disk) -> None:
        """Hot-plug a LUN; fine when that serial is attached already."""

    async def detach_disk(self, name: str, serial: str) -> None:
        """Unplug it; fine when neither it nor the domain is there."""

    async def attach_share(self, name: str, socket_path: str) -> None:
        """Hot-plug the virtio-fs device of a virtiofsd that listens there; fine when there is one already."""

    async def replug_vsock(self, name: str, socket_path: str) -> None:
        """Replace a vhost-user-vsock device whose back end died without a successor."""

    def subscribe(self, callback: Callable[[DomainEvent], None]) -> None:
        """Call `callback` on the loop for every lifecycle event of our domains."""
