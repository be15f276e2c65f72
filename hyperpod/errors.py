"""The domain's exceptions; imports nothing.

Every error names the thing it is about and, where there is one, the mend. The gRPC interceptor maps each
class to one status code; nothing else in the project knows gRPC codes.
"""

from __future__ import annotations

IMAGE_VOLUME_FAILED = "ImageVolumeMountFailed"
"""In the message of a failed image volume: cri-api's word, which other runtimes say too and tools look for."""


class HyperpodError(Exception):
    """Base of every error that hyperpod raises on purpose; maps to INTERNAL."""


class InvalidArgument(HyperpodError):
    """The request can never work as it stands; maps to INVALID_ARGUMENT."""


class NotFound(HyperpodError):
    """No such sandbox, container or image; maps to NOT_FOUND."""


class AlreadyExists(HyperpodError):
    """The name is taken by something else; maps to ALREADY_EXISTS."""


class FailedPrecondition(HyperpodError):
    """The object is in the wrong state for this; maps to FAILED_PRECONDITION."""


class PermissionDenied(HyperpodError):
    """Policy or credentials forbid it; maps to PERMISSION_DENIED."""


class Unsupported(HyperpodError):
    """Known to the interface, not built here (yet); maps to UNIMPLEMENTED."""


class ResourceExhausted(HyperpodError):
    """A bound was reached: memory, disk, slots, message sizes; maps to RESOURCE_EXHAUSTED."""


class Unavailable(HyperpodError):
    """Cannot be done now, a retry may work; maps to UNAVAILABLE."""


class ConnectionLost(Unavailable):
    """The connection broke before the answer came: whether the call had its effect is not known."""


class NetworkError(Unavailable):
    """A pod's network cannot be made or unmade: configuration, a plugin, an address pool; maps as Unavailable."""


class DeadlineExceeded(HyperpodError):
    """A bounded wait ran out; the message says which; maps to DEADLINE_EXCEEDED."""


class Aborted(HyperpodError):
    """Overtaken by another operation on the same object; maps to ABORTED."""


class ImageError(HyperpodError):
    """An image is missing, corrupt or lies about itself; maps to UNKNOWN, as containerd's does."""


class GuestError(HyperpodError):
    """The guest failed or answered nonsense; maps to INTERNAL. Its text is escaped and bounded already."""


class BootError(GuestError):
    """A VM did not come up: carries the phase and the last console lines."""

    def __init__(self, phase: str, cause: str, console: str = "") -> None:
        self.phase, self.cause, self.console = phase, cause, console
        tail = f"; last console lines: {console}" if console else ""
        super().__init__(f"boot failed in phase {phase}: {cause}{tail}")


class ProtocolError(HyperpodError):
    """A peer broke a wire protocol; the connection it came on is unusable; maps to INTERNAL."""
