"""The statistics RPCs: which objects are asked for, the agents' answers, and their form."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.container.known import KnownContainers
from hyperpod.container.live import LiveContainer
from hyperpod.container.stats import StatsCollector
from hyperpod.cri import filesystems, metrics, replies, stats_replies
from hyperpod.errors import Unavailable
from hyperpod.model.sandbox import Kind
from hyperpod.sandbox import overhead
from hyperpod.sandbox.live import LiveSandbox
from hyperpod.sandbox.manager import SandboxManager


class StatsReader:
    """Each method answers one RPC, or its streamed twin."""

    def __init__(
        self,
        sandboxes: SandboxManager,
        containers: KnownContainers,
        collector: StatsCollector,
        state_dir: Path,
    ) -> None:
        self._sandboxes, self._containers, self._collector = sandboxes, containers, collector
        self._state_dir = state_dir

    def _mountpoint(self) -> str:
        return filesystems.scratch_mountpoint(self._state_dir, str(self._state_dir / "layers"))

    def _of(self, containers: Iterable[LiveContainer]) -> list[LiveSandbox]:
        wanted = {container.sandbox_id for container in containers}
        return [sandbox for ident in wanted if (sandbox := self._sandboxes.index.find(ident)) is not None]

    async def container(self, ident: str) -> cri.ContainerStats:
        """Raises NotFound; Unavailable when its guest does not answer and nothing of it is known."""
        container = self._containers.index.get(ident)
        samples = await self._collector.collect(self._of([container]))
        sample = samples.get(container.sandbox_id)
        if container.sandbox_id in samples and sample is None:
            raise Unavailable(f"container {container.short}: its pod's guest does not answer")
        return stats_replies.container(container, sample, self._mountpoint())

    async def containers(self, wanted: cri.ContainerStatsFilter | None) -> list[cri.ContainerStats]:
        """Those of pods that do not answer have their attributes, and what was last known."""
        found = replies.wanted_containers(self._containers.all(), _as_filter(wanted))
        samples = await self._collector.collect(self._of(found))
        mountpoint = self._mountpoint()
        return [stats_replies.container(item, samples.get(item.sandbox_id), mountpoint) for item in found]

    async def pod(self, ident: str) -> cri.PodSandboxStats:
        """Raises NotFound, FailedPrecondition when it is not ready, Unavailable."""
        sandbox = self._sandboxes.live(ident)
        sandbox.need_ready()
        sample = (await self._collector.collect([sandbox])).get(sandbox.id)
        if sample is None:
            raise Unavailable(f"sandbox {sandbox.short}: its guest does not answer")
        return stats_replies.pod(sandbox, self._by_sandbox()[sandbox.id], sample, self._mountpoint())

    async def pods(self, wanted: cri.PodSandboxStatsFilter | None) -> list[cri.PodSandboxStats]:
        """Of ready pods; one that never answered has its attributes alone."""
        wanted = wanted or cri.PodSandboxStatsFilter()
        found = [
            sandbox
            for sandbox in self._ready()
            if sandbox.id.startswith(wanted.id)
            and wanted.label_selector.items() <= sandbox.record.config.labels.items()
        ]
        samples = await self._collector.collect(found)
        containers, mountpoint = self._by_sandbox(), self._mountpoint()
        return [
            stats_replies.pod(sandbox, containers[sandbox.id], samples.get(sandbox.id), mountpoint)
            for sandbox in found
        ]

    async def metrics(self) -> AsyncIterator[cri.PodSandboxMetrics]:
        """Of ready pods whose guests answer, one after the other."""
        found = self._ready()
        samples = await self._collector.collect(found, details=True)
        containers = self._by_sandbox()
        for sandbox in found:
            if (sample := samples.get(sandbox.id)) is not None:
                yield metrics.pod(sandbox, containers[sandbox.id], sample)
                await asyncio.sleep(0)  # some hundred messages each

    def _ready(self) -> list[LiveSandbox]:
        return [sandbox for sandbox in self._sandboxes.index.values() if sandbox.ready]

    def _by_sandbox(self) -> dict[str, list[LiveContainer]]:
        found: dict[str, list[LiveContainer]] = defaultdict(list)
        for container in self._containers.all():
            found[container.sandbox_id].append(container)
        return found

    async def host(self, ident: str) -> dict[str, Any]:
        """What a ready sandbox costs its host, beside what its guest says it uses. Empty when it is not ready."""
        sandbox = self._sandboxes.live(ident)
        if not sandbox.ready:
            return {}
        path = self._sandboxes.builder(sandbox).cgroup(sandbox)
        found = await overhead.processes(path, self._sandboxes.cgroups.used)
        sample = (await self._collector.collect([sandbox])).get(sandbox.id)
        memory, cpu_ns = sum(p.memory for p in found), sum(p.cpu_ns for p in found)
        host: dict[str, Any] = {
            "cgroup": path,
            "processes": [asdict(process) for process in found],
            "memory_bytes": memory,
            "cpu_ns": cpu_ns,
        }
        if sample is not None and sandbox.record.kind is Kind.VM:
            guest = sample.figures.guest
            used = max(guest.memory_total - guest.memory_free, 0)
            host |= {
                "guest_memory_bytes": used,
                "guest_cpu_ns": guest.cpu_usage_ns,
                "overhead_memory_bytes": max(memory - used, 0),
                "overhead_cpu_ns": max(cpu_ns - guest.cpu_usage_ns, 0),
            }
        return host


def _as_filter(wanted: cri.ContainerStatsFilter | None) -> cri.ContainerFilter:
    wanted = wanted or cri.ContainerStatsFilter()
    return cri.ContainerFilter(
        id=wanted.id, pod_sandbox_id=wanted.pod_sandbox_id, label_selector=wanted.label_selector
    )
