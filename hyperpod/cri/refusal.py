"""One table of what becomes of every field of the requests that describe pods, containers and limits.

A field is honoured, or harmless to ignore for the reason given, or refused by name when it is set: nothing a
user asks for is dropped silently. A test walks the interface and fails for a field that is in none of the
classes, so a newer CRI cannot bring one in unnoticed. README lists the harmless and the refused ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import betterproto2

from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.errors import InvalidArgument, Unsupported
from hyperpod.spec.place import HANDLERS


@dataclass(frozen=True)
class Honoured:
    """Converted and acted upon; of a message without rules of its own this covers all that is in it."""


@dataclass(frozen=True)
class Harmless:
    """Ignored; `reason` says why nobody misses it."""

    reason: str


@dataclass(frozen=True)
class Refused:
    """Not built: an error when set, that is, present, not empty and not zero.

    `here`: whether this host is one where the field means something; elsewhere nobody misses it."""

    why: str = "not built yet"
    here: Callable[[], bool] = lambda: True


@dataclass(frozen=True)
class Only:
    """Honoured for these values, the others are refused."""

    values: tuple[Any, ...]
    why: str = "not built yet"
    never: tuple[Any, ...] | None = ()
    """Those that cannot make sense here (None: all others): INVALID_ARGUMENT instead of UNIMPLEMENTED."""


Rule = Honoured | Harmless | Refused | Only
Table = dict[str, Rule]
HONOURED = Honoured()
_POD, _CONTAINER, _NODE = cri.NamespaceMode.POD, cri.NamespaceMode.CONTAINER, cri.NamespaceMode.NODE
_NO_PAUSE = "a VM needs no pause process, so there is nothing that it could apply to"
_WHICH = "no such namespace for it"
_WINDOWS = "this is a Linux runtime"
_PROFILES = (cri.SecurityProfileProfileType.RuntimeDefault, cri.SecurityProfileProfileType.Unconfined)
_OLD_PROFILES = ("", "runtime/default", "docker/default", "unconfined")
_NO_APPARMOR = "the guest has no AppArmor"


def has_selinux() -> bool:
    """Whether this host's kernel enforces labels, or tells what it would."""
    return Path("/sys/fs/selinux/enforce").exists()


def _under(prefix: str, table: Table) -> Table:
    return {f"{prefix}.{path}": rule for path, rule in table.items()}


def _honoured(*paths: str) -> Table:
    return dict.fromkeys(paths, HONOURED)


_NAMESPACES: Table = {
    # NODE makes a pod a host pod, or is refused for a VM by spec/place.py.
    "network": Only((_POD, _NODE), _WHICH, never=None),
    "ipc": Only((_POD, _CONTAINER, _NODE), _WHICH, never=None),
    # The kubelet sends NODE for every pod that does not ask for a user namespace.
    "userns_options.mode": Only((_POD, _NODE), "a user namespace is the pod's or the node's", never=None),
    **_honoured("userns_options.uids", "userns_options.gids"),
}
_SELINUX: Table = dict.fromkeys(
    ("user", "role", "type", "level"), Refused("SELinux labels are not built yet", has_selinux)
)
"""Network agents' charts name labels for whatever node there may be; without SELinux other runtimes ignore them."""
_POD_NAMESPACES: Table = {
    **_NAMESPACES,
    "pid": Only((_POD, _CONTAINER, _NODE), "TARGET is a container's", never=None),
    "target_id": Harmless("counts with TARGET only"),
}
_CONTAINER_NAMESPACES: Table = {
    **_NAMESPACES,
    "pid": HONOURED,
    "target_id": HONOURED,
}
_APPARMOR: Table = {
    "profile_type": Only(_PROFILES, _NO_APPARMOR),
    "localhost_ref": Refused(_NO_APPARMOR),
}
_RESOURCES: Table = {
    **_honoured("cpu_period", "cpu_quota", "cpu_shares", "memory_limit_in_bytes", "oom_score_adj"),
    **_honoured("cpuset_cpus", "cpuset_mems", "unified", "memory_swap_limit_in_bytes"),
    "hugepage_limits": HONOURED,
}
_POD_RESOURCES: Table = {
    **_honoured("cpu_period", "cpu_quota", "memory_limit_in_bytes"),
    "cpu_shares": Harmless("a weight among the host's VMs; each has its vCPUs"),
    "oom_score_adj": Harmless(_NO_PAUSE),
    "cpuset_cpus": Refused("pinning vCPUs is not built yet"),
    "cpuset_mems": Refused("pinning a VM's memory is not built yet"),
    # A kubelet on cgroup v2 sends memory.oom.group, and with the sum of the containers' limits, so with every pod.
    "unified": Harmless("each container has its own; the pod's cgroup is the caller's"),
    "memory_swap_limit_in_bytes": Harmless("the guest has no swap; its memory is the limit"),
    "hugepage_limits[].page_size": Harmless("counts with a limit only"),
    "hugepage_limits[].limit": Refused("the guest has no huge pages"),
}
_IMAGE: Table = {
    **_honoured("image", "annotations", "user_specified_image"),
    "runtime_handler": Only(HANDLERS, "no such runtime handler", never=None),
    "image_ref": Harmless("ContainerStatus tells what `image` turned out to be"),
}
_MOUNT: Table = {
    **_honoured("container_path", "host_path", "readonly", "recursive_read_only", "propagation"),
    # The kubelet sets it on every host for the first container that gets a volume.
    "selinux_relabel": Harmless("the guest has no SELinux, and nothing of the pod on the host needs a label"),
    **_honoured("uid_mappings", "gid_mappings"),
    **_under("image", _IMAGE),
    "image_sub_path": HONOURED,
    "mount_options": Refused("mount options are not built yet"),
}

