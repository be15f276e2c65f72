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

from hyperpod.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    HyperpodError,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from hyperpod.logs import printable

log = logging.getLogger(__name__)
T = TypeVar("T")

WORKERS = 12
URGENT = 4
"""Blocking calls at once, and how many of those are kept for destroy and list: a QEMU whose monitor hangs
holds a worker, and must still be destroyable."""

CALL_TIMEOUT = 60.0
"""Seconds; libvirt's own bounds (30 s for a job on a domain, 5 s for an unplug) end before it."""

KEEPALIVE_SECONDS = 5
KEEPALIVE_COUNT = 3
"""A libvirtd that answers none of so many questions, so far apart, is lost."""

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
max_core = 0
"""
"""For the embedded driver. `stdio_handler`: the default needs virtlogd. Files get their owners from us, and each
domain its own user by a static DAC label. No cgroup_controllers line: subsets crash libvirt 9.0. No core files:
a tenant that crashes its QEMU must not fill the host's disk."""

_CODES: dict[int, type[HyperpodError]] = {
    libvirt.VIR_ERR_NO_DOMAIN: NotFound,
    libvirt.VIR_ERR_DOM_EXIST: AlreadyExists,
    libvirt.VIR_ERR_NO_MEMORY: ResourceExhausted,
    libvirt.VIR_ERR_OPERATION_INVALID: FailedPrecondition,
    libvirt.VIR_ERR_OPERATION_TIMEOUT: DeadlineExceeded,
    libvirt.VIR_ERR_NO_CONNECT: Unavailable,
    libvirt.VIR_ERR_INVALID_CONN: Unavailable,
    libvirt.VIR_ERR_SYSTEM_ERROR: Unavailable,
    libvirt.VIR_ERR_RPC: Unavailable,
}

_event_lock = threading.Lock()
_event_thread: threading.Thread | None = None


def _start_event_thread() -> None:
    """Once per process, before the first open."""
    global _event_thread  # noqa: PLW0603  libvirt's event implementation is one per process as well
    with _event_lock:
        if _event_thread is not None:
            return
        libvirt.virEventRegisterDefaultImpl()

        def run() -> None:
            while True:
                libvirt.virEventRunDefaultImpl()

        _event_thread = threading.Thread(target=run, name="libvirt-events", daemon=True)
        _event_thread.start()


def _quiet(_context: object, _error: object) -> None:
    """libvirt prints errors to stderr by default; they all come to us as exceptions as well."""


def mapped(exc: libvirt.libvirtError, what: str) -> HyperpodError:
    """The domain's error for a libvirt error."""
    text = printable(str(exc.get_error_message() or exc), 1000)
    return _CODES.get(exc.get_error_code(), HyperpodError)(f"{what}: {text}")


class Connection:
    """One libvirt connection, used from the loop through a bounded pool of threads.

    `root`: the folder of the driver inside this process; None for a connection to a libvirtd, which may go
    away (`on_lost`) and is then opened again by the next call.
    """

    def __init__(self, uri: str, root: Path | None) -> None:
        self.uri, self.root = uri, root
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="libvirt")
        self._ordinary = asyncio.Semaphore(WORKERS - URGENT)
        self._lock = threading.Lock()
        self._conn: Any = None
        self._subscription = -1
        self._closed = False

    async def open(self, on_event: Callable[[str, int, int], None], on_lost: Callable[[], None]) -> None:
        """Connect; `on_event(name, event, detail)` and `on_lost()` are called on the loop. Raises Unavailable."""
        loop = asyncio.get_running_loop()

        def tell(callback: Callable[..., None], *args: object) -> None:
            if not self._closed and not loop.is_closed():
                loop.call_soon_threadsafe(callback, *args)

        def lifecycle(_conn: Any, domain: Any, event: int, detail: int, _opaque: object) -> None:
            tell(on_event, domain.name(), event, detail)

        def lost(_conn: Any, reason: int, _opaque: object) -> None:
            log.error("the connection to %s is lost (reason %d)", self.uri, reason)
            tell(on_lost)

        self._lifecycle, self._lost = lifecycle, lost
        if self.root is not None:
            await asyncio.to_thread(self._configure, self.root)
        await self.call(f"opening {self.uri}", lambda conn: None)

    @staticmethod
    def _configure(root: Path) -> None:
        (root / "etc").mkdir(parents=True, exist_ok=True, mode=0o711)
        (root / "etc" / "qemu.conf").write_text(QEMU_CONF)

    def _connect(self) -> None:
        libvirt.registerErrorHandler(_quiet, None)
        _start_event_thread()
        cpus = os.sched_getaffinity(0)  # of this worker thread alone
        os.sched_setaffinity(0, {min(cpus)})
        try:
            conn = libvirt.open(self.uri)
        finally:
            os.sched_setaffinity(0, cpus)
        self._subscription = conn.domainEventRegisterAny(
            None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._lifecycle, None
        )
        try:
            conn.registerCloseCallback(self._lost, None)
            conn.setKeepAlive(KEEPALIVE_SECONDS, KEEPALIVE_COUNT)
        except libvirt.libvirtError as exc:
            # A driver inside this process cannot be lost, and has neither.
            if exc.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:
                raise
        self._conn = conn

    def _live(self) -> Any:
        """The connection, opened again where a libvirtd went away. Runs in a worker."""
        with self._lock:
            if self._closed:
                raise Unavailable(f"{self.uri} is closed")
            if self._conn is None or not self._conn.isAlive():
                self._connect()
            return self._conn

    async def call(
        self,
        what: str,
        function: Callable[[Any], T],
        *,
        urgent: bool = False,
        timeout: float | None = CALL_TIMEOUT,
    ) -> T:
        """Run the blocking `function(connection)` in a worker; errors are mapped and name `what`.

        Neither a cancelled caller nor the timeout (DeadlineExceeded) stops a call that runs: look again by name.
        """
        if self._closed:
            raise Unavailable(f"{what}: {self.uri} is closed")
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout):
                if not urgent:
                    await self._ordinary.acquire()
                future = loop.run_in_executor(self._pool, lambda: function(self._live()))
                future.add_done_callback(_retrieved)
                if not urgent:
                    future.add_done_callback(lambda _: self._ordinary.release())
                return await asyncio.shield(future)
        except libvirt.libvirtError as exc:
            raise mapped(exc, what) from exc
        except TimeoutError as exc:
            raise DeadlineExceeded(f"{what} took longer than {timeout:g} s") from exc

    async def close(self) -> None:
        """Disconnect; calls that run go on to their end. Domains are not touched."""
        if self._closed:
            return

        def disconnect() -> None:
            with self._lock:
                self._closed = True
                conn, self._conn = self._conn, None
                if conn is not None and conn.isAlive():
                    conn.domainEventDeregisterAny(self._subscription)
                    conn.close()

        try:
            async with asyncio.timeout(CALL_TIMEOUT):
                await asyncio.get_running_loop().run_in_executor(self._pool, disconnect)
        except (libvirt.libvirtError, TimeoutError) as exc:
            log.warning("closing %s: %s", self.uri, exc or "timeout")
        self._pool.shutdown(wait=False, cancel_futures=True)


def _retrieved(future: asyncio.Future[Any]) -> None:
    """A caller that left does not take the exception; asyncio would complain of it."""
    if not future.cancelled():
        future.exception()
