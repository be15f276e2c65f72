"""Mount system calls on descriptors (Linux 5.12), and entering a mount namespace; each raises OSError.

Standard library only: the agent uses it as well as the daemon.
"""

from __future__ import annotations

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000

OPEN_TREE_CLONE = 1
MOVE_MOUNT_F_EMPTY_PATH = 4

MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
MOUNT_ATTR_IDMAP = 0x100000
MS_PRIVATE, MS_SLAVE = 1 << 18, 1 << 19

_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_CLONE_FS, _CLONE_NEWNS = 0x200, 0x20000

# The same on every architecture since Linux 5.1.
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_MOUNT_SETATTR = 428, 429, 442


class _MountAttr(ctypes.Structure):
    """struct mount_attr."""

    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return int(result)


def clone_tree(fd: int) -> int:
    """A detached copy of what lies at `fd`, with the mounts below it; the caller closes or moves it."""
    flags = OPEN_TREE_CLONE | os.O_CLOEXEC | AT_EMPTY_PATH | AT_RECURSIVE
    return _check(_libc.syscall(_SYS_OPEN_TREE, fd, b"", flags), "open_tree")


def set_attributes(fd: int, path: bytes, *, attributes: int, propagation: int = 0, recursive: bool) -> None:
    """Add MOUNT_ATTR_* flags to a mount (`path` empty: the one at `fd`), or to all below it as well."""
    flags = (0 if path else AT_EMPTY_PATH) | (AT_RECURSIVE if recursive else 0)
    value = _MountAttr(attributes, 0, propagation, 0)
    _check(
        _libc.syscall(
            _SYS_MOUNT_SETATTR, fd, path, flags, ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value))
        ),
        "mount_setattr",
    )


def map_ids(tree: int, userns: int) -> None:
    """Show the top mount of a detached copy with its ids mapped as in a user namespace. EINVAL: its file system
    cannot do that."""
    value = _MountAttr(MOUNT_ATTR_IDMAP, 0, 0, userns)
    size = ctypes.c_size_t(ctypes.sizeof(value))
    _check(
        _libc.syscall(_SYS_MOUNT_SETATTR, tree, b"", AT_EMPTY_PATH, ctypes.byref(value), size),
        "mount_setattr",
    )


def attach(tree: int, folder: int, name: bytes) -> None:
    """Mount a detached copy on `name` in the folder `folder`; a symbolic link there is not followed."""
    _check(_libc.syscall(_SYS_MOVE_MOUNT, tree, b"", folder, name, MOVE_MOUNT_F_EMPTY_PATH), "move_mount")


def detach(path: bytes) -> None:
    """Unmount what lies on `path`, now or when nobody uses it any more. EINVAL: nothing does."""
    _check(_libc.umount2(path, _MNT_DETACH | _UMOUNT_NOFOLLOW), "umount2")


def enter_mount_namespace(fd: int) -> None:
    """For the calling thread alone, for good: it has to end afterwards."""
    _check(_libc.unshare(_CLONE_FS), "unshare")
    _check(_libc.setns(fd, _CLONE_NEWNS), "setns")
