"""libvirt's connection, its event thread, and the settings of the driver inside this process.

What must be got right (all of it measured): libvirt finds its children's deaths itself, so nothing in this
process may reap (the supervisor is the subreaper); its event loop runs in one thread of its own; its CPU probe
is repeated for seconds when the opening thread's CPU differs from the last one's, so the open is pinned.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import libvirt

from hyperpod.errors import HyperpodError, NotFound, ResourceExhausted, Unavailable
from hyperpod.logs import printable

log = logging.getLogger(__name__)
T = TypeVar("T")

WORKERS = 8
"""Blocking calls at once; a hung QEMU monitor holds one."""

QEMU_CONF = """\
stdio_handler = "file"
security_driver = "none"
security_default_confined = 0
namespaces = []
remember_owner = 0
dynamic_ownership = 0
user = "root"
group = "root"
seccomp_sandbox = 1
"""
"""For the embedded driver. `stdio_handler`: the default needs virtlogd. Files get their owners from us, and each
domain its own user by a static DAC label. No cgroup_controllers line: subsets crash libvirt 9.0."""

_event_thread_started = threading.Event()


def _start_event_thread() -> None:
    """Once per process, before the first open."""
    if _event_thread_started.is_set():
        return
    libvirt.virEventRegisterDefaultImpl()

    def run() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    threading.Thread(target=run, name="libvirt-events", daemon=True).start()
    _event_thread_started.set()


def _quiet(_context: object, _error: object) -> None:
    """libvirt prints errors to stderr by default; they all come to us as exceptions as well."""


def mapped(exc: libvirt.libvirtError, what: str) -> HyperpodError:
    """The domain's error for a libvirt error."""
    code, text = exc.get_error_code(), printable(str(exc.get_error_message() or exc), 1000)
    if code == libvirt.VIR_ERR_NO_DOMAIN:
        return NotFound(f"{what}: {text}")
    if code == libvirt.VIR_ERR_NO_MEMORY:
        return ResourceExhausted(f"{what}: {text}")
    if code in (libvirt.VIR_ERR_NO_CONNECT, libvirt.VIR_ERR_INVALID_CONN, libvirt.VIR_ERR_SYSTEM_ERROR):
        return Unavailable(f"{what}: {text}")
    return HyperpodError(f"{what}: {text}")


class Connection:
    """One libvirt connection, used from the loop through a bounded pool of threads."""

    def __init__(self, uri: str, root: Path | None) -> None:
        self.uri, self.root = uri, root
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="libvirt")
        self._conn: Any = None

    async def open(self, on_event: Callable[[str, int, int], None]) -> None:
        """Connect; `on_event(name, event, detail)` is called on the loop. Raises Unavailable."""
        loop = asyncio.get_running_loop()

        def lifecycle(_conn: Any, domain: Any, event: int, detail: int, _opaque: object) -> None:
            name = domain.name()
            loop.call_soon_threadsafe(on_event, name, event, detail)

        def connect() -> None:
            if self.root is not None:
                (self.root / "etc").mkdir(parents=True, exist_ok=True, mode=0o711)
                (self.root / "etc" / "qemu.conf").write_text(QEMU_CONF)
            libvirt.registerErrorHandler(_quiet, None)
            _start_event_thread()
            cpus = os.sched_getaffinity(0)
            os.sched_setaffinity(0, {min(cpus)})
            try:
                self._conn = libvirt.open(self.uri)
            finally:
                os.sched_setaffinity(0, cpus)
            self._conn.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle, None)

        await self.call(f"opening {self.uri}", connect)

    async def call(self, what: str, function: Callable[[], T]) -> T:
        """Run a blocking call; errors are mapped and name `what`. Cancelling does not stop the call."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, function)
        except libvirt.libvirtError as exc:
            raise mapped(exc, what) from exc

    @property
    def conn(self) -> Any:
        assert self._conn is not None, "open() first"
        return self._conn

    async def close(self) -> None:
        conn, self._conn = self._conn, None
        if conn is not None:
            await self.call("closing", conn.close)
        self._pool.shutdown(wait=False, cancel_futures=True)
