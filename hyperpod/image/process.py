"""Runs one helper program to its end: bounded output, a stall clock, nothing left behind when cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hyperpod.errors import DeadlineExceeded, ImageError, Unavailable

STDERR_TAIL = 8192
_KILL_WAIT = 10.0


@dataclass(frozen=True)
class Finished:
    """Outcome of a program; `stderr` is its last 8 KiB."""

    code: int
    stdout: bytes
    stderr: bytes


async def run(
    argv: Sequence[str],
    *,
    what: str,
    cwd: Path,
    env: dict[str, str],
    stall: float,
    alive: Callable[[], object],
    stdin: int = asyncio.subprocess.DEVNULL,
    max_stdout: int,
    on_line: Callable[[bytes], None] | None = None,
) -> Finished:
    """Run `argv` in a session of its own.

    `alive` returns any value; when neither it nor stdout changes for `stall` seconds, or on cancellation, the
    whole session is killed. `on_line` takes stdout line by line instead of collecting it. Raises
    DeadlineExceeded that names `what`, ImageError when stdout exceeds `max_stdout` bytes, Unavailable when
    the program is missing.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            cwd=cwd,
            env=env,
            stdin=stdin,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            limit=max_stdout,
        )
    except FileNotFoundError as exc:
        raise Unavailable(f"{what}: cannot run {argv[0]}: {exc.strerror}; install its package") from exc
    assert process.stdout and process.stderr
    heard = [0]
    try:
        async with asyncio.TaskGroup() as group:
            out = group.create_task(_collect(process.stdout, max_stdout, what, heard, on_line))
            err = group.create_task(_tail(process.stderr))
            watch = group.create_task(_watch(lambda: (heard[0], alive()), stall, what))
            code = await process.wait()
            await asyncio.wait([out, err], timeout=_KILL_WAIT)
            watch.cancel()
            _kill(process.pid)  # a grandchild that held the pipes
        return Finished(code, out.result(), err.result())
    except BaseExceptionGroup as group_error:
        raise group_error.exceptions[0] from None
    finally:
        _kill(process.pid)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_KILL_WAIT):
                await process.communicate()  # to the end of its pipes, so that their transports close


async def _collect(
    stream: asyncio.StreamReader,
    limit: int,
    what: str,
    heard: list[int],
    on_line: Callable[[bytes], None] | None,
) -> bytes:
    data = bytearray()
    while True:
        if on_line is not None:
            try:
                piece = await stream.readline()
            except ValueError as exc:
                raise ImageError(f"{what}: a line of more than {limit} bytes") from exc
        else:
            piece = await stream.read(65536)
        if not piece:
            return bytes(data)
        heard[0] += len(piece)
        if on_line is not None:
            on_line(piece)
            continue
        data += piece
        if len(data) > limit:
            raise ImageError(f"{what}: the answer is larger than {limit} bytes")


async def _tail(stream: asyncio.StreamReader) -> bytes:
    data = bytearray()
    while piece := await stream.read(4096):
        data += piece
        del data[:-STDERR_TAIL]
    return bytes(data)


async def _watch(sign: Callable[[], object], stall: float, what: str) -> None:
    loop = asyncio.get_running_loop()
    last, since = sign(), loop.time()
    while True:
        await asyncio.sleep(min(1.0, stall / 4))
        now = sign()
        if now != last:
            last, since = now, loop.time()
        elif loop.time() - since > stall:
            raise DeadlineExceeded(f"{what}: no progress for {stall:g} s")


def _kill(session: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)
