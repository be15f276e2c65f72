"""Images as volumes of a real pod: their layers are disks of its VM, which come and go with the containers."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from grpclib.const import Status

from hyperpod.api.gen.hyperpod.admin.v1 import LoadRequest
from hyperpod.api.gen.runtime import v1 as cri
from images import busybox
from tests import imagekit
from tests.daemonkit import BUSYBOX, PATIENCE, Cri, Daemon, daemon
from tests.vm.test_bad_input import refused
from tests.vm.test_mounts import shell

pytestmark = pytest.mark.vm

TOOLS = "docker.io/example/tools:1"


@pytest.fixture(scope="module")
def own_daemon() -> Iterator[Daemon]:
    with daemon() as one:
        yield one
        assert one.leftovers() == []


@pytest.fixture(scope="module")
def pod_id(own_daemon: Daemon) -> Iterator[str]:
    async def make() -> str:
        async with own_daemon.client() as client:
            await client.load_busybox()
            return await client.run_pod()

    async def remove(pod: str) -> None:
        async with own_daemon.client() as client:
            await client.remove_pod(pod)

    pod = asyncio.run(make())
    yield pod
    asyncio.run(remove(pod))


@pytest.fixture
async def client(own_daemon: Daemon, pod_id: str) -> AsyncIterator[Cri]:
    """Of the module's one pod; afterwards no layer is a disk of it."""
    async with own_daemon.client() as one:
        await load_tools(one)
        yield one
        for item in (await one.runtime.list_containers(cri.ListContainersRequest())).containers:
            await one.runtime.remove_container(cri.RemoveContainerRequest(container_id=item.id))
    assert disks(own_daemon, pod_id) == {}


async def load_tools(client: Cri) -> str:
    """An image of two layers; gives its id."""
    below = imagekit.tar(
        imagekit.folder("lib"),
        imagekit.Item("lib/old", b"old"),
        imagekit.Item("lib/both", b"below"),
        imagekit.Item("suid", b"x", mode=0o4755),
        imagekit.symlink("up", "../../../../lib"),
        imagekit.symlink("escape", "../../../../run/hyperpod"),
    )
    above = imagekit.tar(
        imagekit.folder("lib"),
        imagekit.Item("lib/.wh.old"),
        imagekit.Item("lib/both", b"above"),
        imagekit.Item("lib/run", b"#!/bin/sh\necho ran\n", mode=0o755),
    )
    built = imagekit.image(below, above)
    folder = client.daemon.base / "tools"
    if not folder.exists():
        imagekit.write_layout(folder, built, TOOLS)
    await client.admin.load(LoadRequest(path=str(folder)))
    return built.config_digest


def disks(one: Daemon, pod: str) -> dict[str, int]:
    """Layer to LUN, as the daemon has it on record."""
    file = one.state / "sandboxes" / pod / "disks.json"
    return dict(json.loads(file.read_text())) if file.exists() else {}


def layer_files(one: Daemon) -> set[str]:
    return {path.name for path in (one.state / "layers").iterdir() if path.is_file()}


def volume(path: str = "/v", sub_path: str = "", image: str = TOOLS, **more: object) -> cri.Mount:
    values = {"readonly": True, "image_sub_path": sub_path, "image": cri.ImageSpec(image=image), **more}
    return cri.Mount(container_path=path, **values)  # type: ignore[arg-type]


async def sleeper(client: Cri, pod: str, *mounts: cri.Mount, **more: object) -> str:
    return await client.run(pod, "/bin/sleep", "1000", mounts=list(mounts), **more)


