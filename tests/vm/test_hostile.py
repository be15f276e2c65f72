"""Tenants that fork without end, eat memory and disk, flood outputs, freeze or kill their machine."""

from __future__ import annotations

import asyncio
import os
import signal
import struct

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from hyperpod.api.gen.runtime import v1 as cri
from tests.daemonkit import PATIENCE, Cri, eventually

pytestmark = pytest.mark.vm

EAFNOSUPPORT = 97
SIGKILLED = 137


def qemu_of(client: Cri, pod: str) -> int:
    [line] = [p for p in client.daemon.processes() if "qemu-system" in p and pod[:12] in p]
    return int(line.split()[0])


async def works(client: Cri, pod: str) -> None:
    """A new container in this pod runs, and its output arrives."""
    container = await client.sh(pod, "echo fine")
    assert (await client.wait(container)).exit_code == 0
    assert await client.log(container) == [("stdout", "F", "fine")]


async def test_a_fork_bomb_is_stopped_and_harms_nobody(cri_client: Cri, pod: str) -> None:
    other = await cri_client.run_pod()
    bomb = await cri_client.sh(pod, "echo lit; b() { b | b & }; b; while :; do b; done 2>/dev/null")
    await cri_client.logged(bomb, "lit")
    await asyncio.sleep(3)
    await works(cri_client, other)
    async with asyncio.timeout(PATIENCE):
        await cri_client.stop(bomb)
    status = await cri_client.status(bomb)
    assert status.state == cri.ContainerState.CONTAINER_EXITED
    assert status.exit_code == SIGKILLED, "its guest was alive enough to kill it and to say so"
    await works(cri_client, pod)
    await cri_client.sh(pod, "b() { b | b & }; b; while :; do b; done 2>/dev/null")
    async with asyncio.timeout(PATIENCE):
        await cri_client.remove_pod(pod)
    await works(cri_client, other)


async def test_a_frozen_guest_loses_its_vm(cri_client: Cri) -> None:
    """StopContainer promises an end. What cannot be reached ends with its machine, in bounded time."""
    pod = await cri_client.run_pod()
    container = await cri_client.sh(pod, "sleep 600")
    neighbour = await cri_client.sh(pod, "sleep 600")
    os.kill(qemu_of(cri_client, pod), signal.SIGSTOP)
    async with asyncio.timeout(PATIENCE):
        await cri_client.stop(container)
    for one in (container, neighbour):  # nobody asked for the neighbour's end: it is told why
        status = await cri_client.status(one)
        assert (status.exit_code, status.reason) == (255, "Unknown")
        assert f"container {container[:12]} did not end within 20 s of SIGKILL" in status.message
    await cri_client.remove_pod(pod)


async def test_an_exec_ends_with_its_machine(cri_client: Cri) -> None:
    pod = await cri_client.run_pod()
    container = await cri_client.sh(pod, "sleep 600")
    running = asyncio.ensure_future(cri_client.exec(container, "sleep", "500", timeout=0))
    while b"sleep 500" not in (await cri_client.exec(container, "ps")).stdout:
        await asyncio.sleep(0.1)
    os.kill(qemu_of(cri_client, pod), signal.SIGKILL)
    with pytest.raises(GRPCError) as info:
        await asyncio.wait_for(running, PATIENCE)
    assert info.value.status is Status.UNAVAILABLE
    await cri_client.wait(container)
    with pytest.raises(GRPCError) as info:
        await cri_client.exec(container, "true")
    assert info.value.status is Status.FAILED_PRECONDITION
    await cri_client.remove_pod(pod)


@pytest.mark.parametrize("limit_mib", [32, 0], ids=["its own limit", "all of the pod"])
async def test_memory_without_end_is_oom_killed(cri_client: Cri, pod: str, limit_mib: int) -> None:
    neighbour = await cri_client.sh(pod, "sleep 600")
    linux = cri.LinuxContainerConfig(
        resources=cri.LinuxContainerResources(memory_limit_in_bytes=limit_mib << 20)
    )
    eater = await cri_client.run(pod, "/bin/awk", 'BEGIN { s = "x"; while (1) s = s s }', linux=linux)
    status = await cri_client.wait(eater)
    assert (status.exit_code, status.reason) == (SIGKILLED, "OOMKilled")
    assert (await cri_client.exec(neighbour, "echo", "alive")).stdout == b"alive\n"
    await works(cri_client, pod)


