"""A container's root: an overlay of its layers and a writable folder on the scratch disk."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from typing import TYPE_CHECKING

from hyperpod.agent import linux
from hyperpod.agent.layout import Layout
from hyperpod.errors import FailedPrecondition, InvalidArgument

if TYPE_CHECKING:
    from hyperpod.agent.userns import PodUser

OPTIONS_LIMIT = 4095
"""Bytes of mount(2) options: one page with its final NUL."""

_numbers = itertools.count()


def mount_overlay(layout: Layout, container: str, layers: list[int], user: PodUser | None = None) -> str:
    """Mount and give the path. `layers`: topmost last; `user`: whose root it is to be.

    Raises FailedPrecondition, InvalidArgument."""
    writable, target = layout.writable(container), f"{layout.bundle(container)}/rootfs"
    for path in (f"{writable}/u", f"{writable}/w", target):
        os.makedirs(path, exist_ok=True)
    # The upper folder becomes the root folder of the container: everybody must be able to enter it.
    os.chmod(f"{writable}/u", 0o755)  # noqa: S103
    if user is not None:
        user.own(f"{writable}/u")
        user.own(f"{writable}/w")
        bundle = layout.bundle(container)
        user.open_way(os.path.dirname(bundle), bundle)  # crun's child, which mounts, is that root already
    lower = ":".join(str(number) for number in reversed(layers))
    options = f"lowerdir={lower},upperdir={writable}/u,workdir={writable}/w"
    if len(options) > OPTIONS_LIMIT:
        raise InvalidArgument(f"{len(layers)} layers are too many for one overlay")
    try:
        linux.mount("overlay", target, "overlay", 0, options)
    except OSError as exc:
        raise FailedPrecondition(
            f"the root of container {container[:12]} does not mount: {exc.strerror}"
        ) from exc
    return target


def unmount_overlay(layout: Layout, container: str) -> None:
    """Lazily, so that it cannot hang; nothing mounted is fine."""
    with contextlib.suppress(OSError):
        linux.umount(f"{layout.bundle(container)}/rootfs", linux.MNT_DETACH)


async def discard(layout: Layout, path: str) -> None:
    """Remove a tree that a container could write to; at once out of the way, then off the event loop."""
    if not os.path.lexists(path):
        return
    trash = f"{layout.trash}/{next(_numbers)}"
    os.rename(path, trash)
    await asyncio.to_thread(remove_tree, trash)


def remove_tree(path: str) -> None:
    """Remove a folder of any depth: subfolders are moved up first, so nothing recurses and no path grows.

    What cannot be removed (an immutable file) is left.
    """
    pending, moved = [path], 0
    while pending:
        folder = pending.pop()
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        os.chmod(entry.path, 0o700)
                        flat = f"{path}.{moved}"
                        os.rename(entry.path, flat)
                        pending.append(flat)
                        moved += 1
                    else:
                        os.unlink(entry.path)
        with contextlib.suppress(OSError):
            os.rmdir(folder)
