"""A place where an agent runs, and the guest, which is one: what it needs before the first container.

The other one is hyperpod.agent.hostplace."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from typing import TYPE_CHECKING

from hyperpod.agent import linux, podfiles
from hyperpod.agent.cgroups import ROOT as CGROUP_ROOT
from hyperpod.agent.cgroups import Cgroups
from hyperpod.agent.crun import Crun
from hyperpod.agent.layout import Layout
from hyperpod.api.gen.hyperpod.agent import v1
from hyperpod.errors import InvalidArgument

if TYPE_CHECKING:
    from hyperpod.agent.userns import PodUser

log = logging.getLogger(__name__)

RESERVE_BYTES = 48 << 20
"""Memory that containers together cannot have: the agent's, crun's, and the kernel's for both."""

RESERVE_PIDS = 256
ENTROPY_LIMIT = 512
SCRATCH_SERIAL = "scratch"
SCRATCH_TIMEOUT = 10.0
OPEN_FILES = 65536
CRUN_VERSION_FILE = "/etc/hyperpod/crun-version"
"""Written when the guest image is built: starting crun to ask it costs an emulated guest 50 ms."""


def phase(name: str) -> None:
    """One line on the console, for who wonders where a boot hangs. Goes past logging: it is the boot's own."""
    os.write(2, f"hyperpod-agent: phase={name} t={time.clock_gettime(time.CLOCK_BOOTTIME):.2f}\n".encode())


class Place:
    """Base: a guest overrides what it owns, a host agent what its pod does."""

    def __init__(self, layout: Layout, ended: asyncio.Event) -> None:
        self.layout, self._ended = layout, ended
        self._crun_version: str | None = None
        self.user: PodUser | None = None
        """The pod's user namespace."""

    async def greet(self, hello: v1.HelloRequest) -> None:
        """Take what Hello brings. Raises InvalidArgument."""
        raise NotImplementedError

    def write_files(self, hello: v1.HelloRequest) -> None:
        """Those of names, which are the pod's user's."""
        if hello.resolv_conf or hello.hosts:
            podfiles.write(self.layout, hello.resolv_conf, hello.hosts, hello.hostname)
            if self.user is not None:
                podfiles.give(self.layout, self.user)

    def set_clock(self, ns: int) -> None:
        """Nothing on a host."""

    async def crun_version(self, crun: Crun) -> str:
        if self._crun_version is None:
            self._crun_version = await crun.version()
        return self._crun_version

    def end(self) -> None:
        """Leave the main loop; the process exits or the machine powers off after it."""
        self._ended.set()

    def power_off(self) -> None:
        """Nothing on a host."""


