"""A Unix stream listener that takes only root's and our own connections."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

_BATCH: Final = 32
_BACKLOG: Final = 128
_PAUSE_SECONDS: Final = 0.2  # when accept fails for want of descriptors


class Listener:
    """Accepts on `path` and hands each non-blocking socket to `accepted`, which owns it then.

    Whoever makes the folder decides who gets here (0700); the peer's uid is checked all the same.
    """

    def __init__(self, path: str, accepted: Callable[[socket.socket], None]) -> None:
        """Bind, replacing a socket that a predecessor left. Raises OSError."""
        self._path, self._accepted = path, accepted
        self._loop = asyncio.get_running_loop()
        self._paused: asyncio.TimerHandle | None = None
        Path(path).unlink(missing_ok=True)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._sock.bind(path)
            self._sock.listen(_BACKLOG)
            self._inode = Path(path).stat().st_ino
        except OSError:
            self._sock.close()
            raise
        self._resume()

    def close(self) -> None:
        """Stop, and remove the socket unless a successor has replaced it."""
        if self._paused is not None:
            self._paused.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        try:
            if Path(self._path).stat().st_ino == self._inode:
                Path(self._path).unlink()
        except FileNotFoundError:
            pass

    def _resume(self) -> None:
        self._paused = None
        self._loop.add_reader(self._sock.fileno(), self._readable)

    def _readable(self) -> None:
        for _ in range(_BATCH):
            try:
                sock, _ = self._sock.accept()
            except BlockingIOError:
                return
            except ConnectionError:
                continue
            except OSError as exc:  # out of descriptors or memory: the backlog holds the rest for now
                log.error("accept on %s: %s", self._path, exc)
                self._loop.remove_reader(self._sock.fileno())
                self._paused = self._loop.call_later(_PAUSE_SECONDS, self._resume)
                return
            if (uid := peer_uid(sock)) not in (0, os.geteuid()):
                log.warning("refused uid %d on %s", uid, self._path)
                sock.close()
                continue
            sock.setblocking(False)
            self._accepted(sock)


def peer_uid(sock: socket.socket) -> int:
    """The effective uid of the other side of a Unix socket, as it was when it connected."""
    _pid, uid, _gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)
