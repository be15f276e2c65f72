"""Which sysctls belong to a namespace, so that a pod that shares its kernel may set them for itself. Pure."""

from __future__ import annotations

_OWNERS = (
    ("net.", "network"),
    ("kernel.shm", "ipc"),
    ("kernel.msg", "ipc"),
    ("kernel.sem", "ipc"),
    ("fs.mqueue.", "ipc"),
)
"""Sysctls that belong to a namespace, by their beginning (namespaces(7)); all others are the whole kernel's."""


def namespace_of(sysctl: str) -> str:
    """The namespace that a sysctl belongs to, as CRI names it; empty: to the whole kernel."""
    name = sysctl.replace("/", ".")
    return next((owner for prefix, owner in _OWNERS if name.startswith(prefix)), "")
