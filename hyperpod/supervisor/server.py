"""The supervisor's socket: the daemon spawns, drops and lists shims, shims register and store."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hyperpod.errors import HyperpodError, PermissionDenied, ProtocolError, Unavailable, Unsupported
from hyperpod.processes import start_time
from hyperpod.shim import packets
from hyperpod.shim.packets import Peer
from hyperpod.supervisor.loop import Loop
from hyperpod.supervisor.nursery import Nursery
from hyperpod.supervisor.shims import Shims, ShimSpec
from hyperpod.wire.control import MAX_MESSAGE, Request, decode_request, encode_error, encode_reply

log = logging.getLogger(__name__)

LIST_PAGE = 256
_BACKLOG = 128
_MESSAGES_PER_TURN = 16
_MAX_UID = 2**32 - 2
_PER_USER = 8
"""Connections of one user that is not root at once: a shim has one. More could take all our descriptors."""
_PAUSE = 0.2
"""Seconds without accepting, when there are no descriptors left."""


class Connection:
    """One client; `reply` may come much later, when the client may be gone."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.peer = sock, packets.peer(sock)

    def reply(self, request: Request, fields: dict[str, Any]) -> None:
        self._send(request, encode_reply(request.id, fields))

    def error(self, request: Request, error: HyperpodError) -> None:
        log.warning("%s of pid %d refused: %s", request.op[:32], self.peer.pid, error)
        self._send(request, encode_error(request.id, error))

    def _send(self, request: Request, data: bytes) -> None:
        if request.id and self.sock.fileno() >= 0:
            try:
                packets.send(self.sock, data)
            except OSError as exc:  # it is gone, or does not read: its next read is then the end
                log.warning("no reply to pid %d: %s", self.peer.pid, exc.strerror)


