"""Folders and files of the host in a pod: the kubelet's kinds of volumes, and what must not work."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.processes import stat_fields
from tests.daemonkit import Cri, Daemon, daemon

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def own_daemon() -> Iterator[Daemon]:
    with daemon() as one:
        yield one


@pytest.fixture(scope="module")
def pod_id(own_daemon: Daemon) -> str:
    async def make() -> str:
        async with own_daemon.client() as client:
            await client.load_busybox()
            return await client.run_pod()

    return asyncio.run(make())


@pytest.fixture
async def client(own_daemon: Daemon, pod_id: str) -> AsyncIterator[Cri]:
    """Of the module's one pod; what a test mounts must be out of the share when its containers are removed."""
    async with own_daemon.client() as one:
        yield one
        for item in (await one.runtime.list_containers(cri.ListContainersRequest())).containers:
            await one.runtime.remove_container(cri.RemoveContainerRequest(container_id=item.id))
    assert list((own_daemon.run_dir / "m" / pod_id[:12] / "share").iterdir()) == []
    assert share_mounts(own_daemon, pod_id) == []


def virtiofsd(one: Daemon, pod: str) -> list[int]:
    """Its process and the confined child; numbers start anew at some point, so the lower one may be either."""
    share = str(one.run_dir / "m" / pod[:12] / "share").encode()
    parents = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and share in (entry / "cmdline").read_bytes():
                parents[int(entry.name)] = int(stat_fields(entry.name)[1])
    return sorted(parents, key=lambda pid: parents[pid] in parents)


def share_mounts(one: Daemon, pod: str) -> list[str]:
    """Mount points that the file server sees, without its root."""
    child = virtiofsd(one, pod)[-1]
    lines = Path(f"/proc/{child}/mountinfo").read_text().splitlines()
    return [line.split()[4] for line in lines if line.split()[4] != "/"]


def mount(source: Path | str, destination: str, **more: object) -> cri.Mount:
    return cri.Mount(host_path=str(source), container_path=destination, **more)  # type: ignore[arg-type]


async def output(client: Cri, container: str) -> str:
    await client.wait(container)
    return "\n".join(text for _, _, text in await client.log(container))


async def shell(client: Cri, container: str, script: str, timeout: int = 180) -> tuple[int, str]:
    reply = await client.exec(container, "/bin/sh", "-c", script, timeout=timeout)
    return reply.exit_code, (reply.stdout + reply.stderr).decode(errors="replace").strip()


async def sleeper(client: Cri, pod: str, *mounts: cri.Mount, **more: object) -> str:
    return await client.run(pod, "/bin/sleep", "1000", mounts=list(mounts), **more)


@contextlib.contextmanager
def mounted(target: Path, *how: str) -> Iterator[None]:
    target.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", *how, str(target)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-R", "-l", str(target)], check=True)


async def test_folders_and_files_both_ways(client: Cri, pod_id: str, tmp_path: Path) -> None:
    (tmp_path / "etc-hosts").write_text("127.0.0.1 localhost\n10.0.0.9 kubelet.example\n")
    (tmp_path / "termination-log").touch(mode=0o666)
    volume = tmp_path / "empty-dir"
    volume.mkdir()
    container = await client.sh(
        pod_id,
        "cat /etc/hosts; echo bye > /dev/termination-log; echo from guest > /data/out; "
        "mkdir /data/sub && echo deep > /data/sub/x; ls /var/run/there",
        mounts=[
            mount(tmp_path / "etc-hosts", "/etc/hosts"),
            mount(tmp_path / "termination-log", "/dev/termination-log"),
            mount(volume, "/data"),
            mount(volume, "/var/run/there"),
        ],
    )
    assert "10.0.0.9 kubelet.example" in await output(client, container)
    assert (await client.status(container)).exit_code == 0
    assert (tmp_path / "termination-log").read_text() == "bye\n"
    assert (volume / "out").read_text() == "from guest\n"
    assert (volume / "sub" / "x").read_text() == "deep\n"


