"""What a start leaves, of a pod or of the daemon, that meets a fault nobody has foreseen."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hyperpod.config import Config
from hyperpod.model.sandbox import SandboxRecord, SandboxStatus
from hyperpod.recovery import Recovery
from hyperpod.sandbox.manager import SandboxManager
from hyperpod.store.records import RecordStore
from hyperpod.tasks import TaskOwner
from tests.unit.test_convert import sandbox


class Builder:
    """Of sandboxes whose start meets a fault of our own."""

    def __init__(self) -> None:
        self.undone: list[str] = []
        self.networks, self.cgroups = self, SimpleNamespace()
        self.hypervisor = SimpleNamespace(subscribe=lambda _: None)

    async def build(self, sandbox: Any) -> None:
        raise KeyError("a fault")

    async def tear_down(self, sandbox: Any) -> None:
        self.undone.append("tear-down")

    async def detach(self, ident: str) -> None:
        self.undone.append("network")


async def test_a_fault_of_our_own_is_undone_like_any_failure(tmp_path: Path) -> None:
    """A kubelet tries again, and each try would leave one more VM behind."""
    store = RecordStore(tmp_path, "sandboxes", SandboxRecord, SandboxStatus)
    owner, builder = TaskOwner("t"), Builder()
    config = Config(state_dir=tmp_path, run_dir=Path("/run/hp-none"), host_pods=("*",))
    manager = SandboxManager(config, store, builder, builder, owner, boot_id="b")  # type: ignore[arg-type]
    with pytest.raises(KeyError):
        await manager.run(sandbox().record.config, "host")
    assert builder.undone == ["tear-down", "network"]
    assert len(manager.index) == 0
    assert [path for path in (tmp_path / "sandboxes").iterdir() if not path.name.startswith(".")] == []
    await owner.close()


class Manager:
    """Whose one sandbox cannot be recovered."""

    def __init__(self, owner: TaskOwner) -> None:
        self.owner, self.boot_id = owner, "another"
        self.stopped: list[str] = []

    async def recover(self, sandbox: Any, *, running: bool, why_not: str) -> None:
        raise KeyError("a fault")

    async def stop(self, ident: str) -> None:
        self.stopped.append(ident)


async def test_a_fault_in_one_pods_recovery_stops_that_pod_alone() -> None:
    """The daemon has the others to look after, and would meet it again at each of its starts."""
    owner = TaskOwner("t")
    manager = Manager(owner)
    made = sandbox()
    live = SimpleNamespace(
        id=made.id, short=made.id[:12], record=made.record, gone_detail="", gone=asyncio.Event()
    )
    await Recovery(manager, None, None)._recover(live, set())  # type: ignore[arg-type]
    await asyncio.sleep(0)
    assert live.gone.is_set() and "a fault" in live.gone_detail
    assert manager.stopped == [made.id]
    await owner.close()
