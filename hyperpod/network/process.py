"""Runs one short program: input and bounded output in memory, a deadline, its whole session killed at the end.

Not asyncio's own subprocess: its wait() lasts until everybody has closed the pipes (before Python 3.13), so one
grandchild that lives on would hold up a pod.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from hyperpod import processes
from hyperpod.errors import NetworkError

MAX_STDOUT = 1 << 20
STDERR_TAIL = 4096
DRAIN = 0.5
"""Seconds for the rest of the output after the program's end: a grandchild may hold the pipes."""

REAP = 5.0
"""Seconds for a killed program to be gone."""

NOTED = 'at() { echo "$1 ${22}"; }; read -r stat </proc/$$/stat; at $stat >"$1"; shift; exec "$@"'
"""For sh: writes what processes.remember does before it becomes the program. We could be killed before we did."""

_left: list[subprocess.Popen[bytes]] = []
"""Programs whose caller was cancelled, to be reaped."""


@dataclass(frozen=True)
class Finished:
    """`code` is negative for a signal; `stderr` the last 4 KiB."""

    code: int
    stdout: bytes
    stderr: bytes


async def run(
    argv: Sequence[str],
    *,
    what: str,
    stdin: bytes,
    env: Mapping[str, str],
    timeout: float,
    note: Path | None = None,
) -> Finished:
    """Run to the end. Raises NetworkError that names `what`: missing, too slow, or too much output.

    With a `note` the program goes on when its caller is cancelled or dies; that file tells `outlived` of it."""
    loop = asyncio.get_running_loop()
    _left[:] = [process for process in _left if process.poll() is None]
    async with _output() as (out_end, out_reader), _output() as (err_end, err_reader):
        command = argv if note is None else ["/bin/sh", "-c", NOTED, "sh", str(note), *argv]
        process, goes_on = _start(command, what, stdin, env, out=out_end, err=err_end), False
        out, err = bytearray(), bytearray()
        reading = loop.create_task(_collect(out_reader, out), name=f"{what}/stdout")
        tailing = loop.create_task(_tail(err_reader, err), name=f"{what}/stderr")
        try:
            with _end_of(process.pid) as ended:
                try:
                    async with asyncio.timeout(timeout):
                        await asyncio.wait([ended, reading], return_when=asyncio.FIRST_COMPLETED)
                        if len(out) <= MAX_STDOUT:
                            await asyncio.shield(ended)
                            await asyncio.wait([reading, tailing], timeout=DRAIN)
                except TimeoutError as exc:
                    raise NetworkError(f"{what} did not end within {timeout:g} s; it was killed") from exc
                except asyncio.CancelledError:
                    goes_on = note is not None
                    raise
                finally:
                    if goes_on:
                        _left.append(process)
                    else:
                        with contextlib.suppress(ProcessLookupError):
                            os.killpg(process.pid, signal.SIGKILL)
                        await asyncio.wait([ended], timeout=REAP)
                        process.poll()
                        if note is not None:
                            note.unlink(missing_ok=True)
        finally:
            reading.cancel()
            tailing.cancel()
            await asyncio.gather(reading, tailing, return_exceptions=True)
    if len(out) > MAX_STDOUT:
        raise NetworkError(f"{what} printed more than {MAX_STDOUT} bytes; it was killed")
    return Finished(process.returncode, bytes(out), bytes(err))


async def outlived(note: Path, timeout: float) -> None:
    """Wait for the end of what a `run` with this note has left, of this process or one before; it is killed after
    `timeout` seconds."""
    if pid := processes.recall(note):
        with contextlib.suppress(ProcessLookupError), _end_of(pid) as ended:
            await asyncio.wait([ended], timeout=timeout)
            if not ended.done() and processes.recall(note) == pid:
                os.killpg(pid, signal.SIGKILL)
                await asyncio.wait([ended], timeout=REAP)
    note.unlink(missing_ok=True)


def _start(
    argv: Sequence[str], what: str, stdin: bytes, env: Mapping[str, str], *, out: int, err: int
) -> subprocess.Popen[bytes]:
    """Its input is a file, so nobody has to feed it. The ends of the pipes are closed here."""
    source = os.memfd_create("stdin", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(source), "wb") as file:
            file.write(stdin)
        os.lseek(source, 0, os.SEEK_SET)
        return subprocess.Popen(
            argv, env=dict(env), stdin=source, stdout=out, stderr=err, start_new_session=True
        )
    except OSError as exc:
        raise NetworkError(f"{what}: cannot run {argv[0]}: {exc.strerror}") from exc
    finally:
        for fd in (source, out, err):
            os.close(fd)


@asynccontextmanager
async def _output() -> AsyncIterator[tuple[int, asyncio.StreamReader]]:
    """The writing end, for the child, which `_start` closes; and a reader."""
    loop = asyncio.get_running_loop()
    ours, theirs = os.pipe()
    reader = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(ours, "rb", buffering=0)
    )
    try:
        yield theirs, reader
    finally:
        transport.close()


@contextlib.contextmanager
def _end_of(pid: int) -> Iterator[asyncio.Future[None]]:
    """Done when the process has ended; it is for the caller to reap."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    fd = os.pidfd_open(pid)

    def on_end() -> None:
        loop.remove_reader(fd)
        if not ended.done():
            ended.set_result(None)

    loop.add_reader(fd, on_end)
    try:
        yield ended
    finally:
        loop.remove_reader(fd)
        os.close(fd)


async def _collect(stream: asyncio.StreamReader, into: bytearray) -> None:
    while len(into) <= MAX_STDOUT and (piece := await stream.read(65536)):
        into += piece


async def _tail(stream: asyncio.StreamReader, into: bytearray) -> None:
    while piece := await stream.read(4096):
        into += piece
        del into[:-STDERR_TAIL]
