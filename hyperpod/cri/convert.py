"""Requests to records, with every check that needs no state; protobuf types end here.

All functions raise InvalidArgument that names the field.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence

from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.errors import InvalidArgument
from hyperpod.model.container import Capabilities, ContainerConfig, ContainerMetadata
from hyperpod.model.images import RegistryAuth
from hyperpod.model.mounts import Mount, MountImage, Propagation
from hyperpod.model.sandbox import DnsConfig, PortMapping, SandboxConfig, SandboxMetadata
from hyperpod.model.security import (
    Device,
    IdMapping,
    LinuxResources,
    NamespaceMode,
    NamespaceOptions,
    SeccompKind,
    SeccompProfile,
    UserNamespace,
)
from hyperpod.spec import limits, mounts, podnet
from hyperpod.spec.cgroup import parent_folder
from hyperpod.wire.remotecommand import Wanted

MAX_NAME = 1024
MAX_HOSTNAME = 64
"""Bytes that Linux keeps of a host name."""
MAX_PATH = 4095
MAX_MAP_BYTES = 1 << 20
"""Of labels, or of annotations; Kubernetes itself takes 256 KiB of annotations."""
MAX_ITEMS = 65536
MAX_PAGE_SIZES = 16
MAX_ID = 2**32 - 2
MAX_SECONDS = 99_999_999
"""Longer timeouts are none: three years, and the most that gRPC's eight digits of seconds hold."""

_HOSTNAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?\Z")
_WORD = re.compile(r"[\x21-\x7e]{1,255}\Z")
_SYSCTL = re.compile(r"[A-Za-z0-9_-]+([./][A-Za-z0-9_-]+)+\Z")
MAX_DNS = 64
_NUL = re.compile("\0")


def _text(where: str, value: str, limit: int = MAX_NAME, *, required: bool = False) -> str:
    if required and not value:
        raise InvalidArgument(f"{where} is missing")
    if len(value) > limit:
        raise InvalidArgument(f"{where} has {len(value)} characters, at most {limit} are taken")
    if _NUL.search(value):
        raise InvalidArgument(f"{where} holds a NUL")
    return value


def _cgroup_parent(value: str) -> str:
    parent_folder(_text("config.linux.cgroup_parent", value, MAX_PATH))
    return value


def _texts(where: str, values: Sequence[str], limit: int = MAX_MAP_BYTES) -> tuple[str, ...]:
    if len(values) > MAX_ITEMS:
        raise InvalidArgument(f"{where} has {len(values)} items, at most {MAX_ITEMS} are taken")
    return tuple(_text(f"{where}[{i}]", value, limit) for i, value in enumerate(values))


def _hostname(value: str) -> str:
    if value and not _HOSTNAME.match(_text("config.hostname", value, MAX_HOSTNAME)):
        raise InvalidArgument(f"config.hostname {value!r} is no host name: letters, digits, '-' and '.'")
    return value


def _absolute(where: str, value: str) -> str:
    if value and not value.startswith("/"):
        raise InvalidArgument(f"{where} {value[:100]!r} is not absolute")
    return _text(where, value, MAX_PATH)


def _map(where: str, values: Mapping[str, str]) -> dict[str, str]:
    if (size := sum(len(k) + len(v) for k, v in values.items())) > MAX_MAP_BYTES:
        raise InvalidArgument(f"{where} has {size} characters, at most {MAX_MAP_BYTES} are taken")
    return dict(values)


