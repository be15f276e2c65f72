"""Joining a VM's tap to the interface that the plugins made: every frame of one leaves by the other.

The interface keeps its addresses in the namespace, so that CHECK finds them, but its stack hears nothing: frames
are redirected before it. libvirt makes the tap in the host's namespace (QEMU gets its descriptor, and may be an
unprivileged user); then it is moved. It lives as long as QEMU holds it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from hyperpod.errors import NetworkError
from hyperpod.model.network import GuestInterface
from hyperpod.netlink import Netlink
from hyperpod.network import links
from hyperpod.network.netns import Namespaces, in_thread
from hyperpod.network.process import run
from hyperpod.wire import rtnetlink as rt

TC_TIMEOUT = 20.0


async def connect(namespaces: Namespaces, path: str, interfaces: Sequence[GuestInterface]) -> None:
    """Move the taps into the namespace at `path` and join each to its interface. Raises NetworkError."""

    def move() -> None:
        target = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with Netlink() as netlink:
                for tap in (interface.tap for interface in interfaces):
                    netlink.do(f"moving {tap}", rt.set_link, _index(tap), namespace=target)
        finally:
            os.close(target)

    def raise_up() -> None:
        with Netlink() as netlink:
            for interface in interfaces:
                tap = interface.tap
                links.quiet(tap)
                netlink.do(f"{tap} up", rt.set_link, _index(tap), up=True, mtu=interface.mtu)

    try:
        await in_thread(f"taps-{interfaces[0].tap}", move)
    except OSError as exc:
        raise NetworkError(f"the VM's tap cannot be moved into {path}: {exc}") from exc
    await namespaces.run(path, raise_up)
    await _redirect(path, interfaces)


def _index(tap: str) -> int:
    """In the thread's namespace. Asked for by name: a list of a node's links takes Python 60 ms with 500 pods, and
    the kernel may leave some out while others come and go. Raises NetworkError for one that went with QEMU."""
    try:
        return socket.if_nametoindex(tap)
    except OSError as exc:
        raise NetworkError(f"tap {tap} is not there: has the VM ended?") from exc


def batch(interfaces: Sequence[GuestInterface]) -> str:
    """Commands for `tc -batch`. `u32 match u32 0 0` is every packet; not every kernel has `matchall`."""
    lines = []
    for interface in interfaces:
        for here, there in ((interface.name, interface.tap), (interface.tap, interface.name)):
            lines.append(f"qdisc add dev {here} clsact")
            lines.append(
                f"filter add dev {here} ingress protocol all prio 1 u32 match u32 0 0 "
                f"action mirred egress redirect dev {there}"
            )
    return "\n".join(lines) + "\n"


async def _redirect(path: str, interfaces: Sequence[GuestInterface]) -> None:
    done = await run(
        ["nsenter", f"--net={path}", "tc", "-batch", "-"],
        what="tc",
        stdin=batch(interfaces).encode(),
        env={"PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")},
        timeout=TC_TIMEOUT,
    )
    if done.code:
        words = done.stderr.decode(errors="replace").strip()
        raise NetworkError(f"tap and pod cannot be joined: tc failed ({done.code}): {words}")
