"""`python -m tests.perf [--quick]`: the budgets, measured in one run. A report: a missed budget is no failure."""

from __future__ import annotations

import argparse
import asyncio
import os

from tests.daemonkit import daemon
from tests.perf import latency, many, mounts, net, output, race, streams
from tests.perf.bare import BareBoot
from tests.perf.pods import Pods
from tests.perf.report import Figure, progress, table

POD_MEMORY_MIB = 256
"""What the test kit's daemon gives a pod without limits: 96 + 160."""


async def measure(quick: bool) -> tuple[list[Figure], list[list[str]], str]:
    bare = BareBoot(POD_MEMORY_MIB)
    progress("starting a daemon")
    with daemon() as one:
        async with one.client() as client:
            await client.load_busybox()
            pods = Pods(one, client, bare)
            await pods.run(2 if quick else 5)
            progress(f"a daemon with {many.SANDBOXES} sandboxes, then with {many.CONTAINERS} containers")
            await many.make_one(one, client)
            progress("a pod's network")
            network = await net.figures(client, 32 if quick else 256)
            progress("a mount beside the guest's disk")
            files = await mounts.figures(client, 16 if quick else 64, 2 if quick else 5)
            progress("calls beside streams")
            calls = await latency.figures(one, client, 50 if quick else 500)
        figures = pods.figures() + network + files + calls
        one.stop()
        originals = many.kept(one)
        many.copy(one, originals, 1)
        one.start()
        figures.append(await many.memory(one))
        one.stop()
        many.copy(one, originals, many.CONTAINERS // many.SANDBOXES)
        one.start()
        figures += await many.lists(one, 10 if quick else 50)
    progress("container output to log")
    figures += await output.figures(20 if quick else 100, 2 if quick else 3)
    progress("host pods")
    [hosts] = await race.race(4 if quick else 12)
    figures += race.figures(hosts)
    progress("calls beside streams of a host pod")
    figures += await latency.on_host(50 if quick else 500)
    progress("streams")
    figures += await streams.figures(64 if quick else 512, 2 if quick else 3)
    return figures, pods.times(), bare.versions


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.perf", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller rounds")
    quick, load = parser.parse_args().quick, os.getloadavg()[0]
    figures, times, versions = asyncio.run(measure(quick))
    print(f"{os.cpu_count()} CPUs, load {load:.1f} before the run, emulated (TCG), {versions}\n")
    print(table(("budget", "measured", "allowed", "share", "", ""), [figure.row() for figure in figures]))
    print()
    print(table(("call or phase", "median s", "range"), times))


if __name__ == "__main__":
    main()
