"""Runs one short program: input and bounded output in memory, a deadline, its whole session killed at the end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hyperpod.errors import NetworkError

MAX_STDOUT = 1 << 20
STDERR_TAIL = 4096
DRAIN = 1.0
"""Seconds for the rest of the output after the program's end: a grandchild may hold the pipes."""


@dataclass(frozen=True)
class Finished:
    """`code` is negative for a signal; `stderr` the last 4 KiB."""

    code: int
    stdout: bytes
    stderr: bytes


async def run(
    argv: Sequence[str], *, what: str, stdin: bytes, env: Mapping[str, str], timeout: float
) -> Finished:
    """Run to the end. Raises NetworkError that names `what`: missing, too slow, or too much output."""
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            env=dict(env),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as exc:
        raise NetworkError(f"{what}: cannot run {argv[0]}: {exc.strerror}") from exc
    assert process.stdin and process.stdout and process.stderr
    loop = asyncio.get_running_loop()
    out, err = bytearray(), bytearray()
    ended = loop.create_task(process.wait(), name=f"{what}/wait")
    reading = loop.create_task(_collect(process.stdout, out), name=f"{what}/stdout")
    tailing = loop.create_task(_tail(process.stderr, err), name=f"{what}/stderr")
    try:
        async with asyncio.timeout(timeout):
            await _feed(process.stdin, stdin)
            await asyncio.wait([ended, reading], return_when=asyncio.FIRST_COMPLETED)
            if len(out) > MAX_STDOUT:
                raise NetworkError(f"{what} printed more than {MAX_STDOUT} bytes; it was killed")
            code = await ended
        await asyncio.wait([reading, tailing], timeout=DRAIN)
    except TimeoutError as exc:
        raise NetworkError(f"{what} did not end within {timeout:g} s; it was killed") from exc
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for task in (reading, tailing):
            task.cancel()
        await asyncio.gather(reading, tailing, process.wait(), return_exceptions=True)
        # A grandchild in a session of its own may hold the pipes: our ends are closed all the same.
        process._transport.close()  # type: ignore[attr-defined]
    return Finished(code, bytes(out[:MAX_STDOUT]), bytes(err))


async def _feed(stream: asyncio.StreamWriter, data: bytes) -> None:
    """A program that does not read its input is none the worse for it."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        stream.write(data)
        await stream.drain()
    stream.close()


async def _collect(stream: asyncio.StreamReader, into: bytearray) -> None:
    while len(into) <= MAX_STDOUT and (piece := await stream.read(65536)):
        into += piece


async def _tail(stream: asyncio.StreamReader, into: bytearray) -> None:
    while piece := await stream.read(4096):
        into += piece
        del into[:-STDERR_TAIL]
