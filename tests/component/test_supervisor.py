"""The supervisor: pods outlive everything, a killed shim's successor goes on where it was, nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from hyperpod.errors import HyperpodError, PermissionDenied, Unavailable
from hyperpod.shim import packets
from hyperpod.shim.caller import ControlCaller
from hyperpod.shim.channel import Channel
from hyperpod.shimclient.client import ShimClient
from hyperpod.supervisor.store import MAX_STATE
from tests.shimkit import IDLE, ROOT, WAIT, cmdline, eventually, pod, processes, supervisor, until
from tests.stdiopeer import of_bytes

UID = 1_500_123


def features(qemu: socket.socket) -> int:
    """Ask the vhost-user device for its features, as QEMU does."""
    qemu.sendall(struct.pack("<III", 1, 1, 0))  # GET_FEATURES, version 1
    request, _, size = struct.unpack("<III", qemu.recv(12, socket.MSG_WAITALL))
    assert (request, size) == (1, 8)
    return int(struct.unpack("<Q", qemu.recv(8, socket.MSG_WAITALL))[0])


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def targets(pid: int) -> set[str]:
    """What the process's descriptors lead to."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(str(link.readlink()))
    return found


async def test_a_shim_is_the_sandbox_users_and_shares_nothing_of_the_supervisors(tmp_path: Path) -> None:
    with supervisor() as parent:
        async with pod(parent, uid=UID) as one:
            found = await one.spawn(device=True)
            state = status(found.pid)
            assert state["Uid"].split() == [str(UID)] * 4
            assert state["Gid"].split() == [str(UID)] * 4
            assert state["Groups"] == ""
            assert state["NoNewPrivs"] == "1"
            assert int(state["CapEff"], 16) == 0
            assert state["PPid"] == str(parent.pid)
            assert str(parent.run_dir / "supervisor.lock") not in targets(found.pid)
            assert os.getsid(found.pid) == found.pid
            for name in ("vhost.sock", "vsock.sock", "console.sock", "control.sock"):
                assert (one.directory / name).stat().st_uid == UID
            [listed] = await one.client.list()
            assert listed == found


async def test_a_shim_joins_its_cgroups() -> None:
    controllers = Path("/proc/self/cgroup").read_text().splitlines()
    assert controllers
    with supervisor() as parent:
        async with pod(parent) as one:
            with pytest.raises(Unavailable, match="exit code"):
                await one.client.spawn_shim(
                    sandbox_id=one.id, directory=str(one.directory), uid=0, gid=0, device=False,
                    cgroup=[str(parent.run_dir / "no-such-cgroup")],
                )  # fmt: skip
            folder = parent.run_dir / "like-a-cgroup"
            folder.mkdir()
            (folder / "cgroup.procs").touch()
            await one.client.spawn_shim(
                sandbox_id=one.id, directory=str(one.directory), uid=0, gid=0, device=False,
                cgroup=[str(folder)],
            )  # fmt: skip
            assert (folder / "cgroup.procs").read_text() == "0"  # "myself", cgroups(7)


async def test_qemu_does_not_notice_a_killed_shim() -> None:
    """The vhost-user connection, held by the supervisor, is served on by the successor."""
    with supervisor() as parent:
        async with pod(parent, uid=UID) as one:
            await one.spawn(device=True)
            with socket.socket(socket.AF_UNIX) as qemu:
                qemu.connect(str(one.directory / "vhost.sock"))
                qemu.settimeout(WAIT)
                offered = await asyncio.to_thread(features, qemu)
                for _ in range(3):
                    await one.kill()
                    await one.spawn(device=True, resume=True)
                    assert one.shim is not None
                    assert (await one.shim.hello()).device == "resumed"
                    assert await asyncio.to_thread(features, qemu) == offered
                await one.client.drop(one.id)
                assert await asyncio.to_thread(qemu.recv, 1) == b"", "a dropped sandbox lets QEMU go"


async def test_without_resume_nothing_is_inherited() -> None:
    with supervisor() as parent:
        async with pod(parent) as one:
            await one.spawn(device=True)
            with socket.socket(socket.AF_UNIX) as qemu:
                qemu.connect(str(one.directory / "vhost.sock"))
                qemu.settimeout(WAIT)
                await asyncio.to_thread(features, qemu)
                await one.kill()
                await one.spawn(device=True)
                assert one.shim is not None
                assert (await one.shim.hello()).device == "fresh"
                assert await asyncio.to_thread(qemu.recv, 1) == b""


