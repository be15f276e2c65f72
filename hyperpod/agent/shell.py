"""The operator's shells: processes beside the containers, in the agent's own root and namespaces.

The control port starts one, which nobody but the host's root reaches; whoever opens its `process` stream then holds
it: it ends with that connection, and when nobody comes. Its cgroup is beside the containers', none of theirs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from typing import TYPE_CHECKING, Any

from hyperpod.agent.cgroups import KILL_TIMEOUT
from hyperpod.agent.process import Pipes, ProcessIO
from hyperpod.agent.sessions import HANGUP_GRACE
from hyperpod.errors import (
    AlreadyExists,
    FailedPrecondition,
    HyperpodError,
    InvalidArgument,
    NotFound,
    ProtocolError,
    ResourceExhausted,
)
from hyperpod.wire.process import OUTPUT_GRACE, decode_resize, encode_exit
from hyperpod.wire.stdio import Frame, FrameType, Open, encode_opened

if TYPE_CHECKING:
    from hyperpod.agent.streams import Peer, Stream
    from hyperpod.agent.tools import Tools

log = logging.getLogger(__name__)

MAX_SHELLS = 4
CLAIM_TIMEOUT = 10.0
"""Seconds from a shell's start until somebody must have opened it."""

MEMORY_MAX, PIDS_MAX = 24 << 20, 128
"""Of a guest's shells together: of what is kept from the containers (environment.RESERVE_BYTES), so that a careless
operator ends in the shell's own out-of-memory kill, and not in the agent's."""

GUEST_PROGRAM = ("/usr/lib/hyperpod/busybox", "sh")
HOST_PROGRAM = ("/bin/sh",)

_BEGINNING = """
tty=$1; shift
for file; do echo 0 >"$file" || exit 126; done
[ -z "$tty" ] || exec <>"$tty" >&0 2>&0
cd / && unset tty file && exec """
"""Run by the shell itself: so nothing of it ever runs outside its cgroup, and a session's terminal is the first one
that its leader opens."""


class Shell:
    """One process with its streams."""

    def __init__(self, ident: str, cgroup: str, *, tty: bool, stdin: bool) -> None:
        self.id, self.cgroup = ident, cgroup
        self.io = ProcessIO(tty=tty, stdin=stdin, ends_with_peer=True, eof_closes=True)
        self.pid = 0
        self.exited: asyncio.Future[int] | None = None
        self.held = asyncio.Event()
        """Its `process` stream has been opened."""


