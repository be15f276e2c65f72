"""Images as volumes of a container: what a request may ask for, and what crun is told. And the volumes that a
container's own image declares (VOLUME), which can be written to although its root is read-only.

The agent mounts the layers, as it does for a container's root, and fills in where crun finds them.
"""

from __future__ import annotations

import posixpath
from collections.abc import Collection, Sequence
from typing import Any

from hyperpod.errors import InvalidArgument
from hyperpod.model.mounts import Mount, Propagation

MAX_DECLARED = 64
MAX_PATH = 4095
_OF_THE_KERNEL = ("/proc", "/sys", "/dev")

VIA_LAYERS = "read-only layers"
"""How an image volume gets there, in the verbose status."""


def check(where: str, mount: Mount) -> None:
    """The rules for `image` and `image_sub_path`. Raises InvalidArgument that names the field."""
    if mount.image is None:
        if mount.image_sub_path:
            raise InvalidArgument(f"{where}.image_sub_path is set without an image")
        return
    if mount.host_path:
        raise InvalidArgument(f"{where}: host_path and image are both set; a mount has one source")
    if not mount.image.image:
        raise InvalidArgument(f"{where}.image.image is missing")
    if not mount.readonly:
        raise InvalidArgument(f"{where}.readonly is false: a volume that is an image can only be read")
    if mount.propagation is not Propagation.PRIVATE:
        raise InvalidArgument(
            f"{where}.propagation is {mount.propagation.value}: nothing is ever mounted below an image"
        )
    path = mount.image_sub_path
    if path.startswith("/") or ".." in path.split("/"):
        raise InvalidArgument(f"{where}.image_sub_path {path[:200]!r} is not a path below the image's root")


def oci_mount(destination: str) -> dict[str, Any]:
    """For crun; `source` is the agent's to fill in. Programs may run from it, as Kubernetes promises."""
    options = ["rbind", "rprivate", "ro", "nosuid", "nodev"]
    return {"destination": destination, "type": "bind", "source": "", "options": options}


def explained(mount: Mount, image_id: str) -> str:
    """For the verbose status."""
    part = f"{mount.image_sub_path!r} in " if mount.image_sub_path else ""
    return f"{VIA_LAYERS} of {part}image {image_id}: read-only, private"


def declared(volumes: Sequence[str], taken: Collection[str]) -> list[str]:
    """Folders of the image's VOLUMEs that nothing is mounted at (`taken`), as containerd has them: the same as the
    image's, and writable. An image may say anything: what is no folder of its own is left out."""
    found: dict[str, None] = {}
    for volume in volumes[:MAX_DECLARED]:
        path = posixpath.normpath("/" + volume.lstrip("/"))
        of_the_kernel = any(path == top or path.startswith(f"{top}/") for top in _OF_THE_KERNEL)
        if path != "/" and not of_the_kernel and path.isprintable() and len(path.encode()) <= MAX_PATH:
            found[path] = None
    return [path for path in found if path not in taken]


def declared_mount(destination: str) -> dict[str, Any]:
    """For crun; `source` is the agent's to fill in."""
    return {"destination": destination, "type": "bind", "source": "", "options": ["rbind", "rprivate", "rw"]}
