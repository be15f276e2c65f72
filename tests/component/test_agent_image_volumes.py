"""Images as volumes of real containers; nothing here depends on the transport."""

from __future__ import annotations

import json

import pytest

from hyperpod.agentclient.types import ImageVolume
from hyperpod.errors import FailedPrecondition, HyperpodError, InvalidArgument, NotFound
from hyperpod.spec.imagevolumes import oci_mount
from hyperpod.spec.oci import ContainerSpecInput
from tests.agentkit import APPLETS, AgentKit


async def created(agent: AgentKit, script: str, *volumes: tuple[str, str], readonly: bool = False) -> str:
    """With the image of the container as its volumes; each a destination and a path in the image."""
    wanted = [ImageVolume(where, agent.place.layers, path) for where, path in volumes]
    mounts = tuple(oci_mount(where) for where, _ in volumes)
    spec = ContainerSpecInput(
        args=("/bin/sh", "-c", script), mounts=mounts, readonly_rootfs=readonly, env=(b"PATH=/bin",)
    )
    return await agent.create(spec=spec, image_volumes=wanted)


async def printed(agent: AgentKit, script: str, *volumes: tuple[str, str]) -> list[str]:
    """What a shell says to both outputs; it must end with 0."""
    ident = await created(agent, f"exec 2>&1; {script}", *volumes)
    await agent.client.start_container(ident)
    async with agent.output(ident) as stream:
        out = (await stream.read_all()).decode()
    assert (await agent.exit_of(ident)).exit_code == 0, out
    return out.splitlines()


async def test_an_image_is_read_and_run_from_but_not_written(agent: AgentKit) -> None:
    script = "cat /v/etc/notes; /v/bin/echo run; touch /v/new; rm /v/etc/notes; mkdir /v/tmp/x; true"
    *good, touch, remove, make = await printed(agent, script, ("/v", ""))
    assert good == ["not a program", "run"]
    for refusal in (touch, remove, make):
        assert "Read-only file system" in refusal
    [line] = await printed(agent, "grep ' /v ' /proc/mounts", ("/v", ""))
    options = line.split()[3].split(",")
    assert {"ro", "nosuid", "nodev"} <= set(options)
    assert "noexec" not in options


async def test_a_root_in_the_container_cannot_make_it_writable(agent: AgentKit) -> None:
    spec = ContainerSpecInput(
        args=(
            "sh",
            "-c",
            "mount -o remount,bind,rw /v; touch /v/new 2>&1; mount -o remount,rw /v; touch /v/new",
        ),
        mounts=(oci_mount("/v"),),
        add_capabilities=("SYS_ADMIN",),
        env=(b"PATH=/bin",),
    )
    ident = await agent.create(spec=spec, image_volumes=[ImageVolume("/v", agent.place.layers)])
    await agent.client.start_container(ident)
    async with agent.output(ident) as stream:
        assert b"Read-only file system" in await stream.read_all()
    assert (await agent.exit_of(ident)).exit_code != 0


async def test_folders_of_an_image(agent: AgentKit) -> None:
    found = await printed(
        agent, "cat /a/notes; ls /b | wc -l; ls /c", ("/a", "etc"), ("/b", "./bin/"), ("/c", "tmp")
    )
    assert found == ["not a program", str(len(APPLETS) + 2)]


@pytest.mark.parametrize("link", ["up", "absolute"])
async def test_links_hold_within_the_image(agent: AgentKit, link: str) -> None:
    """Both lead to /bin of whatever they are taken to start from; the agent's has no busybox of this kind."""
    names = await printed(agent, "ls /v", ("/v", f"etc/{link}"))
    assert sorted(names) == sorted([*APPLETS, "busybox", "probe"])


@pytest.mark.parametrize(
    ("path", "kind", "words"),
    [
        ("nowhere", NotFound, "its folder 'nowhere' is not there"),
        ("etc/notes", InvalidArgument, "its folder 'etc/notes' is not one"),
        ("etc/notes/x", NotFound, "is not there"),
        ("etc/loop", FailedPrecondition, "Too many levels"),
        ("etc/proc", NotFound, "is not there"),
        ("x" * 300, FailedPrecondition, "File name too long"),
    ],
)
async def test_what_is_not_there_leaves_nothing(
    agent: AgentKit, path: str, kind: type[HyperpodError], words: str
) -> None:
    with pytest.raises(kind, match=words) as info:
        await created(agent, "true", ("/first", "etc"), ("/v", path))
    assert str(info.value).startswith("ImageVolumeMountFailed: the image at '/v'")
    assert await agent.client.list_containers() == []
    await agent.client.forget_layers([layer.serial for layer in agent.place.layers])


async def test_a_volume_without_a_mount_or_layers_is_refused(agent: AgentKit) -> None:
    for volume in (ImageVolume("/elsewhere", agent.place.layers), ImageVolume("/v", ())):
        spec = ContainerSpecInput(args=("true",), mounts=(oci_mount("/v"),))
        with pytest.raises(InvalidArgument, match="no layers, or no mount"):
            await agent.create(spec=spec, image_volumes=[volume])
    assert await agent.client.list_containers() == []


async def test_layers_of_volumes_are_in_use_until_the_container_is_removed(agent: AgentKit) -> None:
    serials = [layer.serial for layer in agent.place.layers]
    first = await created(agent, "sleep 1000", ("/v", "etc"))
    second = await created(agent, "sleep 1000", ("/v", ""))
    await agent.client.start_container(second)
    await agent.client.remove_container(first)
    with pytest.raises(FailedPrecondition, match="in use by 2"):
        await agent.client.forget_layers(serials)
    await agent.client.remove_container(second)
    await agent.client.forget_layers(serials)


async def test_an_exec_and_an_update_see_it_too(agent: AgentKit) -> None:
    ident = await created(agent, "sleep 1000", ("/v", "etc"))
    await agent.client.update_container(ident, json.dumps({"pids": {"limit": 50}}).encode())
    await agent.client.start_container(ident)
    exec_id = await agent.exec(ident, "cat", "/v/notes")
    async with agent.output(ident, exec_id) as out:
        assert await out.read_all() == b"not a program\n"


async def test_more_than_a_message_takes_is_refused_by_name(agent: AgentKit) -> None:
    many = [ImageVolume(f"/{n}", agent.place.layers * 100) for n in range(2000)]
    with pytest.raises(InvalidArgument, match="specification is .* bytes, too large"):
        await agent.create(spec=ContainerSpecInput(args=("true",)), image_volumes=many)


@pytest.mark.parametrize("readonly", [False, True])
async def test_volumes_of_the_own_image(agent: AgentKit, readonly: bool) -> None:
    """The kit's image has /etc/notes; a folder that it has stays as it is, one that it lacks is new."""
    spec = ContainerSpecInput(
        args=(
            "/bin/sh",
            "-c",
            "for d in /etc /new/deep /etc/notes/x; do echo x > $d/made && echo $d; done; cat /etc/notes",
        ),
        env=(b"PATH=/bin",),
        readonly_rootfs=readonly,
        declared_volumes=("/etc", "/new/deep", "/etc/notes/x"),
    )
    ident = await agent.create(spec=spec)
    await agent.client.start_container(ident)
    async with agent.output(ident) as stream:
        out = (await stream.read_all()).decode()
    assert out.splitlines() == ["/etc", "/new/deep", "not a program"]
