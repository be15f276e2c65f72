"""Before any RPC of a service: its request is checked; and those that are not built refuse by their name."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from functools import wraps
from typing import Any, TypeVar

from betterproto2.grpclib import ServiceBase

from hyperpod.cri import wellformed
from hyperpod.cri.refusal import refuse
from hyperpod.errors import Unsupported
from hyperpod.rpc.interceptor import about

S = TypeVar("S", bound=type[ServiceBase])


def guarded(service: S) -> S:
    """Class decorator for the generated bases: every RPC calls `wellformed.check` and `refuse` first.

    RPCs that the class does not define itself raise Unsupported."""
    base = service.__mro__[1]
    for name, member in list(vars(base).items()):
        if name.startswith("_"):
            continue
        own = vars(service).get(name)
        if inspect.isasyncgenfunction(member):
            setattr(service, name, _stream(name, own))
        elif inspect.iscoroutinefunction(member):
            setattr(service, name, _unary(name, own))
    return service


def _check(name: str, own: Any, message: Any) -> None:
    if own is None:
        rpc = "".join(part.capitalize() for part in name.split("_"))
        raise Unsupported(f"{rpc} is not built yet")
    wellformed.check(message)
    about(_subject(message))
    refuse(message)


def _subject(message: Any) -> str:
    """The id that a request is about, else the name in its configuration, else its image."""
    if ident := getattr(message, "container_id", "") or getattr(message, "pod_sandbox_id", ""):
        return str(ident[:12])
    if (metadata := getattr(getattr(message, "config", None), "metadata", None)) is not None:
        return "/".join(part for part in (getattr(metadata, "namespace", ""), metadata.name) if part)
    image = getattr(message, "image", None)
    return "" if image is None else str(image.image)


def _unary(name: str, own: Any) -> Any:
    @wraps(own or _unary)
    async def call(self: Any, message: Any) -> Any:
        _check(name, own, message)
        return await own(self, message)

    return call


def _stream(name: str, own: Any) -> Any:
    @wraps(own or _stream)
    async def call(self: Any, message: Any) -> AsyncIterator[Any]:
        _check(name, own, message)
        async for item in own(self, message):
            yield item

    return call
