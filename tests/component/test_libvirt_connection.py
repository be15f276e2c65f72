"""The connection's promises against libvirt itself: its test driver for threads and errors, its QEMU driver for
who may open which root."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from hyperpod.errors import DeadlineExceeded, FailedPrecondition, HyperpodError, NotFound, Unavailable
from hyperpod.hypervisor.connection import QEMU_CONF, URGENT, WORKERS, Connection

EVENTS: list[tuple[str, int, int]] = []


@pytest.fixture
async def connection() -> AsyncIterator[Connection]:
    """Each open of test:///default has one running domain, `test`."""
    EVENTS.clear()
    one = Connection("test:///default", None)
    await one.open(lambda *event: EVENTS.append(event), lambda: None)
    yield one
    await one.close()


async def test_events_arrive_on_the_loop(connection: Connection) -> None:
    loop_thread = threading.get_ident()
    seen: list[int] = []
    arrived = asyncio.Event()
    other = Connection("test:///default", None)

    def on_event(*_: object) -> None:
        seen.append(threading.get_ident())
        arrived.set()

    await other.open(on_event, lambda: None)
    await other.call("suspending", lambda conn: conn.lookupByName("test").suspend())
    async with asyncio.timeout(10):
        await arrived.wait()
    assert seen == [loop_thread]
    await other.close()


async def test_errors_are_ours_and_name_the_call(connection: Connection) -> None:
    with pytest.raises(NotFound, match="looking for ghost"):
        await connection.call("looking for ghost", lambda conn: conn.lookupByName("ghost"))
    await connection.call("stopping", lambda conn: conn.lookupByName("test").destroy())
    with pytest.raises(FailedPrecondition, match="asking: .*not running"):
        await connection.call("asking", lambda conn: conn.lookupByName("test").memoryStats())
    with pytest.raises(HyperpodError, match="bad XML"):
        await connection.call("bad XML", lambda conn: conn.createXML("<domain/>", 0))


async def test_urgent_calls_pass_when_all_ordinary_workers_hang(connection: Connection) -> None:
    release, hung = threading.Event(), threading.Semaphore(0)

    def hang(_conn: Any) -> None:
        hung.release()
        release.wait(30)

    hanging = [asyncio.create_task(connection.call("hang", hang)) for _ in range(WORKERS * 2)]
    for _ in range(WORKERS - URGENT):
        assert await asyncio.to_thread(hung.acquire, True, 30)
    with pytest.raises(DeadlineExceeded, match="one more took longer"):
        await connection.call("one more", lambda conn: conn.getHostname(), timeout=0.2)
    names = await asyncio.gather(
        *(connection.call("urgent", lambda conn: conn.getHostname(), urgent=True) for _ in range(URGENT * 2))
    )
    assert len(names) == URGENT * 2
    release.set()
    await asyncio.gather(*hanging)
    await connection.call("after", lambda conn: conn.getHostname())


async def test_a_caller_that_leaves_neither_stops_the_call_nor_keeps_its_worker(
    connection: Connection,
) -> None:
    started, release, ended = threading.Event(), threading.Event(), threading.Event()

    def fail_late(conn: Any) -> None:
        started.set()
        release.wait(30)
        try:
            conn.lookupByName("ghost")
        finally:
            ended.set()

    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    for _ in range(WORKERS):
        started.clear()
        release.clear()
        ended.clear()
        call = asyncio.create_task(connection.call("left alone", fail_late))
        assert await asyncio.to_thread(started.wait, 30)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        release.set()
        assert await asyncio.to_thread(ended.wait, 30)
    # One worker each, all of them back: more calls than there are ordinary workers go through.
    await asyncio.gather(*(connection.call("next", lambda conn: conn.getHostname()) for _ in range(WORKERS)))
    gc.collect()
    await asyncio.sleep(0)
    assert complaints == []


async def test_a_closed_connection_says_so(connection: Connection) -> None:
    await connection.close()
    await connection.close()
    with pytest.raises(Unavailable, match="is closed"):
        await connection.call("late", lambda conn: conn.getHostname())


# -- the driver inside this process ---------------------------------------------------------------------------

SCRIPT = """
import asyncio, sys
from pathlib import Path
from hyperpod.errors import HyperpodError
from hyperpod.hypervisor.connection import Connection

async def main(root, action):
    one = Connection(f"qemu:///embed?root={root}", Path(root))
    try:
        await one.open(lambda *_: None, lambda: None)
    except HyperpodError as exc:
        print(type(exc).__name__, exc)
        return
    print("open", await one.call("list", lambda conn: len(conn.listAllDomains(0))), flush=True)
    if action == "hold":
        sys.stdin.readline()
    await one.close()
    if action == "again":
        two = Connection(f"qemu:///embed?root={root}", Path(root))
        await two.open(lambda *_: None, lambda: None)
        print("again", await two.call("list", lambda conn: len(conn.listAllDomains(0))))
        await two.close()

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hp-", dir="/run") as folder:
        yield Path(folder)


def embedded(root: Path, action: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(root), action],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent.parent)},
    )  # fmt: skip


def test_open_close_and_open_again_in_one_process(root: Path) -> None:
    with embedded(root, "again") as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out.split("\n")[:2], err) == (0, ["open 0", "again 0"], "")
    assert (root / "etc" / "qemu.conf").read_text() == QEMU_CONF


def test_one_process_per_root(root: Path) -> None:
    with embedded(root, "hold") as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "open 0\n"
        with embedded(root, "once") as second:
            out, _ = second.communicate(timeout=60)
        first.communicate("\n", timeout=60)
    assert out.startswith("Unavailable opening qemu:///embed"), out
    # The next one may.
    with embedded(root, "once") as third:
        out, _ = third.communicate(timeout=60)
    assert out == "open 0\n"
