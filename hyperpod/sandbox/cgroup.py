"""Each sandbox's shim and QEMU run in a cgroup of their own below the pod's, so the pod's limits hold for them.

cgroup v1, v2 and both at once. libvirt puts a QEMU into `/machine/...` before it runs; once it runs, it is moved
here with all of its threads, and libvirt minds neither that nor the empty cgroup, which it removes with the
domain. What the QEMU used until then stays accounted to /machine (v2 never moves charges). The v1 `devices` tree
is left alone: libvirt's list of permitted devices holds there.

Below a systemd slice these are plain folders: the kubelet's slices are delegated, and systemd leaves folders alone
that it does not know as long as the slice lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

from hyperpod.errors import InvalidArgument, Unavailable
from hyperpod.spec.cgroup import TOP, Hierarchy, hierarchies, owner

log = logging.getLogger(__name__)

REMOVE_TIMEOUT = 5.0
"""Seconds for SIGKILLed processes to leave a cgroup; then it is left behind, with a warning."""

FIRST_RETRY, LAST_RETRY = 0.001, 0.05
"""Seconds between looks whether they have; a process ends within one or two milliseconds."""

_V1_UNLIMITED = 1 << 62
"""cgroup v1 writes "no limit" as a number of pages just below 2^63 bytes."""

_MAKE_ATTEMPTS = 5
_UNUSABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
_CPUSET = ("cpuset.cpus", "cpuset.mems")


def mounted() -> tuple[Hierarchy, ...]:
    """This host's hierarchies, without those that are mounted read-only."""
    return hierarchies(Path("/proc/self/mountinfo").read_text())


