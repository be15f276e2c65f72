"""Host agents: forked from this preloaded process, so that they start in milliseconds and share its memory.

Nothing is kept of them here. The daemon knows a host agent by pid and start time, and ends it by its cgroup.
"""

from __future__ import annotations

import importlib
import logging
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hyperpod import logs
from hyperpod.agent import main as agent
from hyperpod.agent.hostplace import HostOptions
from hyperpod.api.gen.hyperpod.agent import v1
from hyperpod.supervisor import linux


@dataclass(frozen=True)
class AgentSpec:
    """`cgroups`: folders whose cgroup.procs the agent joins, before it does anything."""

    options: HostOptions
    cgroups: tuple[str, ...]


LATER = (
    "hyperpod.agent.sessions",
    "hyperpod.spec.capabilities",
    "hyperpod.spec.sysctls",
    "hyperpod.spec.users",
)
"""What an agent imports when it needs it, which here is at once: a guest starts without."""


def preload() -> None:
    """The first message costs most of what a start would: make it before anything is forked."""
    for name in LATER:
        importlib.import_module(name)
    v1.HelloRequest.parse(bytes(v1.HelloRequest(api_version=1)))
    bytes(v1.HelloResponse(api_version=1))


def fork_agent(spec: AgentSpec, log_level: str, release: Callable[[], None]) -> tuple[int, int]:
    """Gives pid and start time. `release` closes, in the child, what is the supervisor's own. Raises OSError."""
    pid = os.fork()
    if pid == 0:
        _child(spec, log_level, release)
    return pid, linux.start_time(pid)


def _child(spec: AgentSpec, log_level: str, release: Callable[[], None]) -> None:
    """The rest of the agent's life. Never returns."""
    code = 70
    try:
        linux.reset_signals()
        release()
        linux.close_all_but(())
        linux.become_background(f"hyperpod-agent {spec.options.directory}", spec.cgroups)
        logs.setup(log_level, f"agent {Path(spec.options.directory).name}")
        logging.raiseExceptions = False  # stderr may go away with the supervisor
        code = agent.main_on_host(spec.options)
    except BaseException:  # noqa: BLE001  a child may never return into the parent's stack
        traceback.print_exc()
    finally:
        os._exit(code)
