"""Images of several layers as volumes, of a host agent: it can be given any files as layers."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hyperpod.agentclient.types import ImageVolume, Layer
from hyperpod.spec.imagevolumes import oci_mount
from hyperpod.spec.oci import ContainerSpecInput
from tests.agentkit import AgentKit, AgentPlace, agent_folder, agent_pid, host_agent


def squashfs(folder: Path, name: str, **files: str) -> Layer:
    root = folder / name
    root.mkdir()
    for path, text in files.items():
        (root / path).write_text(text)
    return squashed(folder, name)


def squashed(folder: Path, name: str) -> Layer:
    image = folder / f"{name}.sqfs"
    subprocess.run(["mksquashfs", folder / name, image, "-quiet", "-no-progress", "-all-root"], check=True)
    return Layer(serial=name, path=str(image), fstype="squashfs")


@pytest.fixture
def three(tmp_path: Path) -> Iterator[tuple[Layer, ...]]:
    """The second hides a file of the first, the third replaces one; a name is not UTF-8."""
    folder = tmp_path / "layers"
    folder.mkdir()
    first = squashfs(folder, "first", a="first", b="first", c="first")
    (folder / "second").mkdir()
    subprocess.run(["mknod", folder / "second" / "a", "c", "0", "0"], check=True)
    strange = bytes(folder / "second") + b"/\xff\xfe"
    Path(strange.decode(errors="surrogateescape")).mkdir()
    Path((strange + b"/deep").decode(errors="surrogateescape")).mkdir()
    (folder / "second" / "link").symlink_to((b"\xff\xfe").decode(errors="surrogateescape"))
    yield first, squashed(folder, "second"), squashfs(folder, "third", b="third")


def mounts_of(place: AgentPlace, state: Path) -> list[str]:
    """Mount points of the agent in its own folder."""
    lines = Path(f"/proc/{agent_pid(place)}/mounts").read_text().splitlines()
    return [line.split()[1] for line in lines if line.split()[1].startswith(str(agent_folder(state)))]


async def test_layers_lie_over_each_other(
    busybox_layer: Path, tmp_path: Path, three: tuple[Layer, ...]
) -> None:
    state = tmp_path / "agent"
    state.mkdir()
    async with host_agent(state, busybox_layer) as place:
        kit = await AgentKit.claim(place)
        volumes = [
            ImageVolume("/all", three),
            ImageVolume("/one", three[1:2]),
            ImageVolume("/strange", three, "link/deep/.."),
        ]
        spec = ContainerSpecInput(
            args=("sh", "-c", "ls /all | wc -l; cat /all/b /all/c; echo; ls /all/a /one/a; ls /strange"),
            mounts=tuple(oci_mount(volume.destination) for volume in volumes),
            env=(b"PATH=/bin",),
        )
        before = mounts_of(place, state)
        ident = await kit.create(spec=spec, image_volumes=volumes)
        assert len(mounts_of(place, state)) == len(before) + 1 + 3 + 1 + 3 + 1
        await kit.client.start_container(ident)
        async with kit.output(ident) as stream:
            lines = (await stream.read_all()).decode().splitlines()
        assert lines == ["4", "thirdfirst", "deep"]
        await kit.client.remove_container(ident)
        await kit.client.forget_layers([layer.serial for layer in (*place.layers, *three)])
        assert mounts_of(place, state) == before
        await kit.client.close()