def _number(where: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise InvalidArgument(f"{where} is {value}; {low} to {high} is possible")
    return value


def _id(where: str, value: cri.Int64Value | None) -> int | None:
    """uid or gid; a present zero is root, an absent message is unset."""
    return None if value is None else _number(where, value.value, 0, MAX_ID)


def _ids(where: str, values: Sequence[int]) -> tuple[int, ...]:
    if len(values) > MAX_ITEMS:
        raise InvalidArgument(f"{where} has {len(values)} items, at most {MAX_ITEMS} are taken")
    return tuple(_number(f"{where}[{i}]", value, 0, MAX_ID) for i, value in enumerate(values))


def seconds(where: str, value: int) -> int:
    """A timeout; 0 keeps the meaning that the RPC gives it."""
    return min(_number(where, value, 0, 2**63 - 1), MAX_SECONDS)


def resources(where: str, value: cri.LinuxContainerResources | None) -> LinuxResources:
    """CRI to record, in the ranges that the kernel takes."""
    if value is None:
        return LinuxResources()
    if value.cpu_period:
        _number(f"{where}.cpu_period", value.cpu_period, 1000, 1_000_000)
    if value.cpu_quota not in (0, -1):
        _number(f"{where}.cpu_quota", value.cpu_quota, 1000, 2**44)
    return LinuxResources(
        cpu_period=value.cpu_period,
        cpu_quota=value.cpu_quota,
        cpu_shares=_number(f"{where}.cpu_shares", value.cpu_shares, 0, 262_144),
        memory_limit=_number(f"{where}.memory_limit_in_bytes", value.memory_limit_in_bytes, 0, 2**60),
        memory_swap_limit=_number(
            f"{where}.memory_swap_limit_in_bytes", value.memory_swap_limit_in_bytes, -1, 2**60
        ),
        oom_score_adj=_number(f"{where}.oom_score_adj", value.oom_score_adj, -1000, 1000),
        cpuset_cpus=_text(f"{where}.cpuset_cpus", value.cpuset_cpus),
        cpuset_mems=_text(f"{where}.cpuset_mems", value.cpuset_mems),
        unified=limits.unified(f"{where}.unified", value.unified),
        hugepage_limits=_hugepages(f"{where}.hugepage_limits", value.hugepage_limits),
    )


def _hugepages(where: str, values: Sequence[cri.HugepageLimit]) -> tuple[tuple[str, int], ...]:
    if len(values) > MAX_PAGE_SIZES:
        raise InvalidArgument(f"{where} has {len(values)} items, at most {MAX_PAGE_SIZES} are taken")
    return tuple(
        (
            limits.page_size(f"{where}[{i}].page_size", value.page_size),
            _number(f"{where}[{i}].limit", value.limit, 0, 2**60),
        )
        for i, value in enumerate(values)
    )


def _mapping(where: str, values: Sequence[cri.IdMapping]) -> IdMapping:
    """One line, which is all that an overlay's layers, and so containerd, can have."""
    if len(values) != 1:
        raise InvalidArgument(f"{where} has {len(values)} mappings: exactly one is taken")
    value = values[0]
    if value.container_id:
        raise InvalidArgument(
            f"{where}[0].container_id is {value.container_id}: the mapping has to begin with a container's root, 0"
        )
    _number(f"{where}[0].length", value.length, 1, MAX_ID)
    _number(f"{where}[0].host_id", value.host_id, 0, MAX_ID + 1 - value.length)
    return IdMapping(host_id=value.host_id, length=value.length)


def _userns(where: str, value: cri.UserNamespace | None) -> UserNamespace | None:
    """Absent and NODE mean the same; the other modes are refused before."""
    if value is None or value.mode == cri.NamespaceMode.NODE:
        for name in ("uids", "gids") if value is not None else ():
            if getattr(value, name):
                raise InvalidArgument(
                    f"{where}.{name} is set, but mode is NODE: without a user namespace of its "
                    "own a pod has no ids to be mapped"
                )
        return None
    return UserNamespace(
        uids=_mapping(f"{where}.uids", value.uids), gids=_mapping(f"{where}.gids", value.gids)
    )


def _namespaces(where: str, value: cri.NamespaceOption | None) -> NamespaceOptions:
    if value is None:
        return NamespaceOptions()
    return NamespaceOptions(
        network=NamespaceMode(value.network.name),
        pid=NamespaceMode(value.pid.name),
        ipc=NamespaceMode(value.ipc.name),
        target_id=value.target_id,
        userns_mode=NamespaceMode(value.userns_options.mode.name) if value.userns_options else None,
        userns=_userns(f"{where}.namespace_options.userns_options", value.userns_options),
    )


_OLD_PROFILES = {
    "": SeccompKind.UNSET,
    "runtime/default": SeccompKind.RUNTIME_DEFAULT,
    "docker/default": SeccompKind.RUNTIME_DEFAULT,
    "unconfined": SeccompKind.UNCONFINED,
}


def _seccomp(where: str, value: cri.SecurityProfile | None, old: str) -> SeccompProfile:
    """`old`: the deprecated seccomp_profile_path, which counts when `value` is absent."""
    if value is None:
        if old in _OLD_PROFILES:
            return SeccompProfile(kind=_OLD_PROFILES[old])
        if not old.startswith("localhost/"):
            raise InvalidArgument(f"{where}.seccomp_profile_path {old[:100]!r} is no profile")
        kind, path, field = SeccompKind.LOCALHOST, old.removeprefix("localhost/"), "seccomp_profile_path"
    else:
        kind, path, field = SeccompKind(value.profile_type.name), value.localhost_ref, "seccomp.localhost_ref"
    if kind is not SeccompKind.LOCALHOST:
        return SeccompProfile(kind=kind)
    if not path.startswith("/"):
        raise InvalidArgument(f"{where}.{field}: {path[:100]!r} is not an absolute path of this host")
    return SeccompProfile(kind=kind, path=_text(f"{where}.{field}", path, MAX_PATH))


def _devices(values: Sequence[cri.Device]) -> tuple[Device, ...]:
    found = []
    for index, value in enumerate(values):
        where = f"config.devices[{index}]"
        _text(f"{where}.host_path", value.host_path, required=True)
        path = _absolute(f"{where}.host_path", value.host_path)
        permissions = value.permissions or "rwm"
        if not set(permissions) <= set("rwm"):
            raise InvalidArgument(f"{where}.permissions {permissions[:20]!r}: r, w and m are possible")
        inside = _absolute(f"{where}.container_path", value.container_path) or path
        found.append(Device(host_path=path, container_path=inside, permissions=permissions))
    return tuple(found)


def _address(where: str, value: str) -> str:
    try:
        return str(ipaddress.ip_address(value))
    except ValueError as exc:
        raise InvalidArgument(f"{where} is {value[:100]!r}, not an IP address") from exc


def _host_ip(where: str, value: str) -> str:
    if "%" in value:
        raise InvalidArgument(f"{where} is {value[:100]!r}: an address with a zone cannot be a rule's")
    return _address(where, value)


def _words(where: str, values: Sequence[str]) -> tuple[str, ...]:
    """Of a line of resolv.conf: no white space in them."""
    if len(values) > MAX_DNS:
        raise InvalidArgument(f"{where} has {len(values)} items, at most {MAX_DNS} are taken")
    for i, value in enumerate(values):
        if not _WORD.match(value):
            raise InvalidArgument(
                f"{where}[{i}] is {value[:100]!r}: a word of at most 255 characters is needed"
            )
    return tuple(values)


def _ports(values: Sequence[cri.PortMapping]) -> tuple[PortMapping, ...]:
    if len(values) > MAX_ITEMS:
        raise InvalidArgument(f"config.port_mappings has {len(values)} items, at most {MAX_ITEMS} are taken")
    found = []
    for i, port in enumerate(values):
        where = f"config.port_mappings[{i}]"
        host_port = _number(f"{where}.host_port", port.host_port, 0, 65535)
        low = 1 if host_port else 0
        found.append(
            PortMapping(
                protocol=port.protocol.name or "",
                container_port=_number(f"{where}.container_port", port.container_port, low, 65535),
                host_port=host_port,
                host_ip=_host_ip(f"{where}.host_ip", port.host_ip) if port.host_ip else "",
            )
        )
    return tuple(found)


def _sysctls(where: str, values: Mapping[str, str]) -> dict[str, str]:
    """Well-formed ones; whether the guest's kernel has them, it tells itself."""
    for name, value in _map(where, values).items():
        if not _SYSCTL.match(name):
            raise InvalidArgument(f"{where}: {name[:100]!r} is not the name of a sysctl")
        if len(value) > MAX_NAME or not value.isprintable():
            raise InvalidArgument(f"{where}: {name} has the value {value[:100]!r}")
    return dict(values)


def _checked(config: SandboxConfig) -> SandboxConfig:
    """What becomes a word of the network's: annotations of bandwidth, names for the plugins."""
    podnet.runtime(config)
    podnet.arguments(config, "")
    return config


def sandbox_config(config: cri.PodSandboxConfig | None) -> SandboxConfig:
    """RunPodSandboxRequest.config to the record."""
    if config is None:
        raise InvalidArgument("config is missing")
    meta = config.metadata
    if meta is None:
        raise InvalidArgument("config.metadata is missing")
    linux = config.linux or cri.LinuxPodSandboxConfig()
    security = linux.security_context or cri.LinuxSandboxSecurityContext()
    dns = config.dns_config
    context = "config.linux.security_context"
    built = SandboxConfig(
        metadata=SandboxMetadata(
            name=_text("config.metadata.name", meta.name, required=True),
            uid=_text("config.metadata.uid", meta.uid, required=True),
            namespace=_text("config.metadata.namespace", meta.namespace, required=True),
            attempt=meta.attempt,
        ),
        hostname=_hostname(config.hostname),
        log_directory=_absolute("config.log_directory", config.log_directory),
        dns=None
        if dns is None
        else DnsConfig(
            servers=tuple(_address(f"config.dns_config.servers[{i}]", x) for i, x in enumerate(dns.servers)),
            searches=_words("config.dns_config.searches", dns.searches),
            options=_words("config.dns_config.options", dns.options),
        ),
        port_mappings=_ports(config.port_mappings),
        labels=_map("config.labels", config.labels),
        annotations=_map("config.annotations", config.annotations),
        has_linux=config.linux is not None,
        cgroup_parent=_cgroup_parent(linux.cgroup_parent),
        namespaces=_namespaces(context, security.namespace_options),
        run_as_user=_id(f"{context}.run_as_user", security.run_as_user),
        run_as_group=_id(f"{context}.run_as_group", security.run_as_group),
        readonly_rootfs=security.readonly_rootfs,
        supplemental_groups=_ids(f"{context}.supplemental_groups", security.supplemental_groups),
        privileged=security.privileged,
        sysctls=_sysctls("config.linux.sysctls", linux.sysctls),
        resources=resources("config.linux.resources", linux.resources),
        overhead=resources("config.linux.overhead", linux.overhead),
    )
    return _checked(built)


def stop_signal(value: cri.Signal) -> str:
    """`SIGRTMINPLUS3` to `SIGRTMIN+3`; empty for RUNTIME_DEFAULT."""
    if value == cri.Signal.RUNTIME_DEFAULT:
        return ""
    return (value.name or "").replace("PLUS", "+").replace("MINUS", "-")


def _mount_image(where: str, value: cri.ImageSpec | None) -> MountImage | None:
    if value is None:
        return None
    return MountImage(
        image=_text(f"{where}.image", value.image),
        user_specified_image=_text(f"{where}.user_specified_image", value.user_specified_image),
        annotations=_map(f"{where}.annotations", value.annotations),
    )


def _mount_ids(where: str, value: cri.Mount) -> UserNamespace | None:
    if not value.uid_mappings and not value.gid_mappings:
        return None
    return UserNamespace(
        uids=_mapping(f"{where}.uid_mappings", value.uid_mappings),
        gids=_mapping(f"{where}.gid_mappings", value.gid_mappings),
    )


def _mounts(values: Sequence[cri.Mount]) -> tuple[Mount, ...]:
    found = tuple(
        Mount(
            container_path=_text(f"config.mounts[{i}].container_path", value.container_path, MAX_PATH),
            host_path=_text(f"config.mounts[{i}].host_path", value.host_path, MAX_PATH),
            readonly=value.readonly,
            recursive_read_only=value.recursive_read_only,
            propagation=Propagation((value.propagation.name or "").removeprefix("PROPAGATION_")),
            selinux_relabel=value.selinux_relabel,
            image=_mount_image(f"config.mounts[{i}].image", value.image),
            image_sub_path=_text(f"config.mounts[{i}].image_sub_path", value.image_sub_path, MAX_PATH),
            ids=_mount_ids(f"config.mounts[{i}]", value),
        )
        for i, value in enumerate(values[: mounts.MAX_MOUNTS + 1])
    )
    mounts.check(found)
    return found


def container_config(config: cri.ContainerConfig | None) -> ContainerConfig:
    """CreateContainerRequest.config to the record."""
    if config is None:
        raise InvalidArgument("config is missing")
    if config.metadata is None:
        raise InvalidArgument("config.metadata is missing")
    if config.image is None:
        raise InvalidArgument("config.image is missing")
    linux = config.linux or cri.LinuxContainerConfig()
    security = linux.security_context or cri.LinuxContainerSecurityContext()
    capabilities = security.capabilities or cri.Capability()
    context = "config.linux.security_context"
    if len(config.envs) > MAX_ITEMS:
        raise InvalidArgument(f"config.envs has {len(config.envs)} items, at most {MAX_ITEMS} are taken")
    return ContainerConfig(
        metadata=ContainerMetadata(
            name=_text("config.metadata.name", config.metadata.name, required=True),
            attempt=config.metadata.attempt,
        ),
        image=_text("config.image.image", config.image.image, required=True),
        user_specified_image=_text("config.image.user_specified_image", config.image.user_specified_image),
        image_annotations=_map("config.image.annotations", config.image.annotations),
        command=_texts("config.command", config.command),
        args=_texts("config.args", config.args),
        working_dir=_text("config.working_dir", config.working_dir, MAX_PATH),
        envs=tuple((_text("config.envs.key", env.key, MAX_MAP_BYTES), env.value) for env in config.envs),
        mounts=_mounts(config.mounts),
        labels=_map("config.labels", config.labels),
        annotations=_map("config.annotations", config.annotations),
        log_path=_text("config.log_path", config.log_path, MAX_PATH),
        stdin=config.stdin,
        stdin_once=config.stdin_once,
        tty=config.tty,
        resources=resources("config.linux.resources", linux.resources),
        devices=_devices(config.devices),
        has_security_context=linux.security_context is not None,
        privileged=security.privileged,
        capabilities=Capabilities(
            add=_texts(f"{context}.capabilities.add_capabilities", capabilities.add_capabilities),
            drop=_texts(f"{context}.capabilities.drop_capabilities", capabilities.drop_capabilities),
            add_ambient=_texts(
                f"{context}.capabilities.add_ambient_capabilities", capabilities.add_ambient_capabilities
            ),
        ),
        namespaces=_namespaces(context, security.namespace_options),
        run_as_user=_id(f"{context}.run_as_user", security.run_as_user),
        run_as_group=_id(f"{context}.run_as_group", security.run_as_group),
        run_as_username=_text(f"{context}.run_as_username", security.run_as_username),
        readonly_rootfs=security.readonly_rootfs,
        supplemental_groups=_ids(f"{context}.supplemental_groups", security.supplemental_groups),
        strict_groups=security.supplemental_groups_policy == cri.SupplementalGroupsPolicy.Strict,
        no_new_privs=security.no_new_privs,
        masked_paths=_texts(f"{context}.masked_paths", security.masked_paths, MAX_PATH),
        readonly_paths=_texts(f"{context}.readonly_paths", security.readonly_paths, MAX_PATH),
        seccomp=_seccomp(context, security.seccomp, security.seccomp_profile_path),
        stop_signal=stop_signal(config.stop_signal),
    )


def auth(value: cri.AuthConfig | None) -> RegistryAuth | None:
    """None when nothing is given."""
    if value is None or not bytes(value):
        return None
    return RegistryAuth(
        username=value.username,
        password=value.password,
        auth=value.auth,
        identity_token=value.identity_token,
        registry_token=value.registry_token,
        server_address=value.server_address,
    )


def image_name(spec: cri.ImageSpec | None) -> str:
    """The reference or id that an image RPC is about."""
    return _text("image.image", spec.image if spec is not None else "", required=True)


def wanted(message: cri.ExecRequest | cri.AttachRequest) -> Wanted:
    return Wanted(stdin=message.stdin, stdout=message.stdout, stderr=message.stderr, tty=message.tty)


def command(argv: Sequence[str]) -> tuple[str, ...]:
    """ExecSyncRequest.cmd."""
    return _texts("cmd", argv)
