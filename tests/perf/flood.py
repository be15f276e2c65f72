"""`python -m tests.perf.flood URL...`: takes what exec sessions send, as fast as it comes, until its input ends.

Prints "started" when every session has sent something, and the bytes of all at the end. A process of its own, so
that who measures the daemon beside it does not wait for its own reading.
"""

from __future__ import annotations

import asyncio
import sys

from tests.streamkit import Command


async def main(urls: list[str]) -> None:
    total, silent = 0, len(urls)
    all_send = asyncio.Event()

    async def take(url: str) -> None:
        nonlocal total, silent
        command = await Command.open(url)
        assert command.stdout is not None
        first = True
        while data := await command.stdout.read():
            total += len(data)
            if first:
                first, silent = False, silent - 1
                if silent == 0:
                    all_send.set()

    tasks = [asyncio.ensure_future(take(url)) for url in urls]
    await all_send.wait()
    total = 0
    print("started", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    print(total, flush=True)
    assert not any(task.done() for task in tasks), "a session ended by itself"
    for task in tasks:
        task.cancel()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
