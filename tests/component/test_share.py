"""The host's side of a share with real mounts, virtiofsd and QEMU; guests that use it are in tests/vm."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hyperpod.errors import FailedPrecondition, HyperpodError, NotFound, Unavailable, Unsupported
from hyperpod.share import binds, virtiofsd
from hyperpod.share.virtiofsd import FileServer, Program
from hyperpod.spec import mountinfo
from hyperpod.spec.mounts import HostBind
from tests import runs

SHORT = "0123456789ab"
QEMU = ["qemu-system-x86_64", "-S", "-nodefaults", "-display", "none", "-m", "64"]
MEMORY = ["-M", "q35,memory-backend=mem", "-object", "memory-backend-memfd,id=mem,size=64M,share=on"]


def apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """In a thread of its own, which changes its mount namespace."""
    out: list[Any] = []

    def run() -> None:
        try:
            out.append(work(*arguments))
        except HyperpodError as exc:
            out.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(out[0], HyperpodError):
        raise out[0]
    return out[0]


def which() -> Program:
    found = virtiofsd.program()
    assert found is not None
    return found


@contextlib.contextmanager
def connected(server: FileServer, *, covered: bool = False) -> Iterator[str]:
    """Started and confined: gives the namespace of its mounts."""
    server.start(which(), 0, 0, [])
    device = [
        "-chardev",
        f"socket,id=fs,path={server.socket}",
        "-device",
        "vhost-user-fs-pci,chardev=fs,tag=x",
    ]
    qemu = subprocess.Popen([*QEMU, *MEMORY, *device], stdin=subprocess.DEVNULL)
    try:
        namespace = server.namespace()
        if not covered:
            server.uncover()
        yield namespace
    finally:
        qemu.kill()
        qemu.wait()
        server.end()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    one = FileServer(tmp_path / "m" / SHORT)
    yield one
    with contextlib.suppress(HyperpodError):
        one.end()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "file").write_text("mine")
    return folder


def one(source: Path, number: int = 0, **flags: bool) -> HostBind:
    values = {"readonly": False, "recursive": False, "follow": False, **flags}
    return HostBind(source=str(source), destination="/d", place=f"{SHORT}/{number}", **values)


def put(namespace: str, server: FileServer, wanted: Sequence[HostBind]) -> list[str]:
    found: list[str] = apart(binds.bind, binds.Target(namespace, server.share), wanted, threading.Event())
    return found


def table(namespace: str) -> dict[str, mountinfo.MountPoint]:
    lines = Path(namespace.replace("ns/mnt", "mountinfo")).read_bytes()
    return {mount.path: mount for mount in mountinfo.parse(lines).values()}


def on_the_host(server: FileServer) -> list[str]:
    """Mount points below its folder; others mount elsewhere meanwhile."""
    found = mountinfo.parse(Path("/proc/self/mountinfo").read_bytes()).values()
    return [mount.path for mount in found if mount.path.startswith(f"{server.folder}/")]


def place(server: FileServer, number: int = 0, short: str = SHORT) -> str:
    """Where in the share mount `number` of a container really lies."""
    path = server.share / short / str(number)
    return f"/{path.resolve().relative_to(server.share.resolve())}"


def inside(namespace: str) -> Path:
    return Path(namespace.replace("ns/mnt", "root"))


def test_mounts_come_and_go_and_are_nowhere_else(server: FileServer, source: Path) -> None:
    with connected(server) as namespace:
        put(namespace, server, [one(source, 0, readonly=True), one(source, 1), one(source / "file", 2)])
        found = table(namespace)
        places = [place(server, n) for n in range(3)]
        assert sorted(found) == ["/", *sorted(places)]
        assert [found[path].readonly for path in ("/", *places)] == [True, True, False, False]
        assert on_the_host(server) == []
        assert (inside(namespace) / SHORT / "0" / "file").read_text() == "mine"
        (inside(namespace) / SHORT / "1" / "new").touch()
        assert (source / "new").exists()
        for path in (SHORT, f"{SHORT}/0", "common", "."):
            with pytest.raises(OSError, match="Read-only file system"):
                (inside(namespace) / path / "evil").touch()
        binds.release(server.share, SHORT)
        assert sorted(table(namespace)) == ["/"]
        assert list(server.share.iterdir()) == []
        binds.release(server.share, SHORT)
        put(namespace, server, [one(source)])
        pid = server.pid()
    assert not server.folder.exists()
    deadline = time.monotonic() + 60  # whose child it is reaps it
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert sorted(path.name for path in source.iterdir()) == ["file", "new"]
    assert on_the_host(server) == []


def test_containers_have_the_same_mount_of_the_same_source(server: FileServer, source: Path) -> None:
    other = "ba9876543210"

    def of_other(path: Path, number: int = 0, **flags: bool) -> HostBind:
        return replace(one(path, number, **flags), place=f"{other}/{number}")

    with connected(server) as namespace:
        shared = [one(source), one(source, 1), one(source / "file", 2)]
        assert put(namespace, server, shared) == [f"{SHORT}/0", f"{SHORT}/1"], "folders that are walked into"
        put(
            namespace,
            server,
            [of_other(source), of_other(source / "file", 1), of_other(source, 2, readonly=True)],
        )
        assert place(server) == place(server, 1) == place(server, 0, other)
        assert place(server, 2) == place(server, 1, other)
        assert len({place(server), place(server, 2), place(server, 2, other)}) == 3, (
            "read-only is another one"
        )
        assert len(table(namespace)) == 4
        kept = place(server)
        binds.release(server.share, SHORT)
        assert len(table(namespace)) == 4
        assert place(server, 0, other) == kept
        (server.share / "common" / "crash").mkdir()
        # What was made anew under the old name is another folder.
        source.rename(source.parent / "old")
        source.mkdir()
        put(namespace, server, [one(source)])
        assert place(server) != kept
        binds.release(server.share, other)
        assert sorted(table(namespace)) == ["/", place(server)]
        assert [path.name for path in (server.share / "common").iterdir()] == [Path(place(server)).name]
        binds.release(server.share, SHORT)
        assert list(server.share.iterdir()) == []


def test_a_mount_is_not_shared_once_the_host_has_made_its_own_read_only(
    server: FileServer, source: Path
) -> None:
    subprocess.run(["mount", "--bind", str(source), str(source)], check=True)
    try:
        with connected(server) as namespace:
            put(namespace, server, [one(source)])
            subprocess.run(["mount", "-o", "remount,bind,ro", str(source)], check=True)
            put(namespace, server, [one(source, 1)])
            found = table(namespace)
            assert [found[place(server, number)].readonly for number in (0, 1)] == [False, True]
    finally:
        subprocess.run(["umount", "-l", str(source)], check=True)


def test_a_mount_point_without_its_mount_is_used(server: FileServer, source: Path) -> None:
    """As a crash leaves it."""
    with connected(server) as namespace:
        put(namespace, server, [one(source)])
        where = place(server)
        binds.release(server.share, SHORT)
        (server.share / where[1:]).mkdir(parents=True)
        put(namespace, server, [one(source)])
        assert where in table(namespace)
        assert (inside(namespace) / SHORT / "0" / "file").read_text() == "mine"


@pytest.mark.parametrize("propagation", ["private", "shared"])
def test_a_guest_never_has_a_writable_place_of_its_own(
    server: FileServer, source: Path, propagation: str
) -> None:
    """Plugged into a guest that tenants own already, it would be theirs for a moment."""
    run = _made(server.folder.parent)
    subprocess.run(["mount", "-t", "tmpfs", "none", str(run)], check=True)
    try:
        subprocess.run(["mount", f"--make-{propagation}", str(run)], check=True)
        _never_writable(server, source)
    finally:
        subprocess.run(["umount", "-l", str(run)], check=True)


def _never_writable(server: FileServer, source: Path) -> None:
    with connected(server, covered=True) as namespace:
        assert table(namespace)["/"].readonly
        with pytest.raises(OSError, match="Read-only file system"):
            (inside(namespace) / "evil").symlink_to(source)
        with pytest.raises(HyperpodError, match="mount point .*Read-only file system"):
            put(namespace, server, [one(source)])
        server.uncover()
        server.uncover()
        assert on_the_host(server) == []
        assert table(namespace)["/"].readonly
        put(namespace, server, [one(source)])
    with connected(server, covered=True):
        pass  # as after the death of a daemon in between
    assert not server.folder.exists()
    assert on_the_host(server) == []


def test_the_clean_up_follows_no_link(server: FileServer, source: Path) -> None:
    server.share.mkdir(parents=True)
    (server.share / SHORT).symlink_to(source)
    with pytest.raises(OSError, match="Not a directory"):
        binds.release(server.share, SHORT)
    with pytest.raises(HyperpodError, match="cannot be removed"):
        server.end()
    assert (source / "file").read_text() == "mine"


def test_nothing_stays_of_a_group_with_a_bad_one(server: FileServer, source: Path, tmp_path: Path) -> None:
    with connected(server) as namespace:
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(NotFound, match=r"missing.*does not exist"):
            put(namespace, server, [one(source), one(tmp_path / "missing", 1)])
        with pytest.raises(Unsupported, match="character device"):
            put(namespace, server, [one(source), one(Path("/dev/null"), 1)])
        with pytest.raises(FailedPrecondition, match="File name too long"):
            put(namespace, server, [one(Path("/" + "x" * 300))])
        assert sorted(table(namespace)) == ["/"]
        assert len(os.listdir("/proc/self/fd")) <= before


def test_mounts_below_a_source(server: FileServer, source: Path) -> None:
    (source / "sub").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(source / "sub")], check=True)
    try:
        with connected(server) as namespace:
            plain, deep = one(source, 0, readonly=True), one(source, 1, readonly=True, recursive=True)
            assert put(namespace, server, [plain, deep]) == [f"{SHORT}/0/sub"]
            found = table(namespace)
            assert [found[f"/{SHORT}/{path}"].readonly for path in ("0", "0/sub", "1", "1/sub")] == [
                *(True, False, True, True)
            ]
            # Busy in that namespace only: the host goes on as if there were no pod.
            subprocess.run(["umount", str(source / "sub")], check=True)
            (source / "sub").rmdir()
            subprocess.run(["mount", "-t", "tmpfs", "none", "."], check=True, cwd=_made(source / "sub"))
    finally:
        subprocess.run(["umount", str(source / "sub")], check=True)


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def test_later_mounts_need_a_shared_source(server: FileServer, source: Path) -> None:
    (source / "later").mkdir()
    subprocess.run(["mount", "--bind", str(source), str(source)], check=True)
    try:
        subprocess.run(["mount", "--make-private", str(source)], check=True)
        with connected(server) as namespace:
            with pytest.raises(FailedPrecondition, match=r"source' is private; `mount --make-rshared`"):
                put(namespace, server, [one(source, follow=True)])
            subprocess.run(["mount", "--make-rshared", str(source)], check=True)
            put(namespace, server, [one(source, 0, follow=True), one(source, 1)])
            subprocess.run(["mount", "-t", "tmpfs", "none", str(source / "later")], check=True)
            assert f"{place(server)}/later" in table(namespace)
            assert f"{place(server, 1)}/later" not in table(namespace)
            subprocess.run(["umount", str(source / "later")], check=True)
            assert f"{place(server)}/later" not in table(namespace)
    finally:
        subprocess.run(["umount", "-l", str(source)], check=True)


def test_a_late_thread_mounts_nothing_for_a_caller_that_left(server: FileServer, source: Path) -> None:
    cancelled = threading.Event()
    cancelled.set()
    with connected(server) as namespace:
        assert apart(binds.bind, binds.Target(namespace, server.share), [one(source)], cancelled) == []
        assert sorted(table(namespace)) == ["/"]


def test_an_end_without_a_start_and_after_a_death(server: FileServer, source: Path) -> None:
    server.end()
    with connected(server) as namespace:
        put(namespace, server, [one(source)])
        os.kill(server.pid(), signal.SIGKILL)
        deadline = time.monotonic() + 60
        while server.pid():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(FailedPrecondition, match="has ended"):
            server.namespace()
        with pytest.raises(Unavailable):
            put("/proc/999999999/ns/mnt", server, [one(source, 1)])
    assert not server.folder.exists()
    assert (source / "file").read_text() == "mine"


def test_another_process_with_its_number_is_left_alone(server: FileServer) -> None:
    server.folder.mkdir(parents=True)
    with subprocess.Popen(["sleep", "100"]) as other:
        (server.folder / "pid").write_text(f"{other.pid} 12345")
        assert server.pid() == 0
        server.end()
        assert other.poll() is None
        other.kill()


def test_it_joins_cgroups_and_speaks_before_it_dies(server: FileServer) -> None:
    group = Path("/sys/fs/cgroup/pids") if Path("/sys/fs/cgroup/pids").is_dir() else Path("/sys/fs/cgroup")
    group /= f"hyperpod-test-{os.getpid()}"
    runs.record("cgroup", group.name)
    group.mkdir()
    try:
        pid = server.start(which(), 0, 0, [str(group)])
        _until(lambda: str(pid) in (group / "cgroup.procs").read_text().split())
        server.end()
        _until(lambda: (group / "cgroup.procs").read_text() == "")  # its child dies a moment later
    finally:
        group.rmdir()
    shutil.rmtree(server.share, ignore_errors=True)
    server.start(Program(which().path, rust=not which().rust), 0, 0, [])  # options that it does not know
    _until(lambda: not server.pid())
    assert ": " in server.last_words()
    server.end()


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_host_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtiofsd, "PLACES", "/nonexistent")
    assert virtiofsd.program() is None


def test_both_programs_are_told_the_same() -> None:
    in_c = " ".join(virtiofsd.arguments(Program("/c", rust=False), "/a,b"))
    in_rust = " ".join(virtiofsd.arguments(Program("/r", rust=True), "/a,b"))
    assert "source=/a\\,b" in in_c
    assert "--shared-dir=/a,b" in in_rust
    for words in ("sandbox=namespace", "xattrmap=", "modcaps=-mknod", "--fd=3"):
        assert words in in_c
        assert words in in_rust
