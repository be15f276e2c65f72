"""The cgroups of the containers: where they are, who is in them, killing all of one, out-of-memory kills.

crun makes and configures a container's cgroup; this knows the two layouts. In a guest there is cgroup2 only.
A host may still have the v1 hierarchies, and then crun cannot use cgroup2 (it refuses hybrid mode).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal

from hyperpod.errors import Unavailable

ROOT = "/sys/fs/cgroup"
MAKE_ATTEMPTS = 5
KILL_TIMEOUT = 5.0
"""Seconds for SIGKILLed processes to leave a cgroup."""


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()


def _oom_kills(path: str) -> int:
    try:
        lines = _read(path).splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


class Cgroups:
    """All below `parent` (an absolute cgroup path such as /hyperpod)."""

    def __init__(self, parent: str) -> None:
        self.parent = parent
        self.unified = os.path.exists(f"{ROOT}/cgroup.controllers")
        if self.unified:
            self._hierarchies = [ROOT]
        else:
            self._hierarchies = [f"{ROOT}/{name}" for name in self._v1_names()]
        self._main = ROOT if self.unified else f"{ROOT}/pids"

    @staticmethod
    def _v1_names() -> list[str]:
        names = []
        for line in _read("/proc/self/cgroup").splitlines():
            controllers = line.split(":")[1].removeprefix("name=")
            if controllers and os.path.isdir(f"{ROOT}/{controllers}"):
                names.append(controllers)
        return names

    def setup(self, memory_max: int = 0, pids_max: int = 0) -> None:
        """Make the parent with these limits (0: none) and every controller for its children."""
        if self.unified:
            wanted = [f"+{name}" for name in _read(f"{ROOT}/cgroup.controllers").split()]
            self._enable(ROOT, wanted)
            path = ""
            for part in self.parent.strip("/").split("/"):
                path = f"{path}/{part}"
                os.makedirs(ROOT + path, exist_ok=True)
                self._enable(ROOT + path, wanted)
        else:
            self.make(self.parent)
        self.limit(self.parent, memory_max, pids_max)

    @staticmethod
    def _enable(path: str, wanted: list[str]) -> None:
        # One by one: a controller that cannot be enabled here must not keep the others off.
        for item in wanted:
            with contextlib.suppress(OSError):
                _write(f"{path}/cgroup.subtree_control", item)

    @staticmethod
    def _limit(path: str, value: int) -> None:
        if value and os.path.exists(path):
            _write(path, str(value))

    @staticmethod
    def _make_v1(hierarchy: str, path: str) -> None:
        """A v1 cgroup and its parents; an empty cpuset admits nobody, so it gets its parent's."""
        for attempt in range(MAKE_ATTEMPTS):
            try:
                if "cpuset" not in os.path.basename(hierarchy).split(","):
                    os.makedirs(hierarchy + path, exist_ok=True)
                    return
                current = hierarchy
                for part in path.strip("/").split("/"):
                    above, current = current, f"{current}/{part}"
                    os.makedirs(current, exist_ok=True)
                    for name in ("cpuset.cpus", "cpuset.mems"):
                        if not _read(f"{current}/{name}").strip():
                            _write(f"{current}/{name}", _read(f"{above}/{name}"))
                return
            except OSError as exc:
                # Who shares the parent with us on a host may remove it, empty, between two of these steps.
                if exc.errno not in (errno.ENOENT, errno.ENODEV) or attempt == MAKE_ATTEMPTS - 1:
                    raise

    def container_path(self, container: str) -> str:
        """For linux.cgroupsPath."""
        return f"{self.parent}/{container}"

    def make_exec(self, container: str, name: str) -> None:
        """A cgroup for one exec below the container's: crun only moves into one that exists."""
        self.make(f"{self.container_path(container)}/{name}")

    def make(self, path: str) -> None:
        """With its parents."""
        if self.unified:
            os.makedirs(ROOT + path, exist_ok=True)
            return
        for hierarchy in self._hierarchies:
            self._make_v1(hierarchy, path)

    def member_files(self, path: str) -> list[str]:
        """Who writes "0" to each of them is in the cgroup."""
        return [f"{hierarchy}{path}/cgroup.procs" for hierarchy in self._hierarchies]

    def limit(self, path: str, memory_max: int, pids_max: int) -> None:
        """What all below together may have; 0: no limit."""
        if self.unified:
            self._limit(f"{ROOT}{path}/memory.max", memory_max)
            self._limit(f"{ROOT}{path}/pids.max", pids_max)
            return
        self._limit(f"{ROOT}/memory{path}/memory.limit_in_bytes", memory_max)
        self._limit(f"{ROOT}/pids{path}/pids.max", pids_max)

    @staticmethod
    def lift_quota(path: str) -> None:
        """Let a v1 cgroup have as much CPU time as there is."""
        _write(f"{ROOT}/cpu{path}/cpu.cfs_quota_us", "-1")

    def pids(self, path: str) -> list[int]:
        """Every process in the cgroup `path` and below it; empty when it does not exist."""
        found: list[int] = []
        for folder, _, _ in os.walk(self._main + path):
            with contextlib.suppress(OSError):
                found += map(int, _read(f"{folder}/cgroup.procs").split())
        return found

    def signal_all(self, path: str, number: int) -> None:
        """Send a signal to every process of the cgroup and below; SIGKILL gets forking ones as well."""
        if number == signal.SIGKILL and self.unified:
            with contextlib.suppress(FileNotFoundError):
                _write(f"{ROOT}{path}/cgroup.kill", "1")
            return
        frozen = number == signal.SIGKILL and self._freeze(path, "FROZEN")
        try:
            for pid in self.pids(path):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        finally:
            if frozen:
                self._freeze(path, "THAWED")

    def _freeze(self, path: str, state: str) -> bool:
        """Whether anything of it was: a cgroup below may go while we look."""
        done = False
        for folder, _, _ in os.walk(f"{ROOT}/freezer{path}"):
            with contextlib.suppress(OSError):
                _write(f"{folder}/freezer.state", state)
                done = True
        return done

    async def kill(self, path: str, timeout: float = KILL_TIMEOUT) -> None:
        """SIGKILL until nobody is left. Raises Unavailable when somebody is after `timeout` seconds."""
        loop = asyncio.get_running_loop()
        deadline, delay = loop.time() + timeout, 0.002
        while self.pids(path):
            self.signal_all(path, signal.SIGKILL)
            if loop.time() > deadline:
                raise Unavailable(f"processes of cgroup {path} survive SIGKILL: {self.pids(path)[:5]}")
            await asyncio.sleep(delay)
            delay = min(delay * 2, 0.1)

    def remove(self, path: str) -> None:
        """Remove the cgroup and those below it; what is busy or gone is left."""
        for hierarchy in self._hierarchies:
            for folder, _, _ in os.walk(hierarchy + path, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)

    def oom_kills(self, container: str) -> int:
        """How often the kernel killed in this container for want of memory."""
        path = self.container_path(container)
        if self.unified:  # counts what is below as well, and keeps it when that is removed
            return _oom_kills(f"{ROOT}{path}/memory.events")
        return sum(_oom_kills(f"{f}/memory.oom_control") for f, _, _ in os.walk(f"{ROOT}/memory{path}"))

    def oom_kills_to_be_lost(self, path: str) -> int:
        """Of a cgroup that is about to be removed: those that the one above it does not count."""
        return 0 if self.unified else _oom_kills(f"{ROOT}/memory{path}/memory.oom_control")

    def huge_page_sizes(self) -> list[str]:
        """As the files of cgroup v2 name them: 2MB, 1GB."""
        names = os.listdir(f"{ROOT}{self.parent}")
        return sorted(
            name.split(".")[1] for name in names if name.startswith("hugetlb.") and name.endswith("B.max")
        )

    def children(self, path: str) -> list[str]:
        """Names of the cgroups right below `path`."""
        try:
            return [entry.name for entry in os.scandir(self._main + path) if entry.is_dir()]
        except OSError:
            return []
