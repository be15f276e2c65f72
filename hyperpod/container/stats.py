"""Statistics of sandboxes: one question to each agent for all its containers, asked when somebody asks us.

Nothing is sampled on a timer: with a kubelet, which asks every ten seconds, rates come out of its own questions,
and without one a hundred guests are not woken for nobody. A guest that does not answer costs its caller DEADLINE
once, in parallel with all others, and is represented by what it last said.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from hyperpod.agentclient.figures import MAX_INTERFACES, Bounds, SandboxFigures
from hyperpod.errors import HyperpodError
from hyperpod.model.base import now_ns
from hyperpod.model.security import NamespaceMode
from hyperpod.sandbox.live import LiveSandbox
from hyperpod.tasks import Operations, TaskOwner, bounded

log = logging.getLogger(__name__)

DEADLINE = 2.0
"""Seconds for one agent."""

FIRST_DEADLINE = 10.0
"""Seconds for the first answer: one that has not come has no predecessor to show. Given once."""

FRESH = 0.5
"""Seconds that an answer serves further callers: a kubelet asks for pods and for containers at the same time."""

KEPT = 120.0
"""Seconds after which the last answer of a silent agent says nothing any more."""

RATE_WINDOW = 5.0
"""Seconds over which usage_nano_cores is measured at least, once there is that much history."""

RATE_FIRST = 0.5
"""Seconds after which the very first rate is told."""

NANO = 10**9


class Rate:
    """CPU time to cores: over the last RATE_WINDOW seconds or the time between two questions, if that is longer."""

    def __init__(self) -> None:
        self._base: tuple[float, int] | None = None
        self._value: int | None = None

    def update(self, at: float, cpu_ns: int, most: int) -> int | None:
        """Nanocores, at most `most`; None while they cannot be told. `at` in seconds, of a monotonic clock."""
        if self._base is None or cpu_ns < self._base[1]:  # the first, or a counter that began anew
            self._base, self._value = (at, cpu_ns), None
            return None
        seconds = at - self._base[0]
        if seconds >= RATE_WINDOW or (self._value is None and seconds >= RATE_FIRST):
            self._value = min(round((cpu_ns - self._base[1]) / seconds), most)
        if seconds >= RATE_WINDOW:
            self._base = (at, cpu_ns)
        return self._value


@dataclass(frozen=True)
class Sample:
    """One answer. `at_ns`: host time. `nano_cores`: by container id, and of the whole pod by ""."""

    at_ns: int
    figures: SandboxFigures
    nano_cores: dict[str, int | None]


@dataclass
class _Known:
    """What is kept of a sandbox between questions."""

    sample: Sample | None = None
    asked: float = 0.0
    detailed: bool = False
    silent: bool = False
    rates: dict[str, Rate] = field(default_factory=dict)


class StatsCollector:
    """Asks the agents. `scratch`: gives the size of a sandbox's scratch disk in bytes."""

    def __init__(self, owner: TaskOwner, scratch: Callable[[LiveSandbox], int]) -> None:
        self._operations = Operations(owner)
        self._scratch = scratch
        self._known: WeakKeyDictionary[LiveSandbox, _Known] = WeakKeyDictionary()

    async def collect(
        self, sandboxes: Iterable[LiveSandbox], *, details: bool = False
    ) -> dict[str, Sample | None]:
        """By sandbox id; None for one of which nothing is known. Never raises for a guest's fault."""
        ready = [sandbox for sandbox in sandboxes if sandbox.ready]
        samples = await asyncio.gather(*(self._sample(sandbox, details) for sandbox in ready))
        return {sandbox.id: sample for sandbox, sample in zip(ready, samples, strict=True)}

    async def _sample(self, sandbox: LiveSandbox, details: bool) -> Sample | None:
        known = self._known.setdefault(sandbox, _Known())
        age = time.monotonic() - known.asked
        if known.sample is not None and age < FRESH and (known.detailed or not details):
            return known.sample
        seconds = DEADLINE if known.asked or known.silent else FIRST_DEADLINE
        try:
            await self._operations.run(
                f"stats/{sandbox.id}/{details}",
                lambda: bounded(self._ask(sandbox, known, details, seconds), seconds, "statistics"),
            )
        except HyperpodError as exc:
            if not known.silent:
                known.silent = True
                log.warning("sandbox %s: no statistics: %s", sandbox.short, exc)
            if age > KEPT:
                known.sample = None
        return known.sample

    async def _ask(self, sandbox: LiveSandbox, known: _Known, details: bool, seconds: float) -> None:
        most = self._bounds(sandbox)
        agent = await sandbox.session.client(timeout=seconds)
        figures = await agent.stats(most, details=details, timeout=seconds)
        at = time.monotonic()
        usage = {ident: c.cgroup.cpu_usage_ns for ident, c in figures.containers.items() if c.cgroup}
        if figures.guest.containers is not None:
            usage[""] = figures.guest.containers.cpu_usage_ns
        known.rates = {ident: known.rates.get(ident) or Rate() for ident in usage}
        cores = sandbox.record.size.max_vcpus * NANO
        rates = {ident: known.rates[ident].update(at, cpu_ns, cores) for ident, cpu_ns in usage.items()}
        known.sample, known.asked, known.detailed = Sample(now_ns(), figures, rates), at, details
        if known.silent:
            known.silent = False
            log.info("sandbox %s: statistics again", sandbox.short)

    def _bounds(self, sandbox: LiveSandbox) -> Bounds:
        size = sandbox.record.size
        age = now_ns() - sandbox.record.created_at
        # Nothing that runs is older than the host's run, and that is all that is known once the clock was set back.
        uptime = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        age = min(age, uptime) if age > 0 else uptime
        memory, disk = size.max_memory_mib << 20, self._scratch(sandbox)
        of_node = sandbox.record.config.namespaces.network is NamespaceMode.NODE
        interfaces = 0 if of_node else MAX_INTERFACES
        return Bounds(memory=memory, disk=disk, cpu_ns=age * size.max_vcpus, interfaces=interfaces)
