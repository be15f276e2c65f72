"""The host's resolv.conf as a pod can use it."""

from __future__ import annotations

import contextlib
from pathlib import Path

from hyperpod.spec.podfiles import only_loopback

RESOLV_CONF = Path("/etc/resolv.conf")
SYSTEMD = Path("/run/systemd/resolve/resolv.conf")
"""The servers behind systemd-resolved's stub on 127.0.0.53, which no pod reaches."""

LIMIT = 64 * 1024


def host_resolv_conf(path: Path = RESOLV_CONF, behind_stub: Path = SYSTEMD, *, stub: bool = False) -> str:
    """Empty when the host has none. `stub`: a stub resolver on the host's loopback will do."""
    text = _read(path)
    if only_loopback(text) and not stub:
        return _read(behind_stub) or text
    return text


def _read(path: Path) -> str:
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(LIMIT).decode(errors="replace")
    return ""