async def test_shims_outlive_the_supervisor_and_the_next_one_takes_them_over() -> None:
    with supervisor() as parent:
        async with pod(parent, uid=UID) as one:
            container = secrets.token_hex(32)
            stream = one.peer.add(container, "stdout", of_bytes(b"before\nafter\n"))
            one.peer.add(container, "stderr", of_bytes(b""))
            stream.paused.clear()
            stream.sender.feed(stream.source(7))
            first = await one.spawn(device=True)
            await one.log_start(container)
            with socket.socket(socket.AF_UNIX) as qemu:
                qemu.connect(str(one.directory / "vhost.sock"))
                qemu.settimeout(WAIT)
                await asyncio.to_thread(features, qemu)
                parent.kill()
                await asyncio.to_thread(features, qemu)
                parent.start(IDLE)
                async with parent.client() as client:
                    async with asyncio.timeout(WAIT):
                        while await client.list() != [first]:
                            await asyncio.sleep(0.01)
                    # What the old supervisor held for the shim the new one has as well: QEMU's connection, the log.
                    one.client = client
                    await eventually(
                        lambda: any("socket:" in link for link in targets(first.pid) & targets(parent.pid))
                    )
                    await eventually(lambda: str(one.path(container)) in targets(parent.pid))
                    await one.kill()
                    second = await one.spawn(device=True, resume=True)
                    assert second.pid != first.pid
                    await asyncio.to_thread(features, qemu)
                    stream.paused.set()
                    await one.log_start(container)
                    assert one.shim is not None
                    assert (await one.shim.log_finish(container, WAIT)).complete
                    await client.drop(one.id)
                    assert await client.list() == []
            until(lambda: not Path(f"/proc/{second.pid}").exists())


async def test_a_living_shim_is_replaced_not_doubled() -> None:
    with supervisor() as parent:
        async with pod(parent) as one:
            first = await one.spawn()
            os.kill(first.pid, signal.SIGSTOP)
            second = await one.spawn(resume=True)
            assert not Path(f"/proc/{first.pid}").exists()
            assert await one.client.list() == [second]
            await one.client.drop(one.id)
            await one.client.drop(one.id)
            assert await one.client.list_ids() == set()


async def test_a_shim_that_cannot_start_is_reported() -> None:
    with supervisor() as parent:
        async with parent.client() as client:
            with pytest.raises(Unavailable, match="ended at its start"):
                await client.spawn_shim(
                    sandbox_id=secrets.token_hex(32), directory="/nonexistent/x", uid=0, gid=0, device=False
                )
            assert "cannot serve" in parent.text()


async def test_the_list_is_whole_however_long() -> None:
    with supervisor() as parent:
        caller = ControlCaller(str(parent.run_dir / "supervisor.sock"), "supervisor")
        await caller.connect(WAIT)
        names = {secrets.token_hex(32) for _ in range(600)}
        for name in names:
            await caller.call("register", {"sandbox_id": name}, timeout=WAIT)
        async with parent.client() as client:
            assert await client.list_ids() == names
        await caller.close()


async def test_what_may_be_stored_is_bounded() -> None:
    with supervisor() as parent:
        caller = ControlCaller(str(parent.run_dir / "supervisor.sock"), "supervisor")
        await caller.connect(WAIT)
        own = {"sandbox_id": "ab" * 32, "name": "x"}
        fds = len(os.listdir(f"/proc/{parent.pid}/fd"))
        with pytest.raises(HyperpodError):
            await caller.call("store", own | {"state": "x" * (MAX_STATE + 1)}, timeout=WAIT)
        with open("/dev/null", "rb") as null:
            refused = 0
            for number in range(60):
                try:
                    await caller.call(
                        "store",
                        own | {"name": str(number), "state": "{}"},
                        [null.fileno()] * packets.MAX_FDS,
                        timeout=WAIT,
                    )
                except HyperpodError:
                    refused += 1
            assert 0 < refused < 60
            for number in range(60):
                await caller.call("forget", own | {"name": str(number)}, timeout=WAIT)
        # The connection, and a pidfd: the test itself is taken for the sandbox's shim.
        await eventually(lambda: len(os.listdir(f"/proc/{parent.pid}/fd")) <= fds + 2)
        await caller.close()


def test_other_users_command_nothing() -> None:
    """Each request is made by a process of another uid."""
    with supervisor() as parent:
        victim = secrets.token_hex(32)
        folder = parent.run_dir / "s" / victim[:12]
        folder.mkdir(mode=0o700)
        os.chown(folder, UID, UID)
        code = (
            "import json, os, socket, sys\n"
            "os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))\n"
            "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.connect(sys.argv[1])\n"
            "s.send(sys.argv[3].encode()); print(s.recv(65536).decode())"
        )

        def ask(uid: int, request: str) -> str:
            socket_path = str(parent.run_dir / "supervisor.sock")
            argv = [sys.executable, "-c", code, socket_path, str(uid), request]
            return subprocess.run(argv, capture_output=True, text=True, check=True, cwd="/").stdout

        ours = f'"sandbox_id":"{victim}"'
        for request in (
            f'{{"id":1,"op":"drop",{ours}}}',
            '{"id":1,"op":"list","after":""}',
            f'{{"id":1,"op":"spawn_shim",{ours},"directory":"/","uid":0,"gid":0,"cid":3,"device":false,'
            f'"cgroup":[],"resume":false}}',
            f'{{"id":1,"op":"store",{ours},"name":"x","state":"{{}}"}}',
        ):
            assert "permission_denied" in ask(UID + 1, request), request
        assert '"ok":true' in ask(UID, f'{{"id":1,"op":"store",{ours},"name":"x","state":"{{}}"}}')
        assert "permission_denied" in ask(UID, f'{{"id":1,"op":"drop",{ours}}}')


