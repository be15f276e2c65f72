"""Dial an agent's port and do the preface: the one way in which the host reaches an agent."""

from __future__ import annotations

import asyncio
import os
import socket

from hyperpod.errors import DeadlineExceeded, Unavailable
from hyperpod.vsock.dial import Endpoint, dial
from hyperpod.wire.preface import NONCE_LEN, HostPreface

CONTROL_PORT = 1024
STDIO_PORT = 1025


async def open_agent(
    endpoint: Endpoint, port: int, sandbox_id: str, token: bytes, *, claim: bool = False, timeout: float
) -> tuple[socket.socket, bytes]:
    """A connected, proven, non-blocking socket, and the bytes that were read past the preface.

    Raises Unavailable (nobody there, or it hung up), DeadlineExceeded, ProtocolError (it refused, or it is
    not this sandbox's agent).
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    preface = HostPreface(sandbox_id, token, claim, nonce=os.urandom(NONCE_LEN))
    sock = await dial(endpoint, port, timeout)
    try:
        async with asyncio.timeout_at(deadline):
            await loop.sock_sendall(sock, preface.start())
            while not preface.done:
                data = await loop.sock_recv(sock, 4096)
                if not data:
                    raise Unavailable(f"the agent closed port {port} during the preface")
                if reply := preface.feed(data):
                    await loop.sock_sendall(sock, reply)
    except TimeoutError as exc:
        sock.close()
        raise DeadlineExceeded(f"no preface from the agent on port {port} within {timeout:g} s") from exc
    except OSError as exc:
        sock.close()
        raise Unavailable(f"the connection to the agent's port {port} broke: {exc.strerror}") from exc
    except BaseException:
        sock.close()
        raise
    return sock, preface.trailing
