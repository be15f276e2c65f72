"""The shims: forked in the nursery, watched by pidfd, found again after our own restart."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from hyperpod.errors import HyperpodError, ResourceExhausted, Unavailable
from hyperpod.processes import start_time
from hyperpod.supervisor.loop import Loop
from hyperpod.supervisor.nursery import Nursery
from hyperpod.supervisor.store import Store

log = logging.getLogger(__name__)

Outcome = Callable[[HyperpodError | None], None]

MAX_SHIMS = 4096
READY_TIMEOUT = 15.0
GRACE = 2.0
"""Seconds from SIGTERM to SIGKILL of a shim that is dropped."""


@dataclass(frozen=True)
class ShimSpec:
    """What the daemon wants forked. `cgroups`: folders whose cgroup.procs the shim joins."""

    sandbox_id: str
    directory: str
    uid: int
    gid: int
    cid: int
    device: bool
    cgroups: tuple[str, ...]


@dataclass
class Shim:
    """One sandbox's shim process (pid 0: none now) and what it stored."""

    sandbox_id: str
    pid: int = 0
    pidfd: int = -1
    start_time: int = 0
    store: Store = field(default_factory=Store)
    when_ready: list[Outcome] = field(default_factory=list)
    when_dead: list[Callable[[], None]] = field(default_factory=list)


class Shims:
    """All of them, by sandbox id."""

    def __init__(self, loop: Loop, nursery: Nursery) -> None:
        self.all: dict[str, Shim] = {}
        self._loop, self._nursery = loop, nursery

    def spawn(self, spec: ShimSpec, *, resume: bool, done: Outcome) -> None:
        """Fork a shim; `done` is called once it listens, or with why not. One that still lives is killed first.

        Raises ResourceExhausted, Unavailable.
        """
        shim = self.all.get(spec.sandbox_id)
        if shim is None:
            if len(self.all) >= MAX_SHIMS:
                raise ResourceExhausted(f"{MAX_SHIMS} shims are the most")
            shim = self.all[spec.sandbox_id] = Shim(spec.sandbox_id)
        if shim.pid:
            log.warning("sandbox %s: its shim, pid %d, is to be replaced", spec.sandbox_id[:12], shim.pid)
            shim.when_dead.append(lambda: self._respawn(spec, resume=resume, done=done))
            _kill(shim, signal.SIGKILL)
            return
        if not resume:
            shim.store.clear()
        pid = self._nursery.spawn_shim(asdict(spec), shim.store.items)
        shim.when_ready.append(done)
        self._watch(shim, pid)
        self._loop.after(READY_TIMEOUT, lambda: self._late(shim, pid))

    def _respawn(self, spec: ShimSpec, *, resume: bool, done: Outcome) -> None:
        try:
            self.spawn(spec, resume=resume, done=done)
        except HyperpodError as exc:
            done(exc)

    def register(self, sandbox_id: str, pid: int) -> None:
        """A shim listens: one that was just forked, or one of an earlier supervisor."""
        shim = self.all.setdefault(sandbox_id, Shim(sandbox_id))
        if not shim.pid:
            self._watch(shim, pid)
            log.info("sandbox %s: took over its shim, pid %d", sandbox_id[:12], pid)
        _tell(shim, None)

    def drop(self, sandbox_id: str, done: Callable[[], None]) -> None:
        """End the shim if it lives and forget all about it; `done` is called then."""
        shim = self.all.get(sandbox_id)
        if shim is None:
            done()
            return

        def gone() -> None:
            shim.store.clear()
            self.all.pop(sandbox_id, None)
            done()

        if not shim.pid:
            gone()
            return
        shim.when_dead.append(gone)
        pid = shim.pid
        _kill(shim, signal.SIGTERM)
        self._loop.after(GRACE, lambda: _kill(shim, signal.SIGKILL) if shim.pid == pid else None)

    def reaped(self, pid: int, status: int) -> None:
        """A child of ours has ended; maybe a shim."""
        for shim in list(self.all.values()):
            if shim.pid == pid:
                self._dead(shim, status)

    def _watch(self, shim: Shim, pid: int) -> None:
        shim.pid, shim.pidfd, shim.start_time = pid, os.pidfd_open(pid), start_time(pid)
        self._loop.watch(shim.pidfd, lambda: self._ended(shim, pid))

    def _ended(self, shim: Shim, pid: int) -> None:
        """By pidfd, so also for one that is no child of ours."""
        with contextlib.suppress(ChildProcessError):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self._dead(shim, status)
                return
        if shim.pid == pid:
            self._dead(shim, None)

    def _dead(self, shim: Shim, status: int | None) -> None:
        self._loop.unwatch(shim.pidfd)
        os.close(shim.pidfd)
        how = "" if status is None else f", {_how(status)}"
        log.info("sandbox %s: shim %d ended%s", shim.sandbox_id[:12], shim.pid, how)
        shim.pid, shim.pidfd, shim.start_time = 0, -1, 0
        if status == 0:
            shim.store.clear()  # it left because it was told to: there is no successor
        _tell(shim, Unavailable(f"the shim ended at its start{how}"))
        callbacks, shim.when_dead = shim.when_dead, []
        for callback in callbacks:
            callback()

    def _late(self, shim: Shim, pid: int) -> None:
        if shim.pid == pid and shim.when_ready:
            log.error("sandbox %s: its shim does not get ready", shim.sandbox_id[:12])
            _kill(shim, signal.SIGKILL)


def _kill(shim: Shim, number: signal.Signals) -> None:
    if shim.pid:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(shim.pidfd, number)


def _tell(shim: Shim, error: HyperpodError | None) -> None:
    outcomes, shim.when_ready = shim.when_ready, []
    for outcome in outcomes:
        outcome(error)


def _how(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"exit code {code}" if code >= 0 else f"signal {-code}"