def test_another_user_takes_no_more_than_a_shim_needs() -> None:
    """A shim that a guest has taken over: it neither opens connections without end, nor stores as more than one."""
    with supervisor() as parent:
        one = secrets.token_hex(32)
        folder = parent.run_dir / "s" / one[:12]
        folder.mkdir(mode=0o700)
        os.chown(folder, UID, UID)
        code = (
            "import json, os, socket, sys\n"
            "os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))\n"
            "kept = []\n"
            "for number in range(100):\n"
            "    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.connect(sys.argv[1]); kept.append(s)\n"
            "for number in range(3):\n"
            "    ident = sys.argv[3][:63] + 'abc'[number]\n"
            "    kept[0].send(json.dumps(dict(id=1, op='store', sandbox_id=ident, name='x', state='1')).encode())\n"
            "    print('ok' if json.loads(kept[0].recv(65536)).get('ok') else 'refused')\n"
            "sys.stdout.flush()\n"
            "sys.stdin.read()"
        )
        before = len(os.listdir(f"/proc/{parent.pid}/fd"))
        socket_path = str(parent.run_dir / "supervisor.sock")
        argv = [sys.executable, "-c", code, socket_path, str(UID), one]
        with subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"
        ) as process:
            assert process.stdout is not None
            assert [process.stdout.readline().strip() for _ in range(3)] == ["ok", "refused", "refused"]
            assert len(os.listdir(f"/proc/{parent.pid}/fd")) < before + 20
            process.communicate()


# -- the daemon as a child ----------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    """But for the nursery, and for what has the supervisor's own words still, or none: it may become anything."""
    others = set(offspring(pid)) - set(nurseries(pid))
    return sorted(child for child in others if cmdline(child) not in (b"", cmdline(pid)))


def nurseries(pid: int) -> list[int]:
    words = (b"hyperpod.supervisor.forks", b"hyperpod-nursery")
    return [child for child in offspring(pid) if any(word in cmdline(child) for word in words)]


