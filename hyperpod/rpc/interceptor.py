"""Around every RPC: errors become one gRPC status each, and the log gets a start and an end line.

The only place in the project that knows gRPC status codes, and one of two that may catch everything.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

from grpclib.const import Status
from grpclib.exceptions import GRPCError, StreamTerminatedError

from hyperpod import errors
from hyperpod.logs import printable

log = logging.getLogger("hyperpod.rpc")

CODES: dict[type[BaseException], Status] = {
    errors.InvalidArgument: Status.INVALID_ARGUMENT,
    errors.NotFound: Status.NOT_FOUND,
    errors.AlreadyExists: Status.ALREADY_EXISTS,
    errors.FailedPrecondition: Status.FAILED_PRECONDITION,
    errors.PermissionDenied: Status.PERMISSION_DENIED,
    errors.Unsupported: Status.UNIMPLEMENTED,
    errors.ResourceExhausted: Status.RESOURCE_EXHAUSTED,
    errors.Unavailable: Status.UNAVAILABLE,
    errors.DeadlineExceeded: Status.DEADLINE_EXCEEDED,
    errors.Aborted: Status.ABORTED,
    errors.ImageError: Status.UNKNOWN,
    errors.GuestError: Status.INTERNAL,
    errors.HyperpodError: Status.INTERNAL,
    TimeoutError: Status.DEADLINE_EXCEEDED,
}

MESSAGE_LIMIT = 4096
"""Bytes of an error's text: it travels in a header."""

QUIET = (
    "Version",
    "Status",
    "List",
    "Stream",
    "ImageStatus",
    "ContainerStatus",
    "PodSandboxStatus",
    "ImageFsInfo",
)
"""Called every second by a kubelet; logged at debug."""

_numbers = itertools.count(1)
_subject: ContextVar[str] = ContextVar("subject", default="")
Handler = Callable[[Any], Awaitable[None]]


def about(subject: str) -> None:
    """Called by a service: what its RPC is about, for the log's end line. No secrets."""
    _subject.set(" " + printable(subject, 100) if subject else "")


def _line(text: str) -> str:
    return text.replace("\n", "\\n")


def to_grpc(exc: BaseException) -> GRPCError | None:
    """The status of a known error, searched in groups too; None for what nobody foresaw."""
    if isinstance(exc, GRPCError):
        return exc
    if isinstance(exc, BaseExceptionGroup):
        found = [mapped for inner in exc.exceptions if (mapped := to_grpc(inner)) is not None]
        return found[0] if found else None
    for kind in type(exc).__mro__:
        if kind in CODES:
            return GRPCError(CODES[kind], printable(str(exc), MESSAGE_LIMIT) or kind.__name__)
    return None


def guarded(name: str, handler: Handler, closing: Callable[[], bool]) -> Handler:
    """Wrap one method's handler. `closing` tells whether a cancellation means that the server ends."""
    short = name.rpartition("/")[2]
    level = logging.DEBUG if short.startswith(QUIET) else logging.INFO

    async def run(stream: Any) -> None:
        number, start = next(_numbers), time.monotonic()
        log.log(level, "%s #%d", short, number)

        def end(level: int, outcome: str) -> None:
            seconds = time.monotonic() - start
            text = _line(f"{_subject.get()}: {outcome}")
            log.log(level, "%s #%d%s in %.3f s", short, number, text, seconds)

        try:
            await handler(stream)
        except asyncio.CancelledError:
            if closing():
                end(logging.INFO, "cut short by the server's end")
                raise GRPCError(Status.UNAVAILABLE, "the runtime is shutting down; try again") from None
            if not _cancelled():
                end(logging.WARNING, "lost what it waited for")
                raise GRPCError(Status.ABORTED, f"{short} was overtaken; try again") from None
            end(logging.INFO, "given up by its client")
            raise
        except StreamTerminatedError:
            end(logging.INFO, "left by its client")
            raise
        except Exception as exc:
            mapped = to_grpc(exc)
            if mapped is None:
                log.exception("%s #%d failed unexpectedly", short, number)
                text = f"internal error in {short}: {type(exc).__name__}; see the log"
                mapped = GRPCError(Status.INTERNAL, text)
            end(logging.INFO, f"{mapped.status.name} ({mapped.message})")
            raise mapped from exc
        else:
            end(level, "OK")

    return run


def _cancelled() -> bool:
    """Whether the call itself was cancelled, not just something that it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
