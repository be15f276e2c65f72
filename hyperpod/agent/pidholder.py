"""The first process of a pid namespace that containers share: it reaps, and does nothing else.

Containers see it, and one with CAP_SYS_PTRACE can go to where it is (/proc/1/root) and have it run code: so it has
no files, no system calls but read and write, and, as other runtimes' pause, neither root's id nor capabilities.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

from hyperpod.agent import linux
from hyperpod.title import set_title

NOBODY = 65535
"""Uid and gid of Kubernetes' own pause."""

_CONFINED = b"!"


@dataclass(frozen=True)
class PidNamespace:
    """`holder`: pid of its first process, whose end is the namespace's. `fd`: the namespace, whatever becomes of
    the number, which may be any process's later."""

    holder: int
    fd: int

    @property
    def path(self) -> str:
        """For crun."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"


def hold_pid_namespace(userns: int = -1) -> PidNamespace:
    """Start the first process. `userns`: of the pod, whose root it is to be; -1: there is none."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        try:
            if userns >= 0:
                linux.setns(userns, linux.CLONE_NEWUSER)
                os.setgroups([])
                os.setresgid(0, 0, 0)
                os.setresuid(0, 0, 0)
            linux.unshare(linux.CLONE_NEWPID)
            first = os.fork()
            if first == 0:
                _hold(writing, root=userns >= 0)
            os.write(writing, str(first).encode())  # its number here: the new namespace is for children
            os._exit(0)
        finally:
            os._exit(70)
    os.close(writing)
    os.waitpid(child, 0)
    with open(reading, "rb") as told:
        words = told.read()  # until both have closed it
    number = words.replace(_CONFINED, b"")
    if not number or number == words:
        raise OSError("no pid namespace could be made")
    holder = int(number)
    return PidNamespace(holder, os.open(f"/proc/{holder}/ns/pid", os.O_RDONLY | os.O_CLOEXEC))


def _hold(telling: int, *, root: bool) -> None:
    """Never returns. The kernel reaps for who ignores SIGCHLD, and gives a namespace's first process no signal that
    it does not ask for, except from outside. `root`: it stays that of its user namespace."""
    set_title("pause", "pause")
    linux.hide()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    linux.leave_files()
    if not root:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    os.write(telling, _CONFINED)
    os.closerange(0, 1 << 16)
    silent, _ = os.pipe()
    linux.sleep_for_ever(silent)