def offspring(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_what_the_nursery_loads() -> None:
    """Every shim and host agent has its share of it."""
    lines = (
        "from hyperpod.supervisor.forks import *",
        "children.preload()",
        "print(*filter(sys.modules.get, sys.modules))",
    )
    loaded = set(
        subprocess.check_output([sys.executable, "-c", "\n".join(lines)], text=True, cwd=ROOT).split()
    )
    assert loaded >= {"hyperpod.shim.main", "hyperpod.agent.main", "websockets.speedups"}
    assert not loaded & {"pydantic", "ssl", "_hashlib", "email", "zipfile", "importlib.metadata"}


async def test_a_killed_nursery_is_replaced() -> None:
    with supervisor() as parent:
        async with pod(parent) as one:
            until(lambda: nurseries(parent.pid))
            [nursery] = nurseries(parent.pid)
            os.kill(nursery, signal.SIGKILL)
            found = await one.spawn()
            assert found.pid in children(parent.pid)
            [other] = nurseries(parent.pid)
            assert other != nursery


def test_a_rehearsal_leaves_nothing_in_the_nursery(tmp_path: Path) -> None:
    """What is forked from it has its folders, descriptors, threads and signal handlers otherwise."""
    script = """
import os, signal, sys, threading
from pathlib import Path
from hyperpod.supervisor import forks, rehearsal
def state():
    handlers = [signal.getsignal(n) for n in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    return os.listdir("/proc/self/fd"), threading.enumerate(), handlers, os.getcwd(), os.umask(0o22)
before = state()
rehearsal.rehearse(Path(sys.argv[1]))
assert state() == before, (before, state())
assert signal.set_wakeup_fd(-1) == -1
assert not os.path.exists(sys.argv[1])
"""
    folder = tmp_path / "rehearsal"
    (folder / "left").mkdir(parents=True)  # by one that was killed in the middle
    done = subprocess.run(
        [sys.executable, "-c", script, folder], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


async def test_the_nursery_ends_with_the_supervisor_and_the_shims_do_not() -> None:
    with supervisor() as parent:
        async with pod(parent) as one:
            found = await one.spawn()
            [nursery] = nurseries(parent.pid)
            parent.kill()
            until(lambda: nursery not in processes())
            assert found.pid in processes()


def test_a_killed_daemon_is_started_again_and_ends_with_the_supervisor() -> None:
    with supervisor() as parent:
        until(lambda: len(children(parent.pid)) == 1)
        [first] = children(parent.pid)
        os.kill(first, signal.SIGKILL)
        until(lambda: [c for c in children(parent.pid) if c != first])
        [second] = children(parent.pid)
        assert parent.stop() == 0
        assert not Path(f"/proc/{second}").exists()
        assert not (parent.run_dir / "supervisor.sock").exists()


def test_the_daemon_does_not_outlive_a_killed_supervisor() -> None:
    with supervisor() as parent:
        until(lambda: len(children(parent.pid)) == 1)
        [daemon] = children(parent.pid)
        until(lambda: b"pause" in cmdline(daemon))
        parent.kill()
        until(lambda: b"pause" not in cmdline(daemon))


def test_a_daemon_that_ends_well_ends_the_supervisor() -> None:
    with supervisor([sys.executable, "-c", "print('did it')"]) as parent:
        assert parent.process is not None
        assert parent.process.wait(WAIT) == 0
        assert "did it" in parent.text()


def test_a_daemon_that_fails_is_started_again_with_pauses() -> None:
    with supervisor([sys.executable, "-c", "import sys; sys.exit(3)"]) as parent:
        until(lambda: "exit code 3; starting it again in 0.4 s" in parent.text())
        assert parent.stop() == 0


ORPHAN = (
    "import os, sys, time\n"
    "if os.fork() == 0:\n"
    "    while not os.path.exists(sys.argv[1]):\n"
    "        time.sleep(0.01)\n"
    "os._exit(0)"
)
DAEMON_WITH_ORPHAN = (
    "import signal, subprocess, sys\nsubprocess.run([sys.executable, '-c', *sys.argv[1:]])\nsignal.pause()"
)


def test_orphans_become_children_and_are_reaped(tmp_path: Path) -> None:
    """What QEMU is to the daemon that started it."""
    over = tmp_path / "over"
    with supervisor([sys.executable, "-c", DAEMON_WITH_ORPHAN, ORPHAN, str(over)]) as parent:
        until(lambda: len(children(parent.pid)) == 2)
        both = set(children(parent.pid))
        over.touch()
        until(lambda: len(both & set(offspring(parent.pid))) == 1)


def test_a_second_supervisor_is_refused() -> None:
    with supervisor() as parent:
        code = (
            "import sys; from pathlib import Path; from hyperpod.supervisor.main import supervise\n"
            "supervise(Path(sys.argv[1]), ['/bin/false'])"
        )
        second = subprocess.run(
            [sys.executable, "-c", code, parent.run_dir], capture_output=True, text=True, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=WAIT, check=False,
        )  # fmt: skip
        assert second.returncode != 0
        assert "another supervisor" in second.stderr


async def test_a_stopped_supervisor_leaves_the_pods_running() -> None:
    with supervisor() as parent:
        async with pod(parent) as one:
            found = await one.spawn()
            assert parent.stop() == 0
            assert one.shim is not None
            assert (await one.shim.hello()).pid == found.pid
            assert found.pid in processes()
            with pytest.raises((Unavailable, PermissionDenied)):
                await one.client.list()


async def test_a_link_to_another_shim_is_not_followed(tmp_path: Path) -> None:
    """The folder is the user's that QEMU runs as; the daemon would tell another pod's shim where its agent is."""
    with supervisor() as parent:
        async with pod(parent, uid=UID) as one, pod(parent, uid=UID + 1) as other:
            await one.spawn()
            await other.spawn()
            path = one.directory / "control.sock"
            client = ShimClient(str(path), UID)
            await client.connect(WAIT)
            assert (await client.hello()).sandbox_id == one.id
            await client.close()
            path.unlink()
            path.symlink_to(other.directory / "control.sock")
            client = ShimClient(str(path), UID)
            with pytest.raises(Unavailable, match=f"answered by uid {UID + 1}"):
                await client.connect(WAIT)


async def test_a_shim_that_answers_without_end_leaves_others_their_turn() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    for _ in range(100):
        theirs.send(b'{"id": 1, "ok": true}')
    channel, caller = Channel(ours), ControlCaller("", "shim")
    reading = asyncio.ensure_future(caller._read(channel))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    left = 0
    with contextlib.suppress(BlockingIOError):
        while ours.recv(100):
            left += 1
    assert left > 90, "it read all of them before anybody else had a turn"
    theirs.close()
    await reading
    channel.close()
