"""Operators' shells begin on a socket of root's own: no URL of the streaming server can lead to one.

What the kubelet, or who has stolen a streaming URL, could reach is the other server; this one is a UNIX socket of
mode 0600, whose peers must be root by SO_PEERCRED, and it is there only when the configuration allows shells.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path
from urllib.parse import quote

from hyperpod.config import StreamingConfig
from hyperpod.errors import FailedPrecondition
from hyperpod.rpc.server import listening
from hyperpod.shim.packets import peer
from hyperpod.streaming.server import HandOver, StreamingServer
from hyperpod.streaming.tokens import Tokens

SCHEME = "http+unix"
"""Of its URLs: the socket's path, percent-encoded, stands where others have host and port."""
_NO_LOGIN = 0xFFFFFFFF


class OperatorServer(StreamingServer):
    """Serves shells and nothing else."""

    kinds = ("shell",)

    def __init__(self, path: Path, tokens: Tokens, hand_over: HandOver) -> None:
        super().__init__(StreamingConfig(), tokens, hand_over)
        self._path = path

    async def _bind(self) -> tuple[socket.socket, str]:
        try:
            sock = await asyncio.to_thread(listening, self._path)
        except OSError as exc:
            raise FailedPrecondition(
                f"operator_shell: cannot listen on {self._path}: {exc.strerror}"
            ) from exc
        return sock, f"{SCHEME}://{quote(str(self._path), safe='')}"

    def _admit(self, sock: socket.socket) -> None:
        pid, uid, _ = peer(sock)
        if uid != 0:
            raise PermissionError(f"pid {pid} of uid {uid} wanted an operator's shell")

    async def close(self) -> None:
        await super().close()
        self._path.unlink(missing_ok=True)


def who(sock: socket.socket) -> str:
    """For the log: the peer, and who had logged in to become it."""
    pid, uid, _ = peer(sock)
    name, login = "?", _NO_LOGIN
    with contextlib.suppress(OSError, ValueError):
        name = Path(f"/proc/{pid}/comm").read_text().strip()
        login = int(Path(f"/proc/{pid}/loginuid").read_text())
    return f"pid {pid} ({name}), uid {uid}" + ("" if login == _NO_LOGIN else f", logged in as uid {login}")