async def test_the_status_echoes_and_explains(client: Cri, pod_id: str, tmp_path: Path) -> None:
    wanted = [mount(tmp_path, "/b/", readonly=True, recursive_read_only=True), mount("/etc/hostname", "/a")]
    container = await client.create(pod_id, "/bin/true", mounts=wanted)
    reply = await client.runtime.container_status(
        cri.ContainerStatusRequest(container_id=container, verbose=True)
    )
    assert reply.status is not None
    assert reply.status.mounts == wanted
    explained = json.loads(reply.info["mounts"])
    assert sorted(explained) == ["/a", "/b"]
    assert "read-only, enforced by the host, recursively" in explained["/b"]
    assert explained["/a"].startswith("virtio-fs bind of /etc/hostname: read-write")


async def test_an_atomic_swap_is_seen_at_once(client: Cri, pod_id: str, tmp_path: Path) -> None:
    """As the kubelet's AtomicWriter does it for configMap, secret and projected volumes."""

    def publish(value: str) -> None:
        folder = tmp_path / f"..{value}"
        folder.mkdir()
        (folder / "key").write_text(value)
        (tmp_path / "..data_tmp").symlink_to(folder.name)
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")

    publish("v0")
    (tmp_path / "key").symlink_to("..data/key")
    container = await sleeper(client, pod_id, mount(tmp_path, "/config", readonly=True))
    for number in range(1, 6):
        assert await shell(client, container, "cat /config/key") == (0, f"v{number - 1}")
        publish(f"v{number}")
    # Data of a file that stays the same one, too.
    (tmp_path / "..v5" / "key").write_text("changed in place")
    assert await shell(client, container, "cat /config/key") == (0, "changed in place")


async def test_read_only_is_the_hosts_to_enforce(client: Cri, pod_id: str, tmp_path: Path) -> None:
    """A guest that owns itself remounts what it likes; what it writes comes to the host all the same."""
    (tmp_path / "file").write_text("mine")
    admin = cri.LinuxContainerConfig(
        security_context=cri.LinuxContainerSecurityContext(
            capabilities=cri.Capability(add_capabilities=["SYS_ADMIN", "SYS_PTRACE"]),
            seccomp=cri.SecurityProfile(profile_type=cri.SecurityProfileProfileType.Unconfined),
        )
    )
    container = await sleeper(
        client, pod_id, mount(tmp_path, "/ro", readonly=True), mount(tmp_path, "/rw"), linux=admin
    )
    assert await shell(client, container, "echo x > /ro/file") != (0, "")
    code, text = await shell(client, container, "mount -o remount,bind,rw /ro && grep ' /ro ' /proc/mounts")
    assert code == 0, text
    assert " rw" in text
    for script in ("echo x > /ro/file", "touch /ro/new", "rm /ro/file", "chmod 777 /ro/file", "mkdir /ro/d"):
        code, text = await shell(client, container, script)
        assert code != 0, script
        assert "Read-only file system" in text, script
    assert (tmp_path / "file").read_text() == "mine"
    # The share itself, reached through the agent's root: only the mounts are in it, and nothing can be added.
    share = "/proc/1/root/run/hyperpod/share"
    for folder, names in ((share, {container[:12], "common"}), (f"{share}/{container[:12]}/", {"0", "1"})):
        code, text = await shell(client, container, f"ls {folder}")
        assert (code, set(text.split())) == (0, names)
    for path in ("evil", "common/evil", f"{container[:12]}/evil", f"{container[:12]}/0/evil"):
        code, text = await shell(client, container, f"mkdir {share}/{path}")
        assert code != 0
        assert "Read-only file system" in text, path
    assert (await shell(client, container, f"touch {share}/{container[:12]}/1/fine"))[0] == 0
    assert (tmp_path / "fine").exists()


async def test_device_nodes_do_not_reach_the_host(client: Cri, pod_id: str, tmp_path: Path) -> None:
    container = await sleeper(client, pod_id, mount(tmp_path, "/m"))
    code, text = await shell(client, container, "mknod /m/disk b 8 0")
    assert code != 0
    assert "not permitted" in text
    assert list(tmp_path.iterdir()) == []
    assert (await shell(client, container, "mkfifo /m/fifo && (echo through > /m/fifo & cat /m/fifo)")) == (
        0,
        "through",
    )


