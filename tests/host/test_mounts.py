"""Mounts of host pods: plain binds, with every propagation, and recursive read-only."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from hyperpod.api.gen.hyperpod.admin.v1 import LoadRequest
from hyperpod.api.gen.runtime import v1 as cri
from images import busybox
from tests import imagekit, usernskit
from tests.daemonkit import BUSYBOX, Cri
from tests.host.test_lifecycle import until_logged

PRIVATE = cri.MountPropagation.PROPAGATION_PRIVATE
SLAVE = cri.MountPropagation.PROPAGATION_HOST_TO_CONTAINER
SHARED = cri.MountPropagation.PROPAGATION_BIDIRECTIONAL


def mount(*args: str | Path) -> None:
    subprocess.run(["mount", *args], check=True)


def mounted(path: Path) -> bool:
    return any(line.split()[1] == str(path) for line in Path("/proc/mounts").read_text().splitlines())


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A folder of the host that is a shared mount; all that is mounted below it goes afterwards."""
    folder = tmp_path / "shared"
    folder.mkdir()
    mount("--bind", folder, folder)
    mount("--make-private", folder)
    mount("--make-shared", folder)
    yield folder
    subprocess.run(["umount", "-R", folder], check=True)


def volume(source: Path, **more: object) -> cri.Mount:
    return cri.Mount(container_path="/v", host_path=str(source), **more)  # type: ignore[arg-type]


async def privileged_pod(client: Cri) -> str:
    security = cri.LinuxSandboxSecurityContext(privileged=True)
    return await client.run_pod(client.pod_config(security_context=security))


PRIVILEGED = cri.LinuxContainerConfig(security_context=cri.LinuxContainerSecurityContext(privileged=True))


async def test_mounts_of_a_container_reach_the_host_and_back(cri_client: Cri, shared: Path) -> None:
    pod = await privileged_pod(cri_client)
    container = await cri_client.sh(
        pod, "sleep 600", mounts=[volume(shared, propagation=SHARED)], linux=PRIVILEGED
    )
    for name in ("inner", "outer"):
        (shared / name).mkdir()
    done = await cri_client.exec(container, "mount", "-t", "tmpfs", "inside", "/v/inner")
    assert done.exit_code == 0, done.stderr
    assert mounted(shared / "inner")
    mount("-t", "tmpfs", "outside", shared / "outer")
    seen = await cri_client.exec(container, "cat", "/proc/mounts")
    assert b"outside /v/outer tmpfs" in seen.stdout
    await cri_client.exec(container, "umount", "/v/inner")
    assert not mounted(shared / "inner")
    await cri_client.remove_pod(pod)
    assert mounted(shared / "outer"), "the end of a pod unmounts nothing of the host"


@pytest.mark.parametrize(("propagation", "arrives"), [(SLAVE, True), (PRIVATE, False)])
async def test_mounts_of_the_host_reach_a_container(
    cri_client: Cri, shared: Path, propagation: cri.MountPropagation, arrives: bool
) -> None:
    pod = await privileged_pod(cri_client)
    container = await cri_client.sh(
        pod, "sleep 600", mounts=[volume(shared, propagation=propagation)], linux=PRIVILEGED
    )
    for name in ("inner", "outer"):
        (shared / name).mkdir()
    mount("-t", "tmpfs", "outside", shared / "outer")
    seen = await cri_client.exec(container, "cat", "/proc/mounts")
    assert (b"outside /v/outer" in seen.stdout) == arrives
    done = await cri_client.exec(container, "mount", "-t", "tmpfs", "inside", "/v/inner")
    assert done.exit_code == 0, done.stderr
    assert not mounted(shared / "inner")


@pytest.mark.parametrize("privileged", [True, False])
async def test_the_runtimes_own_mounts_stay_in_the_container(
    cri_client: Cri, shared: Path, privileged: bool
) -> None:
    """Below a mount that propagates they would be the host's as well, and stay."""
    pod = await privileged_pod(cri_client)
    at = {"host_path": str(shared), "propagation": SHARED}
    linux = PRIVILEGED if privileged else None
    etc = [cri.Mount(container_path="/etc", **at)]  # type: ignore[arg-type]
    container = await cri_client.sh(
        pod, "exec 2>&1; cat /etc/hosts; echo end; sleep 600", mounts=etc, linux=linux
    )
    assert (await until_logged(cri_client, container, 2))[-1] == "end"
    assert [line for line in Path("/proc/mounts").read_text().splitlines() if f"{shared}/" in line] == []
    assert list(shared.iterdir()) == [], "nor are there mount points"


