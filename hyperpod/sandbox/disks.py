"""Layers of one sandbox. In a VM each image layer is one read-only LUN, attached once, counted per container.

Which LUN number a layer got is written to `disks.json` in the sandbox's record folder before the attach, so a
restarted daemon knows what hangs on the VM.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pydantic import TypeAdapter, ValidationError

from hyperpod.errors import HyperpodError, ResourceExhausted
from hyperpod.hypervisor.base import Disk, Hypervisor
from hyperpod.store.records import write_atomic
from hyperpod.tasks import settle_all

log = logging.getLogger(__name__)

MAX_LUNS = 250
"""Target 0, units 0 to 249; above 255 SCSI changes the LUN's format (SAM-5 4.7)."""

_State = TypeAdapter(dict[str, int])


class LayerImage(Protocol):
    """A layer as a file of the host: its digest and where it lies."""

    @property
    def name(self) -> str: ...

    @property
    def path(self) -> str: ...


def serial_of(layer: str) -> str:
    """The LUN's serial (VPD page 0x80): the first 32 digits of the layer's digest."""
    return layer.removeprefix("sha256:")[:32]


class Layers:
    """Who uses which layer of one sandbox. On a host that is all: its agent opens the files itself."""

    def __init__(self) -> None:
        self._users: dict[str, set[str]] = {}

    def load(self) -> None:
        """After a restart; users come back by `adopt`."""

    def adopt(self, layers: tuple[str, ...], owner: str) -> None:
        """Count a container that used these layers before the restart."""
        for layer in layers:
            self._users.setdefault(serial_of(layer), set()).add(owner)

    async def attach(self, layers: Sequence[LayerImage], owner: str) -> None:
        """Make every layer visible to the agent. When it raises, nothing is counted."""
        self.adopt(tuple(layer.name for layer in layers), owner)

    def unused_after(self, owner: str) -> list[str]:
        """Serials that only `owner` still uses."""
        return [serial for serial, users in self._users.items() if users == {owner}]

    def _drop(self, owner: str) -> list[str]:
        """Stop counting `owner`; gives the serials that nobody uses any more."""
        gone = self.unused_after(owner)
        for users in self._users.values():
            users.discard(owner)
        for serial in gone:
            del self._users[serial]
        return gone

    async def release(self, owner: str, *, detach: bool) -> None:
        """Stop counting `owner`; detach what nobody uses any more, unless the place is gone or uses it still."""
        self._drop(owner)


class LayerDisks(Layers):
    """Attaches to a VM and detaches; all methods are safe to call again after a failure."""

    def __init__(self, hypervisor: Hypervisor, domain: str, folder: Path) -> None:
        super().__init__()
        self._hypervisor, self._domain = hypervisor, domain
        self._file = folder / "disks.json"
        self._units: dict[str, int] = {}
        self._lock = asyncio.Lock()

    def load(self) -> None:
        """After a restart: the numbers are those of before; users come back by `adopt`. Raises HyperpodError."""
        if self._file.exists():
            try:
                self._units = _State.validate_json(self._file.read_bytes())
            except ValidationError as exc:
                raise HyperpodError(f"{self._file} is damaged: what hangs on the VM is not known") from exc

    async def attach(self, layers: Sequence[LayerImage], owner: str) -> None:
        async with self._lock:
            fresh: list[Disk] = []
            try:
                for layer in layers:
                    serial = serial_of(layer.name)
                    # What nobody uses may hang on the VM already or not: to attach it again does no harm.
                    known = serial in self._users and serial in self._units
                    if known or any(disk.serial == serial for disk in fresh):
                        continue
                    unit = self._units[serial] = self._unit(serial)
                    fresh.append(Disk(serial=serial, path=layer.path, readonly=True, target=0, unit=unit))
                if fresh:
                    await self._save()
                    await settle_all(*(self._hypervisor.attach_disk(self._domain, disk) for disk in fresh))
            except (HyperpodError, OSError):
                await self._detach([disk.serial for disk in fresh])
                raise
            self.adopt(tuple(layer.name for layer in layers), owner)

    def _unit(self, serial: str) -> int:
        """Its number, or a free one. Raises ResourceExhausted."""
        if (unit := self._units.get(serial)) is not None:
            return unit
        taken = set(self._units.values())
        if (unit := next((u for u in range(MAX_LUNS) if u not in taken), None)) is None:
            raise ResourceExhausted(f"a pod can have {MAX_LUNS} image layers; remove containers first")
        return unit

    async def release(self, owner: str, *, detach: bool) -> None:
        async with self._lock:
            unused = self._drop(owner)
            if detach:
                await self._detach(unused)

    async def _detach(self, serials: Sequence[str]) -> None:
        """What does not come off keeps its number, and is used again from there; it goes with the VM at last."""
        for serial in serials:
            try:
                await self._hypervisor.detach_disk(self._domain, serial)
                self._units.pop(serial, None)
            except HyperpodError as exc:
                log.warning("layer %s stays on %s: %s", serial, self._domain, exc)
        if serials:
            try:
                await self._save()
            except (HyperpodError, OSError) as exc:  # the file names more than there is, which does no harm
                log.warning("%s", exc)

    async def _save(self) -> None:
        await asyncio.to_thread(write_atomic, self._file, json.dumps(self._units).encode())
