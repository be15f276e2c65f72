"""The nursery: the process that shims and host agents are forked from, and the supervisor's line to it.

A forked child shares its parent's memory until either of the two writes to it, and a parent that serves sockets and
timers writes all the time. So it is a process that does nothing else, and has loaded nothing that they do not need
(hyperpod.supervisor.forks). What it forks becomes the supervisor's child: the process in between ends at once, and
the supervisor is the subreaper.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Mapping
from typing import Any

from hyperpod.errors import Unavailable
from hyperpod.shim import packets
from hyperpod.supervisor.store import Item
from hyperpod.wire.control import decode_reply, encode_request

log = logging.getLogger(__name__)

ANSWER = 20.0
"""Seconds for a fork; the first one waits until everything is loaded."""


class Nursery:
    """Started with the supervisor, and again when it has died."""

    def __init__(self, supervisor_socket: str, log_level: str) -> None:
        self._arguments = [supervisor_socket, log_level]
        self._sock = self._start()

    def close(self) -> None:
        """It ends by itself then."""
        self._sock.close()

    def spawn_agent(self, fields: Mapping[str, Any]) -> int:
        """Gives the pid. `fields`: of HostOptions, and `cgroups`. Raises Unavailable."""
        return self._spawn("agent", fields, {})

    def spawn_shim(self, fields: Mapping[str, Any], stored: Mapping[str, Item]) -> int:
        """Gives the pid. `fields`: of ShimSpec; the stored descriptors stay ours. Raises Unavailable."""
        return self._spawn("shim", fields, stored)

    def _spawn(self, kind: str, fields: Mapping[str, Any], stored: Mapping[str, Item]) -> int:
        for _ in range(2):
            try:
                return self._ask(kind, fields, stored)
            except TimeoutError as exc:
                self._sock.close()
                self._sock = self._start()
                raise Unavailable(f"no {kind} was forked within {ANSWER:g} s") from exc
            except OSError as exc:
                log.error("the nursery is gone (%s); starting another", exc.strerror)
                self._sock.close()
                self._sock = self._start()
        raise Unavailable(f"no {kind} can be forked: the nursery ends at its start")

    def _ask(self, kind: str, fields: Mapping[str, Any], stored: Mapping[str, Item]) -> int:
        """Raises OSError when it is gone, TimeoutError, or what it answers."""
        # All are made before the first one is sent: it must not keep items for the next shim.
        messages = [
            (encode_request(0, "item", {"name": name, "state": item.state}), item.fds)
            for name, item in stored.items()
        ]
        messages.append((encode_request(1, kind, dict(fields)), []))
        for message, fds in messages:
            packets.send(self._sock, message, fds)
        data, _ = packets.receive(self._sock)
        if not data:
            raise ConnectionResetError(0, "it hung up")
        reply = decode_reply(data)
        if reply.error is not None:
            raise reply.error
        return int(reply.fields["pid"])

    def _start(self) -> socket.socket:
        """Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            theirs.set_inheritable(True)
            command = [
                sys.executable,
                "-m",
                "hyperpod.supervisor.forks",
                str(theirs.fileno()),
                *self._arguments,
            ]
            environment = {k: v for k, v in os.environ.items() if k != "HYPERPOD_FAILPOINT"}
            os.posix_spawn(sys.executable, command, environment)
        ours.settimeout(ANSWER)
        return ours