@pytest.mark.parametrize(
    ("path", "more", "words"),
    [
        ("/proc", {}, "/proc/acpi there is to be masked or read-only"),
        ("/dev", {"tty": True, "linux": PRIVILEGED}, r"the terminal \(config.tty\) would take the place"),
    ],
)
async def test_what_would_cover_the_hosts_files_is_refused(
    cri_client: Cri, path: str, more: dict[str, Any], words: str
) -> None:
    pod = await privileged_pod(cri_client)
    source = [cri.Mount(container_path=path, host_path=path, propagation=SHARED)]
    with pytest.raises(GRPCError, match=words) as info:
        await cri_client.create(pod, "true", mounts=source, **more)
    assert info.value.status is Status.INVALID_ARGUMENT


async def test_a_private_source_cannot_propagate(cri_client: Cri, pod: str, tmp_path: Path) -> None:
    mount("--bind", tmp_path, tmp_path)
    mount("--make-private", tmp_path)
    try:
        for propagation, word in ((SHARED, "BIDIRECTIONAL"), (SLAVE, "HOST_TO_CONTAINER")):
            with pytest.raises(GRPCError) as info:
                await cri_client.create(pod, "true", mounts=[volume(tmp_path, propagation=propagation)])
            assert info.value.status is Status.FAILED_PRECONDITION
            assert word in str(info.value.message)
            assert "make-rshared" in str(info.value.message)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("recursive", [False, True])
async def test_read_only_and_recursively(cri_client: Cri, pod: str, shared: Path, recursive: bool) -> None:
    (shared / "below").mkdir()
    mount("-t", "tmpfs", "below", shared / "below")
    container = await cri_client.sh(
        pod, "sleep 600", mounts=[volume(shared, readonly=True, recursive_read_only=recursive)]
    )
    top = await cri_client.exec(container, "touch", "/v/file")
    below = await cri_client.exec(container, "touch", "/v/below/file")
    assert (top.exit_code, below.exit_code != 0) == (1, recursive)
    (shared / "below/more").write_text("x")
    assert (await cri_client.exec(container, "cat", "/v/below/more")).stdout == b"x"


