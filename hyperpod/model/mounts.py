"""Mounts of a container as the request gives them."""

from __future__ import annotations

from enum import StrEnum

from hyperpod.model.base import Record
from hyperpod.model.security import UserNamespace


class Propagation(StrEnum):
    """CRI MountPropagation."""

    PRIVATE = "PRIVATE"
    HOST_TO_CONTAINER = "HOST_TO_CONTAINER"
    BIDIRECTIONAL = "BIDIRECTIONAL"


class MountImage(Record):
    """CRI Mount.image: what a volume is made of, in the user's words."""

    image: str
    user_specified_image: str = ""
    annotations: dict[str, str] = {}


class Mount(Record):
    """CRI Mount as far as it is honoured; paths as they came. Either `host_path` or `image` is set."""

    container_path: str
    host_path: str = ""
    readonly: bool = False
    recursive_read_only: bool = False
    propagation: Propagation = Propagation.PRIVATE
    selinux_relabel: bool = False
    image: MountImage | None = None
    image_sub_path: str = ""
    """Below the image's root; empty: all of it."""
    ids: UserNamespace | None = None
    """Files are a container's whose ids are mapped so (an idmapped mount)."""


class ImageVolume(Record):
    """Which image the mount number `mount` of a request turned out to be."""

    mount: int
    image_id: str
    layers: tuple[str, ...]
    """Names, lowest first."""
