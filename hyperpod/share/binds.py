"""Folders and files of the host as mounts in another mount namespace: a virtiofsd's, or a host pod's agent's.

A source is opened once, following symbolic links as containerd does; type, flags and the mount itself are those of
that open file, so nothing can be swapped in between. Flags are set while the copy is still detached: a guest never
sees a read-only mount writable. All functions block and raise hyperpod errors; `bind` enters another mount
namespace, so it needs a thread that ends with it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from hyperpod import mountapi, userns
from hyperpod.errors import (
    FailedPrecondition,
    HyperpodError,
    NotFound,
    ResourceExhausted,
    Unavailable,
    Unsupported,
)
from hyperpod.model.security import UserNamespace
from hyperpod.share import common
from hyperpod.spec.mountinfo import MountPoint, parse
from hyperpod.spec.mounts import HostBind
from hyperpod.spec.share import COMMON, folder, link
from hyperpod.spec.userns import map_line

MAX_SUBMOUNTS = 256
"""Of one source, that keep flags of their own under a read-only parent in the guest; the host's hold anyway."""

_KINDS = (
    (
        stat.S_ISSOCK,
        "a socket: who connects must be on the same kernel as who listens, and a pod in a VM is not",
    ),
    (stat.S_ISFIFO, "a FIFO: its two ends must be on the same kernel, and a pod in a VM is not"),
    (stat.S_ISBLK, "a block device of the host, which a VM does not have"),
    (stat.S_ISCHR, "a character device of the host, which a VM does not have"),
)


@dataclass(frozen=True)
class Target:
    """`namespace`: of the mounts, a path in /proc. `share`: the folder with the mount points, as the host sees it;
    `inside`: as the namespace does. `guest`: what reads them has another kernel. `ids`: of those to be mapped."""

    namespace: str
    share: Path
    inside: str = ""
    guest: bool = True
    ids: UserNamespace | None = None


@dataclass
class _Source:
    """An opened source: `tree` is the detached copy of it, `common` its name among those that containers share,
    `walk` what the agent is to walk into."""

    bind: HostBind
    tree: int
    folder: bool
    walk: list[str]
    common: str = ""

    @property
    def place(self) -> str:
        return f"{COMMON}/{self.common}" if self.common else self.bind.place


def bind(target: Target, binds: Sequence[HostBind], cancelled: Event) -> list[str]:
    """Put `binds` into the share; gives the paths in it that the guest's agent has to walk into: folders that other
    containers have too, and mounts below read-only ones that stay writable.

    When it raises, `release` takes away what was made. Raises NotFound for a missing source, Unsupported for one
    that cannot cross, FailedPrecondition, Unavailable when the namespace is gone.
    """
    sources: list[_Source] = []
    try:
        table = parse(Path("/proc/thread-self/mountinfo").read_bytes())
        for one in binds:
            sources.append(_open(one, table, guest=target.guest))
        _map_ids([source for source in sources if source.bind.mapped], target.ids)
        if cancelled.is_set():
            return []
        with common.locked(target.share):
            there = _mounted(target.namespace) if any(source.common for source in sources) else set()
            for source in sources:
                _make_place(target.share, source)
            _enter(target.namespace)
            for source in sources:
                path = f"{target.inside}/{source.place}"
                if path not in there:
                    there.add(path)
                    above, _, name = path.rpartition("/")
                    _attach(source.tree, above, name)
    finally:
        for source in sources:
            os.close(source.tree)
    return [path for source in sources for path in source.walk]


def release(share: Path, container_id: str) -> None:
    """Unmount a container's mounts and forget them; nothing there is fine. The name of its folder does for its id.

    The rmdir of a mount point unmounts it in other namespaces (rmdir(2) since Linux 3.18); one that is busy in ours
    is none that we made."""
    place = share / folder(container_id)
    with contextlib.suppress(FileNotFoundError), common.locked(share) as whole:
        try:
            fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                common.empty(fd)
            finally:
                os.close(fd)
            place.rmdir()
        finally:
            common.sweep(whole)


def _open(one: HostBind, table: dict[int, MountPoint], *, guest: bool) -> _Source:
    source, folder = -1, False
    try:
        source = os.open(one.source, os.O_PATH | os.O_CLOEXEC)
        status = os.fstat(source)
        mode = status.st_mode
        for is_kind, why in _KINDS if guest else ():
            if is_kind(mode):
                raise Unsupported(f"mount source {one.source!r} for {one.destination!r} is {why}")
        folder = stat.S_ISDIR(mode)
        mount_id = _mount_id(source)
        mount = table.get(mount_id)
        if one.follow and (mount is None or not mount.receives):
            where = f"mount {mount.path!r}" if mount else "its mount"
            raise FailedPrecondition(
                f"mount source {one.source!r} for {one.destination!r}: propagation HOST_TO_CONTAINER needs a "
                f"shared or slave mount, and {where} is private; `mount --make-rshared` it"
            )
        if one.both_ways and (mount is None or not mount.shared):
            where = f"mount {mount.path!r}" if mount else "its mount"
            raise FailedPrecondition(
                f"mount source {one.source!r} for {one.destination!r}: propagation BIDIRECTIONAL needs a shared "
                f"mount, and {where} is not; `mount --make-rshared` it"
            )
        below = _below(source, table) if folder else []
        # A copy of mounts below it is as old as itself: unless they follow the host's, a later one has to be made.
        alike = guest and (one.follow or not below)
        shared = common.name(mount_id, status, _flags(one, mount)) if alike else ""
        walk = [one.place] if shared and folder else []
        if one.readonly and not one.recursive:
            walk += [f"{one.place}/{path}" for path, mount in below if not mount.readonly][:MAX_SUBMOUNTS]
        return _Source(one, _detached(source, one, guest=guest), folder, walk, shared)
    except FileNotFoundError as exc:
        raise NotFound(
            f"mount source {one.source!r} for {one.destination!r} does not exist; make it and try again"
        ) from exc
    except OSError as exc:
        kind = (
            ResourceExhausted
            if exc.errno in (errno.EMFILE, errno.ENFILE, errno.ENOSPC)
            else FailedPrecondition
        )
        raise kind(f"mount source {one.source!r} for {one.destination!r}: {exc.strerror}") from exc
    finally:
        if source >= 0:
            os.close(source)


