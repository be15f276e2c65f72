"""Whether pods of a kind can have user namespaces here, and if not, why."""

from __future__ import annotations

import asyncio

from hyperpod import userns
from hyperpod.config import VmConfig
from hyperpod.errors import FailedPrecondition
from hyperpod.model.sandbox import Kind
from hyperpod.model.security import IdMapping
from hyperpod.sandbox import artifacts
from hyperpod.spec.userns import map_line, too_old

_SOME = map_line(IdMapping(host_id=65536, length=65536))


class UserNamespaces:
    """Of one daemon."""

    def __init__(self, settings: VmConfig) -> None:
        self._settings = settings
        self._host: str | None = None

    async def missing(self, kind: Kind) -> str:
        """The reason why not; empty: they can."""
        if kind is Kind.VM:  # another kernel may be there for the next pod
            try:
                return too_old(artifacts.kernel(self._settings.kernel).version)
            except FailedPrecondition as exc:
                return str(exc)
        if self._host is None:
            self._host = await asyncio.to_thread(_of_host)
        return self._host


def _of_host() -> str:
    """What the kernel can do does not change; whether it lets root is asked once by doing it."""
    if why := too_old(artifacts.host_kernel().version):
        return why
    try:
        with userns.held(_SOME, _SOME):
            return ""
    except OSError as exc:
        return str(exc)
