"""Which layer hangs on a VM under which number, whatever fails in between."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from hyperpod.errors import HyperpodError, ResourceExhausted, Unavailable
from hyperpod.hypervisor.base import Disk
from hyperpod.sandbox import disks
from hyperpod.sandbox.disks import LayerDisks, serial_of


@dataclass(frozen=True)
class Layer:
    name: str

    @property
    def path(self) -> str:
        return f"/layers/{self.name}"


def layers(*numbers: int) -> list[Layer]:
    return [Layer(f"sha256:{number:032x}{0:032x}") for number in numbers]


def layer(number: int) -> str:
    """Its serial."""
    return serial_of(layers(number)[0].name)


@dataclass
class Vm:
    """Takes LUNs like libvirt: one serial once, one number once."""

    luns: dict[str, int] = field(default_factory=dict)
    failing: set[str] = field(default_factory=set)

    async def attach_disk(self, name: str, disk: Disk) -> None:
        if disk.serial in self.failing:
            raise Unavailable("no")
        if disk.serial not in self.luns:
            assert disk.unit not in self.luns.values()
            self.luns[disk.serial] = disk.unit

    async def detach_disk(self, name: str, serial: str) -> None:
        if serial in self.failing:
            raise Unavailable("no")
        self.luns.pop(serial, None)


@pytest.fixture
def vm() -> Vm:
    return Vm()


def made(vm: Vm, folder: Path) -> LayerDisks:
    one = LayerDisks(cast(Any, vm), "d", folder)
    one.load()
    return one


async def test_shared_layers_are_attached_once(vm: Vm, tmp_path: Path) -> None:
    one = made(vm, tmp_path)
    await one.attach(layers(1, 2), "a")
    await one.attach(layers(2, 3, 3), "b")
    assert sorted(vm.luns.values()) == [0, 1, 2]
    await one.release("a", detach=True)
    assert set(vm.luns) == {layer(2), layer(3)}
    await one.release("b", detach=True)
    assert vm.luns == {}


@pytest.mark.parametrize("what", ["disk", "record", "numbers"])
async def test_what_failed_to_attach_is_attached_the_next_time(
    vm: Vm, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = made(vm, tmp_path)
    await one.attach(layers(1), "a")
    with monkeypatch.context() as patch:
        if what == "disk":
            vm.failing = {layer(3)}
        elif what == "numbers":
            patch.setattr(disks, "MAX_LUNS", 2)
        else:

            def full(*_: object) -> None:
                raise ResourceExhausted("no room")

            patch.setattr(disks, "write_atomic", full)
        with pytest.raises(HyperpodError):
            await one.attach(layers(2, 3), "b")
        assert one.unused_after("b") == []
    vm.failing = set()
    await one.attach(layers(2, 3), "c")
    assert set(vm.luns) == {layer(1), layer(2), layer(3)}
    await one.release("c", detach=True)
    await one.release("a", detach=True)
    assert vm.luns == {}


@pytest.mark.parametrize("restarted", [False, True])
async def test_what_does_not_come_off_keeps_its_number(vm: Vm, tmp_path: Path, restarted: bool) -> None:
    one = made(vm, tmp_path)
    await one.attach(layers(1, 2), "a")
    vm.failing = {layer(1)}
    await one.release("a", detach=True)
    vm.failing = set()
    assert vm.luns == {layer(1): 0}
    if restarted:
        one = made(vm, tmp_path)
    await one.attach(layers(3), "b")
    await one.attach(layers(1), "c")
    assert vm.luns == {layer(1): 0, layer(3): 1}
    await one.release("c", detach=True)
    assert vm.luns == {layer(3): 1}


async def test_a_layer_that_its_agent_still_has_stays(vm: Vm, tmp_path: Path) -> None:
    one = made(vm, tmp_path)
    await one.attach(layers(1), "a")
    await one.release("a", detach=False)
    await one.attach(layers(2), "b")
    await one.attach(layers(1), "c")
    assert vm.luns == {layer(1): 0, layer(2): 1}


@pytest.mark.parametrize("next_one", [False, True])
async def test_a_container_that_was_recorded_and_got_no_further(
    vm: Vm, tmp_path: Path, next_one: bool
) -> None:
    """The daemon was killed before it wrote which layers it attaches."""
    one = made(vm, tmp_path)
    one.adopt(tuple(x.name for x in layers(1, 2)), "a")
    if next_one:
        await one.attach(layers(1), "b")
        assert set(vm.luns) == {layer(1)}
    await one.release("a", detach=True)
    assert set(vm.luns) == ({layer(1)} if next_one else set())
    await one.release("b", detach=True)
    assert vm.luns == {}


def test_a_damaged_file_is_an_error_of_this_pod(vm: Vm, tmp_path: Path) -> None:
    (tmp_path / "disks.json").write_text("{nonsense")
    with pytest.raises(HyperpodError, match=r"disks\.json is damaged"):
        made(vm, tmp_path)
