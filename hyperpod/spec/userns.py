"""User namespaces of pods: what goes together, and the words for the kernel. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hyperpod.errors import InvalidArgument
from hyperpod.model.mounts import Mount
from hyperpod.model.security import IdMapping, NamespaceMode, NamespaceOptions, UserNamespace
from hyperpod.spec.place import of_node

KERNEL = (6, 2)
"""The first whose squashfs, which image layers are, allows idmapped mounts."""

_RELEASE = re.compile(r"(\d+)\.(\d+)")
_WHERE = "config.linux.security_context.namespace_options"


def map_line(mapping: IdMapping) -> str:
    """Of /proc/<pid>/uid_map or gid_map: user_namespaces(7)."""
    return f"0 {mapping.host_id} {mapping.length}"


def check_pod(options: NamespaceOptions) -> None:
    """The node's namespaces belong to the node's users: one cannot have a part of both. Raises InvalidArgument."""
    if options.userns is not None and (names := of_node(options)):
        raise InvalidArgument(
            f"{_WHERE}.userns_options.mode is POD and {names[0]} is NODE: a pod with a user namespace of its own "
            f"(hostUsers: false) cannot have the node's {names[0]} namespace"
        )


def check_container(pod: NamespaceOptions, container: NamespaceOptions, mounts: Sequence[Mount]) -> None:
    """All of a pod's containers have its user namespace, and their mounts its ids. Raises InvalidArgument."""
    said = container.userns_mode
    if said is not None and (container.userns != pod.userns):
        raise InvalidArgument(
            f"{_WHERE}.userns_options is {_words(container.userns)}, but that of the pod is {_words(pod.userns)}: "
            "they have to be the same"
        )
    for number, mount in enumerate(mounts):
        if mount.ids is not None and mount.ids != pod.userns:
            raise InvalidArgument(
                f"config.mounts[{number}].uid_mappings and gid_mappings are {_words(mount.ids)}, but the user "
                f"namespace of the pod is {_words(pod.userns)}: they have to be the same"
            )


def too_old(release: str) -> str:
    """Why a kernel cannot do it; empty when it can."""
    found = _RELEASE.match(release)
    if found is None or (int(found[1]), int(found[2])) >= KERNEL:
        return ""
    wanted = ".".join(map(str, KERNEL))
    return f"its kernel, {release}, cannot map the ids of image layers; {wanted} can"


def _words(ids: UserNamespace | None) -> str:
    if ids is None:
        return NamespaceMode.NODE.value
    return f"POD (uids {map_line(ids.uids)}, gids {map_line(ids.gids)})"
