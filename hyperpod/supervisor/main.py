"""`hyperpod serve`: the supervisor's process."""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import resource
import signal
import sys
from pathlib import Path

from hyperpod import logs
from hyperpod.daemon_args import arguments, config_of
from hyperpod.errors import FailedPrecondition
from hyperpod.supervisor import linux
from hyperpod.supervisor.daemon import DaemonChild
from hyperpod.supervisor.loop import Loop
from hyperpod.supervisor.server import Server

log = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """Keep a daemon running with the same arguments until SIGTERM. Returns the exit code.

    Raises InvalidArgument for a bad configuration, FailedPrecondition when another supervisor is there.
    """
    parser = argparse.ArgumentParser(prog="hyperpod serve")
    arguments(parser)
    config = config_of(parser.parse_args(argv))
    command = [sys.executable, "-m", "hyperpod.daemon", *argv]
    return supervise(config.run_dir, command, config.log_level)


def supervise(run_dir: Path, command: list[str], log_level: str = "info") -> int:
    """Run `command` as the daemon, and the shims that it asks for at `<run_dir>/supervisor.sock`."""
    logs.setup(log_level, "supervisor")
    run_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
    lock = os.open(run_dir / "supervisor.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        os.close(lock)
        raise FailedPrecondition(f"another supervisor runs in {run_dir}; give --run-dir another") from exc
    linux.become_subreaper()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    loop = Loop()
    server = Server(loop, run_dir, log_level)
    daemon = DaemonChild(loop, command)

    def reap() -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            daemon.reaped(pid, status)
            server.shims.reaped(pid, status)

    loop.on_signals([signal.SIGCHLD], reap)
    loop.on_signals([signal.SIGTERM, signal.SIGINT], daemon.stop)
    daemon.start()
    code = loop.run()
    server.close()
    return code
