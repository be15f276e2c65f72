"""Which seccomp profile a container gets, and where it is read from.

RuntimeDefault is a file that others maintain (containers/common's, as podman and CRI-O use it), read again when it
has changed, so that an upgraded package counts at once. A file that is missing or broken is an error: a container
is never started with less than what was asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import platform
import stat
from pathlib import Path
from typing import Any

from hyperpod.config import ContainerConfig as Settings
from hyperpod.errors import FailedPrecondition, HyperpodError, InvalidArgument
from hyperpod.model.container import ContainerConfig
from hyperpod.model.security import SeccompKind
from hyperpod.spec.capabilities import of_container
from hyperpod.spec.profile import Target, resolve
from hyperpod.spec.seccomp import ALLOW_ALL, without_host_sockets

PROFILE_LIMIT = 1 << 20
"""Bytes of a profile; containers/common's has 26,000."""


class SeccompProfiles:
    """Of one daemon."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._default: dict[tuple[object, ...], dict[str, Any]] = {}
        """The last one resolved, by what it was resolved from."""

    def kind(self, config: ContainerConfig) -> SeccompKind:
        """What the request comes to: privileged is unconfined, and unset is as the configuration says.

        A request that says nothing at all about security gets the default profile."""
        if config.privileged:
            return SeccompKind.UNCONFINED
        if config.seccomp.kind is not SeccompKind.UNSET:
            return config.seccomp.kind
        if not config.has_security_context:
            return SeccompKind.RUNTIME_DEFAULT
        return SeccompKind(self._settings.unset_seccomp_profile)

    async def of(self, config: ContainerConfig, kernel: str) -> dict[str, Any] | None:
        """The OCI seccomp object, None for no filter. `kernel`: release of the guest's.

        Raises FailedPrecondition or InvalidArgument that names the file and what is wrong with it."""
        kind, asked = self.kind(config), config.capabilities
        if kind is SeccompKind.UNCONFINED:
            return without_host_sockets(ALLOW_ALL) if self._settings.filter_unconfined else None
        caps = frozenset(of_container(asked.add, asked.drop, asked.add_ambient))
        target = Target(caps, platform.machine(), kernel)
        if kind is SeccompKind.LOCALHOST:
            return await asyncio.to_thread(_localhost, Path(config.seccomp.path), target)
        return await self._runtime_default(target)

    async def _runtime_default(self, target: Target) -> dict[str, Any]:
        path, key = self._settings.seccomp_profile, None
        with contextlib.suppress(OSError):
            status = path.stat()
            key = (
                target,
                status.st_dev,
                status.st_ino,
                status.st_size,
                status.st_mtime_ns,
                status.st_ctime_ns,
            )
            if (known := self._default.get(key)) is not None:
                return known
        profile = await asyncio.to_thread(runtime_default, path, target)
        if key is not None:
            self._default = {key: profile}
        return profile


def runtime_default(path: Path, target: Target) -> dict[str, Any]:
    """Raises FailedPrecondition that says how to mend it."""
    try:
        profile = resolve(_load(path), target)
    except HyperpodError as exc:
        raise FailedPrecondition(
            f"the default seccomp profile {str(path)!r}: {exc}; "
            "install golang-github-containers-common, or set container.seccomp_profile"
        ) from exc
    # The native ABI only: what runs in another one is killed, and guest kernels of ours have no other.
    profile.pop("architectures", None)
    return without_host_sockets(profile)


def _localhost(path: Path, target: Target) -> dict[str, Any]:
    try:
        profile = resolve(_load(path), target)
    except HyperpodError as exc:
        raise type(exc)(f"seccomp profile {str(path)[:500]!r}: {exc}") from exc
    return without_host_sockets(profile)


def _load(path: Path) -> object:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a FIFO would keep us waiting
            raise InvalidArgument("it is not a file")
        with path.open("rb") as file:
            data = file.read(PROFILE_LIMIT + 1)
    except OSError as exc:
        raise FailedPrecondition(str(exc.strerror)) from exc
    if len(data) > PROFILE_LIMIT:
        raise InvalidArgument(f"it is larger than {PROFILE_LIMIT} bytes")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise InvalidArgument(f"it is not JSON: {exc!s:.200}") from exc