async def test_symbolic_links_stay_in_the_guest(client: Cri, pod_id: str, tmp_path: Path) -> None:
    """A link that the guest leaves on the share names the guest's files, not the host's."""
    (tmp_path / "secret").write_text("the host's")
    inner = tmp_path / "inner"
    inner.mkdir()
    container = await sleeper(client, pod_id, mount(inner, "/m"), mount("/etc/hostname", "/f"))
    await shell(client, container, "ln -s ../secret /m/a; ln -s /etc/hostname /m/b; ln -s .. /m/c")
    assert (await shell(client, container, "cat /m/a"))[0] != 0
    _code, text = await shell(client, container, "ls -a /m/c/ | grep -c secret")
    assert text == "0", text
    assert (inner / "a").readlink() == Path("../secret")


async def test_owners_modes_and_times(client: Cri, pod_id: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    os.chown(file, 12345, 23456)
    file.chmod(0o640)
    os.utime(file, (1_000_000_000, 1_000_000_000))
    container = await sleeper(client, pod_id, mount(tmp_path, "/m"))
    assert (await shell(client, container, "stat -c '%u %g %a %Y' /m/file"))[
        1
    ] == "12345 23456 640 1000000000"
    script = "echo y > /m/new; chown 7:8 /m/new; chmod 4711 /m/new; ln /m/new /m/hard; stat -c %h /m/hard"
    assert await shell(client, container, script) == (0, "2")
    found = (tmp_path / "new").stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o7777, found.st_nlink) == (7, 8, 0o4711, 2)


async def test_names_of_every_kind(client: Cri, pod_id: str, tmp_path: Path) -> None:
    names = [
        "with space",
        "comma,equals=",
        "näme-日本",
        "new\nline",
        'quo"te',
        "back\\slash",
        "percent%s",
        "-dash",
    ]
    for number, name in enumerate(names):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(str(number))
    container = await sleeper(client, pod_id, *(mount(tmp_path / n, f"/mnt/{n}") for n in names))
    for number, name in enumerate(names):
        reply = await client.exec(container, "cat", f"/mnt/{name}/{name}")
        assert reply.stdout == str(number).encode(), name
    assert (await client.exec(container, "sh", "-c", "ls /mnt/*/* | wc -l")).exit_code == 0


async def test_a_hundred_mounts(client: Cri, pod_id: str, tmp_path: Path) -> None:
    wanted = []
    for number in range(100):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "n").write_text(f"{number}\n")
        wanted.append(mount(folder, f"/many/{number}"))
    container = await sleeper(client, pod_id, *wanted)
    code, text = await shell(client, container, "cat $(seq -f /many/%g/n 0 99 2>/dev/null || ls /many/*/n)")
    assert code == 0
    assert sorted(map(int, text.split())) == list(range(100))


@pytest.mark.parametrize("readonly", [False, True], ids=["writable", "read-only"])
async def test_containers_of_a_pod_see_the_same_files(
    client: Cri, pod_id: str, tmp_path: Path, readonly: bool
) -> None:
    """Not only the same bytes: a FIFO joins them, so do sockets, and locks hold. The one that came first may go."""
    volume = tmp_path / "empty-dir"
    volume.mkdir()
    os.mkfifo(volume / "fifo")
    first = await sleeper(client, pod_id, mount(volume, "/x", readonly=readonly))
    reader = await client.sh(pod_id, "cat /r/fifo", mounts=[mount(volume, "/r", readonly=readonly)])
    await client.stop(first)
    await client.runtime.remove_container(cri.RemoveContainerRequest(container_id=first))
    # Blocks until somebody reads, and for ever when that is another FIFO.
    writer = await client.sh(
        pod_id, "timeout 30 sh -c 'echo through > /w/fifo'", mounts=[mount(volume, "/w", readonly=readonly)]
    )
    assert (await client.wait(writer)).exit_code == 0
    assert await output(client, reader) == "through"


async def test_parents_come_before_children(client: Cri, pod_id: str, tmp_path: Path) -> None:
    """As the request's order is, and an API file system gives way to what is asked for in its place."""
    for name in ("upper", "lower", "shm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    (tmp_path / "upper" / "inner").mkdir()
    container = await sleeper(
        client,
        pod_id,
        mount(tmp_path / "lower", "/a//inner/"),
        mount(tmp_path / "upper", "/a"),
        mount(tmp_path / "shm", "/dev/shm"),
    )
    assert (await shell(client, container, "ls /a/inner /a/upper /dev/shm"))[1].split() == [
        *("/a/upper", "/a/inner:", "lower", "/dev/shm:", "shm"),
    ]


async def test_a_symbolic_link_as_source(client: Cri, pod_id: str, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "here").touch()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "again").symlink_to(tmp_path / "link")
    container = await sleeper(client, pod_id, mount(tmp_path / "again", "/m"))
    assert await shell(client, container, "ls /m") == (0, "here")


