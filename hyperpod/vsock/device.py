"""The vhost-user-vsock device of one VM: what the shim runs where the kernel has no vhost-vsock.

QEMU connects to `vhost_path`; clients connect to `hybrid_path`, send `CONNECT <port>\\n` and read `OK <n>\\n`
once the guest has accepted (or are closed). Only the host opens streams.

After a crash a new process calls `VsockDevice.resume` with what the last `on_state_change` delivered. QEMU
and the guest notice nothing but resets of the streams that were open.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from typing import Any, Final

from hyperpod.errors import ProtocolError
from hyperpod.vsock.frontend import Session
from hyperpod.vsock.journal import Journal
from hyperpod.vsock.listener import Listener
from hyperpod.vsock.switch import Switch
from hyperpod.wire.vsock.virtqueue import Virtqueue

log = logging.getLogger(__name__)

STATE_VERSION: Final = 1
MIN_CID: Final = 3  # below are the hypervisor, loopback and the host
MAX_CID: Final = 0xFFFFFFFE

StateCallback = Callable[[dict[str, Any], list[int]], None]


class VsockDevice:
    """One device, one VM. All methods belong to the event loop's thread."""

    def __init__(
        self,
        cid: int,
        vhost_path: str,
        hybrid_path: str,
        *,
        on_state_change: StateCallback | None = None,
        on_failure: Callable[[ProtocolError], None] | None = None,
    ) -> None:
        """`cid`: the guest's address, 3 to 2**32-2; it need not be unique on the host.

        `on_state_change(state, fds)` gets what `export_state` returns, after every change that a successor
        must know; it must duplicate or send the descriptors before it returns. `on_failure` hears that the
        guest or QEMU broke the protocol: the rings are stopped until the driver starts again, or QEMU is
        disconnected.
        """
        if not MIN_CID <= cid <= MAX_CID:
            raise ValueError(f"guest CID {cid}")
        self.cid, self.vhost_path, self.hybrid_path = cid, vhost_path, hybrid_path
        self.failure: ProtocolError | None = None  # the last one
        self._on_state_change, self._on_failure = on_state_change, on_failure
        self._journal: Journal | None = None
        self._switch: Switch | None = None
        self._session: Session | None = None
        self._listeners: list[Listener] = []
        self._inherited: tuple[dict[str, Any], list[int]] | None = None
        self._announcing = False

    @classmethod
    def resume(
        cls,
        state: dict[str, Any],
        fds: list[int],
        vhost_path: str,
        hybrid_path: str,
        *,
        on_state_change: StateCallback | None = None,
        on_failure: Callable[[ProtocolError], None] | None = None,
    ) -> VsockDevice:
        """A device that `start` will bring up where a dead predecessor was; takes over `fds`.

        Raises ProtocolError when the state is not one of this version's.
        """
        cid, indexes = state.get("cid"), (state.get("journal"), state.get("socket"))
        if state.get("version") != STATE_VERSION or not isinstance(cid, int):
            raise ProtocolError("unusable vsock state: unknown version")
        if any(not isinstance(i, int) or not -1 <= i < len(fds) for i in indexes):
            raise ProtocolError("unusable vsock state: missing descriptors")
        device = cls(cid, vhost_path, hybrid_path, on_state_change=on_state_change, on_failure=on_failure)
        device._inherited = state, fds
        return device

    @property
    def guest_up(self) -> bool:
        """Whether the guest's driver runs, so that CONNECT can work."""
        return self._switch is not None and self._switch.running

    async def start(self) -> None:
        """Listen on both paths. Raises OSError; ProtocolError when an inherited state cannot be used."""
        try:
            self._open()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Disconnect QEMU and every client, remove the sockets. May be called at any time, and twice."""
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        if self._session is not None:
            self._session.close()
            self._session = None
        if self._switch is not None:
            self._switch.close()
            self._switch = None
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        if self._inherited is not None:
            for fd in self._inherited[1]:
                os.close(fd)
            self._inherited = None

    def export_state(self) -> tuple[dict[str, Any], list[int]]:
        """(JSON-able state, descriptors it refers to by index) for `resume`; the descriptors stay ours."""
        assert self._journal is not None, "the device was not started"
        state: dict[str, Any] = {"version": STATE_VERSION, "cid": self.cid, "socket": -1}
        fds: list[int] = []
        if self._session is not None:
            session, fds = self._session.export()
            state |= {"socket": 0, "session": session}
        state["journal"] = len(fds)
        return state, [*fds, self._journal.fd]

    # ---- from the session and the switch ----

    def rings_started(self, rx: Virtqueue, tx: Virtqueue, *, continued: bool) -> None:
        assert self._switch is not None
        if not continued:
            self._switch.drop_all()
        log.info("guest driver %s", "continues" if continued else "started")
        self._switch.start(rx, tx)

    def rings_stopped(self) -> None:
        if self._switch is not None:
            self._switch.stop()

    def kicked(self) -> None:
        if self._switch is not None:
            self._switch.wake()

    def session_changed(self) -> None:
        # QEMU sends some twenty messages in a row: one announcement per turn of the loop is enough.
        if self._on_state_change is not None and not self._announcing:
            self._announcing = True
            asyncio.get_running_loop().call_soon(self._announce)

    def session_ended(self, error: ProtocolError | None) -> None:
        self._session = None
        if self._switch is not None:
            self._switch.stop()
            self._switch.drop_all()
        self.session_changed()
        if error is not None:
            self._report(error)

    # ---- inside ----

    def _open(self) -> None:
        inherited, self._inherited = self._inherited, None
        if inherited is None:
            self._journal = Journal()
            self._switch = Switch(self.cid, self._journal, self._interrupt, self._ring_failure)
        else:
            self._take_over(*inherited)
        self._listeners.append(Listener(self.vhost_path, self._qemu_connected))
        self._listeners.append(Listener(self.hybrid_path, self._client_connected))
        self.session_changed()

    def _take_over(self, state: dict[str, Any], fds: list[int]) -> None:
        journal = state["journal"]
        self._journal = Journal(fds[journal] if journal >= 0 else None)
        self._switch = Switch(self.cid, self._journal, self._interrupt, self._ring_failure)
        if state["socket"] >= 0:
            self._session = Session(socket.socket(fileno=fds[state["socket"]]), self.cid, self)
            try:
                self._session.restore(state.get("session", {}), fds)
            except ProtocolError:
                owned = fds[state["socket"]], fds[journal] if journal >= 0 else -1
                for fd in fds:
                    if fd not in owned:
                        os.close(fd)
                raise

    def _announce(self) -> None:
        self._announcing = False
        if self._on_state_change is not None and self._journal is not None:
            self._on_state_change(*self.export_state())

    def _qemu_connected(self, sock: socket.socket) -> None:
        if self._session is not None:
            log.warning("a second vhost-user connection was refused")
            sock.close()
            return
        log.info("QEMU connected")
        self._session = Session(sock, self.cid, self)
        self.session_changed()

    def _client_connected(self, sock: socket.socket) -> None:
        if self._switch is not None:
            self._switch.accept(sock)
        else:
            sock.close()

    def _interrupt(self, ring: int) -> None:
        if self._session is not None:
            self._session.interrupt(ring)

    def _ring_failure(self, error: ProtocolError) -> None:
        """The guest broke its rings. QEMU stays connected: it still has to stop the device one day."""
        if self._session is not None:
            self._session.break_rings()
        if self._switch is not None:
            self._switch.stop()
            self._switch.drop_all()
        self._report(error)

    def _report(self, error: ProtocolError) -> None:
        self.failure = ProtocolError(str(error))  # a copy: the traceback would keep guest memory mapped
        log.error("vsock device stopped: %s", self.failure)
        if self._on_failure is not None:
            self._on_failure(self.failure)
