"""Where a sandbox's processes belong in the host's cgroup trees: names only, nothing is read or written.

A pod names its cgroup in one of two ways, and the way shows which one it is, whatever the driver: the path of
the cgroupfs driver (`/kubepods/burstable/pod1`), or the systemd driver's slice (`kubepods-burstable-pod1.slice`,
which systemd keeps at /kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from hyperpod.errors import InvalidArgument

TOP = "/hyperpod"
"""For sandboxes without a cgroup_parent."""

SLICE = ".slice"
_MAX_NAME = 255
_KERNELS = ("tasks", "notify_on_release", "release_agent")
"""Files of every v1 cgroup; so is what starts with "cgroup."."""

_SLICE_NAME = re.compile(r"[A-Za-z0-9:_.\\@]+(-[A-Za-z0-9:_.\\@]+)*")
_MOUNT_ESCAPE = re.compile(r"\\([0-7]{3})")
_SHORT = re.compile(r"[0-9a-f]{12}")


@dataclass(frozen=True)
class Hierarchy:
    """One mounted cgroup tree. `unified`: cgroup2. `controllers`: of a v1 tree, with its mount options."""

    mount: str
    unified: bool
    controllers: frozenset[str] = frozenset()


def parent_folder(parent: str) -> str:
    """A CRI cgroup_parent as a path below a hierarchy's mount point; "" is the hierarchy's root.

    Raises InvalidArgument for what cannot name a cgroup or leads out of the tree.
    """
    if not parent:
        return TOP
    names = [name for name in parent.split("/") if name]
    for name in names:
        if name in (".", ".."):
            raise InvalidArgument(f"cgroup_parent {parent!r} has a component {name!r}")
        if name in _KERNELS or name.startswith("cgroup."):
            raise InvalidArgument(
                f"cgroup_parent {parent!r} has a component {name!r}, a file of the kernel's"
            )
        if len(name.encode()) > _MAX_NAME:
            raise InvalidArgument(
                f"cgroup_parent {parent[:64]!r}... has a component of over {_MAX_NAME} bytes"
            )
        if not name.isprintable():
            raise InvalidArgument(f"cgroup_parent {parent!r} has a component with control characters")
    if len(names) == 1 and names[0].endswith(SLICE):
        names = expand_slice(names[0])
    return "".join(f"/{name}" for name in names)


def expand_slice(name: str) -> list[str]:
    """`a-b.slice` lies in `a.slice`; "-.slice" is the root. Raises InvalidArgument for no slice's name."""
    stem = name.removesuffix(SLICE)
    if stem == "-":
        return []
    if not _SLICE_NAME.fullmatch(stem):
        raise InvalidArgument(f"cgroup_parent {name!r} is not the name of a systemd slice")
    parts = stem.split("-")
    return ["-".join(parts[: count + 1]) + SLICE for count in range(len(parts))]


def sandbox_folder(parent: str, sandbox_id: str) -> str:
    """The sandbox's own cgroup, below its pod's. Raises InvalidArgument as parent_folder does."""
    short = sandbox_id[:12]
    return f"{parent_folder(parent)}/hyperpod-{short}" if parent else f"{TOP}/{short}"


def owner(path: str) -> str | None:
    """The first 12 digits of the sandbox whose cgroup `path` is, as sandbox_folder names it.

    None for every other cgroup: who kills or removes asks here first, for the root holds the whole host.
    """
    above, _, name = path.rpartition("/")
    short = name.removeprefix("hyperpod-") if name.startswith("hyperpod-") else name if above == TOP else ""
    return short if _SHORT.fullmatch(short) else None


def hierarchies(mountinfo: str) -> tuple[Hierarchy, ...]:
    """Every writable cgroup hierarchy of /proc/self/mountinfo (proc(5)), each once."""
    found: dict[str, Hierarchy] = {}
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, rest = before.split(" "), after.split(" ")
        if len(fields) < 6 or len(rest) < 3 or rest[0] not in ("cgroup", "cgroup2"):
            continue
        options = frozenset(rest[2].split(","))
        if "ro" in options or "ro" in fields[5].split(","):
            continue
        mount = _MOUNT_ESCAPE.sub(lambda match: chr(int(match[1], 8)), fields[4])
        unified = rest[0] == "cgroup2"
        found.setdefault(fields[2], Hierarchy(mount, unified, frozenset() if unified else options - {"rw"}))
    return tuple(found.values())
