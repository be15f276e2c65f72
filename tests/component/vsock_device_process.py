"""A process with one device: `python -m tests.component.vsock_device_process DIRECTORY FD [resume] [uid=N]`.

Sends every state and its descriptors over FD, a SEQPACKET socket; with `resume` it first reads one from there. With
`uid` it becomes that user once all modules are loaded, which may lie where only root can read them.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from typing import Any

from hyperpod.vsock.device import VsockDevice
from tests.component.vsock_guest import GUEST_CID


async def main(directory: str, fd: int, resume: bool) -> None:
    keeper = socket.socket(fileno=fd)

    def keep(state: dict[str, Any], fds: list[int]) -> None:
        socket.send_fds(keeper, [json.dumps(state).encode()], fds)

    paths = f"{directory}/vhost.sock", f"{directory}/vsock.sock"
    if resume:
        data, fds, _, _ = socket.recv_fds(keeper, 65536, 32)
        device = VsockDevice.resume(json.loads(data), fds, *paths, on_state_change=keep)
    else:
        device = VsockDevice(GUEST_CID, *paths, on_state_change=keep)
    await device.start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    for user in (int(word.removeprefix("uid=")) for word in sys.argv[3:] if word.startswith("uid=")):
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), "resume" in sys.argv[3:]))
