"""What of a container's security only its place can tell: users of the image, device nodes of the guest."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hyperpod.agent import linux
from hyperpod.errors import FailedPrecondition, InvalidArgument

if TYPE_CHECKING:
    from hyperpod.spec.users import Identity

FILE_LIMIT = 1 << 20
"""Bytes of an image's passwd or group file; 10,000 users have 0.7 MB."""

QUICK = 16 << 10
"""Bytes of one that are read and parsed within a millisecond, for which a thread would cost more than they do."""

_NO_DEVICES = frozenset({"pts", "shm", "fd", "mqueue", "console", "ptmx"})
"""Below /dev: made by the runtime for each container, or no devices."""


@dataclass(frozen=True)
class Security:
    """The Security message of agent.proto. `devices`: path, path in the container, permissions."""

    user: str = ""
    strict_groups: bool = False
    pid_target: str = ""
    devices: tuple[tuple[str, str, str], ...] = ()
    all_devices: bool = False


async def apply(spec: dict[str, Any], wanted: Security, *, bind_devices: bool = False) -> tuple[str, ...]:
    """Put it into the OCI spec, whose root is mounted. Gives what the environment lacks. `bind_devices`: nodes of
    the machine's own are bound, as nobody may make any in a user namespace.

    Raises InvalidArgument, FailedPrecondition."""
    user = spec["process"]["user"]
    root, supplemental = spec["root"]["path"], user["additionalGids"]
    try:
        found = _identity(root, wanted, supplemental, QUICK)
    except _LargeError:
        # Off the event loop: a hostile image's files take a while, and another container's exit must not wait.
        found = await asyncio.to_thread(_identity, root, wanted, supplemental, FILE_LIMIT)
    user.update(uid=found.uid, gid=found.gid, additionalGids=list(found.groups))
    devices = spec["linux"].setdefault("devices", [])
    rules = spec["linux"]["resources"]["devices"]
    if wanted.all_devices:
        devices += _every_device()
        rules.append({"allow": True, "access": "rwm"})
    for path, inside, permissions in wanted.devices:
        device = _device(path, inside)
        devices.append(device)
        rules.append(
            {
                "allow": True,
                "type": device["type"],
                "major": device["major"],
                "minor": device["minor"],
                "access": permissions,
            }
        )
    if bind_devices:
        sources = {inside or path: path for path, inside, _ in wanted.devices}
        spec["mounts"] += [_bound(device["path"], sources) for device in devices]
        devices.clear()
    # Without HOME crun looks for it in the container's /etc/passwd, which is anything by then: a FIFO has no end.
    return (f"HOSTNAME={os.uname().nodename}", f"HOME={found.home}")


def complete(process: dict[str, Any], lacking: tuple[str, ...]) -> None:
    """Put variables into the OCI process object that are not set there."""
    given = {item.partition("=")[0] for item in process["env"]}
    process["env"] += [item for item in lacking if item.partition("=")[0] not in given]


class _LargeError(Exception):
    """A file is larger than asked for."""


def _identity(root: str, wanted: Security, supplemental: list[int], most: int) -> Identity:
    """Raises _LargeError for files of more than `most` bytes, InvalidArgument, OSError."""
    from hyperpod.spec.users import resolve  # not needed before the first container

    folder = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return resolve(
            wanted.user,
            supplemental,
            strict=wanted.strict_groups,
            passwd=lambda: read_in_root(folder, "etc/passwd", most),
            group=lambda: read_in_root(folder, "etc/group", most),
        )
    finally:
        os.close(folder)


def read_in_root(root: int, path: str, most: int = FILE_LIMIT) -> bytes:
    """A file of an image, which may be anything; empty when there is none. Raises InvalidArgument, and _LargeError
    for one of more than `most` bytes."""
    try:
        # By path only: opening a device or a FIFO for reading would do something to it.
        fd = linux.open_in_root(root, path, os.O_PATH)
    except (FileNotFoundError, NotADirectoryError):
        return b""
    except OSError as exc:
        raise InvalidArgument(f"the image's /{path}: {exc.strerror}") from exc
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidArgument(f"the image's /{path} is not a file")
        if status.st_size > FILE_LIMIT:
            raise InvalidArgument(f"the image's /{path} is larger than {FILE_LIMIT} bytes")
        if status.st_size > most:
            raise _LargeError
        with open(f"/proc/self/fd/{fd}", "rb", buffering=0) as file:
            return file.read(status.st_size)
    finally:
        os.close(fd)


def _device(path: str, inside: str) -> dict[str, Any]:
    """The OCI device object of a node of this machine. Raises FailedPrecondition."""
    try:
        status = os.stat(path)
    except OSError as exc:
        raise FailedPrecondition(f"device {path[:100]!r} is not there: {exc.strerror}") from exc
    if not (stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        raise FailedPrecondition(f"{path[:100]!r} is no device")
    return _described(inside or path, status)


def _described(path: str, status: os.stat_result) -> dict[str, Any]:
    return {
        "path": path,
        "type": "b" if stat.S_ISBLK(status.st_mode) else "c",
        "major": os.major(status.st_rdev),
        "minor": os.minor(status.st_rdev),
        "fileMode": stat.S_IMODE(status.st_mode),
        "uid": status.st_uid,
        "gid": status.st_gid,
    }


def _bound(inside: str, sources: Mapping[str, str]) -> dict[str, Any]:
    """The mount of a node; where it is not in `sources` it has the same path out here."""
    return {
        "destination": inside,
        "type": "bind",
        "source": sources.get(inside, inside),
        "options": ["bind", "rprivate", "nosuid", "noexec"],
    }


def _every_device() -> list[dict[str, Any]]:
    """Every node below /dev that a container is to have when it gets them all. They come and go meanwhile."""
    found: list[dict[str, Any]] = []
    folders = ["/dev"]
    while folders:
        with contextlib.suppress(FileNotFoundError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.path.removeprefix("/dev/") in _NO_DEVICES or entry.is_symlink():
                    continue
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_dir():
                        folders.append(entry.path)
                    elif stat.S_IFMT(entry.stat().st_mode) in (stat.S_IFCHR, stat.S_IFBLK):
                        found.append(_described(entry.path, entry.stat()))
    return found
