"""The kernel's vhost-vsock: is it there, and which CIDs are free."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import struct
from collections.abc import Collection
from typing import Final

from hyperpod.errors import ResourceExhausted, Unsupported

DEVICE: Final = "/dev/vhost-vsock"
_SET_GUEST_CID: Final = 0x4008AF60  # VHOST_VSOCK_SET_GUEST_CID: _IOW(0xAF, 0x60, __u64), linux/vhost.h
_MIN_CID: Final = 3
_MAX_CID: Final = 0xFFFFFFFE
_TRIES: Final = 64


def available(device: str = DEVICE) -> bool:
    """Whether this process can use the kernel's device."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def free_cid(taken: Collection[int] = (), device: str = DEVICE) -> int:
    """A CID that no VM of this host has now and that is not in `taken`.

    Random, because a CID that is used again soon makes a late client reach another VM. Somebody else may take
    it before the VM starts: then starting fails and is tried again with another.
    Raises Unsupported without the device, ResourceExhausted when no free one was found.
    """
    for _ in range(_TRIES):
        cid = _MIN_CID + secrets.randbelow(_MAX_CID - _MIN_CID + 1)
        if cid not in taken and is_free(cid, device):
            return cid
    raise ResourceExhausted("no free vsock CID found")


def is_free(cid: int, device: str = DEVICE) -> bool:
    """Whether the kernel would give `cid` to a VM now. Raises Unsupported without the device."""
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _SET_GUEST_CID, struct.pack("=Q", cid))  # given back when the descriptor closes
        finally:
            os.close(fd)
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            return False
        raise Unsupported(f"{device}: {exc}") from exc
    return True
