"""The one owner of waitpid in the agent.

Every child is started here and reaped here; a container's first process becomes our child when crun leaves
(PID 1, or child subreaper). Anything else that reaps beside this loses exit codes, so asyncio's and the
subprocess module's process classes are not used.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Iterator, Mapping, Sequence

from hyperpod.errors import DeadlineExceeded, Unavailable

log = logging.getLogger(__name__)

OUTPUT_LIMIT = 64 * 1024
"""Bytes kept of what a helper program prints."""

_RESET = [signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM, signal.SIGCHLD]
"""Python ignores the first two; an ignored signal would stay ignored through exec, into the containers."""

_ENV: Mapping[str, str] = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}


def exit_code(status: int) -> int:
    """From a wait status: 0..255, or 128 + the number of the signal."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def _oom_score(value: int | None) -> Iterator[None]:
    """Children started in here inherit the score; ours is as before afterwards. None: as it is.

    A host may forbid a lower one (it takes CAP_SYS_RESOURCE): then they have ours."""
    if value is None:
        yield
        return
    path = "/proc/self/oom_score_adj"
    with open(path) as file:
        before = file.read()
    with contextlib.suppress(PermissionError), open(path, "w") as file:
        file.write(str(value))
    try:
        yield
    finally:
        with open(path, "w") as file:
            file.write(before)


class Reaper:
    """Reaps all children of this process; made and closed on the event loop's thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._watched: dict[int, asyncio.Future[int]] = {}
        self._windows: dict[object, dict[int, int]] = {}
        # Not the loop's own add_signal_handler: to refuse coroutines it imports `inspect`, 65 ms in a guest.
        signal.signal(signal.SIGCHLD, self._wake)
        # A signal that comes when the loop is about to sleep would be seen at the next event only, which may be
        # hours away: so it writes to a pipe. A loop with handlers of its own has one, and puts that here later.
        self._woken, self._waking = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._loop.add_reader(self._woken, self._wake_up)
        signal.set_wakeup_fd(self._waking, warn_on_full_buffer=False)

    def close(self) -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if (current := signal.set_wakeup_fd(-1)) != self._waking:
            signal.set_wakeup_fd(current)
        self._loop.remove_reader(self._woken)
        os.close(self._woken)
        os.close(self._waking)

    def _wake(self, _number: int, _frame: object) -> None:
        """Between two instructions of anything: only the loop may change what it changes."""
        self._loop.call_soon_threadsafe(self._reap)

    def _wake_up(self) -> None:
        os.read(self._woken, 4096)
        self._reap()

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            future = self._watched.pop(pid, None)
            if future is not None:
                if not future.done():
                    future.set_result(exit_code(status))
                continue
            for window in self._windows.values():
                window[pid] = exit_code(status)

    @contextlib.contextmanager
    def adopting(self) -> Iterator[dict[int, int]]:
        """While open, exits of children that nobody watches are kept in the dict it gives (pid: code).

        A grandchild whose pid is learnt late (from crun's pid file) may have ended by then; outside of such
        a window an orphan's exit is forgotten at once, so that a reused pid never gets an old code.
        """
        key, window = object(), dict[int, int]()
        self._windows[key] = window
        try:
            yield window
        finally:
            del self._windows[key]

    def watch(self, pid: int, window: dict[int, int] | None = None) -> asyncio.Future[int]:
        """A future of the exit code of our (possibly adopted) child `pid`."""
        future: asyncio.Future[int] = self._loop.create_future()
        if window is not None and pid in window:
            future.set_result(window[pid])
        else:
            self._watched[pid] = future
        return future

    def spawn(
        self,
        argv: Sequence[str],
        stdin: int,
        stdout: int,
        stderr: int,
        *more: int,
        oom_score_adj: int | None = None,
        environment: Mapping[str, str] = _ENV,
    ) -> tuple[int, asyncio.Future[int]]:
        """Start a program in a session of its own with these fds as 0, 1, 2 and on: pid, exit code future.

        Raises Unavailable when it cannot be started.
        """
        # They are first moved out of the way, since one may be 0, 1 or 2 itself. The copies' numbers ascend from 3
        # at least, so none is overwritten before it is used.
        moved = [os.dup(fd) for fd in (stdin, stdout, stderr, *more)]
        try:
            actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(moved)]
            with _oom_score(oom_score_adj):
                pid = os.posix_spawnp(
                    argv[0],
                    list(argv),
                    environment,
                    file_actions=actions,
                    setsid=True,
                    setsigmask=(),
                    setsigdef=_RESET,
                )
        except OSError as exc:
            raise Unavailable(f"{argv[0]} cannot be started: {exc.strerror}") from exc
        finally:
            for fd in moved:
                os.close(fd)
        return pid, self.watch(pid)

    async def run(
        self,
        argv: Sequence[str],
        timeout: float,
        *,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        more: Sequence[int] = (),
        oom_score_adj: int | None = None,
    ) -> tuple[int, bytes]:
        """Run a helper program to its end; gives its exit code and what it printed to the fds not given.

        `more` become its fds 3 and on.

        At its timeout it is killed and DeadlineExceeded raised. Output beyond OUTPUT_LIMIT is dropped.
        """
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(writing, True)
        collected = bytearray()
        try:
            try:
                pid, ended = self.spawn(
                    argv,
                    null if stdin is None else stdin,
                    writing if stdout is None else stdout,
                    writing if stderr is None else stderr,
                    *more,
                    oom_score_adj=oom_score_adj,
                )
            finally:
                os.close(writing)
                os.close(null)
            self._loop.add_reader(reading, self._collect, reading, collected)
            try:
                code = await asyncio.wait_for(asyncio.shield(ended), timeout)
            except (TimeoutError, asyncio.CancelledError) as exc:
                if not ended.done():
                    os.kill(pid, signal.SIGKILL)
                if isinstance(exc, asyncio.CancelledError):
                    raise
                raise DeadlineExceeded(f"{argv[0]} did not end within {timeout:g} s") from exc
            self._collect(reading, collected)
        finally:
            self._loop.remove_reader(reading)
            os.close(reading)
        return code, bytes(collected)

    def _collect(self, fd: int, into: bytearray) -> None:
        while True:
            try:
                data = os.read(fd, 16384)
            except BlockingIOError:
                return
            if not data:
                self._loop.remove_reader(fd)
                return
            into += data[: max(0, OUTPUT_LIMIT - len(into))]
