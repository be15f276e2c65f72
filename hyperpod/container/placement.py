"""The few things of a container that differ between a VM and the host: what it may ask for, where things lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hyperpod.errors import InvalidArgument, Unsupported
from hyperpod.model.container import ContainerConfig, ContainerRecord
from hyperpod.model.mounts import Propagation
from hyperpod.model.sandbox import Kind, SandboxRecord, VmSize
from hyperpod.sandbox.live import LiveSandbox
from hyperpod.spec import mounts, place, userns
from hyperpod.spec.mounts import HostBind
from hyperpod.spec.oci import ContainerSpecInput

DEVICES = tuple(
    f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty", "fuse", "net/tun", "kvm")
)
"""Those that are the same thing in every kernel; any other path names something else in a guest."""


def check(sandbox: SandboxRecord, config: ContainerConfig) -> None:
    """What a pod of this kind cannot give. Raises InvalidArgument, Unsupported that name the field."""
    place.check_container(sandbox.kind, sandbox.config.namespaces, config.namespaces)
    userns.check_container(sandbox.config.namespaces, config.namespaces, config.mounts)
    if sandbox.kind is Kind.HOST:
        return
    for number, mount in enumerate(config.mounts):
        if mount.propagation is Propagation.BIDIRECTIONAL:
            raise InvalidArgument(
                f"config.mounts[{number}].propagation is PROPAGATION_BIDIRECTIONAL: the host cannot see what a "
                "guest mounts, it needs a host pod: give the pod another runtime handler"
            )
    for number, device in enumerate(config.devices):
        if device.host_path not in DEVICES:
            raise Unsupported(
                f"config.devices[{number}].host_path is {device.host_path[:100]!r}: a host's device cannot enter a "
                f"VM; of a guest's own there are {', '.join(DEVICES)}"
            )


def placed(sandbox: LiveSandbox, spec: ContainerSpecInput, record: ContainerRecord) -> ContainerSpecInput:
    """On the host mounts are bound from where its agent has them, and may propagate.

    Raises InvalidArgument for what would be covered on the host, too."""
    if sandbox.record.kind is Kind.VM:
        return spec
    covered = () if spec.privileged else (*spec.masked_paths, *spec.readonly_paths)
    if (found := mounts.covering(record.config.mounts, covered)) is not None:
        raise InvalidArgument(
            f"config.mounts[{found[0]}].propagation is PROPAGATION_BIDIRECTIONAL: {found[1][:200]} there is to be "
            "masked or read-only, which the host would see as well, for good: make the container privileged, or "
            "leave the path out of masked_paths and readonly_paths"
        )
    if spec.tty and (found := mounts.covering(record.config.mounts, ["/dev/console"])) is not None:
        raise InvalidArgument(
            f"config.mounts[{found[0]}].propagation is PROPAGATION_BIDIRECTIONAL: the terminal (config.tty) would "
            "take the place of the host's /dev/console, for good: mount the folder elsewhere"
        )
    built = mounts.oci_mounts(record.config.mounts, record.id, str(sandbox.agent_share))
    return replace(spec, mounts=tuple(built), root_propagation=mounts.root_propagation(record.config.mounts))


def room(sandbox: SandboxRecord) -> VmSize | None:
    """What limits have to fit into: a VM's size; on the host nothing but what the kernel takes."""
    return sandbox.size if sandbox.kind is Kind.VM else None


def share(sandbox: SandboxRecord, binds: Sequence[HostBind]) -> str:
    """The tag of the device that mounts come through; on the host they come through none."""
    return mounts.TAG if binds and sandbox.kind is Kind.VM else ""
