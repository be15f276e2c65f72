"""What a container runs: the image's configuration under the CRI request's, as containerd merges them."""

from __future__ import annotations

from typing import Any

from hyperpod.agentclient.types import Device, Security
from hyperpod.errors import FailedPrecondition, HyperpodError, InvalidArgument, NotFound
from hyperpod.model.container import ContainerConfig, ContainerRecord
from hyperpod.model.images import ImageConfig
from hyperpod.model.security import NamespaceMode
from hyperpod.spec.mounts import oci_mounts
from hyperpod.spec.oci import MASKED_PATHS, READONLY_PATHS, RLIMITS, ContainerSpecInput

DEFAULT_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def arguments(config: ContainerConfig, image: ImageConfig) -> tuple[str, ...]:
    """argv: command replaces entrypoint and cmd, args replace cmd. Raises InvalidArgument when empty."""
    if config.command:
        argv = config.command + config.args
    else:
        argv = tuple(image.entrypoint) + (config.args or tuple(image.cmd))
    if not argv:
        raise InvalidArgument(f"image {config.image[:100]!r} has no command and none is given")
    return argv


def environment(config: ContainerConfig, image: ImageConfig) -> tuple[bytes, ...]:
    """`KEY=value` as bytes, the request's over the image's, PATH and TERM when unset."""
    merged: dict[bytes, bytes] = {}
    for item in (DEFAULT_PATH, *(("TERM=xterm",) if config.tty else ()), *image.env):
        key, _, value = item.encode(errors="surrogateescape").partition(b"=")
        merged[key] = value
    for name, raw in config.envs:
        if not name or "=" in name or "\0" in name or b"\0" in raw:
            raise InvalidArgument(f"environment variable {name[:60]!r}: empty, or with '=' or NUL")
        merged[name.encode()] = raw
    return tuple(key + b"=" + value for key, value in merged.items())


def user(config: ContainerConfig, image: ImageConfig) -> str:
    """As in an image's configuration; the request's goes before the image's. Raises InvalidArgument."""
    owner = config.run_as_username or ("" if config.run_as_user is None else str(config.run_as_user))
    if not owner:
        if config.run_as_group is not None:
            raise InvalidArgument("run_as_group is set without run_as_user or run_as_username")
        return image.user
    return owner if config.run_as_group is None else f"{owner}:{config.run_as_group}"


def security(config: ContainerConfig, image: ImageConfig) -> Security:
    """What is left to the agent, but for the container that it targets. Raises InvalidArgument."""
    return Security(
        user=user(config, image),
        strict_groups=config.strict_groups,
        devices=tuple(Device(x.host_path, x.container_path, x.permissions) for x in config.devices),
        all_devices=config.privileged,
    )


def start_failure(argv: tuple[str, ...], exc: HyperpodError) -> HyperpodError:
    """The agent's error with the name of what should have run, which crun does not always tell."""
    kinds = (NotFound, FailedPrecondition, InvalidArgument)
    if isinstance(exc, kinds):
        return type(exc)(f"cannot run {argv[0][:200]!r}: {exc}")
    return exc


def spec_input(record: ContainerRecord, seccomp: dict[str, Any] | None = None) -> ContainerSpecInput:
    """All that the OCI runtime spec of a container is built from, but what `security` leaves to the agent.

    `seccomp`: the filter; an exec has its container's. Raises InvalidArgument."""
    config, image = record.config, record.image_config
    paths = (config.masked_paths, config.readonly_paths)
    masked, readonly = paths if config.has_security_context else (MASKED_PATHS, READONLY_PATHS)
    return ContainerSpecInput(
        args=arguments(config, image),
        env=environment(config, image),
        cwd=config.working_dir or image.working_dir or "/",
        additional_gids=config.supplemental_groups,
        own_pid=config.namespaces.pid is NamespaceMode.CONTAINER,
        own_ipc=config.namespaces.ipc is NamespaceMode.CONTAINER,
        tty=config.tty,
        readonly_rootfs=config.readonly_rootfs,
        add_capabilities=config.capabilities.add,
        drop_capabilities=config.capabilities.drop,
        ambient_capabilities=config.capabilities.add_ambient,
        privileged=config.privileged,
        no_new_privileges=config.no_new_privs,
        masked_paths=masked,
        readonly_paths=readonly,
        rlimits=RLIMITS,
        resources=config.resources,
        seccomp=seccomp,
        mounts=tuple(oci_mounts(config.mounts, record.id)),
        declared_volumes=image.volumes,
    )
