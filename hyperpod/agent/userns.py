"""The pod's user namespace, and the namespaces that have to belong to it.

What a container's root may do in a network, IPC, UTS or pid namespace (mount its sysfs or procfs, open low ports)
it may only where that belongs to its user namespace. The agent, which stays the host's or the guest's root, enters
the first three, so that containers inherit them; the container itself enters the user namespace.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hyperpod.agent import linux
from hyperpod.agent.pidholder import PidNamespace
from hyperpod.errors import InvalidArgument

NS_GET_USERNS = 0xB701
"""ioctl_ns(2)."""

_HARD_LIMITS = (("NOFILE", 524288), ("NPROC", resource.RLIM_INFINITY), ("CORE", resource.RLIM_INFINITY))


@dataclass(frozen=True)
class IdMap:
    """The ids from 0 to `length` - 1 are those from `first` on out here."""

    first: int
    length: int

    @staticmethod
    def parse(text: str) -> IdMap:
        """A line of uid_map. Raises ValueError."""
        _, first, length = map(int, text.split())
        return IdMap(first, length)

    def of(self, ident: int) -> int:
        """Raises InvalidArgument."""
        if not 0 <= ident < self.length:
            raise InvalidArgument(
                f"id {ident} is not in the pod's user namespace, which has {self.length} ids"
            )
        return self.first + ident


class PodUser:
    """The user namespace, by a descriptor that keeps it. `pids`: the pod's pid namespace, None where somebody else
    knows it."""

    def __init__(self, fd: int, uids: IdMap, gids: IdMap) -> None:
        self.fd, self.uids, self.gids = fd, uids, gids
        self.pids: PidNamespace | None = None

    def owner(self, user: dict[str, Any]) -> tuple[int, int]:
        """Uid and gid out here of an OCI user object. Raises InvalidArgument when an id of it is not mapped."""
        for group in user.get("additionalGids", ()):
            self.gids.of(group)
        return self.uids.of(user["uid"]), self.gids.of(user["gid"])

    def own(self, path: str) -> None:
        """Give a file or folder to the namespace's root."""
        os.chown(path, self.uids.first, self.gids.first)

    def open_way(self, *folders: str) -> None:
        """Let the namespace's root, and nobody else, go through folders of ours."""
        for folder in folders:
            os.chown(folder, 0, self.gids.first)
            os.chmod(folder, 0o710)  # noqa: S103  # the group is the pod's own

    def complete(self, spec: dict[str, Any]) -> None:
        """Put it into the OCI spec of a container. Raises InvalidArgument for a user without a mapping."""
        self.owner(spec["process"]["user"])
        section = spec["linux"]
        section["namespaces"].append({"type": "user", "path": f"/proc/{os.getpid()}/fd/{self.fd}"})
        for name, ids in (("uidMappings", self.uids), ("gidMappings", self.gids)):
            section[name] = [{"containerID": 0, "hostID": ids.first, "size": ids.length}]
        share_pids(spec, self.pids)

    @contextlib.contextmanager
    def as_root(self) -> Iterator[None]:
        """Act as the namespace's root: settings of an IPC namespace are for nobody else to write. Not for a process
        with work in other threads."""
        os.setegid(self.gids.first)
        os.seteuid(self.uids.first)
        try:
            yield
        finally:
            os.seteuid(0)
            os.setegid(0)


def share_pids(spec: dict[str, Any], pids: PidNamespace | None) -> None:
    """The pod's pid namespace, if it has one, for a container that has none of its own."""
    namespaces = spec["linux"]["namespaces"]
    if pids is not None and all(item["type"] != "pid" for item in namespaces):
        namespaces.append({"type": "pid", "path": pids.path})


class Namespaces:
    """New UTS, IPC and network namespaces in a user namespace, a new one or that of the network at `netns`."""

    def __init__(self, uids: IdMap, gids: IdMap, netns: str = "") -> None:
        """Forks: before there is a second thread, or between two events of a loop. Raises OSError."""
        self._fds: dict[int, int] = {}
        own = linux.CLONE_NEWUTS | linux.CLONE_NEWIPC
        userns = -1
        if netns:
            self._fds[linux.CLONE_NEWNET] = network = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
            userns = fcntl.ioctl(network, NS_GET_USERNS)
        else:
            own |= linux.CLONE_NEWNET
        child = _Child(userns, own)
        try:
            child.expect(_IN_USERNS)
            if not netns:
                child.map_ids(uids, gids)
                userns = child.open("user")
            child.expect(_IN_ALL)
            self._fds[linux.CLONE_NEWUTS], self._fds[linux.CLONE_NEWIPC] = (
                child.open("uts"),
                child.open("ipc"),
            )
            if not netns:
                self._fds[linux.CLONE_NEWNET] = child.open("net")
        finally:
            child.end()
        self.user = PodUser(userns, uids, gids)

    @property
    def network(self) -> int:
        """A descriptor of the network namespace, until they are entered."""
        return self._fds[linux.CLONE_NEWNET]

    def enter(self) -> None:
        """For the calling thread, and all that it starts; and its limits become high enough for every container,
        since whoever has entered a user namespace cannot raise his any more."""
        for kind, fd in self._fds.items():
            linux.setns(fd, kind)
            os.close(fd)
        self._fds = {}
        for name, wanted in _HARD_LIMITS:
            number = getattr(resource, f"RLIMIT_{name}")
            soft, hard = resource.getrlimit(number)
            if hard != resource.RLIM_INFINITY and (wanted == resource.RLIM_INFINITY or wanted > hard):
                with contextlib.suppress(ValueError, OSError):
                    resource.setrlimit(number, (soft, wanted))


_IN_USERNS, _IN_ALL = b"u", b"a"


class _Child:
    """A process that makes the namespaces, tells how far it is, and waits to be looked at."""

    def __init__(self, userns: int, own: int) -> None:
        """`userns` -1: a new one, whose maps it waits for."""
        self._told, telling = os.pipe2(os.O_CLOEXEC)
        waiting, self._go = os.pipe2(os.O_CLOEXEC)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(self._go)
                if userns < 0:
                    linux.unshare(linux.CLONE_NEWUSER)
                else:
                    linux.setns(userns, linux.CLONE_NEWUSER)
                os.write(telling, _IN_USERNS)
                if userns < 0:
                    os.read(waiting, 1)
                linux.unshare(own)
                os.write(telling, _IN_ALL)
                os.read(waiting, 1)
            except OSError as exc:
                os.write(telling, (exc.strerror or "").encode())
            finally:
                os._exit(0)
        os.close(telling)
        os.close(waiting)

    def expect(self, word: bytes) -> None:
        """Wait until it is that far. Raises OSError with its reason."""
        told = os.read(self._told, 1)
        if told != word:
            why = (told + os.read(self._told, 200)).decode(errors="replace")
            raise OSError(f"the pod's user namespace, or one that belongs to it, cannot be made: {why}")

    def map_ids(self, uids: IdMap, gids: IdMap) -> None:
        for name, ids in (("uid_map", uids), ("gid_map", gids)):
            with open(f"/proc/{self.pid}/{name}", "w") as file:
                file.write(f"0 {ids.first} {ids.length}\n")
        os.write(self._go, b"g")

    def open(self, name: str) -> int:
        return os.open(f"/proc/{self.pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)

    def end(self) -> None:
        os.close(self._go)
        os.close(self._told)
        os.waitpid(self.pid, 0)
