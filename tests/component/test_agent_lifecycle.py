"""Containers of an agent from create to remove, with real crun; nothing here depends on the transport."""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
from dataclasses import replace

import pytest

from hyperpod.agentclient.types import AgentContainerState, Layer, Security, UserInfo
from hyperpod.errors import (
    FailedPrecondition,
    HyperpodError,
    InvalidArgument,
    NotFound,
)
from hyperpod.model.security import LinuxResources
from hyperpod.spec.oci import ContainerSpecInput, build_process, build_spec
from tests.agentkit import TIMEOUT, AgentKit

HUNGRY = ("tail", "/dev/zero")
"""Takes memory until it is killed. Not one read(2) of dd's, which any signal makes a short one."""


async def test_hello_tells_of_the_place(agent: AgentKit) -> None:
    hello = await agent.client.hello(host_time_ns=0, entropy=b"", hostname="", sysctls={})
    assert hello.api_version == 1
    assert hello.crun_version.startswith("1.")
    assert hello.memory_total_bytes > 64 << 20
    assert len(hello.boot_id) == 36
    assert hello.cpus >= 1


async def test_runs_prints_and_ends(agent: AgentKit) -> None:
    ident = await agent.create("sh", "-c", "echo out; echo err >&2; exit 7")
    assert [c.state for c in await agent.client.list_containers()] == [AgentContainerState.CREATED]
    async with agent.output(ident) as out, agent.output(ident, stream="stderr") as err:
        assert await agent.client.start_container(ident) > 0
        assert await out.read_all() == b"out\n"
        assert await err.read_all() == b"err\n"
    info = await agent.exit_of(ident)
    assert (info.exit_code, info.oom_killed, info.exited) == (7, False, True)
    assert info.started_at_ns <= info.finished_at_ns
    assert await agent.client.list_containers() == [info]
    await agent.client.remove_container(ident)
    assert await agent.client.list_containers() == []


@pytest.mark.parametrize("code", [0, 1, 127, 255])
async def test_exit_codes(agent: AgentKit, code: int) -> None:
    _, info, _ = await agent.run("sh", "-c", f"exit {code}")
    assert info.exit_code == code


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGRTMIN + 3])
async def test_signals_end_it_with_their_code(agent: AgentKit, number: int) -> None:
    # The first process of a pid namespace ignores what it has no handler for: hence the trap's default shell.
    script = f"trap 'exit {128 + number}' {number}; echo ready; while :; do sleep 0.05; done"
    ident = await agent.start("sh", "-c", script)
    async with agent.output(ident) as out:
        await out.read_until(b"ready")
        await agent.client.signal_container(ident, number)
    assert (await agent.exit_of(ident)).exit_code == 128 + number


async def test_signal_to_all(agent: AgentKit) -> None:
    ident = await agent.start("sh", "-c", "sleep 1000 & sleep 1000 & echo ready; wait; echo over; exit 5")
    async with agent.output(ident) as out:
        await out.read_until(b"ready")
        await agent.client.signal_container(ident, signal.SIGTERM, all_processes=True)
        assert b"over" in await out.read_all()
    assert (await agent.exit_of(ident)).exit_code == 5


async def test_kill_all_of_a_forking_container(agent: AgentKit) -> None:
    ident = await agent.start("sh", "-c", "echo ready; while :; do sleep 0.5 & sleep 0.02; done")
    async with agent.output(ident) as out:
        await out.read_until(b"ready")
    await agent.client.signal_container(ident, signal.SIGKILL, all_processes=True)
    assert (await agent.exit_of(ident)).exit_code == 137


async def test_the_container_reaps_its_own_zombies_or_they_go_with_it(agent: AgentKit) -> None:
    # Orphans of exec'd shells become children of the container's first process, which never waits for them.
    ident = await agent.start("sh", "-c", "echo ready; exec sleep 1000")
    async with agent.output(ident) as out:
        await out.read_until(b"ready")
    codes = []
    for code in range(8):
        exec_id = await agent.exec(
            ident, "sh", "-c", f"for i in 1 2 3 4 5; do sh -c 'sleep 0.01 &'; done; exit {code}"
        )
        codes.append(await agent.client.wait_exec(ident, exec_id, timeout=TIMEOUT))
        await agent.client.remove_exec(ident, exec_id)
    assert codes == list(range(8))
    await agent.client.signal_container(ident, signal.SIGKILL)
    assert (await agent.exit_of(ident)).exit_code == 137


