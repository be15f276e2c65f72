"""Network namespaces pinned by a bind mount below the run folder, one per pod.

Whatever happens in a namespace is done by a thread made for that one call, which never comes back to a pool: the
daemon's own namespace never changes. The mount keeps a namespace alive without any process in it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import ctypes
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from hyperpod import userns
from hyperpod.errors import NetworkError
from hyperpod.model.security import UserNamespace
from hyperpod.netlink import Netlink
from hyperpod.spec.userns import map_line
from hyperpod.wire import rtnetlink as rt

T = TypeVar("T")
CLONE_NEWNET = 0x40000000
MS_BIND = 4096
MNT_DETACH = 2
TIMEOUT = 20.0
"""Seconds for a thread's work in a namespace; making one takes a millisecond, and longer on a busy host."""

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


async def in_thread(name: str, call: Callable[[], T]) -> T:
    """Run `call` in a thread of its own, which may change its namespace.

    Raises what it raises, or NetworkError when it takes too long."""
    done: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as exc:  # noqa: BLE001  # handed to who waits
            done.set_exception(exc)

    threading.Thread(target=run, name=name, daemon=True).start()
    try:
        async with asyncio.timeout(TIMEOUT):
            return await asyncio.wrap_future(done)
    except TimeoutError as exc:
        raise NetworkError(f"{name} took longer than {TIMEOUT:.0f} s") from exc


class Namespaces:
    """Those of the sandboxes of one daemon: `<run_dir>/netns/<first 12 digits of the sandbox's id>`."""

    def __init__(self, run_dir: Path) -> None:
        self.root = run_dir / "netns"

    def path(self, sandbox_id: str) -> Path:
        return self.root / sandbox_id[:12]

    async def make(self, sandbox_id: str, ids: UserNamespace | None = None) -> Path:
        """A new namespace with loopback up. Raises NetworkError.

        With `ids` it belongs to a user namespace that has them, and keeps that one too."""
        path = self.path(sandbox_id)
        await self.remove(sandbox_id)

        def make() -> None:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o755)
            path.touch(mode=0o444)
            if ids is None:
                _check(_libc.unshare(CLONE_NEWNET), "unshare")
                _pin("/proc/thread-self/ns/net", path)
            else:
                with userns.held(map_line(ids.uids), map_line(ids.gids), "--net") as pid:
                    _pin(f"/proc/{pid}/ns/net", path)
                _enter(path)
            with Netlink() as netlink:
                netlink.do("loopback up", rt.set_link, 1, up=True)

        try:
            await in_thread(f"netns-{sandbox_id[:12]}", make)
        except OSError as exc:
            await self.remove(sandbox_id)
            raise NetworkError(f"network namespace {path} cannot be made: {exc}") from exc
        return path

    async def run(self, path: str | Path, call: Callable[[], T]) -> T:
        """Run blocking `call` inside the namespace. Raises NetworkError when it is not there or `call` fails."""

        def inside() -> T:
            _enter(path)
            return call()

        try:
            return await in_thread(f"in-{Path(path).name}", inside)
        except OSError as exc:
            raise NetworkError(f"network namespace {path}: {exc}") from exc

    async def remove(self, sandbox_id: str) -> None:
        """Unmount and delete; fine when there is none. What is in it goes with it."""
        await asyncio.to_thread(_remove, self.path(sandbox_id))

    def alive(self, path: str) -> bool:
        """Whether a namespace is mounted at `path`: after a reboot there is a folder without one, or nothing."""
        with contextlib.suppress(OSError):
            return Path(path).stat().st_dev != self.root.stat().st_dev
        return False

    def known(self) -> list[str]:
        """Short ids of all that are there."""
        with contextlib.suppress(OSError):
            return sorted(os.listdir(self.root))
        return []


def _pin(namespace: str, path: Path) -> None:
    _check(
        _libc.mount(namespace.encode(), os.fsencode(path), None, ctypes.c_ulong(MS_BIND), None),
        f"mount {path}",
    )


def _enter(path: str | Path) -> None:
    """For the calling thread, for good."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns(fd, CLONE_NEWNET), f"setns {path}")
    finally:
        os.close(fd)


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        while _libc.umount2(os.fsencode(path), MNT_DETACH) == 0:
            pass  # once more: a crash may have mounted it twice
        if (number := ctypes.get_errno()) not in (errno.EINVAL, errno.ENOENT):
            raise NetworkError(f"network namespace {path} cannot be unmounted: {os.strerror(number)}")
        path.unlink()
