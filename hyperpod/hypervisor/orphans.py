"""QEMU processes of our libvirt root that libvirt itself no longer knows.

libvirt adopts what its status files name. A status file that a full disk cut short leaves a process behind that
holds a tenant's memory. Only processes whose own command line names our root are touched. (virtiofsd is ours, not
libvirt's: hyperpod.share.)
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import select
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

log = logging.getLogger(__name__)

DEATH_TIMEOUT_MS = 5000
SHORT_NAME = 20
"""libvirt cuts a domain's name to this many characters in the names of its files (virDomainDefGetShortName)."""


@dataclass(frozen=True)
class Orphan:
    """A process to end. `domain`: what is known of the name."""

    pid: int
    domain: str


def find(root: Path, known: set[str]) -> list[Orphan]:
    """Processes of `root` whose domain is not among the names in `known`."""
    found = []
    mark = f"{root}/lib/qemu/domain-"
    for entry in os.listdir("/proc"):
        if not entry.isdecimal():
            continue
        argv = _argv(int(entry))
        if not argv or not Path(argv[0]).name.startswith("qemu-system-"):
            continue
        name = _guest(argv)
        if name and name not in known and any(mark in arg for arg in argv):
            found.append(Orphan(int(entry), name))
    return found


def _files(root: Path, name: str) -> list[Path]:
    """What libvirt made for the domain and would have removed at its end."""
    short = f"domain-*-{name[:SHORT_NAME]}"
    return [
        *(root / "lib" / "qemu").glob(short),
        *(root / "lib" / "qemu" / "channel" / "target").glob(short),  # libvirt 9.0
        *(root / "run" / "qemu" / "channel").glob(f"*-{name[:SHORT_NAME]}"),  # 11.3
        *(root / "lib" / "qemu" / "ram").glob(f"*-{name[:SHORT_NAME]}"),
        *(root / "run" / "qemu").glob(f"{name}.*"),
        root / "log" / "qemu" / f"{name}.log",
    ]


def _argv(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _guest(argv: list[str]) -> str:
    """The domain's name from QEMU's `-name guest=NAME,...`."""
    for flag, value in itertools.pairwise(argv):
        if flag == "-name":
            return value.removeprefix("guest=").partition(",")[0]
    return ""


def sweep(root: Path, known: set[str]) -> list[Orphan]:
    """Kill what `find` finds and wait for the deaths; returns it."""
    orphans = find(root, known)
    for orphan in orphans:
        log.warning("ending process %d of the unknown domain %s", orphan.pid, orphan.domain)
        _kill(orphan, root, known)
        remove_files(root, orphan.domain)
        remove_cgroups(orphan.domain)
    return orphans


def remove_files(root: Path, name: str) -> None:
    """What libvirt makes for a domain, of one that has no process and that libvirt does not know."""
    for file in _files(root, name):
        if file.is_dir():
            shutil.rmtree(file, ignore_errors=True)
        else:
            file.unlink(missing_ok=True)


def forget_unstarted(root: Path) -> list[str]:
    """Before libvirt is opened: remove domains whose QEMU was about to be started at our end; gives their names.

    Such a one's status file has no pid in it. libvirt 9.0 takes the start that it tells of for one that goes on, so
    that nobody could ever destroy the domain. QEMU itself waits until its pid is on record, and ends when we do.
    """
    names = []
    for file in (root / "run" / "qemu").glob("*.xml"):
        if _recorded_pid(file) == "0":
            log.warning("domain %s was about to be started; forgetting it", file.stem)
            remove_files(root, file.stem)
            remove_cgroups(file.stem)
            names.append(file.stem)
    return names


def _recorded_pid(file: Path) -> str:
    """Of a status file, which may be cut short: its first element is enough."""
    with contextlib.suppress(OSError, ET.ParseError, StopIteration), file.open("rb") as source:
        _, element = next(ET.iterparse(source, events=("start",)))  # noqa: S314  libvirt's own file
        return str(element.get("pid", ""))
    return ""


def remove_cgroups(name: str) -> None:
    """Remove what is left of the cgroups that libvirt made for a domain without a process.

    When a QEMU dies while no libvirt watches, libvirt 9.0 forgets the domain and leaves its cgroup folders.
    """
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, kind, *_ = line.split()
        if not kind.startswith("cgroup"):
            continue
        for group in Path(mount, "machine").glob(f"qemu-*-{name}.libvirt-qemu"):
            for folder, _, _ in os.walk(group, topdown=False):
                try:
                    Path(folder).rmdir()
                except FileNotFoundError:
                    pass
                except OSError as exc:
                    log.warning("cgroup %s stays: %s", folder, exc.strerror)


def _kill(orphan: Orphan, root: Path, known: set[str]) -> None:
    try:
        handle = os.pidfd_open(orphan.pid)
    except ProcessLookupError:
        return
    try:
        # Looked at once more under the pidfd: the number may be another process's by now.
        if orphan not in find(root, known):
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        if not poll.poll(DEATH_TIMEOUT_MS):
            log.error("process %d of domain %s does not die", orphan.pid, orphan.domain)
    finally:
        os.close(handle)