async def test_twenty_at_once_keep_their_exit_codes(agent: AgentKit) -> None:
    idents = [await agent.create("sh", "-c", f"exit {i}") for i in range(20)]
    await asyncio.gather(*(agent.client.start_container(i) for i in idents))
    codes = await asyncio.gather(*(agent.exit_of(i) for i in idents))
    assert [c.exit_code for c in codes] == list(range(20))


@pytest.mark.parametrize("program", ["/nonexistent", "nonexistent"])
async def test_missing_program_is_not_found_and_leaves_it_created(agent: AgentKit, program: str) -> None:
    ident = await agent.create(program)
    for _ in range(2):
        with pytest.raises(NotFound, match="nonexistent"):
            await agent.client.start_container(ident)
    (info,) = await agent.client.list_containers()
    assert info.state is AgentContainerState.CREATED
    await agent.client.remove_container(ident)


@pytest.mark.parametrize(
    ("program", "words"), [("/etc/notes", "executable"), ("/etc", "executable|not a regular file")]
)
async def test_what_is_no_program_is_refused(agent: AgentKit, program: str, words: str) -> None:
    ident = await agent.create(program)
    with pytest.raises(FailedPrecondition, match=words):
        await agent.client.start_container(ident)


async def test_environment_directory_and_user(agent: AgentKit) -> None:
    spec = ContainerSpecInput(
        args=("sh", "-c", "pwd; id -u; id -g; id -G; echo $GREETING"),
        env=(b"PATH=/bin", "GREETING=grüße 'x' \"y\" \\n $z\t".encode()),
        cwd="/tmp",
        uid=1234,
        gid=2345,
        additional_gids=(7, 8),
    )
    _, info, out = await agent.run(spec=spec)
    assert info.exit_code == 0
    assert out.decode() == "/tmp\n1234\n2345\n2345 7 8\ngrüße 'x' \"y\" \\n $z\n"


async def test_the_root_is_the_container_s_own(agent: AgentKit) -> None:
    for _ in range(2):  # the second sees nothing of the first's file
        _, info, out = await agent.run("sh", "-c", "ls /tmp; echo x > /tmp/file && cat /tmp/file")
        assert (info.exit_code, out) == (0, b"x\n")


async def test_read_only_root(agent: AgentKit) -> None:
    spec = ContainerSpecInput(args=("sh", "-c", "echo x > /file || echo refused"), readonly_rootfs=True)
    _, _, out = await agent.run(spec=spec)
    assert out == b"refused\n"


async def test_standard_devices_work_and_others_do_not(agent: AgentKit) -> None:
    script = "echo x > /dev/null && head -c 3 /dev/zero | wc -c; echo y > /dev/stdout; ls /dev/disk 2>&1"
    _, _, out = await agent.run("sh", "-c", script)
    assert out.startswith(b"3\ny\n")
    assert b"No such file" in out


async def test_isolation_of_processes_and_capabilities(agent: AgentKit) -> None:
    _, _, out = await agent.run(
        "sh", "-c", "echo $$; ps | wc -l; grep CapEff /proc/self/status || cat /proc/1/status"
    )
    pid, processes = out.split()[:2]
    assert pid == b"1"
    assert int(processes) <= 4
    assert b"00000000a80425fb" in out


async def test_memory_limit_kills_and_is_told(agent: AgentKit) -> None:
    assert agent.place.memory_limits
    spec = ContainerSpecInput(
        args=HUNGRY,
        resources=LinuxResources(memory_limit=32 << 20),
    )
    _, info, _ = await agent.run(spec=spec)
    assert (info.oom_killed, info.exit_code) == (True, 137)


async def test_wrong_states_and_ids(agent: AgentKit) -> None:
    ident = await agent.create("sleep", "1000")
    with pytest.raises(FailedPrecondition, match="CREATED"):
        await agent.client.signal_container(ident, 9)
    with pytest.raises(FailedPrecondition, match="CREATED"):
        await agent.exec(ident, "true")
    await agent.client.start_container(ident)
    with pytest.raises(InvalidArgument, match="signal 65"):
        await agent.client.signal_container(ident, 65)
    unknown = "0" * 64
    for call in (agent.client.start_container(unknown), agent.client.signal_container(unknown, 9)):
        with pytest.raises(NotFound):
            await call
    await agent.client.remove_container(unknown)
    with pytest.raises(InvalidArgument):
        await agent.client.create_container("../../x", oci_spec=b"{}", layers=agent.place.layers)


