"""Where the mounts of a container lie in its pod's share: the host puts them there, the agent takes them there.

Alone in a module, since the agent imports it.
"""

from __future__ import annotations

FOLDER = "share"
"""Of the share, in the agent's own folder and in its file server's."""

GUEST_SHARE = f"/run/hyperpod/{FOLDER}"
"""Where a guest's agent mounts it."""


COMMON = "common"
"""Of the share: mounts that several containers have; no container is called so."""


def folder(container_id: str) -> str:
    """A container's, in the share."""
    return container_id[:12]


def place(container_id: str, number: int) -> str:
    """Of its mount `number`; holds no character that a path could misread."""
    return f"{folder(container_id)}/{number}"


def link(name: str) -> str:
    """What a container's place is when the mount is COMMON's `name`."""
    return f"../{COMMON}/{name}"