def full(log: list[tuple[str, str, str]]) -> bool:
    said = [text for _, _, text in log]
    return any("No space left" in text for text in said) and any(text.startswith("code") for text in said)


async def test_a_full_disk_is_the_writers_problem(cri_client: Cri, pod: str) -> None:
    neighbour = await cri_client.sh(pod, "sleep 600")
    writer = await cri_client.sh(pod, "dd if=/dev/zero of=/big bs=1M count=2000; echo code $?; sleep 600")
    # Two streams, so what dd complains of may be in the log before or after what the shell says of its code.
    said = [text for _, _, text in await eventually(lambda: cri_client.log(writer), full)]
    assert "code 1" in said
    assert (await cri_client.exec(neighbour, "echo", "alive")).stdout == b"alive\n"
    await cri_client.runtime.remove_container(cri.RemoveContainerRequest(container_id=writer))
    reply = await cri_client.exec(
        neighbour, "/bin/sh", "-c", "head -c 50000000 /dev/zero > /mine && echo room"
    )
    assert reply.stdout == b"room\n"


async def test_output_without_end_is_refused_and_its_writer_killed(cri_client: Cri, pod: str) -> None:
    container = await cri_client.sh(pod, "sleep 600")
    with pytest.raises(GRPCError) as info:
        await cri_client.exec(container, "/bin/sh", "-c", "cat /dev/zero", timeout=0)
    assert info.value.status is Status.RESOURCE_EXHAUSTED
    left = await cri_client.exec(container, "ps")
    assert b"cat" not in left.stdout


async def test_a_grandchild_that_holds_the_pipe(cri_client: Cri, pod: str) -> None:
    container = await cri_client.sh(pod, "sleep 600")
    async with asyncio.timeout(PATIENCE):
        reply = await cri_client.exec(container, "/bin/sh", "-c", "sleep 501 & echo done", timeout=0)
    assert (reply.stdout, reply.exit_code) == (b"done\n", 0)
    assert b"sleep 501" not in (await cri_client.exec(container, "ps")).stdout


async def test_many_execs_at_once(cri_client: Cri, pod: str) -> None:
    container = await cri_client.sh(pod, "sleep 600")
    replies = await asyncio.gather(
        *(
            cri_client.exec(container, "/bin/sh", "-c", f"echo {n}; echo e{n} >&2; exit {n}", timeout=0)
            for n in range(20)
        )
    )
    for n, reply in enumerate(replies):
        assert (reply.stdout, reply.stderr, reply.exit_code) == (b"%d\n" % n, b"e%d\n" % n, n)


def socket_program(family: int, *, compat: bool = False) -> bytes:
    """A static x86-64 ELF that exits with 256 - fd of socket(family, SOCK_STREAM, 0), or with its errno.

    `compat`: through the 32-bit system call entry, which filters of 64-bit numbers do not see."""
    if compat:  # mov eax,359; mov ebx,family; mov ecx,1; xor edx,edx; int 0x80
        call = b"\xb8" + struct.pack("<I", 359) + b"\xbb" + struct.pack("<I", family)
        call += b"\xb9\x01\0\0\0\x31\xd2\xcd\x80"
    else:  # mov eax,41; mov edi,family; mov esi,1; xor edx,edx; syscall
        call = b"\xb8" + struct.pack("<I", 41) + b"\xbf" + struct.pack("<I", family)
        call += b"\xbe\x01\0\0\0\x31\xd2\x0f\x05"
    code = call + b"\xf7\xd8\x89\xc7\xb8\x3c\0\0\0\x0f\x05"  # neg eax; mov edi,eax; mov eax,60; syscall
    base, start = 0x400000, 64 + 56
    size = start + len(code)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, base + start, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return header + struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 4096) + code


async def test_sockets_towards_the_host_are_denied(cri_client: Cri, pod: str) -> None:
    container = await cri_client.sh(pod, "sleep 600")

    async def outcome(family: int, *, compat: bool = False) -> int:
        octal = "".join(f"\\{byte:03o}" for byte in socket_program(family, compat=compat))
        script = f"printf '{octal}' > /p && chmod 700 /p && exec /p"
        return (await cri_client.exec(container, "/bin/sh", "-c", script)).exit_code

    assert await outcome(1) == 256 - 3, "AF_UNIX: the program itself works"
    assert await outcome(40) == EAFNOSUPPORT, "AF_VSOCK"
    assert await outcome(38) == EAFNOSUPPORT, "AF_ALG"
    assert await outcome(40, compat=True) > 128, "the other system call table kills"
