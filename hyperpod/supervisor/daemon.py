"""The daemon as a child: started, restarted with growing pauses, stopped with us."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time

from hyperpod.supervisor import linux
from hyperpod.supervisor.loop import Loop

log = logging.getLogger(__name__)

_FIRST_PAUSE, _LAST_PAUSE = 0.2, 10.0
_STEADY = 30.0
"""Seconds after which a daemon's end counts as its first."""
STOP_TIMEOUT = 25.0
"""Seconds from SIGTERM to SIGKILL: more than the daemon gives its own RPCs and tasks."""


class DaemonChild:
    """`command` is what to execute. Stops the loop with 0 when the daemon ends well or `stop` was called."""

    def __init__(self, loop: Loop, command: list[str]) -> None:
        self._loop, self._command = loop, command
        self.pid = 0
        self._started = 0.0
        self._pause = _FIRST_PAUSE
        self._stopping = False

    def start(self) -> None:
        if self._stopping:
            return
        parent = os.getpid()
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            try:
                linux.reset_signals()
                linux.die_with_parent(signal.SIGTERM, parent)
                os.execv(self._command[0], self._command)  # noqa: S606  no shell is wanted
            finally:
                os._exit(127)
        self.pid, self._started = pid, time.monotonic()
        os.environ.pop("HYPERPOD_FAILPOINT", None)  # meant for the first daemon, not for its successors

    def stop(self) -> None:
        """Ask it to end; the loop stops once it has."""
        self._stopping = True
        if not self.pid:
            self._loop.stop(0)
            return
        pid = self.pid
        os.kill(pid, signal.SIGTERM)  # not reaped yet, so the pid is still its own
        self._loop.after(STOP_TIMEOUT, lambda: self._force(pid))

    def reaped(self, pid: int, status: int) -> None:
        if pid != self.pid:
            return
        self.pid = 0
        code = os.waitstatus_to_exitcode(status)
        if self._stopping or code == 0:
            self._loop.stop(0)
            return
        if time.monotonic() - self._started > _STEADY:
            self._pause = _FIRST_PAUSE
        how = f"exit code {code}" if code > 0 else f"signal {-code}"
        log.error("the daemon ended: %s; starting it again in %.1f s", how, self._pause)
        self._loop.after(self._pause, self.start)
        self._pause = min(2 * self._pause, _LAST_PAUSE)

    def _force(self, pid: int) -> None:
        if self.pid == pid:
            log.error("the daemon does not end; killing it")
            os.kill(pid, signal.SIGKILL)
