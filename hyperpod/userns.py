"""A user namespace made by another process: who has threads cannot make one, nor join one.

What is in it (a network namespace), or is made with it (an idmapped mount), keeps it afterwards.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
from collections.abc import Iterator
from pathlib import Path

TIMEOUT = 10.0
"""Seconds for the process to be there; 5 ms are usual."""


@contextlib.contextmanager
def held(uids: str, gids: str, *more: str) -> Iterator[int]:
    """The pid of a process in a new user namespace with these lines for its maps, until the context's end.

    `more`: options of unshare(1) for further namespaces, which that one owns. Blocks. Raises OSError.
    """
    argv = ["unshare", "--user", *more, "cat"]
    process = subprocess.Popen(  # cat answers once the namespaces are made, and ends with us
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(b"\n")
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(TIMEOUT):
                raise TimeoutError(f"unshare did not answer within {TIMEOUT:g} s")
        if process.stdout.read(1) != b"\n":
            said = process.stderr.read(1000).decode(errors="replace").strip()
            raise OSError(f"no user namespace can be made: {said or 'unshare ended'}")
        for name, line in (("uid_map", uids), ("gid_map", gids)):
            Path(f"/proc/{process.pid}/{name}").write_text(f"{line}\n")
        yield process.pid
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()


@contextlib.contextmanager
def descriptor(uids: str, gids: str) -> Iterator[int]:
    """A descriptor of a new user namespace. Blocks. Raises OSError."""
    with held(uids, gids) as pid:
        fd = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