class Server:
    """Listens on `<run_dir>/supervisor.sock`; every user may connect, the kernel says who it is."""

    def __init__(self, loop: Loop, run_dir: Path, log_level: str) -> None:
        """Raises OSError."""
        self.path = run_dir / "supervisor.sock"
        self._loop, self._run_dir = loop, run_dir
        self._nursery = Nursery(str(self.path), log_level)
        self.shims = Shims(loop, self._nursery)
        self._connections: set[Connection] = set()
        self._operations: dict[str, Callable[[Connection, Request, list[int]], None]] = {
            "spawn_shim": self._spawn_shim,
            "spawn_agent": self._spawn_agent,
            "drop": self._drop,
            "list": self._list,
            "register": self._register,
            "store": self._store,
            "forget": self._forget,
        }
        made = self.path.with_name(f".{self.path.name}")
        made.unlink(missing_ok=True)
        self._sock = packets.seqpacket()
        self._sock.bind(str(made))
        made.chmod(0o666)  # shims run as their sandbox's user
        self._sock.listen(_BACKLOG)
        made.replace(self.path)  # who sees it can connect
        loop.watch(self._sock.fileno(), self._accept)

    def close(self) -> None:
        self._nursery.close()
        self._sock.close()
        self.path.unlink(missing_ok=True)

    def _accept(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except OSError as exc:
            log.warning("accept: %s", exc)
            self._loop.unwatch(self._sock.fileno())
            self._loop.after(_PAUSE, lambda: self._loop.watch(self._sock.fileno(), self._accept))
            return
        sock.setblocking(False)
        connection = Connection(sock)
        uid = connection.peer.uid
        if uid and sum(other.peer.uid == uid for other in self._connections) >= _PER_USER:
            sock.close()
            return
        self._connections.add(connection)
        self._loop.watch(sock.fileno(), lambda: self._readable(connection))

    def _readable(self, connection: Connection) -> None:
        try:
            for _ in range(_MESSAGES_PER_TURN):
                data, fds = packets.receive(connection.sock)
                try:
                    if not data:
                        break
                    self._serve(connection, decode_request(data), fds)
                finally:
                    packets.close_all(fds)
            else:
                return
        except BlockingIOError:
            return
        except (OSError, ProtocolError) as exc:
            log.warning("connection of pid %d ended: %s", connection.peer.pid, exc)
        self._loop.unwatch(connection.sock.fileno())
        connection.sock.close()
        self._connections.discard(connection)

    def _serve(self, connection: Connection, request: Request, fds: list[int]) -> None:
        try:
            operation = self._operations.get(request.op)
            if operation is None:
                raise Unsupported(f"the supervisor has no operation {request.op[:64]!r}")
            operation(connection, request, fds)
        except HyperpodError as exc:
            connection.error(request, exc)

    # -- the daemon's -------------------------------------------------------------------------------------

    def _spawn_shim(self, connection: Connection, request: Request, fds: list[int]) -> None:
        _need_root(connection.peer)
        spec = ShimSpec(
            sandbox_id=request.ident("sandbox_id"),
            directory=request.text("directory"),
            uid=request.number("uid", 0, _MAX_UID),
            gid=request.number("gid", 0, _MAX_UID),
            cid=request.number("cid", 0, _MAX_UID),
            device=request.flag("device"),
            cgroups=tuple(request.texts("cgroup")),
        )

        def done(error: HyperpodError | None) -> None:
            if error is not None:
                connection.error(request, error)
                return
            shim = self.shims.all[spec.sandbox_id]
            connection.reply(request, {"pid": shim.pid, "start_time": shim.start_time})

        self.shims.spawn(spec, resume=request.flag("resume"), done=done)

    def _spawn_agent(self, connection: Connection, request: Request, fds: list[int]) -> None:
        _need_root(connection.peer)
        fields = {
            "directory": request.text("directory"),
            "scratch": request.text("scratch"),
            "cgroup": request.text("cgroup_path"),
            "netns": request.text("netns"),
            "uts": request.flag("uts"),
            "ipc": request.flag("ipc"),
            "pid": request.flag("pid"),
            "uids": request.text("uids"),
            "gids": request.text("gids"),
            "stdio_uid": request.number("stdio_uid", 0, _MAX_UID),
            "crun_version": request.text("crun_version", 64),
            "cgroups": request.texts("cgroup"),
        }
        pid = self._nursery.spawn_agent(fields)
        try:
            began = start_time(pid)
        except OSError as exc:
            raise Unavailable("the agent ended at its start") from exc
        connection.reply(request, {"pid": pid, "start_time": began})

    def _drop(self, connection: Connection, request: Request, fds: list[int]) -> None:
        _need_root(connection.peer)
        self.shims.drop(request.ident("sandbox_id"), lambda: connection.reply(request, {}))

    def _list(self, connection: Connection, request: Request, fds: list[int]) -> None:
        """Up to LIST_PAGE shims, by id, beyond `after`."""
        _need_root(connection.peer)
        after = request.text("after")
        page = sorted(ident for ident in self.shims.all if ident > after)[:LIST_PAGE]
        rows = [[ident, self.shims.all[ident].pid, self.shims.all[ident].start_time] for ident in page]
        connection.reply(request, {"shims": rows})

    # -- the shims' ---------------------------------------------------------------------------------------

    def _register(self, connection: Connection, request: Request, fds: list[int]) -> None:
        ident = self._own(connection.peer, request)
        try:
            self.shims.register(ident, connection.peer.pid)
        except OSError as exc:
            log.warning("sandbox %s: its shim is gone already: %s", ident[:12], exc)
            return
        connection.reply(request, {})

    def _store(self, connection: Connection, request: Request, fds: list[int]) -> None:
        ident = self._own(connection.peer, request)
        name, state = request.text("name", 128), request.text("state", MAX_MESSAGE)
        if ident not in self.shims.all:
            self.shims.register(ident, connection.peer.pid)
        self.shims.all[ident].store.put(name, state, list(fds))
        fds.clear()
        connection.reply(request, {})

    def _forget(self, connection: Connection, request: Request, fds: list[int]) -> None:
        ident = self._own(connection.peer, request)
        if (shim := self.shims.all.get(ident)) is not None:
            shim.store.forget(request.text("name", 128))
        connection.reply(request, {})

    def _own(self, peer: Peer, request: Request) -> str:
        """The sandbox id, if the peer is that sandbox's shim. Raises PermissionDenied.

        A shim that an earlier supervisor forked is known by the owner of its folder, which root made.
        """
        ident = request.ident("sandbox_id")
        shim = self.shims.all.get(ident)
        if shim is not None and shim.pid:
            if shim.pid == peer.pid:
                return ident
        elif peer.uid == 0:
            return ident
        else:
            try:
                owner = os.lstat(self._run_dir / "s" / ident[:12]).st_uid
            except OSError:
                owner = -1
            # A folder is one sandbox's: further ids that begin alike would be room for ever more descriptors.
            if owner == peer.uid and (shim or not any(i.startswith(ident[:12]) for i in self.shims.all)):
                return ident
        raise PermissionDenied(f"pid {peer.pid}, uid {peer.uid} is not the shim of sandbox {ident[:12]}")


def _need_root(peer: Peer) -> None:
    if peer.uid not in (0, os.geteuid()):
        raise PermissionDenied(f"uid {peer.uid} may not command the supervisor")