async def test_memory_volumes_and_subpaths(client: Cri, pod_id: str, tmp_path: Path) -> None:
    """The kubelet mounts a tmpfs for an emptyDir in memory, and binds a subPath to a place of its own."""
    with mounted(tmp_path / "memory", "-t", "tmpfs", "-o", "size=1m", "none"):
        (tmp_path / "memory" / "sub").mkdir()
        with mounted(tmp_path / "subpath", "--bind", str(tmp_path / "memory" / "sub")):
            container = await sleeper(
                client, pod_id, mount(tmp_path / "memory", "/m"), mount(tmp_path / "subpath", "/s")
            )
            assert await shell(client, container, "echo in > /s/x; cat /m/sub/x") == (0, "in")
            code, text = await shell(client, container, "dd if=/dev/zero of=/m/big bs=64k count=64 2>&1")
            assert code != 0
            assert "No space left" in text
            # Files of two host file systems are two: a copy that looks at device and inode sees that.
            code, text = await shell(client, container, "stat -c %d /m /s / | sort -u | wc -l")
            assert (code, text) == (0, "3")


async def test_mounts_below_a_source(client: Cri, pod_id: str, tmp_path: Path) -> None:
    """Read-only covers the top mount, with recursive_read_only all of them, as containerd has it."""
    source = tmp_path / "source"
    with mounted(source / "tmpfs", "-t", "tmpfs", "none"):
        (source / "tmpfs" / "there").touch()
        plain = await sleeper(client, pod_id, mount(source, "/m", readonly=True))
        assert (await shell(client, plain, "ls /m/tmpfs && touch /m/tmpfs/new"))[0] == 0
        code, text = await shell(client, plain, "touch /m/new")
        assert code != 0
        assert "Read-only" in text
        deep = await sleeper(client, pod_id, mount(source, "/m", readonly=True, recursive_read_only=True))
        code, text = await shell(client, deep, "touch /m/tmpfs/foo")
        assert code != 0
        assert "Read-only file system" in text
        assert (source / "tmpfs" / "new").exists()
        # The host takes its mount point away although a container has it: nothing of ours holds it on the host.
        subprocess.run(["umount", str(source / "tmpfs")], check=True)
        (source / "tmpfs").rmdir()
        (source / "tmpfs").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "none", str(source / "tmpfs")], check=True)


async def test_later_mounts_of_the_host(client: Cri, pod_id: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "later").mkdir(parents=True)
    with mounted(source, "--bind", str(source)):
        subprocess.run(["mount", "--make-private", str(source)], check=True)
        with pytest.raises(GRPCError) as info:
            await sleeper(
                client,
                pod_id,
                mount(source, "/m", propagation=cri.MountPropagation.PROPAGATION_HOST_TO_CONTAINER),
            )
        assert info.value.status is Status.FAILED_PRECONDITION
        assert "make-rshared" in str(info.value.message)
        subprocess.run(["mount", "--make-rshared", str(source)], check=True)
        follows = await sleeper(
            client,
            pod_id,
            mount(source, "/m", propagation=cri.MountPropagation.PROPAGATION_HOST_TO_CONTAINER),
            mount(source, "/private"),
        )
        assert await shell(client, follows, "ls /m/later /private/later | grep -c flag") == (1, "0")
        with mounted(source / "later", "-t", "tmpfs", "none"):
            (source / "later" / "flag").touch()
            assert await shell(client, follows, "ls /m/later") == (0, "flag")
            assert await shell(client, follows, "ls /private/later") == (0, "")
        assert await shell(client, follows, "ls /m/later") == (0, "")