RUN_POD_SANDBOX: Table = {
    "runtime_handler": HONOURED,
    **_honoured("config.metadata", "config.hostname", "config.log_directory"),
    **_honoured("config.labels", "config.annotations"),
    **_honoured("config.dns_config", "config.port_mappings"),
    "config.windows": Refused(_WINDOWS),
    "config.linux.cgroup_parent": HONOURED,
    "config.linux.sysctls": HONOURED,
    **_under("config.linux.overhead", _POD_RESOURCES),
    **_under("config.linux.resources", _POD_RESOURCES),
    **_under("config.linux.security_context.namespace_options", _POD_NAMESPACES),
    **_under("config.linux.security_context.selinux_options", _SELINUX),
    "config.linux.security_context.run_as_user": Harmless(_NO_PAUSE),
    "config.linux.security_context.run_as_group": Harmless(_NO_PAUSE),
    "config.linux.security_context.readonly_rootfs": Harmless(_NO_PAUSE),
    "config.linux.security_context.supplemental_groups": Harmless(_NO_PAUSE),
    "config.linux.security_context.supplemental_groups_policy": Harmless(_NO_PAUSE),
    "config.linux.security_context.privileged": HONOURED,
    "config.linux.security_context.seccomp": Harmless(_NO_PAUSE),
    **_under("config.linux.security_context.apparmor", _APPARMOR),
    "config.linux.security_context.seccomp_profile_path": Harmless(_NO_PAUSE),
}

