"""kill -9 of everything that a host pod has on its host: what lives goes on, what died leaves nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from hyperpod import failpoints
from hyperpod.api.gen.runtime import v1 as cri
from tests import usernskit
from tests.daemonkit import Cri, Daemon
from tests.host.conftest import ALLOWED, host_daemon_of
from tests.host.test_lifecycle import HOLD
from tests.recoverykit import AGAIN, client_of, killed_at_every_step, life, numbers, reboot

COUNTER = "i=0; while :; do echo line $i; i=$((i+1)); sleep 0.02; done"


@pytest.fixture
def own_daemon() -> Iterator[Daemon]:
    with host_daemon_of(ALLOWED) as one:
        yield one


async def goes_on(client: Cri, container: str) -> None:
    """It logs and takes execs, within AGAIN; no line is lost or twice."""
    before = len(await numbers(client, container))
    async with asyncio.timeout(AGAIN):
        while len(await numbers(client, container)) < before + 20:
            await asyncio.sleep(0.05)
        while True:
            with contextlib.suppress(GRPCError):
                assert (await client.exec(container, "echo", "hi")).stdout == b"hi\n"
                break
            await asyncio.sleep(0.1)
    got = await numbers(client, container)
    assert got == list(range(len(got))), "every line exactly once"


def process_of(daemon: Daemon, word: str, pod: str) -> int:
    [line] = [p for p in daemon.processes() if word in p and pod[:12] in p]
    return int(line.split()[0])


async def test_pods_survive_daemon_shim_and_supervisor(own_daemon: Daemon) -> None:
    async with client_of(own_daemon, "host") as client:
        await client.load_busybox()
        pod = await client.run_pod()
        container = await client.sh(pod, COUNTER)
    own_daemon.kill_daemon()
    async with client_of(own_daemon, "host") as client:
        await goes_on(client, container)
        os.kill(process_of(own_daemon, "hyperpod-shim", pod), signal.SIGKILL)
        await goes_on(client, container)
    daemon_pid = own_daemon.pid()
    own_daemon.kill_supervisor()
    async with asyncio.timeout(AGAIN):
        while Path(f"/proc/{daemon_pid}").exists():
            await asyncio.sleep(0.05)
    own_daemon.start()
    async with client_of(own_daemon, "host") as client:
        await goes_on(client, container)
        extra = await client.sh(pod, "echo new; sleep 600")
        assert (await client.exec(extra, "true")).exit_code == 0
        await client.remove_pod(pod)
    assert own_daemon.leftovers() == []


async def test_a_shim_that_dies_while_a_log_begins(own_daemon: Daemon) -> None:
    """CreateContainer does not wait for it, StartContainer does not fail of it, and the next shim has all lines."""
    async with client_of(own_daemon, "host") as client:
        await client.load_busybox()
        pod = await client.run_pod()
        shim = process_of(own_daemon, "hyperpod-shim", pod)
        os.kill(shim, signal.SIGSTOP)
        container = await client.create(pod, "/bin/sh", "-c", COUNTER)
        os.kill(shim, signal.SIGKILL)
        await client.start(container)
        await goes_on(client, container)
        await client.remove_pod(pod)
    assert own_daemon.leftovers() == []


async def test_execs_beside_the_death_of_a_shim(own_daemon: Daemon) -> None:
    """Each runs once, and none of them fails: the next shim collects what the dead one has not handed on."""
    async with client_of(own_daemon, "host") as client:
        await client.load_busybox()
        pod = await client.run_pod()
        container = await client.sh(pod, "sleep 600")

        async def run(number: int) -> None:
            script = f"echo {number} >>/ran; sleep 0.{number % 10}; echo {number}"
            reply = await client.exec(container, "sh", "-c", script)
            assert (reply.exit_code, reply.stdout) == (0, b"%d\n" % number)

        for first in (0, 20):
            shim = process_of(own_daemon, "hyperpod-shim", pod)
            running = asyncio.gather(*(run(first + number) for number in range(20)))
            await asyncio.sleep(0.3)
            os.kill(shim, signal.SIGKILL)
            await running
        ran = (await client.exec(container, "sort", "-n", "/ran")).stdout.split()
        assert ran == [b"%d" % number for number in range(40)]
        await client.remove_pod(pod)
    assert own_daemon.leftovers() == []


async def not_ready(client: Cri, pod: str) -> None:
    async with asyncio.timeout(AGAIN):
        while True:
            reply = await client.runtime.pod_sandbox_status(cri.PodSandboxStatusRequest(pod_sandbox_id=pod))
            assert reply.status is not None
            if reply.status.state == cri.PodSandboxState.SANDBOX_NOTREADY:
                return
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("daemon_away", [False, True])
async def test_the_death_of_an_agent_ends_its_pod(own_daemon: Daemon, daemon_away: bool) -> None:
    async with client_of(own_daemon, "host") as client:
        await client.load_busybox()
        pod = await client.run_pod()
        container = await client.sh(pod, f"sleep {(nap := unique_nap())} & {COUNTER}")
        status = await client.status(container)
        assert status.log_path
        agent = process_of(own_daemon, "hyperpod-agent", pod)
    if daemon_away:
        own_daemon.stop()
    os.kill(agent, signal.SIGKILL)
    if daemon_away:
        own_daemon.start()
    async with client_of(own_daemon, "host") as client:
        await not_ready(client, pod)
        status = await client.wait(container)
        assert (status.exit_code, status.reason) == (255, "Unknown")
        assert "agent" in status.message
        assert not running("sleep", nap)
        assert own_daemon.loops() == []
        await client.remove_pod(pod)
    assert own_daemon.leftovers() == []


async def test_an_exit_that_takes_its_time_stops_no_pod(own_daemon: Daemon) -> None:
    """A container ended while the daemon was away, and another holds what its log is read from."""
    async with client_of(own_daemon, "host") as client:
        await client.load_busybox()
        pod = await client.run_pod()
        ending = await client.sh(pod, "echo up; while [ ! -e /dev/shm/end ]; do sleep 0.1; done; exit 3")
        holder = await client.sh(pod, f"{HOLD} (sleep 2; touch /dev/shm/end) & {COUNTER}")
        async with asyncio.timeout(AGAIN):
            while len(await numbers(client, holder)) < 5:
                await asyncio.sleep(0.05)
    own_daemon.stop()
    await asyncio.sleep(5)
    own_daemon.start()
    async with client_of(own_daemon, "host") as client:
        await goes_on(client, holder)
        status = await client.wait(ending)
        assert (status.exit_code, status.reason) == (3, "Error")
        await client.remove_pod(pod)
    assert own_daemon.leftovers() == []


async def test_crun_killed_leaves_a_failed_start(own_daemon: Daemon, tmp_path: Path) -> None:
    """A crun that kills itself at once, in the place of the real one."""
    (tmp_path / "crun").write_text(
        '#!/bin/sh\ncase "$*" in *run*--detach*|*exec*) kill -9 $$;; esac\nexec /usr/bin/crun "$@"\n'
    )
    (tmp_path / "crun").chmod(0o755)
    real = shutil.which("crun")
    assert real == "/usr/bin/crun"
    own_daemon.stop()
    own_daemon.start(PATH=f"{tmp_path}:{os.environ['PATH']}")
    async with client_of(own_daemon, "host") as client:
        await client.load_busybox()
        pod = await client.run_pod()
        container = await client.create(pod, "sleep", "600")
        with pytest.raises(GRPCError, match="137"):
            await client.start(container)
        status = await client.status(container)
        assert (status.exit_code, status.reason) == (128, "StartError")
        await client.remove_pod(pod)
    assert own_daemon.leftovers() == []


async def test_a_host_reboot(own_daemon: Daemon) -> None:
    async with client_of(own_daemon, "host") as client:
        await client.load_busybox()
        pod = await client.run_pod()
        container = await client.sh(pod, "sleep 600")
    reboot(own_daemon, pod)
    async with client_of(own_daemon, "host") as client:
        status = await client.status(container)
        assert status.state == cri.ContainerState.CONTAINER_EXITED
        assert "reboot" in status.message
        await client.remove_pod(pod)
    assert own_daemon.leftovers() == []


async def test_pods_with_damaged_records_leave_nothing(own_daemon: Daemon) -> None:
    """Also where the daemon was killed after it had set one aside, or its plugins would not leave then."""
    async with client_of(own_daemon, "host") as client:
        await client.load_busybox()
        one, two, three = [await client.run_pod() for _ in range(3)]
    own_daemon.stop()
    records, aside = own_daemon.state / "sandboxes", own_daemon.state / "unreadable" / "sandboxes"
    (records / one / "record.json").write_bytes(b"{")
    aside.mkdir(parents=True)
    (records / two).rename(aside / two)
    own_daemon.start()
    async with client_of(own_daemon, "host") as client:
        [item] = (await client.runtime.list_pod_sandbox(cri.ListPodSandboxRequest())).items
        assert item.id == three
        await client.remove_pod(three)
    assert own_daemon.leftovers() == []
    assert (aside / one / "record.json").exists() and (aside / two / "record.json").exists()


CHECKED = """#!/bin/sh
case $CNI_COMMAND in
  ADD) exec python3 -c 'import json, sys; print(json.dumps(json.load(sys.stdin)["prevResult"]))' ;;
  CHECK) echo $$ >FOLDER/new; mv FOLDER/new FOLDER/checking; exec sleep 30 ;;
  DEL) kill -0 $(cat FOLDER/checking); echo $? >FOLDER/over ;;
