"""Images as volumes of a container: what a request may ask for, and what crun is told.

The agent mounts the layers, as it does for a container's root, and fills in where crun finds them.
"""

from __future__ import annotations

from typing import Any

from hyperpod.errors import InvalidArgument
from hyperpod.model.mounts import Mount, Propagation

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
