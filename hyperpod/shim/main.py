"""Entered after the fork in the supervisor, or by `python -m hyperpod.shim` where there is none."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import resource
import signal

from hyperpod import logs
from hyperpod.shim.service import Shim, ShimOptions
from hyperpod.tasks import report_on

log = logging.getLogger(__name__)

_M_ARENA_MAX = -8
"""mallopt(3): a malloc arena per thread would be memory per sandbox for nothing."""
_MAX_FILES = 16_384


def serve(options: ShimOptions, log_level: str = "info") -> int:
    """Run one shim until it is told to leave. Returns the process's exit code."""
    logs.setup(log_level, f"shim {options.sandbox_id[:12]}")
    logging.raiseExceptions = False  # stderr may go away with the supervisor
    ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, _MAX_FILES), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # guest memory is mapped
    try:
        asyncio.run(_serve(options))
    except OSError as exc:
        log.error("cannot serve: %s", exc)
        return 1
    return 0


async def _serve(options: ShimOptions) -> None:
    shim = Shim(options)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, shim.stop.set)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    report_on(signal.SIGUSR1)
    await shim.run()


def main(argv: list[str] | None = None) -> int:
    """`python -m hyperpod.shim`."""
    import argparse  # what a supervisor has forked does without

    parser = argparse.ArgumentParser(prog="hyperpod-shim")
    parser.add_argument("--sandbox-id", required=True)
    parser.add_argument("--directory", required=True)
    parser.add_argument("--cid", type=int, default=3)
    parser.add_argument("--no-device", action="store_true")
    parser.add_argument("--supervisor", default="")
    parser.add_argument("--log-level", default="info")
    args = parser.parse_args(argv)
    options = ShimOptions(
        sandbox_id=args.sandbox_id,
        directory=args.directory,
        cid=args.cid,
        device=not args.no_device,
        supervisor=args.supervisor,
    )
    return serve(options, args.log_level)
