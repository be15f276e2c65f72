"""The OCI runtime spec of a container, for crun in the guest (or on the host): a pure builder.

The network, UTS and user namespaces are the pod's, which for a VM are the guest's own; mount and cgroup are
the container's; pid and ipc are either, as the request says.
`root.path` and `linux.cgroupsPath` are the agent's to fill in.

Environment: an OCI spec is JSON, so it can carry UTF-8 only (crun's parser refuses other bytes, and turns an
escaped code point into its UTF-8). Variables that are not UTF-8 are in `process.binaryEnv`, a list of ours with
the hexadecimal digits of each; the agent takes it out and hands them to the process past crun.

`root.writable` is a list of ours, too: destinations of mounts whose source is that folder of the root itself, or a
new one where the root has none.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from hyperpod.errors import InvalidArgument
from hyperpod.model.security import LinuxResources
from hyperpod.spec import imagevolumes, limits
from hyperpod.spec.capabilities import ambient, of_container
from hyperpod.spec.mounts import merged, ordered

MAX_ARGS_BYTES = 1 << 20
"""Of argv and environment together; Linux itself takes at most 2 MiB with the default stack limit."""

MAX_STRING = 128 * 1024 - 1
"""Bytes of one argument or variable without its NUL (Linux: MAX_ARG_STRLEN); crun would find out only once the
container counts as started."""

MASKED_PATHS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
)
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
NAMESPACES = ("mount", "cgroup")
"""Always the container's own."""

RLIMITS: tuple[tuple[str, int, int], ...] = (
    ("RLIMIT_NOFILE", 1024, 524288),
    ("RLIMIT_NPROC", 2**64 - 1, 2**64 - 1),
    ("RLIMIT_CORE", 0, 2**64 - 1),
)
"""Type, soft, hard. Open files and processes as under a containerd of systemd's (pids are limited by cgroup); no
core files unless a program asks: they would land in the container's writable layer."""


@dataclass(frozen=True)
class ContainerSpecInput:
    """All that a spec is built from. Sizes in bytes, CPU times in microseconds."""

    args: tuple[str, ...]
    env: tuple[bytes, ...] = ()
    """`KEY=value` each."""
    cwd: str = "/"
    uid: int = 0
    gid: int = 0
    additional_gids: tuple[int, ...] = ()
    own_pid: bool = True
    """A pid namespace of its own, not the pod's."""
    own_ipc: bool = True
    """With a /dev/shm of its own; else both are the pod's."""
    privileged: bool = False
    """All capabilities; /sys and cgroups writable, nothing masked. Devices are the agent's to fill in."""
    tty: bool = False
    readonly_rootfs: bool = False
    add_capabilities: tuple[str, ...] = ()
    drop_capabilities: tuple[str, ...] = ()
    ambient_capabilities: tuple[str, ...] = ()
    no_new_privileges: bool = False
    masked_paths: tuple[str, ...] = MASKED_PATHS
    readonly_paths: tuple[str, ...] = READONLY_PATHS
    rlimits: tuple[tuple[str, int, int], ...] = ()
    """Type, soft, hard; what is not named is inherited from the agent."""
    resources: LinuxResources = field(default_factory=LinuxResources)
    mounts: tuple[dict[str, Any], ...] = ()
    """OCI mounts beside the default ones, which they win over."""
    declared_volumes: tuple[str, ...] = ()
    """Folders that the image declares as volumes."""
    root_propagation: str = ""
    """Of mounts at the container's root: rslave, rshared; empty: private."""
    annotations: tuple[tuple[str, str], ...] = ()
    seccomp: dict[str, Any] | None = None
    """An OCI seccomp object; None: no filter."""


def build_spec(spec: ContainerSpecInput) -> bytes:
    """UTF-8 JSON of the whole spec. Raises InvalidArgument that names what cannot be."""
    taken = {mount["destination"] for mount in spec.mounts}
    # What propagates shows the host's folders; a bind on one of them would stay there. With a writable root only
    # what the root lacks is needed, and what the request mounts is not the root's.
    kept = [m for m in spec.mounts if not spec.readonly_rootfs or "rshared" in m.get("options", ())]
    inside = tuple(f"{mount['destination']}/" for mount in kept)
    found = imagevolumes.declared(spec.declared_volumes, taken)
    writable = [path for path in found if not path.startswith(inside)]
    volumes = [imagevolumes.declared_mount(path) for path in writable]
    document: dict[str, Any] = {
        "ociVersion": "1.0.2",
        "process": _process(spec),
        "root": {"path": "", "readonly": spec.readonly_rootfs},
        "mounts": merged(_mounts(spec), ordered([*spec.mounts, *volumes])),
        "linux": {
            "cgroupsPath": "",
            "namespaces": [{"type": name} for name in _namespaces(spec)],
            "maskedPaths": [] if spec.privileged else list(spec.masked_paths),
            "readonlyPaths": [] if spec.privileged else list(spec.readonly_paths),
            "resources": _resources(spec.resources),
        },
    }
    if writable:
        document["root"]["writable"] = writable
    if spec.root_propagation:
        document["linux"]["rootfsPropagation"] = spec.root_propagation
    if spec.annotations:
        document = {"annotations": dict(spec.annotations), **document}
    # Last of all: the agent leaves the text of a filter at the end as it is (agent/ocispec.py).
    if spec.seccomp is not None:
        document["linux"]["seccomp"] = spec.seccomp
    return _encode(document)


