"""System calls that Python's standard library lacks, through ctypes; each raises OSError."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
from typing import Any

from hyperpod.errors import Unavailable

_libc = ctypes.CDLL(None, use_errno=True)

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE, MS_SLAVE = 1 << 12, 1 << 14, 1 << 18, 1 << 19
MNT_DETACH = 2
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER = 4, 22, 36
SECCOMP_MODE_STRICT = 1

SYS_OPENAT2 = 437
"""The same on every architecture."""
RESOLVE_NO_MAGICLINKS, RESOLVE_IN_ROOT = 2, 16
OPENAT2_ATTEMPTS = 1000
"""It says EAGAIN for a path with ".." whenever something is mounted or renamed anywhere meanwhile: openat2(2)."""

SYS_KEYCTL = {"x86_64": 250}.get(os.uname().machine, 219)
KEYCTL_JOIN_SESSION_KEYRING = 1

RB_POWER_OFF = 0x4321FEDC

RNDADDENTROPY = 0x40085203
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1

LOOP_CTL_GET_FREE = 0x4C82
LOOP_CONFIGURE = 0x4C0A
LO_FLAGS_READ_ONLY, LO_FLAGS_AUTOCLEAR = 1, 4
LOOP_MAJOR = 7
_LOOP_CONFIG_SIZE = 304
_LOOP_FLAGS_OFFSET = 8 + 52
"""struct loop_config: fd u32, block_size u32, then loop_info64 with lo_flags after 52 bytes."""
LOOP_TRIES = 20


def _check(result: int, *context: Any) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), *context)


def mount(source: str, target: str, fstype: str, flags: int = 0, data: str = "") -> None:
    _check(
        _libc.mount(
            source.encode(), target.encode(), fstype.encode(), ctypes.c_ulong(flags), data.encode() or None
        ),
        f"mount {fstype} {target}",
    )


def umount(target: str, flags: int = 0) -> None:
    _check(_libc.umount2(target.encode(), flags), target)


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def setns(fd: int, kind: int) -> None:
    """For the calling thread, and all that it starts; a user namespace only for who has no other threads."""
    _check(_libc.setns(fd, kind), "setns")


def enter_network(path: str) -> None:
    """For the calling thread, and all that it starts."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        setns(fd, CLONE_NEWNET)
    finally:
        os.close(fd)


def hide() -> None:
    """Nobody but the host's or the guest's root may look at this process's files and memory."""
    _check(_libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl")


def leave_files() -> None:
    """A mount namespace of this process's own with an empty root, and nothing above or below it."""
    unshare(CLONE_NEWNS)
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    flags = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC
    mount("tmpfs", "/proc", "tmpfs", flags, "size=4k,mode=555")  # any folder will do
    os.chdir("/proc")
    _check(_libc.pivot_root(b".", b"."), "pivot_root")
    umount(".", MNT_DETACH)
    os.chdir("/")


def sleep_for_ever(pipe: int) -> None:
    """By reading from a pipe that nobody writes to, in seccomp's strict mode: whoever gets hold of this process can
    have it read, write and end, and the kernel kills it for anything else. Returns only by raising."""
    prctl, read, nothing = _libc.prctl, _libc.read, ctypes.create_string_buffer(1)
    _check(prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT, 0, 0, 0), "prctl")
    while True:
        read(pipe, nothing, 1)


def open_in_root(root: int, path: str, flags: int) -> int:
    """openat2(2) that takes the folder `root` for "/", whatever symlinks say, and follows none of /proc."""
    how = struct.pack("QQQ", flags | os.O_CLOEXEC, 0, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
    for _ in range(OPENAT2_ATTEMPTS):
        fd = _libc.syscall(ctypes.c_long(SYS_OPENAT2), root, path.encode(), how, ctypes.c_size_t(len(how)))
        if fd >= 0 or ctypes.get_errno() != errno.EAGAIN:
            break
    _check(fd, path)
    return int(fd)


def become_subreaper() -> None:
    """Orphaned descendants become our children: containers' first processes after crun has left."""
    _check(_libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")


def leave_session_keys() -> None:
    """A new, empty session keyring for this process and all that it starts; a kernel without keys is fine."""
    result = _libc.syscall(ctypes.c_long(SYS_KEYCTL), KEYCTL_JOIN_SESSION_KEYRING, None)
    if result >= 0 or ctypes.get_errno() != errno.ENOSYS:
        _check(result, "keyctl")


def power_off() -> None:
    _check(_libc.reboot(ctypes.c_int(RB_POWER_OFF - (1 << 32) if RB_POWER_OFF >= 1 << 31 else RB_POWER_OFF)))


def add_entropy(data: bytes) -> None:
    """Mix into the kernel's random pool and credit all of it."""
    with open("/dev/urandom", "wb", buffering=0) as pool:
        fcntl.ioctl(pool, RNDADDENTROPY, struct.pack(f"ii{len(data)}s", len(data) * 8, len(data), data))


def interface_up(name: str) -> None:
    """Set IFF_UP on an interface."""
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sH14x", name.encode(), 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(sock, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sH14x", name.encode(), flags | IFF_UP))


def loop_attach(path: str) -> tuple[str, int]:
    """A read-only loop device over `path`: its node, and an open fd that keeps it until it is mounted.

    The device frees itself with its last user (AUTOCLEAR). Raises Unavailable when none is to be had.
    """
    config = bytearray(_LOOP_CONFIG_SIZE)
    image = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        struct.pack_into("I", config, 0, image)
        struct.pack_into("I", config, _LOOP_FLAGS_OFFSET, LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR)
        for _ in range(LOOP_TRIES):
            with open("/dev/loop-control", "rb", buffering=0) as control:
                number = fcntl.ioctl(control, LOOP_CTL_GET_FREE)
            node = f"/dev/loop{number}"
            with contextlib.suppress(FileExistsError):
                os.mknod(node, 0o60660, os.makedev(LOOP_MAJOR, number))
            device = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, LOOP_CONFIGURE, bytes(config))
            except BlockingIOError:
                os.close(device)
            except OSError as exc:
                os.close(device)
                if exc.errno != 16:  # EBUSY: somebody else took it first
                    raise
            else:
                return node, device
    finally:
        os.close(image)
    raise Unavailable(f"no free loop device after {LOOP_TRIES} tries")


QUOTACTL_FD = 443
"""Number of the system call, the same on every architecture; Linux 5.14."""

_Q_GETQUOTA_PROJECT = 0x800007 << 8 | 2
_DQBLK = struct.Struct("8QI4x")
"""struct if_dqblk: space and inodes in use are its third and sixth numbers."""


def project_usage(folder: int, project: int) -> tuple[int, int]:
    """Bytes and inodes of a project, on the file system of an open folder."""
    block = ctypes.create_string_buffer(_DQBLK.size)
    result = _libc.syscall(QUOTACTL_FD, folder, _Q_GETQUOTA_PROJECT, project, block)
    _check(result, f"quota of project {project}")
    numbers = _DQBLK.unpack(block.raw)
    return numbers[2], numbers[5]