async def test_an_image_is_there_and_stays_as_it_is(own_daemon: Daemon, client: Cri, pod_id: str) -> None:
    container = await sleeper(client, pod_id, volume())
    assert await shell(client, container, "cat /v/lib/both; ls /v/lib; /v/lib/run") == (
        0,
        "aboveboth\nrun\nran",
    )
    assert len(disks(own_daemon, pod_id)) == 3
    for script in ("touch /v/new", "rm /v/lib/both", "chmod 777 /v/lib", "echo x > /v/lib/run", "mkdir /v/d"):
        code, text = await shell(client, container, script)
        assert code != 0, script
        assert "Read-only file system" in text, script
    _, text = await shell(client, container, "grep ' /v ' /proc/mounts")
    assert {"ro", "nosuid", "nodev"} <= set(text.split()[3].split(","))


async def test_a_guest_that_owns_itself_cannot_change_it(
    own_daemon: Daemon, client: Cri, pod_id: str
) -> None:
    """Root on the guest's own mounts, and the disk itself: what it is made of is the host's, and read-only."""
    pod = await client.run_pod(
        client.pod_config(security_context=cri.LinuxSandboxSecurityContext(privileged=True))
    )
    context = cri.LinuxContainerSecurityContext(privileged=True)
    linux = cri.LinuxContainerConfig(security_context=context)
    before = {name: (own_daemon.state / "layers" / name).read_bytes() for name in layer_files(own_daemon)}
    container = await sleeper(client, pod, volume(), linux=linux)
    for script in (
        "mount -o remount,bind,rw /v && touch /v/new",
        "mount -o remount,rw /v && touch /v/new",
        "for disk in /dev/sd*; do echo x > $disk && exit 0; done; exit 1",
    ):
        code, text = await shell(client, container, script)
        assert code != 0, text
    await client.remove_pod(pod)
    assert before == {
        name: (own_daemon.state / "layers" / name).read_bytes() for name in layer_files(own_daemon)
    }


async def test_folders_of_it(client: Cri, pod_id: str) -> None:
    container = await sleeper(client, pod_id, volume("/a", "lib"), volume("/b", "up"), volume("/c"))
    code, text = await shell(client, container, "ls /a /b; cat /c/lib/both")
    assert (code, text) == (0, "/a:\nboth\nrun\n\n/b:\nboth\nrun\nabove")


async def test_what_cannot_be(client: Cri, pod_id: str) -> None:
    invalid, missing = Status.INVALID_ARGUMENT, Status.NOT_FOUND
    for mount, status, words in (
        (volume(readonly=False), invalid, ["config.mounts[0].readonly", "can only be read"]),
        (volume(host_path="/etc"), invalid, ["host_path and image are both set"]),
        (volume(sub_path="../x"), invalid, ["image_sub_path '../x'"]),
        (
            volume(image="example/none:2"),
            missing,
            ["ImageVolumeMountFailed: ", "'example/none:2'", "pull it"],
        ),
        (volume(sub_path="none"), missing, ["ImageVolumeMountFailed: ", "'/v'", "'none' is not there"]),
        (volume(sub_path="escape"), missing, ["'escape' is not there"]),
        (volume(sub_path="lib/both"), invalid, ["'lib/both' is not one"]),
    ):
        await refused(client.create(pod_id, "/bin/true", mounts=[mount]), status, *words)
    assert (await client.runtime.list_containers(cri.ListContainersRequest())).containers == []


async def test_the_status_tells_which_image(client: Cri, pod_id: str) -> None:
    ident = await load_tools(client)
    asked = volume("/v/", "lib", image="example/tools:1")
    container = await client.create(pod_id, "/bin/true", mounts=[asked])
    reply = await client.runtime.container_status(
        cri.ContainerStatusRequest(container_id=container, verbose=True)
    )
    assert reply.status is not None
    told = cri.ImageSpec(image="example/tools:1", image_ref=ident)
    assert reply.status.mounts == [dataclasses.replace(asked, image=told)]
    explained = json.loads(reply.info["mounts"])["/v"]
    assert explained == f"read-only layers of 'lib' in image {ident}: read-only, private"


