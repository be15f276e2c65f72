"""The standard streams of one process as a set: made before it, joined to crun, ended after it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import struct
import termios
from collections.abc import Callable

from hyperpod.agent.streams import InputStream, OutputStream, Terminal
from hyperpod.errors import DeadlineExceeded, FailedPrecondition, NotFound

PIPE_BYTES = 256 * 1024
"""Buffer of a pipe; Linux gives 64 KiB, which costs a fast writer a wake-up per 64 KiB."""

EOF_TIMEOUT = 2.0
"""Seconds after a process's end for its pipes to end; another process may have inherited them."""

CONSOLE_TIMEOUT = 10.0


def _closer(fd: int) -> Callable[[], None]:
    return lambda: os.close(fd)


class ProcessIO:
    """Streams of a process. They exist, and may be opened by the host, before the process does."""

    def __init__(self, *, tty: bool, stdin: bool, ends_with_peer: bool, eof_closes: bool) -> None:
        self.tty = tty
        self.stdin = InputStream(ends_with_peer=ends_with_peer, eof_closes=eof_closes) if stdin else None
        self.stdout = OutputStream()
        self.stderr = None if tty else OutputStream()
        self._terminal: Terminal | None = None

    def stream(self, name: str) -> InputStream | OutputStream:
        """Raises NotFound for a stream that this process has not."""
        found = {"stdin": self.stdin, "stdout": self.stdout, "stderr": self.stderr}.get(name)
        if found is None:
            raise NotFound(f"the process has no {name}")
        return found

    def resize(self, rows: int, cols: int) -> None:
        """Raises FailedPrecondition without a running terminal."""
        if self._terminal is None or self._terminal.fd < 0:
            raise FailedPrecondition("the process has no terminal")
        fcntl.ioctl(self._terminal.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def attach_terminal(self, master: int) -> None:
        os.set_blocking(master, False)
        self._terminal = terminal = Terminal(master)
        self.stdout.start(master, terminal.use())
        if self.stdin is not None:
            self.stdin.start(master, terminal.use())

    async def wait_for_output(self, timeout: float = EOF_TIMEOUT) -> None:
        """Until all output is read, at most `timeout` seconds."""
        outputs = [s.ended.wait() for s in (self.stdout, self.stderr) if s is not None]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await asyncio.gather(*outputs)

    def hang_up(self) -> None:
        """Nobody is there any more: a terminal is closed, pipes are read into nothing, so that who is told to
        leave can do so in its own way instead of dying of a broken pipe."""
        if self.tty:
            self.close()
            return
        self.process_ended()
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.discard()

    def end_when_idle(self, grace: float) -> None:
        """The process has ended: its outputs end with their pipes, or after `grace` seconds of silence."""
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.end_when_idle(grace)

    def process_ended(self) -> None:
        """Nobody will read the input any more."""
        if self.stdin is not None:
            self.stdin.close_pipe()

    def close(self) -> None:
        """Forget all streams."""
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                stream.close()


def null_device() -> str:
    """A path to /dev/null by a read-only mount, good as long as this process lives. It takes input all the same,
    but crun 1.8 cannot give it to the user of a container, who could then shut it for the whole machine."""
    from hyperpod import mountapi

    device = os.open(os.devnull, os.O_PATH | os.O_CLOEXEC)
    try:
        tree = mountapi.clone_tree(device)
    finally:
        os.close(device)
    mountapi.set_attributes(tree, b"", attributes=mountapi.MOUNT_ATTR_RDONLY, recursive=False)
    return f"/proc/self/fd/{tree}"


class Pipes:
    """The pipes for one start: `child` fds go to crun as 0, 1, 2; `commit` joins ours to the streams.

    `null`: read and written where there is none. `owner`: who may open them by /proc/self/fd, if not root."""

    def __init__(self, io: ProcessIO, null: str = os.devnull, owner: tuple[int, int] | None = None) -> None:
        self._io, self._owner = io, owner
        self._ours: list[int] = []
        null_fd = os.open(null, os.O_RDWR | os.O_CLOEXEC)
        self.child = [null_fd, null_fd, null_fd]
        self._close = {null_fd}
        if io.tty:
            return
        if io.stdin is not None:
            self.child[0], ours = self._pipe(ours_writes=True)
            self._stdin = ours
        self.child[1], self._stdout = self._pipe(ours_writes=False)
        self.child[2], self._stderr = self._pipe(ours_writes=False)

    def _pipe(self, *, ours_writes: bool) -> tuple[int, int]:
        reading, writing = os.pipe2(os.O_CLOEXEC)
        theirs, ours = (reading, writing) if ours_writes else (writing, reading)
        os.set_blocking(ours, False)
        if self._owner is not None:
            os.fchown(theirs, *self._owner)
        self._close.add(theirs)
        self._ours.append(ours)
        # Refused over the host's limit for one user's pipes: the default size does.
        with contextlib.suppress(PermissionError):
            fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        return theirs, ours

    def commit(self) -> None:
        """The process runs: its streams begin."""
        io, self._ours = self._io, []
        if io.tty:
            return
        if io.stdin is not None:
            io.stdin.start(self._stdin, _closer(self._stdin))
        io.stdout.start(self._stdout, _closer(self._stdout))
        assert io.stderr is not None
        io.stderr.start(self._stderr, _closer(self._stderr))

    def close(self) -> None:
        """Close the child's ends, and ours too unless committed."""
        for fd in (*self._close, *self._ours):
            os.close(fd)
        self._close.clear()
        self._ours.clear()


class ConsoleSocket:
    """Where crun sends the master side of a terminal that it made inside the container."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.bind(path)
        self._socket.listen(1)
        self._socket.setblocking(False)

    async def receive(self) -> int:
        """The fd of the terminal. Raises DeadlineExceeded, FailedPrecondition."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONSOLE_TIMEOUT):
                connection, _ = await loop.sock_accept(self._socket)
        except TimeoutError as exc:
            raise DeadlineExceeded("crun sent no terminal") from exc
        with connection:
            connection.setblocking(True)
            connection.settimeout(1.0)
            _, fds, _, _ = socket.recv_fds(connection, 256, 1)
        if not fds:
            raise FailedPrecondition("crun sent no terminal")
        os.set_inheritable(fds[0], False)
        return fds[0]

    def close(self) -> None:
        self._socket.close()
        os.unlink(self.path)
