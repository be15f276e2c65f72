"""Opening of CRI log files for the shim, which may not create them itself."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from hyperpod.errors import InvalidArgument

LOG_MODE = 0o640
"""As the kubelet's log readers expect of containerd."""


def log_path(log_directory: str, path: str) -> str:
    """Where a container logs; empty: nowhere. Raises InvalidArgument for a path that leaves."""
    if not log_directory or not path:
        return ""
    if not log_directory.startswith("/"):
        raise InvalidArgument(f"log_directory {log_directory!r} is not absolute")
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise InvalidArgument(f"log_path {path!r} leads out of the pod's log_directory")
    return str(PurePosixPath(log_directory) / path)


def open_log(path: str) -> int:
    """Open for appending (and reading: the shim rescans after a crash), make parents; the caller closes.

    Raises InvalidArgument with the reason."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, LOG_MODE)
    except OSError as exc:
        raise InvalidArgument(f"log file {path}: {exc.strerror}; check log_directory and log_path") from exc
