"""One container in the daemon's memory."""

from __future__ import annotations

import asyncio

from hyperpod.model.container import Container, ContainerRecord, ContainerState, ContainerStatus
from hyperpod.model.security import LinuxResources


class LiveContainer:
    """Record, status, and who waits for its end. Only KnownContainers changes it."""

    def __init__(self, record: ContainerRecord, status: ContainerStatus) -> None:
        self.record, self.status = record, status
        self.exited = asyncio.Event()
        self.lock = asyncio.Lock()
        """Serialises create, start and remove; stop and exit reports overtake, so they do not take it."""
        self.writing = asyncio.Lock()
        """Held while the status is written or the record deleted."""
        self.logging: asyncio.Task[None] | None = None
        """Begins its log: CreateContainer does not wait for it, StartContainer does."""
        self.stop_at = float("inf")
        """Loop time at which a running StopContainer sends SIGKILL; a later, shorter grace moves it."""
        self.stop_moved = asyncio.Event()
        if status.finished_at:
            self.exited.set()

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def short(self) -> str:
        return self.record.id[:12]

    @property
    def sandbox_id(self) -> str:
        return self.record.sandbox_id

    @property
    def state(self) -> ContainerState:
        return self.status.state

    @property
    def resources(self) -> LinuxResources:
        return self.status.resources or self.record.config.resources

    @property
    def name_key(self) -> tuple[str, str, int]:
        meta = self.record.config.metadata
        return (self.record.sandbox_id, meta.name, meta.attempt)

    def view(self) -> Container:
        return Container(record=self.record, status=self.status)