class SandboxCgroups:
    """Makes, fills and removes cgroups; a path is as spec.cgroup.sandbox_folder gives it.

    A host without a cgroup file system that can be written goes without, and it is logged once.
    """

    def __init__(self, found: Sequence[Hierarchy] | None = None) -> None:
        self.all = list(mounted() if found is None else found)
        self.used = [h for h in self.all if "devices" not in h.controllers]
        if not self.used:
            log.warning("no writable cgroup file system: sandboxes get no cgroups of their own")

    async def make(self, path: str) -> list[str]:
        """Make what is missing; returns the folders to join. Raises Unavailable, InvalidArgument."""
        return await asyncio.to_thread(self._make_all, path)

    async def admit(self, path: str, pid: int) -> None:
        """Move a process with all its threads in; one that is gone is none. Raises Unavailable."""
        await asyncio.to_thread(self._admit, path, pid)

    async def weigh(self, path: str, score: int, but: str) -> None:
        """Set the OOM score of its processes but those named `but`, as far as this host lets us lower one."""
        await asyncio.to_thread(self._weigh, path, score, but)

    async def oom_kills(self, path: str) -> int:
        """How many processes of it this host has killed for want of memory."""
        return await asyncio.to_thread(self._oom_kills, path)

    def is_unlimited(self, path: str) -> bool:
        """Whether this cgroup, any one's, is there and has no memory limit of its own."""
        for hierarchy in self.all:
            for name in ("memory.max", "memory.limit_in_bytes"):  # v2, v1
                with contextlib.suppress(OSError):
                    limit = Path(f"{hierarchy.mount}{path}/{name}").read_text().strip()
                    return limit == "max" or int(limit) >= _V1_UNLIMITED
        return False

    async def remove(self, path: str, domain: str = "") -> list[int]:
        """Kill who is left in it and remove it, and what libvirt has left of `domain`; safe to repeat.

        Gives the processes that outlive SIGKILL, as those do that wait for a disk. Raises ValueError for
        a path that is no sandbox's own: others live there.
        """
        if owner(path) is None:
            raise ValueError(f"{path!r} is not a sandbox's cgroup")
        loop = asyncio.get_running_loop()
        deadline, delay = loop.time() + REMOVE_TIMEOUT, FIRST_RETRY
        alive: list[int] = []
        while left := await asyncio.to_thread(self._remove_all, path):
            if loop.time() > deadline:
                alive = await asyncio.to_thread(_pids, left)
                log.warning("cgroups left behind, with processes %s: %s", alive, " ".join(left))
                break
            await asyncio.sleep(delay)
            delay = min(2 * delay, LAST_RETRY)
        if domain:
            await asyncio.to_thread(self._remove_libvirts, domain)
        return alive

    async def sweep(self, shorts: set[str]) -> None:
        """Remove the cgroups of sandboxes (first 12 digits of the ids) of which nothing else is known."""
        for path in await asyncio.to_thread(self._find, shorts) if shorts else ():
            log.warning("cgroup %s belongs to no sandbox; removing it", path)
            await self.remove(path)

    # -- in a thread --------------------------------------------------------------------------------------

    def _make_all(self, path: str) -> list[str]:
        made = []
        for hierarchy in list(self.used):
            folder = hierarchy.mount + path
            try:
                _make(hierarchy, path)
            except (FileExistsError, NotADirectoryError) as exc:
                raise InvalidArgument(f"cgroup_parent: {exc.filename} is not a cgroup") from exc
            except OSError as exc:
                if exc.errno not in _UNUSABLE:
                    raise Unavailable(f"cgroup {folder} cannot be made: {exc.strerror}") from exc
                log.warning("going on without %s: %s", hierarchy.mount, exc.strerror)
                self.used = [other for other in self.used if other is not hierarchy]
            else:
                made.append(folder)
        return made

    def _admit(self, path: str, pid: int) -> None:
        for hierarchy in self.used:
            folder = Path(hierarchy.mount + path)
            try:
                (folder / "cgroup.procs").write_text(str(pid))
            except ProcessLookupError:
                return
            except OSError as exc:
                raise Unavailable(f"process {pid} cannot join cgroup {folder}: {exc.strerror}") from exc

    def _weigh(self, path: str, score: int, but: str) -> None:
        for pid in _pids([hierarchy.mount + path for hierarchy in self.used[:1]]):
            with contextlib.suppress(OSError):  # it has ended, or we lack CAP_SYS_RESOURCE
                if Path(f"/proc/{pid}/comm").read_text().strip() != but:
                    Path(f"/proc/{pid}/oom_score_adj").write_text(str(score))

    def _oom_kills(self, path: str) -> int:
        for hierarchy in self.used:
            for name in ("memory.events", "memory.oom_control"):  # v2, v1
                with contextlib.suppress(OSError):
                    for line in Path(f"{hierarchy.mount}{path}/{name}").read_text().splitlines():
                        if line.startswith("oom_kill "):
                            return int(line.split()[1])
        return 0

    def _remove_all(self, path: str) -> list[str]:
        """Returns what is still there."""
        left = []
        # The trees that we do not use as well: a host pod's agent does. v2 first, where one write kills all.
        for hierarchy in sorted(self.all, key=lambda h: not h.unified):
            folder = Path(hierarchy.mount + path)
            if not folder.is_dir():
                continue
            _remove_tree(folder)
            if folder.is_dir():  # somebody is in there
                _kill(folder)
                _remove_tree(folder)
            if folder.is_dir():
                left.append(str(folder))
            elif path.startswith(f"{TOP}/"):  # a pod's cgroup is the kubelet's, this one is ours
                with contextlib.suppress(OSError):
                    folder.parent.rmdir()
        return left

    def _remove_libvirts(self, domain: str) -> None:
        """For a domain of which libvirt has lost its state; who is in there is not touched."""
        for hierarchy in self.all:
            for base in ("machine", "machine.slice"):
                for folder in (Path(hierarchy.mount) / base).glob(f"*-{domain}.libvirt-qemu"):
                    _remove_tree(folder)

    def _find(self, shorts: set[str]) -> list[str]:
        found = set()
        for hierarchy in self.used:
            for folder, _, _ in os.walk(hierarchy.mount):
                path = folder.removeprefix(hierarchy.mount)
                if (short := owner(path)) is not None and short in shorts:
                    found.add(path)
        return sorted(found)


