"""A blocking rtnetlink socket of the calling thread's network namespace; the kernel answers at once.

Standard library only: the agent uses it as well as the daemon.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from hyperpod.wire import rtnetlink as rt

T = TypeVar("T")
P = ParamSpec("P")
TIMEOUT = 10.0
_BUFFER = 1 << 18


class Netlink:
    """Use as a context manager. Every call raises OSError with the kernel's reason."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        self._sock.settimeout(TIMEOUT)
        self._seq = 0

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def do(
        self, what: str, build: Callable[Concatenate[int, P], bytes], *args: P.args, **options: P.kwargs
    ) -> None:
        """Send what `build` makes of a sequence number and the rest, and wait for the acknowledgement."""
        self._seq += 1
        self._sock.send(build(self._seq, *args, **options))
        while True:
            for message in rt.messages(self._sock.recv(_BUFFER)):
                if message.seq == self._seq and message.type == rt.NLMSG_ERROR:
                    if number := rt.error_of(message):
                        raise OSError(number, f"{what}: {os.strerror(number)}")
                    return

    def _dump(self, kind: int, read: Callable[[rt.Message], T | None], family: int = rt.AF_UNSPEC) -> list[T]:
        self._seq += 1
        self._sock.send(rt.dump_request(kind, self._seq, family))
        found: list[T] = []
        while True:
            for message in rt.messages(self._sock.recv(_BUFFER)):
                if message.seq != self._seq:
                    continue
                if message.type in (rt.NLMSG_DONE, rt.NLMSG_ERROR):
                    if number := rt.error_of(message):
                        raise OSError(number, f"reading the network's state: {os.strerror(number)}")
                    return found
                if (item := read(message)) is not None:
                    found.append(item)

    def links(self) -> list[rt.Link]:
        return self._dump(rt.RTM_GETLINK, rt.read_link)

    def addresses(self) -> list[rt.Address]:
        return self._dump(rt.RTM_GETADDR, rt.read_address)

    def routes(self) -> list[rt.Route]:
        """Unicast routes of the main tables, IPv4 first."""
        v4 = self._dump(rt.RTM_GETROUTE, rt.read_route, rt.AF_INET)
        return v4 + self._dump(rt.RTM_GETROUTE, rt.read_route, rt.AF_INET6)

    def neighbours(self) -> list[rt.Neighbour]:
        return self._dump(rt.RTM_GETNEIGH, rt.read_neighbour)
