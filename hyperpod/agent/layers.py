"""Read-only image layers: each mounted once per sandbox, counted, unmounted when the host says so.

In a guest a layer is a SCSI LUN found by its serial (VPD page 0x80); for a host agent it is a file.
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hyperpod.agent import linux
from hyperpod.agent.layout import Layout
from hyperpod.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument

if TYPE_CHECKING:
    from hyperpod.agent.userns import PodUser

log = logging.getLogger(__name__)

LUN_TIMEOUT = 15.0
"""Seconds for an attached LUN to be seen by the guest; 16 ms is usual, an emulated and loaded one is slower."""

FSTYPES = ("squashfs", "erofs")
VPD_PAGE = 0x80
_SYS_BLOCK = "/sys/block"


@dataclass(frozen=True)
class LayerSource:
    """One layer as the host names it; `path` is a host agent's image file, else empty."""

    serial: str
    path: str
    fstype: str


@dataclass
class _Mounted:
    number: int
    users: int = 0


def serial_in(page: bytes) -> str:
    """The serial in a VPD page 0x80 (SPC-4 7.8.17); empty when malformed."""
    if len(page) < 4 or page[1] != VPD_PAGE:
        return ""
    length = int.from_bytes(page[2:4], "big")
    return page[4 : 4 + length].decode("ascii", "replace").strip()


def find_lun(serial: str) -> str:
    """The node of the SCSI disk with this serial, or empty. The kernel keeps the page as a file."""
    for name in os.listdir(_SYS_BLOCK):
        if not name.startswith("sd"):
            continue
        try:
            with open(f"{_SYS_BLOCK}/{name}/device/vpd_pg80", "rb") as file:
                page = file.read(260)
        except OSError:
            continue
        if serial_in(page) == serial and os.path.exists(f"/dev/{name}"):
            return f"/dev/{name}"
    return ""


async def wait_for_lun(serial: str, timeout: float) -> str:
    """Raises DeadlineExceeded."""
    loop = asyncio.get_running_loop()
    deadline, delay = loop.time() + timeout, 0.005
    while not (node := find_lun(serial)):
        if loop.time() >= deadline:
            raise DeadlineExceeded(f"no disk with serial {serial} appeared within {timeout:g} s")
        await asyncio.sleep(delay)
        delay = min(delay * 1.5, 0.1)
    return node


class Layers:
    """The mounted layers. Layer n is at <layout.layers>/<n>."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.user: PodUser | None = None
        """Whose ids the layers are shown with."""
        self._mounted: dict[str, _Mounted] = {}
        self._next = 0
        self._lock = asyncio.Lock()

    async def acquire(self, sources: list[LayerSource]) -> list[int]:
        """Mount what is not mounted; gives the numbers in the same order, each with one more user.

        Raises InvalidArgument, DeadlineExceeded (no such LUN), FailedPrecondition (it does not mount).
        """
        async with self._lock:
            for source in sources:
                if source.serial not in self._mounted:
                    await self._mount(source)
        for source in sources:
            self._mounted[source.serial].users += 1
        return [self._mounted[source.serial].number for source in sources]

    def release(self, serials: list[str]) -> None:
        """One user less for each; they stay mounted until they are forgotten."""
        for serial in serials:
            self._mounted[serial].users -= 1

    async def forget(self, serials: list[str]) -> None:
        """Unmount these; unknown ones are fine. Raises FailedPrecondition when one is in use."""
        async with self._lock:
            for serial in serials:
                mounted = self._mounted.get(serial)
                if mounted is None:
                    continue
                if mounted.users:
                    raise FailedPrecondition(f"layer {serial} is in use by {mounted.users} containers")
                self._unmount(serial, mounted)

    def close(self) -> None:
        """Unmount all, whether in use or not."""
        for serial, mounted in list(self._mounted.items()):
            self._unmount(serial, mounted)

    def _unmount(self, serial: str, mounted: _Mounted) -> None:
        target = f"{self._layout.layers}/{mounted.number}"
        try:
            linux.umount(target)
        except OSError as exc:
            # A mount namespace that is just being torn down may hold it for a moment longer.
            log.info("layer %s: %s, unmounting lazily", serial, exc)
            linux.umount(target, linux.MNT_DETACH)
        os.rmdir(target)
        del self._mounted[serial]

    async def _mount(self, source: LayerSource) -> None:
        if source.fstype not in FSTYPES:
            raise InvalidArgument(
                f"layer {source.serial}: file system {source.fstype[:20]!r} is not one of {FSTYPES}"
            )
        if bool(source.path) == self._layout.guest:
            raise InvalidArgument(f"layer {source.serial}: a path is for a host agent, a disk for a guest")
        number, self._next = self._next, self._next + 1
        target = f"{self._layout.layers}/{number}"
        keep = -1
        if source.path:
            try:
                node, keep = linux.loop_attach(source.path)
            except OSError as exc:
                raise FailedPrecondition(f"layer {source.serial}: {source.path}: {exc.strerror}") from exc
        else:
            node = await wait_for_lun(source.serial, LUN_TIMEOUT)
        try:
            os.mkdir(target, 0o755)
            try:
                linux.mount(node, target, source.fstype, linux.MS_RDONLY | linux.MS_NODEV)
            except OSError as exc:
                os.rmdir(target)
                raise FailedPrecondition(
                    f"layer {source.serial} does not mount as {source.fstype}: {exc.strerror}"
                ) from exc
        finally:
            if keep >= 0:
                os.close(keep)
        if self.user is not None:
            try:
                _map_ids(target, self.user.fd)
            except OSError as exc:
                linux.umount(target, linux.MNT_DETACH)
                os.rmdir(target)
                raise FailedPrecondition(
                    f"layer {source.serial}: its ids cannot be mapped for the pod's user namespace: {exc.strerror}"
                ) from exc
        self._mounted[source.serial] = _Mounted(number)


def _map_ids(target: str, userns: int) -> None:
    """Replace a mount by an idmapped one: only a copy that is attached nowhere can become one. Raises OSError."""
    from hyperpod import mountapi  # only pods with a user namespace need it

    place = os.open(target, os.O_PATH | os.O_CLOEXEC)
    try:
        tree = mountapi.clone_tree(place)
    finally:
        os.close(place)
    try:
        mountapi.map_ids(tree, userns)
        linux.umount(target, linux.MNT_DETACH)
        above, _, name = target.rpartition("/")
        folder = os.open(above, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            mountapi.attach(tree, folder, name.encode())
        finally:
            os.close(folder)
    finally:
        os.close(tree)
