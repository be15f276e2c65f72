"""The CRI services behind the real server, with a real image store; what needs no VM."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from grpclib.client import Channel
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from hyperpod.api.gen.hyperpod.admin.v1 import AdminStub, LoadRequest
from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.config import Config, NetworkConfig, VmConfig
from hyperpod.cri.admin_service import AdminService
from hyperpod.cri.image_service import ImageService
from hyperpod.cri.ports import Ports
from hyperpod.cri.runtime_service import RuntimeService
from hyperpod.rpc.server import RpcServer
from hyperpod.sandbox.network import PodNetworks
from hyperpod.sandbox.userns import UserNamespaces
from tests import imagekit as kit
from tests.component.imagestore import opened, passable_folder

WINDOWS = cri.WindowsPodSandboxConfig()
NOWHERE = cast(Any, None)
"""In place of the managers that need VMs: no call of these tests may reach them."""


class Client:
    """Stubs of the three services, and a folder with an OCI layout of `box:1`."""

    def __init__(self, channel: Channel, layout: Path) -> None:
        self.runtime = cri.RuntimeServiceStub(channel)
        self.images = cri.ImageServiceStub(channel)
        self.admin = AdminStub(channel)
        self.layout = layout

    async def status(self, name: str, verbose: bool = False) -> cri.ImageStatusResponse:
        return await self.images.image_status(
            cri.ImageStatusRequest(image=cri.ImageSpec(image=name), verbose=verbose)
        )


@asynccontextmanager
async def refused(status: Status, text: str) -> AsyncIterator[None]:
    with pytest.raises(GRPCError) as info:
        yield
    assert info.value.status is status
    assert text in str(info.value.message)


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    with passable_folder() as base:
        layout = kit.write_layout(base / "layout", kit.image(kit.tar(kit.Item("one", b"1" * 5000))), "box:1")
        config = Config(state_dir=base / "s", run_dir=base / "r", cgroup_driver="systemd")
        async with opened(base / "s") as store:
            networks = PodNetworks(
                NetworkConfig(conf_dir=base / "net.d"), config.run_dir, lambda ident: base / ident
            )
            ports = Ports(
                sandboxes=NOWHERE,
                containers=NOWHERE,
                execs=NOWHERE,
                streams=NOWHERE,
                images=store,
                networks=networks,
                stats=NOWHERE,
                userns=UserNamespaces(VmConfig(kernel=base / "none")),
            )
            services = [
                RuntimeService(ports, config, NOWHERE),
                ImageService(ports, config),
                AdminService(ports),
            ]
            server = RpcServer(services)
            await server.listen(config.socket_path)
            channel = Channel(path=str(config.socket_path))
            try:
                yield Client(channel, layout)
            finally:
                channel.close()
                await server.close(5.0)


async def test_the_life_of_an_image(client: Client) -> None:
    assert (await client.status("box:1")).image is None
    loaded = (await client.admin.load(LoadRequest(path=str(client.layout)))).images
    assert [list(image.tags) for image in loaded] == [["docker.io/library/box:1"]]
    ident = loaded[0].id
    for name in ("box:1", "docker.io/library/box:1", ident, ident.removeprefix("sha256:"), ident[7:20]):
        image = (await client.status(name)).image
        assert image is not None and image.id == ident and image.size > 0, name
    info = (await client.status(ident, verbose=True)).info
    assert len(json.loads(info["layers"])) == 1
    assert "env" in json.loads(info["config"])
    spec = cri.ImageSpec(image="box:1")
    everything = (await client.images.list_images(cri.ListImagesRequest())).images
    one = (await client.images.list_images(cri.ListImagesRequest(cri.ImageFilter(image=spec)))).images
    none = cri.ListImagesRequest(cri.ImageFilter(image=cri.ImageSpec(image="other:1")))
    assert [image.id for image in everything] == [image.id for image in one] == [ident]
    assert (await client.images.list_images(none)).images == []
    streamed = [page async for page in client.images.stream_images(cri.StreamImagesRequest())]
    assert [image.id for page in streamed for image in page.images] == [ident]
    await client.images.remove_image(cri.RemoveImageRequest(image=spec))
    assert (await client.status(ident)).image is None
    await client.images.remove_image(cri.RemoveImageRequest(image=spec))


async def test_both_file_systems_are_told(client: Client) -> None:
    before = await client.images.image_fs_info(cri.ImageFsInfoRequest())
    await client.admin.load(LoadRequest(path=str(client.layout)))
    after = await client.images.image_fs_info(cri.ImageFsInfoRequest())
    [old], [new], [scratch] = before.image_filesystems, after.image_filesystems, after.container_filesystems
    assert old.used_bytes is not None and new.used_bytes is not None and new.inodes_used is not None
    assert new.used_bytes.value > old.used_bytes.value
    assert new.inodes_used.value > 1
    assert new.fs_id is not None and Path(new.fs_id.mountpoint).is_dir()
    assert scratch.fs_id == new.fs_id, "one disk, one name"
    assert scratch.used_bytes is not None and scratch.used_bytes.value == 0


async def test_image_requests_that_cannot_work(client: Client) -> None:
    async with refused(Status.INVALID_ARGUMENT, "image.image is missing"):
        await client.images.pull_image(cri.PullImageRequest())
    foreign = cri.ImageSpec(image="box:1", runtime_handler="runc")
    async with refused(Status.INVALID_ARGUMENT, "image.runtime_handler is 'runc'"):
        await client.images.pull_image(cri.PullImageRequest(image=foreign))
    async with refused(Status.INVALID_ARGUMENT, "is not an absolute path"):
        await client.admin.load(LoadRequest(path="layout"))


async def test_who_we_are(client: Client) -> None:
    version = await client.runtime.version(cri.VersionRequest())
    assert (version.runtime_name, version.runtime_api_version) == ("hyperpod", "v1")
    assert version.runtime_version
    reply = await client.runtime.status(cri.StatusRequest())
    assert reply.status is not None
    assert {(c.type, c.status) for c in reply.status.conditions} == {
        ("RuntimeReady", True),
        ("NetworkReady", False),
    }
    [network] = [c for c in reply.status.conditions if c.type == "NetworkReady"]
    assert network.reason == "NetworkPluginNotReady"
    assert "no CNI network" in network.message and "/net.d" in network.message
    assert [handler.name for handler in reply.runtime_handlers] == ["", "vm", "host"]
    can = {
        handler.name: handler.features and handler.features.user_namespaces
        for handler in reply.runtime_handlers
    }
    assert can == {"": False, "vm": False, "host": True}, "there is no guest kernel here"
    driver = (await client.runtime.runtime_config(cri.RuntimeConfigRequest())).linux
    assert driver is not None and driver.cgroup_driver == cri.CgroupDriver.SYSTEMD
    await client.runtime.update_runtime_config(cri.UpdateRuntimeConfigRequest())


async def test_refusals_come_before_any_work(client: Client) -> None:
    async with refused(Status.INVALID_ARGUMENT, "config is missing"):
        await client.runtime.run_pod_sandbox(cri.RunPodSandboxRequest())
    mounts = cri.ContainerConfig(mounts=[cri.Mount(container_path="/x", mount_options=["noexec"])])
    async with refused(Status.UNIMPLEMENTED, "config.mounts[0].mount_options is set"):
        await client.runtime.create_container(cri.CreateContainerRequest(config=mounts))
    async with refused(Status.INVALID_ARGUMENT, "timeout is -5"):
        await client.runtime.stop_container(cri.StopContainerRequest(container_id="a", timeout=-5))
    async with refused(Status.UNIMPLEMENTED, "CheckpointContainer is not built yet"):
        await client.runtime.checkpoint_container(cri.CheckpointContainerRequest())
    async with refused(Status.UNIMPLEMENTED, "GetContainerEvents is not built yet"):
        _ = [event async for event in client.runtime.get_container_events(cri.GetEventsRequest())]


async def test_the_log_says_what_a_call_is_about_and_no_secret(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    pod = cri.PodSandboxConfig(
        metadata=cri.PodSandboxMetadata(name="web", uid="u", namespace="shop"), windows=WINDOWS
    )
    async with refused(Status.UNIMPLEMENTED, "config.windows is set"):
        await client.runtime.run_pod_sandbox(cri.RunPodSandboxRequest(config=pod))
    mount = cri.Mount(mount_options=["noexec"])
    mounts = cri.ContainerConfig(metadata=cri.ContainerMetadata(name="main"), mounts=[mount])
    async with refused(Status.UNIMPLEMENTED, "config.mounts[0].mount_options is set"):
        await client.runtime.create_container(cri.CreateContainerRequest(config=mounts))
    auth = cri.AuthConfig(username="u", password="p4ssw0rd", registry_token="t0ken")
    image = cri.ImageSpec(image="box:1", runtime_handler="runc")
    async with refused(Status.INVALID_ARGUMENT, "image.runtime_handler is 'runc'"):
        await client.images.pull_image(cri.PullImageRequest(image=image, auth=auth))
    ends = [r.message for r in caplog.records if r.name == "hyperpod.rpc" and " in " in r.message]
    named = [" ".join(line.split("#")[1].split()[1:3]) for line in ends]
    assert named == ["shop/web: UNIMPLEMENTED", "main: UNIMPLEMENTED", "box:1: INVALID_ARGUMENT"]
    assert "p4ssw0rd" not in caplog.text and "t0ken" not in caplog.text