def _detached(source: int, one: HostBind, *, guest: bool) -> int:
    tree = mountapi.clone_tree(source)
    try:
        # On the host's own kernel a volume keeps the flags of its mount, as with every runtime.
        attributes = mountapi.MOUNT_ATTR_NOSUID | mountapi.MOUNT_ATTR_NODEV if guest else 0
        if not one.both_ways:  # it stays a peer of its source
            propagation = mountapi.MS_SLAVE if one.follow else mountapi.MS_PRIVATE
            mountapi.set_attributes(tree, b"", attributes=attributes, propagation=propagation, recursive=True)
        if one.readonly:
            mountapi.set_attributes(tree, b"", attributes=mountapi.MOUNT_ATTR_RDONLY, recursive=one.recursive)
    except OSError:
        os.close(tree)
        raise
    return tree


def _map_ids(sources: Sequence[_Source], ids: UserNamespace | None) -> None:
    """A guest needs the same mapping as a host pod: what its user namespace calls 0 is the same number there."""
    if not sources or ids is None:
        return
    try:
        with userns.descriptor(map_line(ids.uids), map_line(ids.gids)) as namespace:
            for source in sources:
                _map_one(source, namespace)
    except OSError as exc:
        raise FailedPrecondition(f"mounts of a pod with a user namespace: {exc}") from exc


def _map_one(source: _Source, namespace: int) -> None:
    try:
        mountapi.map_ids(source.tree, namespace)
    except OSError as exc:
        why = exc.strerror
        if exc.errno == errno.EINVAL:
            why = "its file system, or this kernel's version of it, cannot map ids"
        raise FailedPrecondition(
            f"mount source {source.bind.source!r} for {source.bind.destination!r}: the pod has a user namespace "
            f"(hostUsers: false), and {why}"
        ) from exc


def _mount_id(fd: int) -> int:
    for line in Path(f"/proc/thread-self/fdinfo/{fd}").read_text().splitlines():
        if line.startswith("mnt_id:"):
            return int(line.split()[1])
    return -1


def _below(source: int, table: dict[int, MountPoint]) -> list[tuple[str, MountPoint]]:
    """Mounts below the folder, by their paths in it; parents first."""
    above = str(Path(f"/proc/thread-self/fd/{source}").readlink()).rstrip("/") + "/"
    found = [(m.path.removeprefix(above), m) for m in table.values() if m.path.startswith(above)]
    return sorted(found, key=lambda item: item[0])


def _flags(one: HostBind, mount: MountPoint | None) -> str:
    """Those that make another mount of the same source; also what the host has made of it meanwhile."""
    host = mount is not None and mount.readonly
    flags = {"r": one.readonly, "R": one.recursive, "f": one.follow, "m": one.mapped, "h": host}
    return "".join(letter for letter, wanted in flags.items() if wanted)


def _mounted(namespace: str) -> set[str]:
    """Where something is mounted in it."""
    try:
        lines = Path(namespace.replace("ns/mnt", "mountinfo")).read_bytes()
    except OSError as exc:
        raise _unreachable(exc) from exc
    return {mount.path for mount in parse(lines).values()}


def _make_place(share: Path, source: _Source) -> None:
    """The mount point; or the link to the one that containers share, which may be there."""
    place = share / source.bind.place
    try:
        if source.common:
            with contextlib.suppress(FileExistsError):
                _mount_point(share / source.place, folder=source.folder)
            place.parent.mkdir(mode=0o711, exist_ok=True)
            place.symlink_to(link(source.common))
        else:
            _mount_point(place, folder=source.folder)
    except OSError as exc:
        kind = ResourceExhausted if exc.errno == errno.ENOSPC else HyperpodError
        raise kind(f"mount point {place}: {exc.strerror}") from exc


def _mount_point(path: Path, *, folder: bool) -> None:
    path.parent.mkdir(mode=0o711, exist_ok=True)
    if folder:
        path.mkdir(mode=0o700)
    else:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


def _unreachable(exc: OSError) -> HyperpodError:
    return Unavailable(f"the pod's mounts cannot be reached: {exc.strerror}")


def _enter(namespace: str) -> None:
    try:
        fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
        try:
            mountapi.enter_mount_namespace(fd)
        finally:
            os.close(fd)
    except OSError as exc:
        raise _unreachable(exc) from exc


def _attach(tree: int, folder: str, name: str) -> None:
    try:
        fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            mountapi.attach(tree, fd, name.encode())
        finally:
            os.close(fd)
    except OSError as exc:
        raise HyperpodError(f"mounting {folder}/{name} in the share: {exc.strerror}") from exc