CREATE_CONTAINER: Table = {
    "pod_sandbox_id": HONOURED,
    "sandbox_config": Harmless("the configuration given to RunPodSandbox holds"),
    **_honoured("config.metadata", "config.command", "config.args", "config.working_dir", "config.envs"),
    **_honoured("config.labels", "config.annotations", "config.log_path"),
    **_honoured("config.stdin", "config.stdin_once", "config.tty", "config.stop_signal"),
    **_under("config.image", _IMAGE),
    **_under("config.mounts[]", _MOUNT),
    **_honoured(
        "config.devices[].host_path", "config.devices[].container_path", "config.devices[].permissions"
    ),
    "config.CDI_devices": Refused("CDI devices are not built yet"),
    "config.windows": Refused(_WINDOWS),
    **_under("config.linux.resources", _RESOURCES),
    "config.linux.security_context.capabilities.add_capabilities": HONOURED,
    "config.linux.security_context.capabilities.drop_capabilities": HONOURED,
    "config.linux.security_context.capabilities.add_ambient_capabilities": HONOURED,
    "config.linux.security_context.privileged": HONOURED,
    **_under("config.linux.security_context.namespace_options", _CONTAINER_NAMESPACES),
    **_under("config.linux.security_context.selinux_options", _SELINUX),
    "config.linux.security_context.run_as_user": HONOURED,
    "config.linux.security_context.run_as_group": HONOURED,
    "config.linux.security_context.run_as_username": HONOURED,
    "config.linux.security_context.readonly_rootfs": HONOURED,
    "config.linux.security_context.supplemental_groups": HONOURED,
    "config.linux.security_context.supplemental_groups_policy": HONOURED,
    "config.linux.security_context.no_new_privs": HONOURED,
    "config.linux.security_context.masked_paths": HONOURED,
    "config.linux.security_context.readonly_paths": HONOURED,
    "config.linux.security_context.seccomp": HONOURED,
    **_under("config.linux.security_context.apparmor", _APPARMOR),
    "config.linux.security_context.apparmor_profile": Only(_OLD_PROFILES, _NO_APPARMOR),
    "config.linux.security_context.seccomp_profile_path": HONOURED,
}

UPDATE_CONTAINER: Table = {
    "container_id": HONOURED,
    **_under("linux", {**_RESOURCES, "oom_score_adj": Harmless("its processes keep what they started with")}),
    "windows": Refused(_WINDOWS),
    "annotations": Harmless("for plug-ins of the runtime; there are none"),
}

UPDATE_POD: Table = {
    "pod_sandbox_id": HONOURED,
    **_under("overhead", _POD_RESOURCES),
    **_under("resources", _POD_RESOURCES),
}

TABLES: dict[type[betterproto2.Message], Table] = {
    cri.RunPodSandboxRequest: RUN_POD_SANDBOX,
    cri.CreateContainerRequest: CREATE_CONTAINER,
    cri.UpdateContainerResourcesRequest: UPDATE_CONTAINER,
    cri.UpdatePodSandboxResourcesRequest: UPDATE_POD,
}


def refuse(request: betterproto2.Message) -> None:
    """For a well-formed message. Raises Unsupported or InvalidArgument that names the field's path.

    Requests without a table pass."""
    if (table := TABLES.get(type(request))) is None:
        return
    for path, where, value in _fields(request, table):
        rule = table.get(path)
        if isinstance(rule, Refused) and value and rule.here():
            raise Unsupported(f"{where} is set{_which(value)}: {rule.why}")
        if isinstance(rule, Only) and value not in rule.values:
            error = InvalidArgument if rule.never is None or value in rule.never else Unsupported
            raise error(f"{where} is {_show(value)}: {rule.why}")


def _fields(
    message: betterproto2.Message, table: Table, path: str = "", where: str = ""
) -> Iterator[tuple[str, str, Any]]:
    """All fields below `message` that have a rule or no fields of their own: table path, place, value."""
    for field in dataclasses.fields(message):  # type: ignore[arg-type]  # every message is a dataclass
        value = getattr(message, field.name)
        dot = "." if path else ""
        below, place = f"{path}{dot}{field.name}", f"{where}{dot}{field.name}"
        rule = table.get(below)
        if isinstance(value, betterproto2.Message):
            # A message that is present counts as set although all in it be zero.
            if rule is not None:
                yield below, place, True
            if not isinstance(rule, Harmless | Refused):
                yield from _fields(value, table, below, place)
        elif (
            isinstance(value, list) and rule is None and value and isinstance(value[0], betterproto2.Message)
        ):
            for number, item in enumerate(value):
                yield from _fields(item, table, f"{below}[]", f"{place}[{number}]")
        elif value is not None:
            yield below, place, value


def _show(value: Any) -> str:
    return str(value.name) if isinstance(value, betterproto2.Enum) else repr(value)[:100]


def _which(value: Any) -> str:
    """The paths or names of what is listed: mounts, devices, CDI devices."""
    if not isinstance(value, list):
        return ""
    names = [getattr(item, "container_path", "") or getattr(item, "name", "") for item in value]
    return f" ({', '.join(repr(name)[:200] for name in names[:8])})" if any(names) else ""