@pytest.mark.parametrize("spec", [b"", b"[]", b"{}", b"\xff", b'{"root":1}', b"[" * 100_000])
async def test_malformed_specs_leave_nothing(agent: AgentKit, spec: bytes) -> None:
    with pytest.raises(InvalidArgument):
        await agent.client.create_container(secrets.token_hex(32), oci_spec=spec, layers=agent.place.layers)
    assert await agent.client.list_containers() == []
    await agent.client.forget_layers([layer.serial for layer in agent.place.layers])


async def test_what_is_asked_again_is_done_once(agent: AgentKit) -> None:
    """Whoever lost an answer asks again."""
    ident = secrets.token_hex(32)
    spec = build_spec(ContainerSpecInput(args=("sleep", "1000"), env=(b"PATH=/bin",)))

    async def create() -> UserInfo | None:
        return await agent.client.create_container(
            ident, oci_spec=spec, layers=agent.place.layers, security=Security(user="5:6")
        )

    first, second = await asyncio.gather(create(), create())
    assert first is not None and first == second == await create()
    pids = await asyncio.gather(*(agent.client.start_container(ident) for _ in range(3)))
    assert len(set(pids)) == 1 and pids[0] > 0
    assert await agent.client.start_container(ident) == pids[0]
    await agent.client.signal_container(ident, 9)
    assert (await agent.exit_of(ident)).exit_code == 137
    await agent.client.start_container(ident)
    [info] = await agent.client.list_containers()
    assert info.exited, "one that has ended is not started a second time"
    await agent.client.remove_container(ident)
    await agent.client.forget_layers([layer.serial for layer in agent.place.layers])


async def test_bad_layers_are_refused(agent: AgentKit) -> None:
    spec = build_spec(ContainerSpecInput(args=("true",)))
    good = agent.place.layers[-1]
    for layers in ([], [Layer(good.serial + "x", good.path, "ext4")], [Layer("y", good.path, "erofs")]):
        with pytest.raises(HyperpodError):
            await agent.client.create_container(secrets.token_hex(32), oci_spec=spec, layers=layers)
    assert await agent.client.list_containers() == []


async def test_layers_are_kept_while_in_use(agent: AgentKit) -> None:
    serials = [layer.serial for layer in agent.place.layers]
    ident = await agent.create("true")
    with pytest.raises(FailedPrecondition, match="in use"):
        await agent.client.forget_layers(serials)
    await agent.client.remove_container(ident)
    await agent.client.forget_layers(serials)
    await agent.client.forget_layers([*serials, "unknown"])
    _, info, _ = await agent.run("true")
    assert info.exit_code == 0


async def test_remove_while_running_and_while_starting(agent: AgentKit) -> None:
    running = await agent.start("sh", "-c", "trap '' TERM; sleep 1000 & sleep 1000")
    await agent.client.remove_container(running)
    starting = await agent.create("sleep", "1000")
    start = asyncio.ensure_future(agent.client.start_container(starting))
    await asyncio.sleep(0)
    await agent.client.remove_container(starting)
    await asyncio.gather(start, return_exceptions=True)
    assert await agent.client.list_containers() == []


async def test_a_deep_and_wide_tree_is_removed(agent: AgentKit) -> None:
    script = "cd /tmp; for i in $(seq 1200); do mkdir d && cd d || exit 1; echo x > f; done; echo $i"
    ident, info, out = await agent.run("sh", "-c", script)
    assert (info.exit_code, out) == (0, b"1200\n")
    await agent.client.remove_container(ident)


async def test_events_resume_where_another_client_left(agent: AgentKit) -> None:
    before = (await agent.client.hello(host_time_ns=0, entropy=b"", hostname="", sysctls={})).event_seq
    first, _, _ = await agent.run("true")
    second, _, _ = await agent.run("false")
    other = await agent.another_client()
    try:
        seen = []
        async for event in other.events(before):
            seen.append((event.seq, event.exited.id))
            if len(seen) == 2:
                break
        assert seen == [(before + 1, first), (before + 2, second)]
        async for event in other.events(before + 1):
            assert event.exited.id == second
            break
    finally:
        await other.close()