def qemu_pid(domain: str, uid: int) -> int | None:
    """The process of a domain, found by its command line and user: libvirt does not tell."""
    wanted = f"guest={domain},".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                arguments = (entry / "cmdline").read_bytes().split(b"\0")
                if any(argument.startswith(wanted) for argument in arguments) and _uid(entry) == uid:
                    return int(entry.name)
    return None


def _uid(process: Path) -> int:
    for line in (process / "status").read_text().splitlines():
        if line.startswith("Uid:"):
            return int(line.split()[1])
    return -1


def _make(hierarchy: Hierarchy, path: str) -> None:
    """Raises OSError."""
    if not hierarchy.unified and "cpuset" not in hierarchy.controllers:
        with contextlib.suppress(FileNotFoundError, FileExistsError, NotADirectoryError):
            Path(hierarchy.mount + path).mkdir()
            return
    for attempt in range(_MAKE_ATTEMPTS):
        try:
            for above, folder in _steps(hierarchy, path):
                if hierarchy.unified:
                    _enable(above)
                folder.mkdir(exist_ok=True)
                if "cpuset" in hierarchy.controllers:
                    _fill_cpuset(above, folder)
            return
        except FileNotFoundError:  # another sandbox's removal took the common parent away in between
            if attempt == _MAKE_ATTEMPTS - 1:
                raise


def _steps(hierarchy: Hierarchy, path: str) -> Iterator[tuple[Path, Path]]:
    current = Path(hierarchy.mount)
    for name in path.strip("/").split("/"):
        above, current = current, current / name
        yield above, current


def _fill_cpuset(above: Path, folder: Path) -> None:
    """An empty v1 cpuset admits nobody."""
    for name in _CPUSET:
        if not (folder / name).read_text().strip():
            (folder / name).write_text((above / name).read_text())


def _enable(folder: Path) -> None:
    """Controllers for what is below, as far as the parent has them; one by one, for some may be refused."""
    with contextlib.suppress(OSError):
        missing = set((folder / "cgroup.controllers").read_text().split())
        missing -= set((folder / "cgroup.subtree_control").read_text().split())
        for name in sorted(missing & {"cpu", "cpuset", "io", "memory", "pids"}):
            with contextlib.suppress(OSError):
                (folder / "cgroup.subtree_control").write_text(f"+{name}")


def _kill(folder: Path) -> None:
    """SIGKILL for everybody in there and below; who comes in meanwhile is the next call's, where the kernel does
    not do it at once (cgroup.kill) or hold them still (v1's freezer)."""
    with contextlib.suppress(OSError):
        _tell(folder / "cgroup.kill", "1")  # Linux 5.14
        return
    frozen = _freeze(folder, "FROZEN")
    for pid in _pids([str(folder)]):
        log.debug("killing process %d of cgroup %s", pid, folder)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if frozen:
        _freeze(folder, "THAWED")


def _pids(folders: Sequence[str]) -> list[int]:
    """Everybody in there and below, each once."""
    found: set[int] = set()
    for folder in folders:
        for current, _, _ in os.walk(folder):
            with contextlib.suppress(OSError):
                found.update(map(int, (Path(current) / "cgroup.procs").read_text().split()))
    # 0 stands for a process that this PID namespace does not see, and would mean our own group.
    return sorted(found - {0})


def _tell(file: Path, word: str) -> None:
    """Raises OSError, also when the kernel has no such file."""
    with file.open("r+") as opened:
        opened.write(word)


def _freeze(folder: Path, state: str) -> bool:
    """Whether anything of it was: it is a v1 freezer's. A cgroup may go while we look."""
    done = False
    for current, _, _ in os.walk(folder):
        with contextlib.suppress(OSError):
            _tell(Path(current) / "freezer.state", state)
            done = True
    return done


def _remove_tree(folder: Path) -> None:
    """Children first; what is busy or gone is left."""
    for current, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            Path(current).rmdir()
