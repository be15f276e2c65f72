"""`python -m hyperpod.supervisor.forks FD SUPERVISOR_SOCKET LOG_LEVEL`: the nursery's own process, see `nursery`.

Messages on the SEQPACKET socket FD: "item" brings what a shim's predecessor stored, with its descriptors; "shim"
and "agent" fork one, and are answered with its pid. The end of the socket is the end of this process.
"""

from __future__ import annotations

import os
import sys
import types

# What threading, logging and random do after a fork is for locks that somebody may hold and numbers that somebody
# may draw: here is one thread, which holds none, and nobody draws. It would make 600 KB of each child its own.
os.register_at_fork = lambda **_: None

# Neither shim nor agent needs them: betterproto2, asyncio and hashlib do without, as in a guest, and every child's
# share of this process is smaller. betterproto2 and websockets load `email` and `zipfile` for their own version;
# whether betterproto2's fits the compiled messages the daemon sees, which has the same.
sys.modules.update(dict.fromkeys(("pydantic", "ssl", "_hashlib"), None))  # type: ignore[arg-type]
for _name, _values in (
    ("betterproto2._version", {"__version__": "", "check_compiler_version": lambda _: None}),
    ("websockets.version", {"version": ""}),
):
    sys.modules[_name] = types.ModuleType(_name)
    vars(sys.modules[_name]).update(_values)

import ctypes  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
import traceback  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import NoReturn  # noqa: E402

from grpclib.exceptions import GRPCError  # noqa: E402

from hyperpod.errors import HyperpodError, Unavailable  # noqa: E402
from hyperpod.shim import packets  # noqa: E402
from hyperpod.shim.service import Stored  # noqa: E402
from hyperpod.supervisor import children, linux, rehearsal  # noqa: E402
from hyperpod.wire.control import Request, decode_request, encode_error, encode_reply  # noqa: E402

_MALLOC = {-8: 1, -3: 512 * 1024, -1: 1024 * 1024}
"""mallopt(3). M_ARENA_MAX: an arena per thread would be memory per pod for nothing. M_MMAP_THRESHOLD and
M_TRIM_THRESHOLD, bytes: a shim that reads 256 KiB at once would else get and give back their pages each time, which
was a quarter of what a port-forward's way up costs. So it keeps up to a MiB that is free."""


class Forks:
    """Serves until its socket ends."""

    def __init__(self, sock: socket.socket, supervisor_socket: str, log_level: str) -> None:
        self._sock, self._supervisor, self._log_level = sock, supervisor_socket, log_level
        self._stored: Stored = {}

    def serve(self) -> None:
        """Does as little as can be: what is written here becomes its own in every process that was forked before.

        Raises OSError."""
        while self._sock.recv(1, socket.MSG_PEEK):
            between = os.fork()
            if between == 0:
                self._between()
            if os.waitpid(between, 0)[1]:
                return  # without an answer; the supervisor starts another nursery, and asks again

    def _between(self) -> NoReturn:
        """Takes one request and ends at once, so that the supervisor is the parent of what it has forked."""
        code = 70
        try:
            request = self._receive()
            try:
                run = self._prepare(request)
                pid = os.fork()
            except (OSError, HyperpodError) as exc:
                failure = Unavailable(f"no {request.op[:16]} was forked: {exc}")
                packets.send(self._sock, encode_error(request.id, failure))
            else:
                if pid == 0:
                    self._child(run)
                packets.send(self._sock, encode_reply(request.id, {"pid": pid}))
            code = 0
        except BaseException:  # noqa: BLE001  # it may never return into the parent's stack
            traceback.print_exc()
        finally:
            os._exit(code)

    def _receive(self) -> Request:
        """Raises OSError, ProtocolError."""
        while True:
            data, fds = packets.receive(self._sock)
            request = decode_request(data)
            if request.op != "item":
                return request
            self._stored[request.text("name")] = json.loads(request.text("state", len(data))), fds

    def _child(self, run: Callable[[], int]) -> NoReturn:
        """The rest of the child's life: it may never return into the parent's stack."""
        code = 70
        try:
            linux.reset_signals()
            self._sock.detach()  # `run` closes what is not its own
            code = run()
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
        finally:
            os._exit(code)

    def _prepare(self, request: Request) -> Callable[[], int]:
        """What the child is to do. Raises OSError."""
        if request.op == "agent":
            return children.agent_child(request.args, self._log_level)
        return children.shim_child(request.args, self._stored, self._supervisor, self._log_level)


def main(argv: list[str]) -> int:
    """Exit code."""
    fd, supervisor_socket, log_level = argv
    for parameter, value in _MALLOC.items():
        ctypes.CDLL(None).mallopt(parameter, value)
    linux.become_background(f"hyperpod-nursery {supervisor_socket}", ())
    for number in (signal.SIGINT, signal.SIGTERM):  # it ends with the supervisor, whose business they are
        signal.signal(number, signal.SIG_IGN)
    children.preload()
    try:
        rehearsal.rehearse(Path(supervisor_socket).parent / "rehearsal")
    except (HyperpodError, GRPCError, OSError) as exc:
        # Then each child has more to do for itself, that is all.
        logging.getLogger(__name__).warning("the nursery's rehearsal failed: %s", exc)
    gc.collect()
    gc.freeze()
    Forks(socket.socket(fileno=int(fd)), supervisor_socket, log_level).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