esac
"""


async def test_a_pod_is_removed_while_its_network_is_checked(own_daemon: Daemon, tmp_path: Path) -> None:
    """No plugin is called twice at once for one pod (CNI's section 2): the CHECK after a restart gives way."""
    own_daemon.add_plugin("checked", CHECKED.replace("FOLDER", str(tmp_path)))
    own_daemon.network.write(own_daemon.network.bridge_plugin(), {"type": "checked"})
    async with client_of(own_daemon, "host") as client:
        await client.load_busybox()
        pod = await client.run_pod()
    own_daemon.kill_daemon()
    async with client_of(own_daemon, "host") as client:
        async with asyncio.timeout(AGAIN):
            while not (tmp_path / "checking").exists():
                await asyncio.sleep(0.05)
        await client.remove_pod(pod)
    assert (tmp_path / "over").read_text() == "1\n", "its process was gone"
    assert own_daemon.leftovers() == []


SLOW_IPTABLES = """#!/bin/sh
if [ -e FOLDER/slow ]; then
  touch FOLDER/waits
  while [ -e FOLDER/slow ]; do sleep 0.05; done
fi
exec /usr/sbin/${0##*/} "$@"
"""


async def test_the_daemon_killed_while_a_plugin_takes_its_rules_away(
    own_daemon: Daemon, tmp_path: Path
) -> None:
    """bridge removes the interface first, and finds the rules of ipMasq by its addresses only."""
    for name in ("iptables", "ip6tables"):
        (tmp_path / name).write_text(SLOW_IPTABLES.replace("FOLDER", str(tmp_path)))
        (tmp_path / name).chmod(0o755)
    own_daemon.stop()
    own_daemon.start(PATH=f"{tmp_path}:{os.environ['PATH']}")
    own_daemon.network.write(own_daemon.network.bridge_plugin(ipMasq=True))
    async with client_of(own_daemon, "host") as client:
        pod = await client.run_pod()
        (tmp_path / "slow").touch()
        stop = asyncio.create_task(client.remove_pod(pod))
        async with asyncio.timeout(AGAIN):
            while not (tmp_path / "waits").exists():
                await asyncio.sleep(0.05)
        os.kill(own_daemon.pid(), signal.SIGKILL)
        (tmp_path / "slow").unlink()
        own_daemon.wait_ready()
        await asyncio.gather(stop, return_exceptions=True)
    async with client_of(own_daemon, "host") as client:
        await client.remove_pod(pod)
    assert own_daemon.leftovers() == []


async def test_the_daemon_killed_at_every_step(own_daemon: Daemon) -> None:
    names = (name for name in failpoints.NAMES if name not in failpoints.OF_VMS)
    await killed_at_every_step(own_daemon, names, "host")


async def userns_life(client: Cri) -> None:
    await life(client, await usernskit.run_pod(client), usernskit.volume(client.daemon.logs))


async def test_the_daemon_killed_while_it_makes_a_user_namespace(own_daemon: Daemon) -> None:
    names = ("sandbox.netns", "sandbox.agent-started", "container.mounted")
    await killed_at_every_step(own_daemon, names, "host", userns_life)


async def test_a_container_whose_record_cannot_be_read_is_ended(own_daemon: Daemon) -> None:
    """Nobody lists it, so nobody would ever stop it: and who makes it anew would have it twice."""
    async with client_of(own_daemon, "host") as client:
        await client.load_busybox()
        pod = await client.run_pod()
        kept = await client.sh(pod, COUNTER)
        lost = await client.sh(pod, f"exec sleep {(nap := unique_nap())}")
        async with asyncio.timeout(AGAIN):
            while not running("sleep", nap):  # a moment after its start it is that
                await asyncio.sleep(0.05)
    (own_daemon.state / "containers" / lost / "record.json").write_text('{"from": "the future"}')
    own_daemon.kill_daemon()
    async with client_of(own_daemon, "host") as client:
        async with asyncio.timeout(AGAIN):
            while running("sleep", nap):
                await asyncio.sleep(0.05)
        listed = await client.runtime.list_containers(cri.ListContainersRequest())
        assert [one.id for one in listed.containers] == [kept]
        await goes_on(client, kept)
        await client.remove_pod(pod)
    shutil.rmtree(own_daemon.state / "unreadable")
    assert own_daemon.leftovers() == []


def unique_nap() -> str:
    """Seconds that no other process of this host sleeps."""
    return str(10_000_000 + secrets.randbelow(10_000_000))


def running(*argv: str) -> list[int]:
    """Processes of the host with this command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "cmdline").read_bytes() == b"\0".join(word.encode() for word in argv) + b"\0":
                found.append(int(entry.name))
    return found


async def test_an_exit_is_told_with_the_whole_log_also_when_the_shim_dies(own_daemon: Daemon) -> None:
    async with client_of(own_daemon, "host") as client:
        await client.load_busybox()
        pod = await client.run_pod()
        container = await client.sh(
            pod, "trap 'seq 9000; exit 3' TERM; echo up; while :; do sleep 0.05; done"
        )
        while not await client.log(container):
            await asyncio.sleep(0.02)
        shim = process_of(own_daemon, "shim", pod)
        os.kill(shim, signal.SIGSTOP)
        stopping = asyncio.ensure_future(client.stop(container, timeout=30))
        await asyncio.sleep(1.0)  # the exit is reported, and waits for the log
        os.kill(shim, signal.SIGKILL)
        await stopping
        status = await client.status(container)
        log = await client.log(container)
        assert (status.exit_code, status.reason) == (3, "Error")
        assert [text for _, _, text in log] == ["up", *map(str, range(1, 9001))]
        await client.remove_pod(pod)
    assert own_daemon.leftovers() == []


async def test_on_a_full_disk_pods_end_and_make_room(own_daemon: Daemon) -> None:
    """The tenant that fills it must not be the one that cannot be stopped and removed for want of room."""
    one = own_daemon
    one.stop()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,mode=711", "none", one.state], check=True)
    try:
        one.start()
        async with client_of(one, "host") as client:
            await client.load_busybox()
            pod, other = await client.run_pod(), await client.run_pod()
            kept = await client.sh(other, "sleep 600")
            container = await client.sh(pod, "sleep 600")
            short = await client.create(pod, "/bin/sh", "-c", "exit 5")
            fill(one.state / "fill")
            with pytest.raises(GRPCError) as info:
                await client.create(pod, "true")
            assert info.value.status is Status.RESOURCE_EXHAUSTED
            await client.stop(container)
            assert (await client.status(container)).exit_code == 137
            fill(one.state / "fill")
            await client.runtime.remove_container(cri.RemoveContainerRequest(container_id=container))
            fill(one.state / "fill")
            await client.runtime.stop_pod_sandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod))
            assert (await client.status(short)).state == cri.ContainerState.CONTAINER_EXITED
            fill(one.state / "fill")
            await client.runtime.stop_pod_sandbox(cri.StopPodSandboxRequest(pod_sandbox_id=other))
        # What could not be written is found out by the next daemon.
        one.kill_daemon()
        async with client_of(one, "host") as client:
            pods = (await client.runtime.list_pod_sandbox(cri.ListPodSandboxRequest())).items
            assert {p.id: p.state for p in pods} == dict.fromkeys(
                (pod, other), cri.PodSandboxState.SANDBOX_NOTREADY
            )
            for ended in (short, kept):
                assert (await client.status(ended)).state == cri.ContainerState.CONTAINER_EXITED
            for ident in (pod, other):
                await client.remove_pod(ident)
        assert [line for line in one.leftovers() if f"{one.state} tmpfs" not in line] == []
    finally:
        one.destroy()
        subprocess.run(["umount", "-l", one.state], check=True)


def fill(path: Path) -> None:
    """What is left of the file system, to the last byte."""
    with contextlib.suppress(OSError), path.open("ab", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while file.write(b"x" * size):
                    pass
