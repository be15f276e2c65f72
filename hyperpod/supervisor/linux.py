"""The few system calls that Python has no name for, and what a child does to itself before it goes its way."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterable
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_MAX_FD = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl {option}: {os.strerror(number)}")


def become_subreaper() -> None:
    """Orphans below us, QEMUs for example, become our children: libvirt's destroy waits 2 s otherwise."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(number: signal.Signals, parent: int) -> None:
    """Get `number` when `parent`, which forked us, ends; leaves at once if it already has."""
    _prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(0)


def forbid_new_privileges() -> None:
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def drop_to(uid: int, gid: int) -> None:
    """For good: no supplementary groups, no saved ids. Nothing to do for root staying root."""
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def reset_signals() -> None:
    """As exec leaves them, for a forked child that goes on in Python."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, set())


def close_all_but(keep: Iterable[int]) -> None:
    """Close every other descriptor from 3 on."""
    low = 3
    for fd in sorted(set(keep)):
        if fd >= low:
            os.closerange(low, fd)
            low = fd + 1
    os.closerange(low, _MAX_FD)


def start_time(pid: int) -> int:
    """Clock ticks from boot to the process's start: with the pid, its identity. Raises OSError."""
    return int(_stat_fields(str(pid))[19])


def set_title(name: str, title: str) -> None:
    """What ps and /proc show: `name` (15 bytes) for the thread, `title` as the command line.

    The title is written over the arguments and, if it needs, the environment after them (proc(5), cmdline).
    """
    short = ctypes.create_string_buffer(name.encode()[:15])
    _prctl(_PR_SET_NAME, ctypes.addressof(short))
    fields = _stat_fields("self")
    arg_start, arg_end, env_end = int(fields[45]), int(fields[46]), int(fields[48])
    if not arg_start < arg_end <= env_end:
        return
    text = os.fsencode(title)[: env_end - arg_start - 1] + b"\0"
    ctypes.memmove(arg_start, text.ljust(arg_end - arg_start, b"\0"), max(len(text), arg_end - arg_start))


def _stat_fields(process: str) -> list[bytes]:
    """The fields of /proc/<process>/stat from the third on: the second may hold anything."""
    return Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