class GuestPlace(Place):
    """PID 1 of a virtual machine."""

    @staticmethod
    def prepare() -> tuple[Layout, Cgroups]:
        """From the kernel's hand-over to the point where containers can be made."""
        phase("init")
        mount_api_filesystems()
        phase("mounts")
        raise_limits()
        with contextlib.suppress(OSError):
            linux.interface_up("lo")
        layout = Layout(root="/run/hyperpod", scratch="/run/scratch", cgroup="/hyperpod", guest=True)
        cgroups = Cgroups(layout.cgroup)
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        with open("/proc/sys/kernel/pid_max") as file:
            pids = int(file.read())
        cgroups.setup(max(total - RESERVE_BYTES, total // 2), max(pids - RESERVE_PIDS, pids // 2))
        phase("cgroups")
        mount_scratch(layout.scratch)
        layout.make()
        phase("scratch")
        return layout, cgroups

    async def greet(self, hello: v1.HelloRequest) -> None:
        self.set_clock(hello.host_time_ns)
        if hello.entropy:
            linux.add_entropy(hello.entropy[:ENTROPY_LIMIT])
        if hello.userns is not None and self.user is None:
            self.user = enter_user_namespace(hello)
        if hello.hostname:
            set_hostname(hello.hostname)
        if hello.interfaces:
            from hyperpod.agent import network

            network.configure(hello.interfaces)
        # After the network: a pod's settings of its interfaces are meant for those that are there.
        for name, value in hello.sysctls.items():
            set_sysctl(name, value, self.user)
        self.write_files(hello)

    def set_clock(self, ns: int) -> None:
        if ns > 0:
            time.clock_settime_ns(time.CLOCK_REALTIME, ns)

    async def crun_version(self, crun: Crun) -> str:
        try:
            with open(CRUN_VERSION_FILE) as file:
                return file.read(100).strip()
        except OSError:
            return await super().crun_version(crun)

    def power_off(self) -> None:
        os.sync()
        linux.power_off()


def set_hostname(name: str) -> None:
    """Raises InvalidArgument when the kernel does not take it."""
    try:
        socket.sethostname(name)
    except OSError as exc:
        raise InvalidArgument(f"hostname {name[:80]!r}: {exc.strerror}") from exc


def enter_user_namespace(hello: v1.HelloRequest) -> PodUser:
    """A guest's pod gets one, with the network cards in its network namespace. Raises InvalidArgument."""
    from hyperpod.agent import network, userns
    from hyperpod.agent.pidholder import hold_pid_namespace
    from hyperpod.agent.userns import IdMap

    wanted = hello.userns
    if wanted is None or wanted.uids is None or wanted.gids is None:
        raise InvalidArgument("a user namespace without mappings")
    uids, gids = (IdMap(ids.host_id, ids.length) for ids in (wanted.uids, wanted.gids))
    try:
        made = userns.Namespaces(uids, gids)
        network.move(hello.interfaces, made.network)
        made.enter()
        linux.interface_up("lo")
        made.user.own("/dev/shm")  # the pod's
        made.user.pids = hold_pid_namespace(made.user.fd)
    except OSError as exc:
        raise InvalidArgument(f"the guest's kernel makes no user namespace: {exc}") from exc
    return made.user


def set_sysctl(name: str, value: str, user: PodUser | None = None) -> None:
    """`user`: owns the pod's namespaces. Raises InvalidArgument when it does not exist or take the value."""
    if not name or name.startswith(("/", ".")) or ".." in name:
        raise InvalidArgument(f"sysctl {name[:80]!r} is no name")
    # With a slash in it the name is written with slashes, and its dots are part of the parts.
    path = name if "/" in name else name.replace(".", "/")
    try:
        try:
            with open(f"/proc/sys/{path}", "w") as file:
                file.write(value)
        except PermissionError:
            if user is None:
                raise
            with user.as_root(), open(f"/proc/sys/{path}", "w") as file:
                file.write(value)
    except OSError as exc:
        raise InvalidArgument(f"sysctl {name[:80]}={value[:80]!r}: {exc.strerror}") from exc


def mount_api_filesystems() -> None:
    """What every program expects of a Linux; what the kernel or an initramfs has mounted is left."""
    safe = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
    for source, target, fstype, flags, data in (
        ("proc", "/proc", "proc", safe, ""),
        ("sysfs", "/sys", "sysfs", safe, ""),
        ("devtmpfs", "/dev", "devtmpfs", linux.MS_NOSUID, "mode=755"),
        ("devpts", "/dev/pts", "devpts", linux.MS_NOSUID | linux.MS_NOEXEC, "gid=5,mode=620,ptmxmode=666"),
        ("tmpfs", "/dev/shm", "tmpfs", safe, "mode=1777,size=64m"),  # the pod's
        ("tmpfs", "/run", "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=755,size=25%"),
        ("tmpfs", "/tmp", "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=1777,size=10%"),
        ("cgroup2", CGROUP_ROOT, "cgroup2", safe, "nsdelegate"),
    ):
        if target.startswith("/dev/"):
            os.makedirs(target, exist_ok=True)
        try:
            linux.mount(source, target, fstype, flags, data)
        except BlockingIOError:
            raise
        except OSError as exc:
            if exc.errno != 16:  # EBUSY: it is mounted there already
                raise
    for link, target in (
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ):
        with contextlib.suppress(FileExistsError):
            os.symlink(target, link)


def raise_limits() -> None:
    """Open files: each stream of each process is a pipe and a connection."""
    import resource

    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))


def find_scratch() -> str:
    """The virtio-blk or SCSI disk whose serial is "scratch", or empty."""
    from hyperpod.agent.layers import find_lun

    for name in os.listdir("/sys/block"):
        if not name.startswith("vd"):
            continue
        with contextlib.suppress(OSError), open(f"/sys/block/{name}/serial") as file:
            if file.read().strip() == SCRATCH_SERIAL:
                return f"/dev/{name}"
    return find_lun(SCRATCH_SERIAL)


def mount_scratch(target: str) -> None:
    """Wait for the scratch disk and mount it. Raises OSError: without it there is no place for a container."""
    deadline = time.monotonic() + SCRATCH_TIMEOUT
    while not (node := find_scratch()):
        if time.monotonic() > deadline:
            raise FileNotFoundError(f"no disk with serial {SCRATCH_SERIAL}")
        time.sleep(0.01)  # nothing else runs yet: there is no event loop to hold up
    os.makedirs(target, exist_ok=True)
    linux.mount(node, target, "ext4", linux.MS_NOSUID | linux.MS_NODEV, "")