async def test_big_files_and_mappings(client: Cri, pod_id: str, tmp_path: Path) -> None:
    block = os.urandom(1 << 20)
    (tmp_path / "big").write_bytes(block * 48)
    container = await sleeper(client, pod_id, mount(tmp_path, "/m"))
    code, text = await shell(client, container, "cp /m/big /m/copy && sha256sum /m/copy", timeout=300)
    assert code == 0, text
    assert text.split()[0] == hashlib.sha256(block * 48).hexdigest()
    assert hashlib.sha256((tmp_path / "copy").read_bytes()).hexdigest() == text.split()[0]


async def test_what_cannot_cross_is_refused_by_name(client: Cri, pod_id: str, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "sock"))
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    for source, status, words in (
        ("sock", Status.UNIMPLEMENTED, "is a socket"),
        ("fifo", Status.UNIMPLEMENTED, "is a FIFO"),
        ("/dev/null", Status.UNIMPLEMENTED, "is a character device"),
        ("missing", Status.NOT_FOUND, "does not exist; make it"),
        ("dangling", Status.NOT_FOUND, "does not exist; make it"),
        ("loop", Status.FAILED_PRECONDITION, "Too many levels"),
        ("file/x", Status.FAILED_PRECONDITION, "Not a directory"),
    ):
        with pytest.raises(GRPCError) as info:
            await client.create(pod_id, "/bin/true", mounts=[mount(tmp_path / source, "/m")], name="again")
        assert info.value.status is status, source
        assert words in str(info.value.message), source
        assert source in str(info.value.message)
    # After the mend the same request works.
    (tmp_path / "missing").mkdir()
    await client.create(pod_id, "/bin/true", mounts=[mount(tmp_path / "missing", "/m")], name="again")


async def test_users_other_than_root(client: Cri, pod_id: str, tmp_path: Path) -> None:
    """fsGroup: the kubelet gives the group and its bits, the guest's kernel checks them."""
    (tmp_path / "g").mkdir()
    os.chown(tmp_path / "g", 0, 4000)
    (tmp_path / "g").chmod(0o2775)
    (tmp_path / "g").joinpath("closed").write_text("x")
    (tmp_path / "g").joinpath("closed").chmod(0o600)
    user = cri.LinuxContainerConfig(
        security_context=cri.LinuxContainerSecurityContext(
            run_as_user=cri.Int64Value(value=1000), supplemental_groups=[4000]
        )
    )
    container = await sleeper(client, pod_id, mount(tmp_path / "g", "/g"), linux=user)
    assert (await shell(client, container, "echo hi > /g/mine"))[0] == 0
    assert (await shell(client, container, "cat /g/closed"))[0] != 0
    found = (tmp_path / "g" / "mine").stat()
    assert (found.st_uid, found.st_gid) == (1000, 4000)
    assert user.security_context is not None
    user.security_context.supplemental_groups = []
    stranger = await sleeper(client, pod_id, mount(tmp_path / "g", "/g"), linux=user)
    code, text = await shell(client, stranger, "echo hi > /g/yours")
    assert code != 0
    assert "Permission denied" in text


async def test_the_file_server_is_in_the_pods_cgroup(own_daemon: Daemon, client: Cri, pod_id: str) -> None:
    processes = virtiofsd(own_daemon, pod_id)
    assert len(processes) == 2
    for pid in processes:
        assert pod_id[:12] in Path(f"/proc/{pid}/cgroup").read_text()
    assert Path(f"/proc/{processes[1]}/ns/mnt").readlink() != Path("/proc/self/ns/mnt").readlink()
    assert "Seccomp:\t2" in Path(f"/proc/{processes[1]}/status").read_text()


async def test_a_restarted_daemon_goes_on_mounting(
    own_daemon: Daemon, client: Cri, pod_id: str, tmp_path: Path
) -> None:
    (tmp_path / "x").write_text("still")
    before = await sleeper(client, pod_id, mount(tmp_path, "/m"))
    own_daemon.kill_daemon()
    async with own_daemon.client() as again:
        assert await shell(again, before, "cat /m/x") == (0, "still")
        after = await sleeper(again, pod_id, mount(tmp_path, "/m"))
        assert await shell(again, after, "cat /m/x") == (0, "still")
        for container in (before, after):
            await again.runtime.remove_container(cri.RemoveContainerRequest(container_id=container))
        assert share_mounts(own_daemon, pod_id) == []
    assert (tmp_path / "x").read_text() == "still"