async def test_beside_folders_of_the_host_and_without_any(client: Cri, pod_id: str, tmp_path: Path) -> None:
    """One image twice, the container's own, and a folder of the host with a volume in it."""
    (tmp_path / "lib").mkdir()
    container = await sleeper(
        client,
        pod_id,
        volume("/host/lib", "lib"),
        cri.Mount(container_path="/host", host_path=str(tmp_path)),
        volume("/own", image=BUSYBOX),
        volume("/again"),
    )
    assert (await shell(client, container, "/own/bin/busybox cat /host/lib/both /again/lib/both"))[
        1
    ] == "aboveabove"
    assert (await shell(client, container, "touch /host/new"))[0] == 0
    assert (tmp_path / "new").exists()


async def test_an_image_in_use_may_be_removed_and_is_kept(
    own_daemon: Daemon, client: Cri, pod_id: str
) -> None:
    """Until its last container is gone, over a restart of the daemon as well."""
    before = layer_files(own_daemon)
    container = await sleeper(client, pod_id, volume())
    await client.images.remove_image(cri.RemoveImageRequest(image=cri.ImageSpec(image=TOOLS)))
    await refused(client.create(pod_id, "/bin/true", mounts=[volume()]), Status.NOT_FOUND, "is not here")
    assert await shell(client, container, "cat /v/lib/both") == (0, "above")
    own_daemon.kill_daemon()
    async with own_daemon.client() as again:
        await again.stop(container)
        status = await again.status(container)
        assert status.mounts[0].image is not None and status.mounts[0].image.image == TOOLS
        assert layer_files(own_daemon) == before
        # Others of the same layers come and go: it keeps its own.
        await load_tools(again)
        other = await sleeper(again, pod_id, volume())
        await again.runtime.remove_container(cri.RemoveContainerRequest(container_id=other))
        assert len(disks(own_daemon, pod_id)) == 3
        await again.images.remove_image(cri.RemoveImageRequest(image=cri.ImageSpec(image=TOOLS)))
        await again.runtime.remove_container(cri.RemoveContainerRequest(container_id=container))
        assert disks(own_daemon, pod_id) == {}
        async with asyncio.timeout(PATIENCE):
            while len(layer_files(own_daemon)) != len(before) - 2:
                await asyncio.sleep(0.1)


@pytest.mark.parametrize("readonly", [False, True], ids=["writable root", "read-only root"])
async def test_volumes_of_the_own_image_are_there_and_writable(
    client: Cri, pod_id: str, readonly: bool
) -> None:
    """Those that it has no folder for, too; what no folder can be made for is in nobody's way."""
    layer = imagekit.tar(
        imagekit.folder("data"),
        imagekit.Item("data/file", b"of the image\n"),
        imagekit.symlink("link", "/nowhere"),
        imagekit.symlink("good", "/data"),
    )
    volumes: dict[str, dict[str, str]] = {
        path: {} for path in ("/data", "/new/deep", "/data/file/x", "/link/x", "/good/in")
    }
    built = imagekit.image(
        busybox.layer(Path("/bin/busybox").read_bytes()), layer, config={"Volumes": volumes}
    )
    name = f"docker.io/example/volumes:{'ro' if readonly else 'rw'}"
    path = imagekit.write_layout(client.daemon.base / f"volumes-{readonly}", built, name)
    await client.admin.load(LoadRequest(path=str(path)))
    context = cri.LinuxContainerSecurityContext(readonly_rootfs=readonly)
    container = await client.sh(
        pod_id,
        "cat /data/file; for d in /data /new/deep /data/in /; do (echo x > $d/made) 2>/dev/null && echo $d; done",
        image=cri.ImageSpec(image=name),
        linux=cri.LinuxContainerConfig(security_context=context),
    )
    await client.wait(container)
    folders = ["/data", "/new/deep", "/data/in", *(() if readonly else ("/",))]
    assert [text for _, _, text in await client.log(container)] == ["of the image", *folders]
