"""`python -m tests.soak --seconds 3600`: pods as a kubelet keeps them, every invariant checked all the time.

`--execs 10000` instead: streaming sessions in a host pod, byte-exact, the daemon killed after every 300 of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator

from tests.daemonkit import Cri, Daemon, daemon
from tests.host.conftest import ALLOWED, host_daemon_of
from tests.recoverykit import watched
from tests.soak.execs import ExecSoak
from tests.soak.kubelet import Kubelet


@contextlib.asynccontextmanager
async def told(one: Daemon, handler: str = "") -> AsyncIterator[Cri]:
    """`watched`, with the daemon's last words when the run breaks."""
    async with watched(one, handler) as client:
        try:
            yield client
        except BaseException:
            print(f"the end of the daemon's log:\n{one.text()[-6000:]}", file=sys.stderr)
            raise


async def soak(seconds: float, pods: int, churn: float, kill: float) -> None:
    with daemon() as one:
        async with told(one) as client:
            kubelet = Kubelet(one, client, pods=pods, churn=churn, kill=kill)
            await kubelet.run(seconds)
        print(f"every invariant held for {seconds:.0f} s: {dict(kubelet.done)}")


async def soak_execs(count: int, kill: int, seed: int) -> None:
    with host_daemon_of(ALLOWED, log_level="info") as one:
        run = ExecSoak(one, count, kill, seed)
        async with told(one, "host") as client:
            await run.run(client)
        print(f"every session was exact, nothing is left: {dict(run.done)}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--pods", type=int, default=3, help="at a time")
    parser.add_argument("--churn", type=float, default=120, help="seconds until a pod is replaced")
    parser.add_argument(
        "--kill", type=float, default=300, help="seconds between kill -9 of the daemon; 0: never"
    )
    parser.add_argument("--execs", type=int, default=0, help="so many streaming sessions, instead of pods")
    parser.add_argument("--kill-every", type=int, default=300, help="sessions between two kill -9; 0: never")
    parser.add_argument("--seed", type=int, default=4)
    args = parser.parse_args()
    if args.execs:
        asyncio.run(soak_execs(args.execs, args.kill_every, args.seed))
        return
    asyncio.run(soak(args.seconds, args.pods, args.churn, args.kill))


if __name__ == "__main__":
    main()
