"""Environment variables that are not UTF-8, handed to a process past its OCI spec; images/envexec.c does the rest.

crun starts that program out of a sealed copy in memory, under descriptor 3: nothing of it appears in the
container, and no root in a container that shares this kernel can write to the original.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
from dataclasses import dataclass
from typing import Any

from hyperpod.errors import FailedPrecondition, HyperpodError, InvalidArgument, NotFound
from hyperpod.tasks import bounded

PROGRAM = "/usr/lib/hyperpod/envexec"
"""Where the guest image has it, and a host's package; HYPERPOD_ENVEXEC names another place."""

DESCRIPTORS = 3
"""That a process gets for it, from 3 on."""

START_TIMEOUT = 30.0
"""Seconds from crun's end to the program's exec."""

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@dataclass(frozen=True)
class Variables:
    """`block`: each variable and a NUL. `program`: argv[0] of what is wanted, for errors."""

    block: bytes
    program: str


def take(process: dict[str, Any]) -> Variables | None:
    """Take `binaryEnv` (spec/oci.py) out of an OCI process object, and have crun start envexec instead."""
    items = process.pop("binaryEnv", None)
    if not items:
        return None
    try:
        variables = [bytes.fromhex(item) for item in items]
        program = str(process["args"][0])
        process["args"] = ["/proc/self/fd/3", *process["args"]]
    except (LookupError, TypeError, ValueError) as exc:
        raise InvalidArgument(f"binaryEnv of the process: {exc!r}") from exc
    if not all(b"=" in item and b"\0" not in item for item in variables):
        raise InvalidArgument("binaryEnv of the process: a variable without '=', or with a NUL")
    return Variables(b"".join(item + b"\0" for item in variables), program)


def _memory_file(name: str, content: bytes) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
        os.fchmod(fd, 0o555)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd


class Handover:
    """What one start needs. `close` it in any case. Raises FailedPrecondition when envexec is not installed."""

    def __init__(self, variables: Variables) -> None:
        self._program = variables.program
        path = os.environ.get("HYPERPOD_ENVEXEC", PROGRAM)
        try:
            with open(path, "rb") as file:
                code = file.read()
        except OSError as exc:
            raise FailedPrecondition(
                f"environment variables that are not UTF-8 need {path}: {exc.strerror}"
            ) from exc
        self._report, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.child = [writing]
        """Descriptors for the child, as its 3, 4 and 5."""
        try:
            os.set_blocking(writing, True)
            self.child.insert(0, _memory_file("environment", variables.block))
            self.child.insert(0, _memory_file("envexec", code))
        except OSError:
            self.close()
            raise

    async def confirm(self) -> None:
        """Once crun has started it: wait for the exec. Raises NotFound, FailedPrecondition as crun's start does."""
        self._close_child()
        data = await bounded(self._read(), START_TIMEOUT, f"the start of {self._program[:200]!r}")
        if data:
            raise failure(self._program, int.from_bytes(data[:4], "little"))

    async def _read(self) -> bytes:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_reader(self._report, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(self._report)
        return os.read(self._report, 4)

    def _close_child(self) -> None:
        while self.child:
            os.close(self.child.pop())

    def close(self) -> None:
        """Safe to repeat."""
        self._close_child()
        if self._report >= 0:
            os.close(self._report)
            self._report = -1


def failure(program: str, number: int) -> HyperpodError:
    """For what envexec reported: in crun's words, so that a missing program is told alike."""
    text = os.strerror(number)
    if number in (errno.ENOENT, errno.ENOTDIR):
        return NotFound(f"executable file `{program[:200]}` not found in $PATH: {text}")
    return FailedPrecondition(f"open executable: {text}")