async def test_files_and_what_leads_to_them(cri_client: Cri, pod: str, tmp_path: Path) -> None:
    """A symbolic link as a source is followed once, when the container is made."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real/file").write_text("here\n")
    (tmp_path / "link").symlink_to("real")
    container = await cri_client.sh(
        pod,
        "sleep 600",
        mounts=[
            volume(tmp_path / "link"),
            cri.Mount(container_path="/etc/one", host_path=str(tmp_path / "real/file"), readonly=True),
        ],
    )
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to("/etc")
    assert (await cri_client.exec(container, "cat", "/v/file", "/etc/one")).stdout == b"here\nhere\n"
    assert (await cri_client.exec(container, "sh", "-c", "echo x > /etc/one")).exit_code == 1
    await cri_client.exec(container, "sh", "-c", "echo written > /v/new")
    assert (tmp_path / "real/new").read_text() == "written\n"


async def test_sockets_and_devices_of_the_host_work(cri_client: Cri, tmp_path: Path) -> None:
    pod = await privileged_pod(cri_client)
    container = await cri_client.sh(
        pod,
        "sleep 600",
        mounts=[cri.Mount(container_path="/host-null", host_path="/dev/null")],
        linux=PRIVILEGED,
    )
    done = await cri_client.exec(container, "sh", "-c", "echo x > /host-null && test -c /host-null")
    assert done.exit_code == 0, done.stderr


async def test_a_missing_source_is_an_error(cri_client: Cri, pod: str, tmp_path: Path) -> None:
    with pytest.raises(GRPCError) as info:
        await cri_client.create(pod, "true", mounts=[volume(tmp_path / "absent")])
    assert info.value.status is Status.NOT_FOUND
    assert "absent" in str(info.value.message)


async def test_an_image_as_a_volume(cri_client: Cri, pod: str) -> None:
    image = cri.Mount(
        container_path="/image", image=cri.ImageSpec(image=BUSYBOX), readonly=True, image_sub_path="bin"
    )
    container = await cri_client.sh(pod, "sleep 600", mounts=[image])
    assert (await cri_client.exec(container, "/image/busybox", "echo", "from it")).stdout == b"from it\n"
    assert (await cri_client.exec(container, "touch", "/image/x")).exit_code == 1


async def test_a_folder_that_a_layer_does_not_mention_stays_as_it_is(
    cri_client: Cri, pod: str, tmp_path: Path
) -> None:
    home = imagekit.folder("me", 0o2750, uid=1000, gid=100)
    built = imagekit.image(
        busybox.layer(Path("/bin/busybox").read_bytes()),
        imagekit.tar(imagekit.folder("tmp", 0o1777), home),
        imagekit.tar(imagekit.Item("tmp/x"), imagekit.Item("me/y")),
    )
    path = imagekit.write_layout(tmp_path / "layout", built, "docker.io/library/implied:latest")
    await cri_client.admin.load(LoadRequest(path=str(path)))
    container = await cri_client.sh(
        pod, "stat -c '%a %u %g' /tmp /me; ls /tmp /me", image=cri.ImageSpec(image="implied")
    )
    status = await cri_client.wait(container)
    assert status.image is not None and status.image.image == "docker.io/library/implied:latest"
    assert status.image_ref == f"docker.io/library/implied@{built.digest}"
    lines = [text for _, _, text in await cri_client.log(container)]
    assert lines == ["1777 0 0", "2750 1000 100", "/me:", "y", "", "/tmp:", "x"]


@pytest.mark.parametrize("with_users", [False, True])
async def test_volumes_of_the_image_are_writable_below_a_read_only_root(
    cri_client: Cri, tmp_path: Path, with_users: bool
) -> None:
    layer = imagekit.tar(
        imagekit.folder("data", 0o750, uid=7),
        imagekit.Item("data/file", b"of the image"),
        imagekit.folder("real"),
        imagekit.symlink("link", "../../../real"),
        imagekit.Item("text", b"no folder"),
    )
    names = ("/data", "/data/", "/new/one", "/link", "/text", "/mine", "/", "/proc", "../..", "relative")
    built = imagekit.image(
        busybox.layer(Path("/bin/busybox").read_bytes()),
        layer,
        config={"Volumes": {name: {} for name in names}},
    )
    path = imagekit.write_layout(tmp_path / "layout", built, "docker.io/library/volumes:latest")
    await cri_client.admin.load(LoadRequest(path=str(path)))
    (tmp_path / "mine").mkdir(mode=0o777)
    (tmp_path / "mine").chmod(0o777)
    pod = await usernskit.run_pod(cri_client) if with_users else await cri_client.run_pod()
    context = cri.LinuxContainerSecurityContext(readonly_rootfs=True)
    script = (
        "exec 2>&1; cat /data/file; echo; stat -c '%a %u' /data;"
        "for d in /data /new/one /link /mine /relative / /real/below /text; do"
        "  (echo x > $d/made) 2>/dev/null && echo $d; done; ls /real; cat /text; echo; sleep 600"
    )
    container = await cri_client.sh(
        pod,
        script,
        image=cri.ImageSpec(image="docker.io/library/volumes:latest"),
        mounts=[cri.Mount(container_path="/mine", host_path=str(tmp_path / "mine"))],
        linux=usernskit.context(readonly_rootfs=True)
        if with_users
        else cri.LinuxContainerConfig(security_context=context),
    )
    assert await until_logged(cri_client, container, 9) == [
        *("of the image", "750 7", "/data", "/new/one", "/link", "/mine", "/relative", "made", "no folder"),
    ]
    assert (tmp_path / "mine/made").read_text() == "x\n"
    stats = await cri_client.runtime.container_stats(cri.ContainerStatsRequest(container_id=container))
    assert stats.stats is not None and stats.stats.writable_layer is not None
