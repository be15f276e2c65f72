"""What a container runs: the image's configuration under the CRI request's, as containerd merges them."""

from __future__ import annotations

from hyperpod.errors import FailedPrecondition, HyperpodError, InvalidArgument, NotFound, Unsupported
from hyperpod.model.container import ContainerConfig, ContainerRecord
from hyperpod.model.images import ImageConfig
from hyperpod.model.security import NamespaceMode
from hyperpod.spec.oci import ContainerSpecInput

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


def user(config: ContainerConfig, image: ImageConfig) -> tuple[int, int]:
    """uid and gid. Raises InvalidArgument, or Unsupported for names (they need the guest's /etc/passwd)."""
    if config.run_as_username:
        raise Unsupported("run_as_username is not built yet; give run_as_user")
    if config.run_as_user is None:
        if config.run_as_group is not None:
            raise InvalidArgument("run_as_group is set without run_as_user")
        name, _, group = image.user.partition(":")
        if (name and not name.isdecimal()) or (group and not group.isdecimal()):
            if name in ("root", "") and group in ("root", ""):
                return (0, 0)
            raise Unsupported(f"the image's user {image.user!r} is a name; give run_as_user by number")
        uid, gid = int(name or 0), int(group or 0)
    else:
        uid, gid = config.run_as_user, config.run_as_group or 0
    for what, value in (("user", uid), ("group", gid)):
        if not 0 <= value < 2**32 - 1:
            raise InvalidArgument(f"{what} id {value} is out of range")
    return (uid, gid)


def start_failure(argv: tuple[str, ...], exc: HyperpodError) -> HyperpodError:
    """The agent's error with the name of what should have run, which crun does not always tell."""
    kinds = (NotFound, FailedPrecondition, InvalidArgument)
    if isinstance(exc, kinds):
        return type(exc)(f"cannot run {argv[0][:200]!r}: {exc}")
    return exc


def spec_input(record: ContainerRecord) -> ContainerSpecInput:
    """All that the OCI runtime spec of a container is built from. Raises InvalidArgument or Unsupported."""
    config, image = record.config, record.image_config
    uid, gid = user(config, image)
    return ContainerSpecInput(
        args=arguments(config, image),
        env=environment(config, image),
        cwd=config.working_dir or image.working_dir or "/",
        uid=uid,
        gid=gid,
        additional_gids=config.supplemental_groups,
        own_pid=config.namespaces.pid is not NamespaceMode.POD,
        own_ipc=config.namespaces.ipc is not NamespaceMode.POD,
        tty=config.tty,
        readonly_rootfs=config.readonly_rootfs,
        add_capabilities=config.capabilities.add,
        drop_capabilities=config.capabilities.drop,
        no_new_privileges=config.no_new_privs,
        masked_paths=config.masked_paths,
        readonly_paths=config.readonly_paths,
        resources=config.resources,
    )