class Shells:
    """All of this agent. Raises hyperpod errors."""

    def __init__(self, tools: Tools) -> None:
        self.tools = tools
        self._parent = f"{tools.layout.cgroup}-operator"
        self._known: dict[str, Shell] = {}

    def start(self, ident: str, process: dict[str, Any], *, tty: bool, stdin: bool) -> int:
        """Gives the pid. Raises AlreadyExists, ResourceExhausted, InvalidArgument, Unavailable: no shell to run."""
        environment = _environment(process)
        if ident in self._known:
            raise AlreadyExists(f"shell {ident} exists")
        if len(self._known) >= MAX_SHELLS:
            raise ResourceExhausted(f"there are {MAX_SHELLS} shells already")
        shell = Shell(ident, f"{self._parent}/{ident}", tty=tty, stdin=stdin)
        try:
            pid = self._spawn(shell, environment)
        except (HyperpodError, OSError):
            shell.io.close()
            self.tools.cgroups.remove(shell.cgroup)
            raise
        self._known[ident] = shell
        self.tools.owner.spawn(f"shell/{ident}", self._life(shell))
        log.warning("operator's shell %s: pid %d", ident, pid)
        return pid

    def _spawn(self, shell: Shell, environment: dict[str, str]) -> int:
        cgroups, io = self.tools.cgroups, shell.io
        cgroups.make(shell.cgroup)
        guest = self.tools.layout.guest
        if guest:
            cgroups.limit(self._parent, MEMORY_MAX, PIDS_MAX)
        program = GUEST_PROGRAM if guest else HOST_PROGRAM
        pipes, terminal = Pipes(io), (-1, -1)
        try:
            terminal = os.openpty() if io.tty else terminal
            child = [terminal[1]] * 3 if io.tty else pipes.child
            name = os.ttyname(terminal[1]) if io.tty else ""
            script = _BEGINNING + " ".join(program)
            argv = [*program, "-c", script, "sh", name, *cgroups.member_files(shell.cgroup)]
            shell.pid, shell.exited = self.tools.reaper.spawn(
                argv, *child, oom_score_adj=0, environment=environment
            )
            if io.tty:
                io.attach_terminal(terminal[0])
                terminal = (-1, terminal[1])
            pipes.commit()
        finally:
            pipes.close()
            for fd in terminal:
                if fd >= 0:
                    os.close(fd)
        shell.exited.add_done_callback(lambda _: io.process_ended())
        return shell.pid

    def _get(self, ident: str) -> Shell:
        if (found := self._known.get(ident)) is None:
            raise NotFound(f"there is no shell {ident[:32]}")
        return found

    def stream(self, what: Open) -> Stream:
        """Raises NotFound, FailedPrecondition."""
        shell = self._get(what.exec_id)
        if what.stream != "process":
            return shell.io.stream(what.stream)
        if shell.held.is_set():
            raise FailedPrecondition(f"shell {shell.id} has its client already")
        return ShellStream(self, shell)

    async def _life(self, shell: Shell) -> None:
        try:
            async with asyncio.timeout(CLAIM_TIMEOUT):
                await shell.held.wait()
        except TimeoutError:
            log.warning("operator's shell %s: nobody came", shell.id)
            await self._end(shell)

    async def hang_up(self, shell: Shell) -> None:
        """Its client is gone: end it, and all that it has started."""
        assert shell.exited is not None
        shell.io.hang_up()
        self.tools.cgroups.signal_all(shell.cgroup, signal.SIGHUP)
        await asyncio.wait([shell.exited], timeout=HANGUP_GRACE)
        await self._end(shell)

    async def _end(self, shell: Shell) -> None:
        try:
            await self._kill(shell)
        except HyperpodError as exc:
            log.warning("operator's shell %s: %s", shell.id, exc)
        finally:
            if self._known.pop(shell.id, None) is not None:
                log.warning("operator's shell %s has ended", shell.id)
            shell.io.close()
            self.tools.cgroups.remove(shell.cgroup if self._known else self._parent)

    async def _kill(self, shell: Shell) -> None:
        """Itself first: it may be about to join its cgroup, and then has nobody in there yet."""
        assert shell.exited is not None
        if not shell.exited.done():
            os.kill(shell.pid, signal.SIGKILL)
            await asyncio.wait([shell.exited], timeout=KILL_TIMEOUT)
        await self.tools.cgroups.kill(shell.cgroup)

    async def close(self) -> None:
        """End all at once."""
        for shell in list(self._known.values()):
            await self._end(shell)


class ShellStream:
    """The `process` stream of one shell; speaks wire.process, without START."""

    def __init__(self, shells: Shells, shell: Shell) -> None:
        self._shells, self._shell = shells, shell
        self._peer: Peer | None = None

    def attach(self, peer: Peer, what: Open) -> None:
        self._peer = peer
        self._shell.held.set()
        peer.send([encode_opened(0)])
        self._shells.tools.owner.spawn(f"shell-exit/{self._shell.id}", self._watch())

    def detach(self, peer: Peer) -> None:
        self._peer = None
        owner = self._shells.tools.owner
        if not owner.closed:
            owner.spawn(f"shell-end/{self._shell.id}", self._shells.hang_up(self._shell))

    def flush(self) -> None:
        """There is never much to send."""

    def receive(self, frame: Frame) -> None:
        """RESIZE. Raises ProtocolError."""
        if frame.type is not FrameType.RESIZE:
            raise ProtocolError(f"stdio: {frame.type.name} to a shell")
        rows, columns = decode_resize(frame.offset)
        try:
            self._shell.io.resize(rows, columns)
        except (HyperpodError, OSError) as exc:
            log.info("operator's shell %s: %s", self._shell.id, exc)

    async def _watch(self) -> None:
        assert self._shell.exited is not None
        code = await asyncio.shield(self._shell.exited)
        self._shell.io.end_when_idle(OUTPUT_GRACE)
        if self._peer is not None:
            self._peer.send([encode_exit(code)])


def _environment(process: dict[str, Any]) -> dict[str, str]:
    """Of an OCI process, of which nothing else counts. Raises InvalidArgument."""
    items = process.get("env", [])
    if not isinstance(items, list) or not all(isinstance(x, str) and "=" in x[1:] for x in items):
        raise InvalidArgument("a shell's env is a list of NAME=value")
    return dict(item.split("=", 1) for item in items)
