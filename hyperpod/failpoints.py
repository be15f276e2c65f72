"""Named points at which a process can be told to kill itself, for crash tests.

`HYPERPOD_FAILPOINT=name[:n]` makes the n-th passage (default the first) of that point a SIGKILL of this very
process: nothing is flushed, no handler runs, as at a power cut of the one process. Without it a passage costs
one comparison.
"""

from __future__ import annotations

import os
import signal

NAMES = (
    "sandbox.recorded",
    "sandbox.netns",
    "sandbox.cni",
    "sandbox.network",
    "sandbox.scratch",
    "sandbox.shim",
    "sandbox.share",
    "sandbox.domain",
    "sandbox.tap",
    "sandbox.sealed",
    "sandbox.agent-started",
    "sandbox.agent",
    "sandbox.ready",
    "sandbox.stopping",
    "sandbox.destroyed",
    "sandbox.unplugged",
    "sandbox.stopped",
    "sandbox.removing",
    "container.recorded",
    "container.layers",
    "container.mounted",
    "container.prepared",
    "container.updated",
    "container.started",
    "container.running",
    "container.exited",
    "container.removing",
    "container.unmounted",
)
"""Every failpoint of the daemon, in the order in which a pod's life meets them."""

OF_VMS = frozenset({"sandbox.share", "sandbox.domain", "sandbox.tap", "sandbox.sealed"})
OF_HOST_PODS = frozenset({"sandbox.agent-started"})
"""Those that only one kind of pod meets."""

_name, _, _count = os.environ.get("HYPERPOD_FAILPOINT", "").partition(":")
_left = int(_count or "1")


def passing(name: str) -> None:
    """Mark a point. Raises AssertionError for a name that is not in NAMES, so that tests cover them all."""
    global _left  # noqa: PLW0603  one counter per process is the point
    assert name in NAMES, name
    if name == _name:
        _left -= 1
        if _left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
