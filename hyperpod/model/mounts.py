"""Mounts of a container as the request gives them."""

from __future__ import annotations

from enum import StrEnum

from hyperpod.model.base import Record


class Propagation(StrEnum):
    """CRI MountPropagation."""

    PRIVATE = "PRIVATE"
    HOST_TO_CONTAINER = "HOST_TO_CONTAINER"
    BIDIRECTIONAL = "BIDIRECTIONAL"


class Mount(Record):
    """CRI Mount as far as it is honoured; paths as they came."""

    container_path: str
    host_path: str
    readonly: bool = False
    recursive_read_only: bool = False
    propagation: Propagation = Propagation.PRIVATE
    selinux_relabel: bool = False
