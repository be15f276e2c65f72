"""Layers of one sandbox. In a VM each image layer is one read-only LUN, attached once, counted per container.

Which LUN number a layer got is written to `disks.json` in the sandbox's record folder before the attach, so a
restarted daemon knows what hangs on the VM.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pydantic import TypeAdapter

from hyperpod.errors import ResourceExhausted
from hyperpod.hypervisor.base import Disk, Hypervisor
from hyperpod.store.records import write_atomic

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
        """Stop counting `owner`; detach what nobody uses any more (not when the place is gone anyway)."""
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
        """After a restart: what the file says is taken as attached; users come back by `adopt`."""
        if self._file.exists():
            self._units = _State.validate_json(self._file.read_bytes())

    async def attach(self, layers: Sequence[LayerImage], owner: str) -> None:
        async with self._lock:
            fresh: list[Disk] = []
            for layer in layers:
                serial = serial_of(layer.name)
                if serial in self._units:
                    continue
                unit = next((u for u in range(MAX_LUNS) if u not in self._units.values()), None)
                if unit is None:
                    raise ResourceExhausted(
                        f"a pod can have {MAX_LUNS} image layers; remove containers first"
                    )
                self._units[serial] = unit
                fresh.append(Disk(serial=serial, path=layer.path, readonly=True, target=0, unit=unit))
            if fresh:
                await self._save()
                results = await asyncio.gather(
                    *(self._hypervisor.attach_disk(self._domain, disk) for disk in fresh),
                    return_exceptions=True,
                )
                failed = [r for r in results if isinstance(r, BaseException)]
                if failed:
                    for disk in fresh:
                        await self._hypervisor.detach_disk(self._domain, disk.serial)
                        self._units.pop(disk.serial, None)
                    await self._save()
                    raise failed[0]
            self.adopt(tuple(layer.name for layer in layers), owner)

    async def release(self, owner: str, *, detach: bool) -> None:
        async with self._lock:
            gone = self.unused_after(owner)
            for serial in gone if detach else ():
                await self._hypervisor.detach_disk(self._domain, serial)
            self._drop(owner)
            for serial in gone:
                self._units.pop(serial, None)
            if gone and detach:
                await self._save()

    async def _save(self) -> None:
        await asyncio.to_thread(write_atomic, self._file, json.dumps(self._units).encode())
