"""What a test run makes on the host, on record before it is made: the next run undoes what a killed one has left.

A run's record is a file that it keeps locked as long as it lives. One whose lock is free is a dead run's, so what
it names belongs to nobody; nothing else on the host is touched, whatever it is called.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

RECORDS = Path("/run/hyperpod-tests")
CGROUPS = Path("/sys/fs/cgroup")
KILL_TIMEOUT = 5.0


@functools.cache
def _own(pid: int) -> int:
    """The record of this process, locked before it has its name. (`pid`: not a parent's, after a fork.)"""
    RECORDS.mkdir(mode=0o700, exist_ok=True)
    name = f"{pid}-{secrets.token_hex(4)}"
    fd = os.open(RECORDS / f".{name}", os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    (RECORDS / f".{name}").rename(RECORDS / name)
    return fd


def record(kind: str, name: str) -> None:
    """`kind`: folder (with all processes that name it), network (of netkit) or cgroup (in any hierarchy)."""
    if os.geteuid() == 0:
        os.write(_own(os.getpid()), f"{kind} {name}\n".encode())


def sweep() -> list[str]:
    """Undo what dead runs have left; says what that was."""
    undone: list[str] = []
    if os.geteuid() != 0 or not RECORDS.is_dir():
        return undone
    for path in RECORDS.glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lines = [line.split(maxsplit=1) for line in file.read().splitlines()]
            kinds = {"folder": _folder, "network": _network, "cgroup": _cgroup}
            # All folders' processes first: they hold the rest.
            for kind, name in sorted(lines, key=lambda line: line[0] != "folder"):
                if kinds[kind](name):
                    undone.append(f"{kind} {name}")
            path.unlink()
    return undone


def processes_of(folder: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if folder.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


def pod_cgroups(log: str) -> list[str]:
    """Cgroups, ours and libvirt's, of every sandbox that a daemon's log tells of; parents first."""
    shorts = set(re.findall(r"sandbox ([0-9a-f]{12})\b", log))
    return [
        folder
        for folder, _, _ in os.walk(CGROUPS)
        if any(name in shorts for name in re.split("[-.]", Path(folder).name))
    ]


def end_cgroup(top: str) -> None:
    """Kill everybody in it, remove it and all below."""
    deadline = time.monotonic() + KILL_TIMEOUT
    while members := _members(top):
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return
        time.sleep(0.02)
    for folder, _, _ in os.walk(top, topdown=False):
        with contextlib.suppress(OSError):
            Path(folder).rmdir()


def _members(top: str) -> list[int]:
    found: list[int] = []
    for folder, _, _ in os.walk(top):
        with contextlib.suppress(OSError):
            found += map(int, (Path(folder) / "cgroup.procs").read_text().split())
    return found


def _folder(name: str) -> bool:
    folder = Path(name)
    pids = processes_of(f"{name}/") + processes_of(f"{name}\0")
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    there = folder.exists()
    if (folder / "daemon.log").exists():
        for top in pod_cgroups((folder / "daemon.log").read_text(errors="replace")):
            end_cgroup(top)
    mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for point in reversed(mounted):
        if point == name or point.startswith(f"{name}/"):
            subprocess.run(["umount", "-l", point], capture_output=True, check=False)
    if not any(line.split()[1].startswith(name) for line in Path("/proc/mounts").read_text().splitlines()):
        shutil.rmtree(folder, ignore_errors=True)
    return there or bool(pids)


def _network(ident: str) -> bool:
    """Bridge and rules of tests.netkit.Network."""
    bridge = Path(f"/sys/class/net/hpt{ident}").exists()
    if bridge:
        subprocess.run(["ip", "link", "delete", f"hpt{ident}"], capture_output=True, check=False)
    rules = [drop_rules(program, f"test-{ident}") for program in ("iptables", "ip6tables")]
    return bridge or any(rules)


def drop_rules(program: str, word: str) -> int:
    """Remove each rule that has the word in it, and the chain that it leads to; says how many there were."""
    saved = subprocess.run([f"{program}-save"], capture_output=True, text=True, check=False).stdout
    table, count = "", 0
    for line in saved.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith("-A") and word in line:
            count += 1
            parts = shlex.split(line)
            rule = [program, "-w", "-t", table, "-D", *parts[1:]]
            subprocess.run(rule, capture_output=True, check=False)
            target = parts[parts.index("-j") + 1] if "-j" in parts else ""
            for action in ("-F", "-X") if target.startswith("CNI-") and len(target) > 20 else ():
                subprocess.run([program, "-w", "-t", table, action, target], capture_output=True, check=False)
    return count


def _cgroup(name: str) -> bool:
    tops = [str(path / name) for path in (CGROUPS, *CGROUPS.iterdir()) if (path / name).is_dir()]
    for top in tops:
        end_cgroup(top)
    return bool(tops)
