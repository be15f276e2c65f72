"""`python -m tests.perf.race`: host pods beside another CRI runtime, by the same client, by turns, in one run.

A round is a pod as the kubelet makes it: RunPodSandbox, CreateContainer, StartContainer, its first log line,
ExecSync, StopPodSandbox, RemovePodSandbox. Then four such at a time, idle pods' memory, and a container that logs
as fast as it can.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
from collections.abc import AsyncIterator
from pathlib import Path

from grpclib.client import Channel

from tests.daemonkit import Cri
from tests.host.conftest import host_daemon_of
from tests.perf import containerd
from tests.perf.report import Figure, number, progress, table
from tests.perf.runner import AT_ONCE, STEPS, Runner, remove_cgroups, write_lines

BUDGETS = {
    "RunPodSandbox": 107, "CreateContainer": 7.5, "StartContainer": 43, "pod to first log line": 161,
    "ExecSync": 21, "StopPodSandbox": 116, "RemovePodSandbox": 23,
}  # fmt: skip
"""Milliseconds: containerd 2.1 with runc on a quiet machine of 2 CPUs."""


async def run(runners: list[Runner], rounds: int, base: Path) -> None:
    """By turns, so that what else the machine does hits all alike."""
    lines = base / "lines"
    digest = write_lines(lines, 64)
    lines.chmod(0o644)
    for runner in runners:
        await runner.pod()  # the first pod of a runtime makes its bridge and fills caches
        runner.seconds.clear()
        runner.phases.clear()
    for one in range(rounds):
        for runner in runners:
            await runner.pod()
        progress(f"round {one + 1} of {rounds}")
    for _ in range(3):
        for runner in runners:
            await runner.together(max(1, rounds // 4))
            progress(f"{runner.name}: {runner.rates[-1]:.1f} pods/s, {AT_ONCE} at a time")
    for runner in runners:
        await runner.idle()
        progress(f"{runner.name}: {' and '.join(f'{mib:.2f}' for mib in runner.memory)} MiB a pod")
    for _ in range(3):
        for runner in runners:
            await runner.logging(lines, digest)
            progress(f"{runner.name}: {runner.logged[-1]:.0f} MiB/s of log")


@contextlib.asynccontextmanager
async def _ours(config: str = 'host_pods = ["test"]\n---') -> AsyncIterator[Runner]:
    with host_daemon_of(config, log_level="info") as one:
        async with one.client() as client:
            client.handler = "host"
            await client.load_busybox()

            def servers() -> set[int]:
                assert one.process is not None
                return {one.process.pid, one.pid()}

            yield Runner("hyperpod", client, str(one.run_dir), servers, one.logs)
            assert (left := one.leftovers()) == [], f"left behind: {left}"


@contextlib.asynccontextmanager
async def _peer(ours: Runner, name: str, socket: str, marker: str, server: int) -> AsyncIterator[Runner]:
    channel = Channel(path=socket)
    try:
        yield Runner(name, Cri(ours.client.daemon, channel), marker, lambda: {server}, ours.logs)
    finally:
        channel.close()


async def race(rounds: int, peer: str = "", containerds: list[Path | None] | None = None) -> list[Runner]:
    """`peer`: another endpoint. `containerds`: folders of containerd's and runc's programs; None is Debian's."""
    async with contextlib.AsyncExitStack() as stack:
        ours = await stack.enter_async_context(_ours())
        runners, base = [ours], ours.client.daemon.base
        for folder in containerds or ():
            one = stack.enter_context(containerd.running(folder, base / "busybox"))
            peer_of = _peer(ours, one.version, str(one.socket), one.marker, one.pid)
            runners.append(await stack.enter_async_context(peer_of))
        if peer:
            path = peer.removeprefix("unix://")
            runners.append(await stack.enter_async_context(_peer(ours, peer, path, path, 0)))
        stack.callback(remove_cgroups)
        await run(runners, rounds, base)
    return runners


def figures(runner: Runner) -> list[Figure]:
    """Against containerd's figures of a quiet machine."""
    rows = [
        Figure(f"host pod: {step}", 1000 * statistics.median(runner.seconds[step]), "ms", BUDGETS[step])
        for step in STEPS
    ]
    return [
        *rows,
        Figure(f"host pods, {AT_ONCE} at a time", statistics.median(runner.rates), "pods/s", 11.5, at_least=True),
        Figure("host pod: PSS, idle", runner.memory[0], "MiB", 4.84, note="without a container"),
        Figure("host pod: PSS, a container asleep", runner.memory[1], "MiB"),
        Figure("host pod: stdout to CRI log", statistics.median(runner.logged), "MiB/s", 103, at_least=True),
    ]  # fmt: skip


def compared(runners: list[Runner]) -> str:
    """A table: a row for each step, a column for each runtime, and ours over the last one's."""

    def cells(what: str, unit: str, values: list[list[float]], scale: float = 1.0) -> list[str]:
        row = [f"{what}, {unit}"]
        for one in values:
            row.append(
                f"{number(scale * statistics.median(one))} ({number(scale * min(one))} to "
                f"{number(scale * max(one))})"
            )
        if len(values) > 1:
            row.append(number(statistics.median(values[0]) / statistics.median(values[-1])))
        return row

    rows = [cells(step, "ms", [runner.seconds[step] for runner in runners], 1000) for step in STEPS]
    rows += [
        cells(f"{AT_ONCE} at a time", "pods/s", [runner.rates for runner in runners]),
        cells("PSS of an idle pod", "MiB", [runner.memory[:1] for runner in runners]),
        cells("PSS with a container asleep", "MiB", [runner.memory[1:] for runner in runners]),
        cells("log", "MiB/s", [runner.logged for runner in runners]),
    ]
    head = ("median (range)", *(runner.name for runner in runners))
    return table((*head, "ratio") if len(runners) > 1 else head, rows)


def phases(runner: Runner) -> str:
    rows = [
        [name, number(1000 * statistics.median(v)), f"{number(1000 * min(v))} to {number(1000 * max(v))}"]
        for name, v in runner.phases.items()
    ]
    return table(("where the time goes", "median ms", "range"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.perf.race", description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument(
        "--peer", default="", help="unix:///path of another CRI endpoint, with the same image"
    )
    parser.add_argument("--containerd", action="store_true", help="run Debian's containerd and runc, too")
    parser.add_argument("--programs", type=Path, help="run containerd and runc out of this folder, too")
    args = parser.parse_args()
    containerds = [None] * args.containerd + [args.programs] * (args.programs is not None)
    load = os.getloadavg()[0]
    runners = asyncio.run(race(args.rounds, args.peer, containerds))
    print(f"{os.cpu_count()} CPUs, load {load:.1f} before the run\n")
    print(compared(runners))
    print()
    print(phases(runners[0]))


if __name__ == "__main__":
    main()
