"""SEQPACKET messages with descriptors beside them, non-blocking or blocking as the socket is."""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Iterable
from typing import NamedTuple

from hyperpod.errors import ProtocolError
from hyperpod.wire.control import MAX_MESSAGE

MAX_FDS = 64
"""Descriptors beside one message; the kernel takes 253."""

_CREDENTIALS = struct.Struct("3i")


class Peer(NamedTuple):
    """Who connected, as the kernel saw it then."""

    pid: int
    uid: int
    gid: int


def seqpacket() -> socket.socket:
    """A non-blocking, close-on-exec SEQPACKET socket."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)


def send(sock: socket.socket, data: bytes, fds: Iterable[int] = ()) -> None:
    """One message. Raises BlockingIOError, OSError."""
    rights = array.array("i", fds)
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else []
    sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)


def receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """One message and the descriptors with it, which are the caller's then; b"" at the end.

    Raises BlockingIOError, OSError; ProtocolError for a message that is cut.
    """
    data, ancillary, flags, _ = sock.recvmsg(
        MAX_MESSAGE, socket.CMSG_SPACE(4 * MAX_FDS), socket.MSG_CMSG_CLOEXEC
    )
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        close_all(fds)
        raise ProtocolError("control message is too long or has too many descriptors")
    return data, list(fds)


def close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def peer(sock: socket.socket) -> Peer:
    return Peer(*_CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)))