async def test_an_exec_killed_for_want_of_memory_is_told_of_its_container(agent: AgentKit) -> None:
    spec = ContainerSpecInput(
        args=("sh", "-c", "echo up; read x; exit 0"), resources=LinuxResources(memory_limit=32 << 20)
    )
    ident = await agent.create(spec=spec, stdin=True)
    await agent.client.start_container(ident)
    async with agent.output(ident) as out:
        await out.read_until(b"up")
    exec_id = await agent.exec(ident, *HUNGRY)
    assert await agent.client.wait_exec(ident, exec_id, timeout=TIMEOUT) == 137
    await agent.client.remove_exec(ident, exec_id)
    async with agent.input(ident) as stdin:
        await stdin.write(b"\n")
    info = await agent.exit_of(ident)
    assert (info.oom_killed, info.exit_code) == (True, 0)


async def test_a_child_killed_for_want_of_memory_is_told(agent: AgentKit) -> None:
    for _ in range(3):
        spec = ContainerSpecInput(
            args=("sh", "-c", f"{' '.join(HUNGRY)}; exit 3"),
            resources=LinuxResources(memory_limit=32 << 20, memory_swap_limit=32 << 20),
        )
        _, info, _ = await agent.run(spec=spec)
        assert (info.oom_killed, info.exit_code) == (True, 3)


async def test_limits_are_updated_before_and_after_the_start(agent: AgentKit) -> None:
    limit = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>&-; true"
    ident = await agent.create("sh", "-c", f"{limit}; echo up; sleep 1000")
    await agent.client.update_container(ident, json.dumps({"memory": {"limit": 64 << 20}}).encode())
    await agent.client.start_container(ident)
    async with agent.output(ident) as out:
        assert (await out.read_until(b"up")).startswith(str(64 << 20).encode())
    await agent.client.update_container(ident, json.dumps({"memory": {"limit": 96 << 20}}).encode())
    exec_id = await agent.exec(ident, "sh", "-c", limit)
    async with agent.output(ident, exec_id) as out:
        assert (await out.read_all()).strip() == str(96 << 20).encode()
    await agent.client.signal_container(ident, signal.SIGKILL)
    await agent.exit_of(ident)
    with pytest.raises(FailedPrecondition, match="has ended"):
        await agent.client.update_container(ident, b"{}")
    with pytest.raises(NotFound):
        await agent.client.update_container("0" * 64, b"{}")
    with pytest.raises(InvalidArgument):
        await agent.client.update_container(ident, b"[]")


async def test_huge_pages_and_swap_that_are_not_there(agent: AgentKit) -> None:
    none = LinuxResources(
        memory_limit=64 << 20, memory_swap_limit=64 << 20, hugepage_limits=(("512GB", 0), ("2MB", 0))
    )
    _, info, _ = await agent.run(spec=ContainerSpecInput(args=("true",), resources=none))
    assert info.exit_code == 0
    some = LinuxResources(hugepage_limits=(("512GB", 1 << 40),))
    with pytest.raises(InvalidArgument, match="no huge pages of 512GB"):
        await agent.create(spec=ContainerSpecInput(args=("true",), resources=some))


async def test_execs_have_the_score_of_their_container_from_the_start(agent: AgentKit) -> None:
    spec = ContainerSpecInput(args=("sleep", "1000"), resources=LinuxResources(oom_score_adj=700))
    ident = await agent.create(spec=spec)
    await agent.client.start_container(ident)
    process = build_process(replace(spec, args=("cat", "/proc/self/oom_score_adj"), env=(b"PATH=/bin",)))
    for _ in range(5):
        exec_id = secrets.token_hex(16)
        await agent.client.start_exec(ident, exec_id, process_json=process)
        async with agent.output(ident, exec_id) as out:
            assert await out.read_all() == b"700\n"
    plain = await agent.exec(ident, "cat", "/proc/self/oom_score_adj")
    async with agent.output(ident, plain) as out:
        assert await out.read_all() != b"700\n", "the agent's own score is as before"
