"""Working directories of containers that see others' processes: none may lead out of the container.

crun changes into the directory with its own rights, which are the agent's, and Debian 12's does not look where it
has come to. In a pid namespace that is shared, links such as /proc/1/root, which an image names or a container puts
in the directory's place, lead to where another process is: into the agent's file system, or the host's. In a pid
namespace of its own a container has no such link.
"""

from __future__ import annotations

import os
from typing import Any

from hyperpod.agent import linux
from hyperpod.errors import FailedPrecondition


def needs_care(namespaces: list[dict[str, Any]], path: str) -> bool:
    """Whether a process in these OCI namespaces may be led away by `path`."""
    own = any(item["type"] == "pid" and not item.get("path") for item in namespaces)
    return not own and os.path.normpath(path) != "/"


def check(pid: int) -> None:
    """That a process, which has not begun yet, is in a directory of its own mounts. Raises FailedPrecondition."""
    try:
        folder = os.open(f"/proc/{pid}/cwd", os.O_PATH | os.O_CLOEXEC)
        try:
            with open(f"/proc/self/fdinfo/{folder}") as file:
                mount = next(line.split()[1] for line in file if line.startswith("mnt_id:"))
        finally:
            os.close(folder)
        with open(f"/proc/{pid}/mountinfo") as file:
            own = {line.split(" ", 1)[0] for line in file}
    except OSError as exc:
        raise FailedPrecondition(f"its first process ended before it began: {exc.strerror}") from exc
    if mount not in own:
        raise FailedPrecondition("the working directory leads out of the container")


def open_in(pid: int, path: str) -> int:
    """A directory of the container with this process, by a descriptor: what `path` becomes later changes nothing.

    Raises FailedPrecondition, also for links of procfs."""
    try:
        root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return linux.open_in_root(root, path, os.O_PATH | os.O_DIRECTORY)
        finally:
            os.close(root)
    except OSError as exc:
        raise FailedPrecondition(f"chdir `{path[:200]}`: {exc.strerror}") from exc
