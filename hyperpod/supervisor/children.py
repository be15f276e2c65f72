"""What shims and host agents do from their fork on. Loaded by the nursery alone (forks.py)."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from betterproto2 import Message

from hyperpod import logs
from hyperpod.agent import main as agent
from hyperpod.agent.hostplace import HostOptions
from hyperpod.agent.listener import CONTROL_PORT, STDIO_PORT, listen_unix
from hyperpod.api.gen.hyperpod.agent import v1
from hyperpod.api.gen.hyperpod.agentstats import v1 as agentstats
from hyperpod.shim import main as shim
from hyperpod.shim.service import ShimOptions, Stored
from hyperpod.supervisor import linux

LATER = (
    "hyperpod.agent.execs",
    "hyperpod.agent.sessions",
    "hyperpod.agent.stats",
    "hyperpod.agent.workdir",
    "hyperpod.mountapi",
    "hyperpod.spec.capabilities",
    "hyperpod.spec.sysctls",
    "hyperpod.spec.users",
)
"""What an agent imports when it needs it, which here is at once: a guest starts without."""


def preload() -> None:
    """The first message of each kind evaluates its class: make it before anything is forked."""
    for name in LATER:
        importlib.import_module(name)
    for kind in (*vars(v1).values(), *vars(agentstats).values()):
        if isinstance(kind, type) and issubclass(kind, Message):
            kind.parse(bytes(kind()))


def agent_child(fields: dict[str, Any], log_level: str) -> Callable[[], int]:
    """`fields`: of HostOptions, and `cgroups`, which it joins before it does anything.

    Its sockets listen from here on: who has asked for it can connect at once. Raises OSError."""
    cgroups: list[str] = fields.pop("cgroups")
    options = HostOptions(**fields)
    listening = {
        CONTROL_PORT: listen_unix(options.directory, CONTROL_PORT),
        STDIO_PORT: listen_unix(options.directory, STDIO_PORT, options.stdio_uid),
    }

    def run() -> int:
        linux.close_all_but(sock.fileno() for sock in listening.values())
        linux.become_background(f"hyperpod-agent {options.directory}", cgroups)
        logs.setup(log_level, f"agent {Path(options.directory).name}")
        logging.raiseExceptions = False  # stderr may go away with the supervisor
        return agent.main_on_host(options, listening)

    return run


def shim_child(
    fields: dict[str, Any], stored: Stored, supervisor_socket: str, log_level: str
) -> Callable[[], int]:
    """`fields`: of ShimSpec."""

    def run() -> int:
        linux.close_all_but(fd for _, fds in stored.values() for fd in fds)
        os.umask(0o077)
        linux.become_background(f"hyperpod-shim {fields['directory']}", fields["cgroups"])
        linux.drop_to(fields["uid"], fields["gid"])
        linux.forbid_new_privileges()
        options = ShimOptions(
            sandbox_id=fields["sandbox_id"],
            directory=fields["directory"],
            cid=fields["cid"],
            device=fields["device"],
            supervisor=supervisor_socket,
            stored=stored,
        )
        return shim.serve(options, log_level)

    return run
