"""Records to replies, and the filters of the list RPCs. No input or output."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.container import signals
from hyperpod.cri.convert import stop_signal
from hyperpod.errors import InvalidArgument
from hyperpod.model.base import now_ns
from hyperpod.model.container import (
    Container,
    ContainerConfig,
    ContainerRecord,
    ContainerState,
    ContainerStatus,
)
from hyperpod.model.images import Image
from hyperpod.model.mounts import Mount, MountImage
from hyperpod.model.sandbox import Kind, Sandbox, SandboxMetadata
from hyperpod.model.security import (
    IdMapping,
    LinuxResources,
    NamespaceMode,
    NamespaceOptions,
)
from hyperpod.spec.mounts import VIA_BIND, VIA_SHARE, explained

_STATES = {
    ContainerState.CREATED: cri.ContainerState.CONTAINER_CREATED,
    ContainerState.RUNNING: cri.ContainerState.CONTAINER_RUNNING,
    ContainerState.EXITED: cri.ContainerState.CONTAINER_EXITED,
    ContainerState.UNKNOWN: cri.ContainerState.CONTAINER_UNKNOWN,
}
_ID_DIGITS = 10
"""Of the highest uid that there is, 2**32 - 2."""

_SIGNALS = {
    signals.number(stop_signal(signal)): signal
    for signal in reversed(cri.Signal)  # of two names of one number, the interface's first
    if signal != cri.Signal.RUNTIME_DEFAULT
}


def _matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    return selector.items() <= labels.items()


def _json(**values: Any) -> str:
    return json.dumps(values, sort_keys=True)


# -- sandboxes ---------------------------------------------------------------------------------------------


def _pod_metadata(meta: SandboxMetadata) -> cri.PodSandboxMetadata:
    return cri.PodSandboxMetadata(
        name=meta.name, uid=meta.uid, namespace=meta.namespace, attempt=meta.attempt
    )


def _pod_state(sandbox: Sandbox) -> cri.PodSandboxState:
    return cri.PodSandboxState.SANDBOX_READY if sandbox.ready else cri.PodSandboxState.SANDBOX_NOTREADY


def pod(sandbox: Sandbox) -> cri.PodSandbox:
    """An item of ListPodSandbox."""
    config = sandbox.record.config
    return cri.PodSandbox(
        id=sandbox.id,
        metadata=_pod_metadata(config.metadata),
        state=_pod_state(sandbox),
        created_at=sandbox.record.created_at,
        labels=config.labels,
        annotations=config.annotations,
        runtime_handler=sandbox.record.runtime_handler,
    )


def wanted_pods(sandboxes: Iterable[Sandbox], wanted: cri.PodSandboxFilter | None) -> list[Sandbox]:
    """All that match, the newest first."""
    wanted = wanted or cri.PodSandboxFilter()
    return [
        sandbox
        for sandbox in sorted(sandboxes, key=lambda s: s.record.created_at, reverse=True)
        if sandbox.id.startswith(wanted.id)
        and (wanted.state is None or _pod_state(sandbox) == wanted.state.state)
        and _matches(sandbox.record.config.labels, wanted.label_selector)
    ]


def _mappings(mapping: IdMapping) -> list[cri.IdMapping]:
    return [cri.IdMapping(container_id=0, host_id=mapping.host_id, length=mapping.length)]


def _userns(options: NamespaceOptions) -> cri.UserNamespace | None:
    if options.userns_mode is None:
        return None
    answer = cri.UserNamespace(mode=cri.NamespaceMode[options.userns_mode.value])
    if ids := options.userns:
        answer.uids, answer.gids = _mappings(ids.uids), _mappings(ids.gids)
    return answer


def _namespaces(options: NamespaceOptions) -> cri.NamespaceOption:
    return cri.NamespaceOption(
        network=cri.NamespaceMode[options.network.value],
        pid=cri.NamespaceMode[options.pid.value],
        ipc=cri.NamespaceMode[options.ipc.value],
        target_id=options.target_id,
        userns_options=_userns(options),
    )


def pod_status(
    sandbox: Sandbox, containers: Iterable[Container], *, verbose: bool, connected: bool = True
) -> cri.PodSandboxStatusResponse:
    """The options of the namespaces are the request's: the kubelet makes the sandbox anew otherwise.

    A stopped pod has no `network`: nothing answers at its addresses. A ready one that is not `connected` has an
    empty one, as with other runtimes: the kubelet makes it anew."""
    config = sandbox.record.config
    options = _namespaces(config.namespaces)
    return cri.PodSandboxStatusResponse(
        status=cri.PodSandboxStatus(
            id=sandbox.id,
            metadata=_pod_metadata(config.metadata),
            state=_pod_state(sandbox),
            created_at=sandbox.record.created_at,
            network=_pod_network(sandbox, connected),
            linux=cri.LinuxPodSandboxStatus(namespaces=cri.Namespace(options=options)),
            labels=config.labels,
            annotations=config.annotations,
            runtime_handler=sandbox.record.runtime_handler,
        ),
        info=_pod_info(sandbox) if verbose else {},
        containers_statuses=[_status(container) for container in containers],
        timestamp=now_ns(),
    )


def _pod_network(sandbox: Sandbox, connected: bool) -> cri.PodSandboxNetworkStatus | None:
    network = sandbox.status.network
    if sandbox.ready and sandbox.record.config.namespaces.network is NamespaceMode.NODE:
        return cri.PodSandboxNetworkStatus()  # its addresses are the node's to tell
    if network is None or not sandbox.ready:
        return None
    if not connected:
        return cri.PodSandboxNetworkStatus()
    first, *others = network.addresses
    return cri.PodSandboxNetworkStatus(ip=first, additional_ips=[cri.PodIp(ip=ip) for ip in others])


def _pod_info(sandbox: Sandbox) -> dict[str, str]:
    record, status = sandbox.record, sandbox.status
    common = {
        "uid": record.uid,
        "gid": record.gid,
        "kernel": record.kernel.version,
        "facts": status.guest_facts,
        "phase": status.phase.value,
        "reason": status.reason,
        "message": status.message,
        "stopped_at": status.stopped_at,
    }
    if record.kind is Kind.VM:
        common |= {
            "domain": record.domain,
            "domain_uuid": record.domain_uuid,
            "vsock": record.vsock,
            "virtiofs": record.virtiofs,
            "size": record.size.model_dump(),
            "guest": record.guest.version,
        }
    return {
        "timings": _json(**status.timings),
        "network": _json(**(status.network.model_dump() if status.network else {})),
        "place": record.kind.value,
        "vm" if record.kind is Kind.VM else "host_pod": _json(**common),
    }


# -- containers --------------------------------------------------------------------------------------------


def _container_metadata(config: ContainerConfig) -> cri.ContainerMetadata:
    return cri.ContainerMetadata(name=config.metadata.name, attempt=config.metadata.attempt)


def _spec(config: ContainerConfig, tag: str = "") -> cri.ImageSpec:
    """The image by its tag, else as the request names it, which is by id when it comes from a kubelet."""
    return cri.ImageSpec(
        image=tag or config.image,
        annotations=config.image_annotations,
        user_specified_image=config.user_specified_image,
    )


class Listable(Protocol):
    """What a list needs of a container."""

    @property
    def id(self) -> str: ...
    @property
    def record(self) -> ContainerRecord: ...
    @property
    def status(self) -> ContainerStatus: ...


C = TypeVar("C", bound=Listable)


def wanted_containers(items: Iterable[C], wanted: cri.ContainerFilter | None) -> list[C]:
    """All that match, the newest first."""
    found = sorted(items, key=_created_at, reverse=True)
    wanted = wanted or cri.ContainerFilter()
    # One pass per criterion that is set: most requests set none.
    if wanted.id:
        found = [item for item in found if item.record.id.startswith(wanted.id)]
    if wanted.pod_sandbox_id:
        found = [item for item in found if item.record.sandbox_id.startswith(wanted.pod_sandbox_id)]
    if wanted.state is not None:
        state = wanted.state.state
        found = [item for item in found if _STATES[item.status.state] == state]
    if selector := wanted.label_selector:
        found = [item for item in found if _matches(item.record.config.labels, selector)]
    return found


def _created_at(item: Listable) -> int:
    return item.record.created_at


def container(item: Listable) -> cri.Container:
    """An item of ListContainers."""
    record = item.record
    return cri.Container(
        id=record.id,
        pod_sandbox_id=record.sandbox_id,
        metadata=_container_metadata(record.config),
        image=_spec(record.config),
        image_ref=record.image_id,
        image_id=record.image_id,
        state=_STATES[item.status.state],
        created_at=record.created_at,
        labels=record.config.labels,
        annotations=record.config.annotations,
    )


def _resources(value: LinuxResources) -> cri.LinuxContainerResources:
    return cri.LinuxContainerResources(
        cpu_period=value.cpu_period,
        cpu_quota=value.cpu_quota,
        cpu_shares=value.cpu_shares,
        memory_limit_in_bytes=value.memory_limit,
        memory_swap_limit_in_bytes=value.memory_swap_limit,
        oom_score_adj=value.oom_score_adj,
        cpuset_cpus=value.cpuset_cpus,
        cpuset_mems=value.cpuset_mems,
        unified=value.unified,
        hugepage_limits=[cri.HugepageLimit(page_size=s, limit=n) for s, n in value.hugepage_limits],
    )


def _user(status: ContainerStatus) -> cri.ContainerUser | None:
    if (user := status.user) is None:
        return None
    groups = list(user.groups)
    return cri.ContainerUser(
        linux=cri.LinuxContainerUser(uid=user.uid, gid=user.gid, supplemental_groups=groups)
    )


def _stop_signal(name: str) -> cri.Signal:
    try:
        return _SIGNALS.get(signals.number(name), cri.Signal.RUNTIME_DEFAULT)
    except InvalidArgument:
        return cri.Signal.RUNTIME_DEFAULT


def _images(record: ContainerRecord) -> dict[int, str]:
    """Number of a mount to the id of its image."""
    return {volume.mount: volume.image_id for volume in record.image_volumes}


def _mounts(record: ContainerRecord) -> list[cri.Mount]:
    images = _images(record)
    return [_mount(mount, images.get(number, "")) for number, mount in enumerate(record.config.mounts)]


def _mount_image(image: MountImage, image_id: str) -> cri.ImageSpec:
    return cri.ImageSpec(
        image=image.image,
        annotations=image.annotations,
        user_specified_image=image.user_specified_image,
        image_ref=image_id,
    )


def _mount(mount: Mount, image_id: str) -> cri.Mount:
    """As it was asked for, and which image that was."""
    return cri.Mount(
        container_path=mount.container_path,
        host_path=mount.host_path,
        readonly=mount.readonly,
        recursive_read_only=mount.recursive_read_only,
        propagation=cri.MountPropagation[f"PROPAGATION_{mount.propagation.value}"],
        selinux_relabel=mount.selinux_relabel,
        image=None if mount.image is None else _mount_image(mount.image, image_id),
        image_sub_path=mount.image_sub_path,
        uid_mappings=_mappings(mount.ids.uids) if mount.ids else [],
        gid_mappings=_mappings(mount.ids.gids) if mount.ids else [],
    )


def _status(container: Container) -> cri.ContainerStatus:
    record, status = container.record, container.status
    return cri.ContainerStatus(
        id=record.id,
        metadata=_container_metadata(record.config),
        state=_STATES[status.state],
        created_at=record.created_at,
        started_at=status.started_at,
        finished_at=status.finished_at,
        exit_code=status.exit_code,
        image=_spec(record.config, record.image_tag),
        image_ref=record.image_ref,
        image_id=record.image_id,
        reason=status.reason,
        message=status.message,
        labels=record.config.labels,
        annotations=record.config.annotations,
        mounts=_mounts(record),
        log_path=record.log_path,
        resources=cri.ContainerResources(linux=_resources(status.resources or record.config.resources)),
        user=_user(status),
        stop_signal=_stop_signal(record.stop_signal),
    )


def container_status(
    container: Container, *, verbose: bool, kind: Kind = Kind.VM
) -> cri.ContainerStatusResponse:
    """`info.container`: what CRI has no field for; `info.mounts`: how each mount gets there. `kind`: of its pod."""
    record, status = container.record, container.status
    info = _json(
        sandbox_id=record.sandbox_id,
        pid=status.pid,
        pid_namespace=record.config.namespaces.pid.value,
        privileged=record.config.privileged,
        layers=record.layers,
        image_config=record.image_config.model_dump(),
    )
    via = VIA_SHARE if kind is Kind.VM else VIA_BIND
    how = explained(record.config.mounts, _images(record), via=via)
    return cri.ContainerStatusResponse(
        status=_status(container),
        info={"container": info, "mounts": _json(**how)} if verbose else {},
    )


# -- images ------------------------------------------------------------------------------------------------


def image(item: Image) -> cri.Image:
    """`uid` or `username` of the image's USER; both absent means root to the kubelet."""
    user = item.config.user.partition(":")[0]
    # An image may say anything here, and what fits no field would fail the list of all images.
    number = int(user) if user.isascii() and user.isdecimal() and len(user) <= _ID_DIGITS else None
    return cri.Image(
        id=item.id,
        repo_tags=list(item.repo_tags),
        repo_digests=list(item.repo_digests),
        size=item.size,
        uid=None if number is None else cri.Int64Value(value=number),
        username=user if number is None else "",
        spec=cri.ImageSpec(image=item.id),
        pinned=item.pinned,
    )


def image_info(item: Image) -> dict[str, str]:
    """`info.config`: the image's configuration; `info.layers`: what its layers became, lowest first."""
    return {
        "config": item.config.model_dump_json(),
        "layers": json.dumps([layer.model_dump() for layer in item.layers]),
    }


def pages(items: Sequence[Any], size: int = 256) -> list[list[Any]]:
    """For the streaming lists: messages of a bounded number of items."""
    return [list(items[at : at + size]) for at in range(0, len(items), size)]
