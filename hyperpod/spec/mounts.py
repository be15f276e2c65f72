"""What becomes of the mounts of a container's request: a pure plan.

Each folder or file of the host comes through the sandbox's one virtio-fs share, at the place of share.py,
and is bound from there to its destination by crun in the guest; imagevolumes.py has those that are images. Order
and overriding are containerd's: parents before children, and a default mount gives way to one that is asked for
at the same place.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hyperpod.errors import InvalidArgument
from hyperpod.model.mounts import Mount, Propagation
from hyperpod.spec import imagevolumes
from hyperpod.spec.share import GUEST_SHARE, place

MAX_MOUNTS = 1024

TAG = "hyperpod"
"""Of the virtio-fs device."""

VIA_SHARE, VIA_BIND = "virtio-fs bind", "bind"
"""How a mount gets there, in the verbose status; others may be added beside it."""

_LATER = {
    Propagation.PRIVATE: "private",
    Propagation.HOST_TO_CONTAINER: "later host mounts appear",
    Propagation.BIDIRECTIONAL: "later mounts appear on both sides",
}


@dataclass(frozen=True)
class HostBind:
    """One folder or file of the host to be put at `place` in the share.

    `readonly` covers its top mount, `recursive` also what is mounted below it; `follow`: mounts that the host makes
    below the source later appear as well. `mapped`: shown with the ids of the pod's user namespace. `destination`
    is for error messages.
    """

    source: str
    destination: str
    place: str
    readonly: bool
    recursive: bool
    follow: bool
    mapped: bool = False
    both_ways: bool = False
    """And those made below it in the container appear on the host: never in a VM."""


def clean(path: str) -> str:
    """As Go's filepath.Clean: POSIX would keep two leading slashes."""
    return posixpath.normpath("/" + path.lstrip("/"))


def check(mounts: Sequence[Mount]) -> None:
    """Raises InvalidArgument that names the mount that cannot be."""
    if len(mounts) > MAX_MOUNTS:
        raise InvalidArgument(f"config.mounts has {len(mounts)} items, at most {MAX_MOUNTS} are taken")
    taken: dict[str, int] = {}
    for number, mount in enumerate(mounts):
        where = f"config.mounts[{number}]"
        imagevolumes.check(where, mount)
        paths = [("container_path", mount.container_path)]
        if mount.image is None:
            paths.append(("host_path", mount.host_path))
        for name, path in paths:
            if not path:
                raise InvalidArgument(f"{where}.{name} is missing")
            if not path.startswith("/"):
                raise InvalidArgument(f"{where}.{name} {path[:200]!r} is not absolute")
        destination = clean(mount.container_path)
        if destination == "/":
            raise InvalidArgument(f"{where}.container_path is the container's root, which its image is")
        if (other := taken.setdefault(destination, number)) != number:
            raise InvalidArgument(
                f"{where}.container_path {destination[:200]!r} is that of mounts[{other}] too"
            )
        if mount.recursive_read_only and not mount.readonly:
            raise InvalidArgument(f"{where}: recursive_read_only needs readonly")
        if mount.recursive_read_only and mount.propagation is not Propagation.PRIVATE:
            raise InvalidArgument(f"{where}: recursive_read_only needs propagation PRIVATE")


def host_binds(mounts: Sequence[Mount], container_id: str) -> list[HostBind]:
    """What the host has to put into the share."""
    return [
        HostBind(
            source=mount.host_path,
            destination=mount.container_path,
            place=place(container_id, number),
            readonly=mount.readonly,
            recursive=mount.recursive_read_only,
            follow=mount.propagation is Propagation.HOST_TO_CONTAINER,
            mapped=mount.ids is not None,
            both_ways=mount.propagation is Propagation.BIDIRECTIONAL,
        )
        for number, mount in enumerate(mounts)
        if mount.image is None
    ]


_OPTIONS = {
    Propagation.PRIVATE: "rprivate",
    Propagation.HOST_TO_CONTAINER: "rslave",
    Propagation.BIDIRECTIONAL: "rshared",
}


def oci_mounts(mounts: Sequence[Mount], container_id: str, share: str = GUEST_SHARE) -> list[dict[str, Any]]:
    """OCI mounts for crun, those with fewer parts in their destination first. `share`: where its agent has them."""
    built = []
    for number, mount in enumerate(mounts):
        if mount.image is not None:
            built.append(imagevolumes.oci_mount(clean(mount.container_path)))
            continue
        options = ["rbind", _OPTIONS[mount.propagation], "ro" if mount.readonly else "rw"]
        built.append(
            {
                "destination": clean(mount.container_path),
                "type": "bind",
                "source": f"{share}/{place(container_id, number)}",
                "options": options,
            }
        )
    return ordered(built)


def ordered(mounts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parents before children."""
    return sorted(mounts, key=lambda mount: str(mount["destination"]).count("/"))


def root_propagation(mounts: Sequence[Mount]) -> str:
    """Of the container's root on a host: what any of its mounts needs; empty: none needs any."""
    found = {mount.propagation for mount in mounts}
    if Propagation.BIDIRECTIONAL in found:
        return "rshared"
    return "rslave" if Propagation.HOST_TO_CONTAINER in found else ""


def covering(mounts: Sequence[Mount], paths: Sequence[str]) -> tuple[int, str] | None:
    """Number of a BIDIRECTIONAL mount, and one of `paths` at or below its destination, if there are such."""
    for number, mount in enumerate(mounts):
        if mount.propagation is Propagation.BIDIRECTIONAL:
            place = clean(mount.container_path)
            for path in paths:
                if clean(path) == place or clean(path).startswith(f"{place}/"):
                    return number, path
    return None


def merged(defaults: Sequence[dict[str, Any]], wanted: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Defaults without those that a wanted mount replaces, then the wanted ones.

    A wanted /dev replaces all below it as well: it would hide them."""
    taken = {clean(str(mount["destination"])) for mount in wanted}
    kept = []
    for mount in defaults:
        destination = clean(str(mount["destination"]))
        if destination in taken or ("/dev" in taken and destination.startswith("/dev/")):
            continue
        kept.append(mount)
    return [*kept, *wanted]


def explained(mounts: Sequence[Mount], images: Mapping[int, str], *, via: str = VIA_SHARE) -> dict[str, str]:
    """Destination to how it gets there, for the verbose status: one rule per mount.

    `images`: id of the image of mount number n."""
    return {
        clean(m.container_path): _how(m, via)
        if m.image is None
        else imagevolumes.explained(m, images[number])
        for number, m in enumerate(mounts)
    }


def _how(mount: Mount, via: str) -> str:
    access = "read-write"
    if mount.readonly:
        access = "read-only, enforced by the host" + (", recursively" if mount.recursive_read_only else "")
    later = _LATER[mount.propagation]
    return f"{via} of {mount.host_path}: {access}, {later}"
