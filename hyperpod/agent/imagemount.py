"""Images as volumes: an overlay of an image's layers without a writable one, and a folder in it to bind from.

A mount per volume and container: the pages of one image's files are shared all the same, they are the layers'.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hyperpod.agent import linux
from hyperpod.agent.layers import LayerSource
from hyperpod.agent.layout import Layout
from hyperpod.agent.rootfs import OPTIONS_LIMIT
from hyperpod.errors import (
    IMAGE_VOLUME_FAILED,
    FailedPrecondition,
    HyperpodError,
    InvalidArgument,
    NotFound,
)

if TYPE_CHECKING:
    from hyperpod.agent.userns import PodUser

log = logging.getLogger(__name__)

_EMPTY = "empty"
"""A folder beside the layers: without a writable one overlayfs wants two, and an image may have one."""


@dataclass(frozen=True)
class ImageVolume:
    """The ImageVolume message of agent.proto."""

    destination: str
    layers: list[LayerSource]
    sub_path: str


def mount(
    layout: Layout,
    container: str,
    mounts: Sequence[dict[str, Any]],
    volumes: Sequence[ImageVolume],
    numbers: Sequence[int],
) -> None:
    """Mount each volume and fill in the source of its mount in the OCI spec's `mounts`. Blocks.

    `numbers`: of the layers of all volumes, one after the other. Raises NotFound, FailedPrecondition,
    InvalidArgument; then `unmount` undoes what there is.
    """
    places = {item["destination"]: item for item in mounts}
    at = 0
    for index, volume in enumerate(volumes):
        own = numbers[at : at + len(volume.layers)]
        at += len(volume.layers)
        what = f"{IMAGE_VOLUME_FAILED}: the image at {volume.destination[:200]!r}"
        if volume.destination not in places or not own:
            raise InvalidArgument(f"{what} has no layers, or no mount in the OCI spec")
        target = f"{_folder(layout, container)}/{index}"
        _mount_layers(layout, target, own, what)
        if volume.sub_path:
            _bind_inside(target, volume.sub_path, f"{target}s", what)
            target = f"{target}s"
        places[volume.destination]["source"] = target


def mount_writable(
    layout: Layout, container: str, spec: dict[str, Any], paths: Sequence[str], user: PodUser | None
) -> None:
    """Folders that the image declares as volumes, each of which has a mount in the OCI spec: one that the image has
    not is a new one. One that it has is bound beside the root, where that one's being read-only does not reach;
    in a writable root it is as it is. What is no folder stays what it is. Blocks."""
    root = os.open(spec["root"]["path"], os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for number, path in enumerate(paths):
            [item] = [item for item in spec["mounts"] if item["destination"] == path]
            item["source"] = target = f"{_folder(layout, container)}/w{number}"
            os.makedirs(_folder(layout, container), exist_ok=True)
            if _is_free(root, path):
                _bind_new(f"{layout.writable(container)}/v{number}", target, user)
            elif not spec["root"]["readonly"]:
                spec["mounts"].remove(item)
            else:
                try:
                    _bind_inside(spec["root"]["path"], path, target, "the volume that the image declares")
                except HyperpodError as exc:
                    log.info("container %s: %s", container[:12], exc)
                    spec["mounts"].remove(item)
    finally:
        os.close(root)


def _bind_new(folder: str, target: str, user: PodUser | None) -> None:
    os.mkdir(folder, 0o755)
    if user is not None:
        user.own(folder)
    os.mkdir(target)
    linux.mount(folder, target, "", linux.MS_BIND)


def _is_free(root: int, path: str) -> bool:
    """Whether a folder can be made there: nothing is, nor a link on the way that leads nowhere."""
    parts = path.strip("/").split("/")
    for count in range(1, len(parts) + 1):
        above = "/".join(parts[:count])
        try:
            os.close(linux.open_in_root(root, above, os.O_PATH))
        except FileNotFoundError:
            try:
                os.close(linux.open_in_root(root, above, os.O_PATH | os.O_NOFOLLOW))
            except FileNotFoundError:
                return True
            return False
        except OSError:  # a file on the way, or links in a circle
            return False
    return False


def unmount(layout: Layout, container: str) -> None:
    """Lazily, so that it cannot hang; nothing mounted is fine."""
    folder = _folder(layout, container)
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):
                linux.umount(f"{folder}/{name}", linux.MNT_DETACH)


def _folder(layout: Layout, container: str) -> str:
    return f"{layout.bundle(container)}/v"


def _mount_layers(layout: Layout, target: str, layers: Sequence[int], what: str) -> None:
    os.makedirs(target)
    os.makedirs(f"{layout.layers}/{_EMPTY}", exist_ok=True)
    # Relative to the agent's working folder, which is that of the layers.
    options = "lowerdir=" + ":".join([*(str(number) for number in reversed(layers)), _EMPTY])
    if len(options) > OPTIONS_LIMIT:
        raise InvalidArgument(f"{what}: {len(layers)} layers are too many for one overlay")
    try:
        linux.mount("overlay", target, "overlay", linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV, options)
    except OSError as exc:
        raise FailedPrecondition(f"{what} does not mount: {exc.strerror}") from exc


def _bind_inside(root: str, path: str, target: str, what: str) -> None:
    """Bind the folder `path` of `root` to `target`; what the image's links say holds within it.

    A mount and not a name for crun: JSON has no words for names that are not UTF-8, nor crun for those too long."""
    what = f"{what}: its folder {path[:200]!r}"
    os.mkdir(target)
    folder = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = linux.open_in_root(folder, path, os.O_PATH)
        try:
            if not stat.S_ISDIR(os.fstat(found).st_mode):
                raise InvalidArgument(f"{what} is not one; only folders can be mounted")
            linux.mount(f"/proc/self/fd/{found}", target, "", linux.MS_BIND)
        finally:
            os.close(found)
    except OSError as exc:
        missing = isinstance(exc, FileNotFoundError | NotADirectoryError)
        kind: type[HyperpodError] = NotFound if missing else FailedPrecondition
        raise kind(f"{what} {'is not there' if missing else f'cannot be had: {exc.strerror}'}") from exc
    finally:
        os.close(folder)