def build_process(spec: ContainerSpecInput) -> bytes:
    """UTF-8 JSON of the OCI process object alone, for an exec. Raises InvalidArgument."""
    return _encode(_process(spec))


def _encode(document: dict[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def _process(spec: ContainerSpecInput) -> dict[str, Any]:
    if not spec.args:
        raise InvalidArgument("a container without a command")
    if not spec.cwd.startswith("/"):
        raise InvalidArgument(f"working directory {spec.cwd[:100]!r} is not absolute")
    args = [_text(f"argument {i}", arg) for i, arg in enumerate(spec.args)]
    for item in spec.env:
        _check_variable(item)
    env, binary = _split(spec.env)
    if (size := sum(len(arg.encode()) for arg in spec.args) + sum(map(len, spec.env))) > MAX_ARGS_BYTES:
        raise InvalidArgument(f"arguments and environment are {size} bytes, over {MAX_ARGS_BYTES}")
    caps = of_container(
        spec.add_capabilities, spec.drop_capabilities, spec.ambient_capabilities, privileged=spec.privileged
    )
    process: dict[str, Any] = {
        "terminal": spec.tty,
        "user": {"uid": spec.uid, "gid": spec.gid, "additionalGids": list(spec.additional_gids)},
        "args": args,
        "env": env,
        "cwd": _text("working directory", spec.cwd),
        "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
        "noNewPrivileges": spec.no_new_privileges,
    }
    if binary:
        process["binaryEnv"] = binary
    if kept := ambient(spec.ambient_capabilities):
        process["capabilities"] |= {"inheritable": kept, "ambient": kept}
    if spec.rlimits:
        process["rlimits"] = [{"type": kind, "soft": soft, "hard": hard} for kind, soft, hard in spec.rlimits]
    if spec.resources.oom_score_adj:
        process["oomScoreAdj"] = spec.resources.oom_score_adj
    return process


def _text(what: str, value: str) -> str:
    if "\0" in value:
        raise InvalidArgument(f"{what} holds a NUL")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as exc:
        raise InvalidArgument(f"{what} is not UTF-8") from exc
    if size > MAX_STRING:
        raise InvalidArgument(f"{what} has {size} bytes; Linux takes {MAX_STRING} in one")
    return value


def _check_variable(item: bytes) -> None:
    name, equals, _ = item.partition(b"=")
    shown = name.decode(errors="replace")[:60]
    if not name or not equals or b"\0" in item:
        raise InvalidArgument(f"environment variable {shown!r}: no name, no '=', or a NUL")
    if len(item) > MAX_STRING:
        raise InvalidArgument(
            f"environment variable {shown!r} has {len(item)} bytes; Linux takes {MAX_STRING} in one"
        )


def _split(variables: tuple[bytes, ...]) -> tuple[list[str], list[str]]:
    """Those that are UTF-8, and the others in hexadecimal."""
    plain, binary = [], []
    for item in variables:
        try:
            plain.append(item.decode())
        except UnicodeDecodeError:
            binary.append(item.hex())
    return plain, binary


def _namespaces(spec: ContainerSpecInput) -> list[str]:
    own = [name for name, wanted in (("pid", spec.own_pid), ("ipc", spec.own_ipc)) if wanted]
    return [*own, *NAMESPACES]


def _mount(destination: str, kind: str, source: str, *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": source, "options": list(options)}


def _mounts(spec: ContainerSpecInput) -> list[dict[str, Any]]:
    """The API file systems, as every CRI runtime gives them. A pod's /dev/shm is the guest's."""
    safe = ("nosuid", "noexec", "nodev")
    writable = "rw" if spec.privileged else "ro"
    return [
        _mount("/proc", "proc", "proc", *safe),
        _mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        _mount(
            "/dev/pts",
            "devpts",
            "devpts",
            "nosuid",
            "noexec",
            "newinstance",
            "ptmxmode=0666",
            "mode=0620",
            "gid=5",
        ),
        _mount("/dev/mqueue", "mqueue", "mqueue", *safe),
        _mount("/dev/shm", "tmpfs", "shm", *safe, "mode=1777", "size=65536k")
        if spec.own_ipc
        else _mount("/dev/shm", "bind", "/dev/shm", "rbind", "rprivate", *safe),
        _mount("/sys", "sysfs", "sysfs", *safe, writable),
        _mount("/sys/fs/cgroup", "cgroup", "cgroup", *safe, "relatime", writable),
    ]


def _resources(resources: LinuxResources) -> dict[str, Any]:
    """Devices: the standard ones are crun's own default, all else is denied."""
    return {"devices": [{"allow": False, "access": "rwm"}], **limits.oci(resources)}
