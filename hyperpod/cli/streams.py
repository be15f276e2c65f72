"""`hyperpod exec`, `attach`, `port-forward` and `console`, as crictl and kubectl have them."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import termios
import threading
import tty
from collections.abc import Iterator

from hyperpod.api.gen.hyperpod.admin.v1 import ConsoleRequest, ShellRequest
from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.cli.client import connect
from hyperpod.cli.streamclient import SpdyClient, Stream
from hyperpod.cli.upgrade import Tls
from hyperpod.config import load
from hyperpod.errors import HyperpodError, InvalidArgument, Unavailable

_PIECE = 64 * 1024


def main(args: argparse.Namespace) -> int:
    commands = {"exec": _command, "attach": _command, "port-forward": _forward, "console": _console}
    _keep_standard_streams()
    try:
        return asyncio.run(commands[args.command](args))
    except BrokenPipeError:  # whoever read our output has gone, as `head` does
        return 128 + signal.SIGPIPE


def _keep_standard_streams() -> None:
    """One that is closed gets a file that ends at once and takes nothing: else our own connection would be it."""
    while (fd := os.open(os.devnull, os.O_RDONLY)) <= 2:
        pass
    os.close(fd)


async def _command(args: argparse.Namespace) -> int:
    flags = {"stdin": args.stdin, "stdout": True, "stderr": not args.tty, "tty": args.tty}
    async with connect(args.endpoint) as client:
        if args.command == "exec":
            request = cri.ExecRequest(container_id=args.container, cmd=args.argv, **flags)
            url = (await client.runtime.exec(request)).url
        else:
            url = (await client.runtime.attach(cri.AttachRequest(container_id=args.container, **flags))).url
    return await _session(url, flags, _tls(args))


def _tls(args: argparse.Namespace) -> Tls:
    """The options, and what they leave open from the configuration's [client]."""
    given = load(args.config, {}).client
    return Tls(
        ca=args.tls_ca or given.tls_ca,
        cert=args.tls_cert or given.tls_cert,
        key=args.tls_key or given.tls_key,
        server_name=args.tls_server_name or given.tls_server_name,
        verify=not args.insecure_skip_tls_verify,
    )


async def _session(url: str, flags: dict[str, bool], tls: Tls | None = None) -> int:
    session = await SpdyClient.connect(url, "v4.channel.k8s.io", tls)
    try:
        names = ("error", "stdin", "stdout", "stderr", "resize")
        wanted = [
            name
            for name in names
            if name == "error" or flags.get(name) or (name == "resize" and flags["tty"])
        ]
        streams = {name: await session.open((("streamtype", name),)) for name in wanted}
        with _raw_terminal(flags["tty"] and flags["stdin"]):
            return await _copy(streams)
    finally:
        await session.close()


async def _copy(streams: dict[str, Stream]) -> int:
    """To the end of the output; gives the exit code."""
    loop = asyncio.get_running_loop()
    if "stdin" in streams:
        threading.Thread(target=_input, args=(loop, streams["stdin"]), daemon=True).start()
    resizing: set[asyncio.Future[None]] = set()
    if "resize" in streams:

        def resize() -> None:
            task = asyncio.ensure_future(_resize(streams["resize"]))
            resizing.add(task)
            task.add_done_callback(resizing.discard)

        resize()
        loop.add_signal_handler(signal.SIGWINCH, resize)
    outputs = [_output(streams[name], fd) for name, fd in (("stdout", 1), ("stderr", 2)) if name in streams]
    telling = asyncio.ensure_future(streams["error"].read_all())
    await asyncio.gather(telling, *outputs)
    return _exit_code(telling.result())


def _input(loop: asyncio.AbstractEventLoop, stream: Stream) -> None:
    """A thread of its own: a terminal cannot be read without blocking, and nobody waits for this one."""
    with contextlib.suppress(HyperpodError, RuntimeError, OSError):
        while data := os.read(0, _PIECE):
            asyncio.run_coroutine_threadsafe(stream.write(data), loop).result()
        asyncio.run_coroutine_threadsafe(stream.end(), loop).result()


async def _output(stream: Stream, fd: int) -> None:
    """Raises HyperpodError: it cannot be written here; BrokenPipeError: nobody reads it any more."""
    with contextlib.suppress(Unavailable):
        while data := await stream.read():
            await asyncio.to_thread(_write, fd, memoryview(data))


def _write(fd: int, data: memoryview) -> None:
    try:
        while data:
            data = data[os.write(fd, data) :]
    except BrokenPipeError:
        raise
    except OSError as exc:
        raise HyperpodError(f"cannot write to {'stdout' if fd == 1 else 'stderr'}: {exc.strerror}") from exc


async def _resize(stream: Stream) -> None:
    columns, rows = shutil.get_terminal_size()
    with contextlib.suppress(HyperpodError):
        await stream.write(json.dumps({"Width": columns, "Height": rows}).encode())


@contextlib.contextmanager
def _raw_terminal(wanted: bool) -> Iterator[None]:
    if not wanted or not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def _exit_code(status: bytes) -> int:
    """Of a metav1.Status. Raises HyperpodError with its message when there is no code."""
    try:
        parsed = json.loads(status)
        if parsed["status"] == "Success":
            return 0
        causes = (parsed.get("details") or {}).get("causes") or []
        for cause in causes:
            if cause.get("reason") == "ExitCode":
                return int(cause["message"])
        message = str(parsed.get("message", "failed"))
    except (ValueError, KeyError, TypeError) as exc:
        raise Unavailable("the session ended without telling how") from exc
    raise HyperpodError(message)


async def _forward(args: argparse.Namespace) -> int:
    pairs = [_pair(text) for text in args.ports]
    async with connect(args.endpoint) as client:
        url = (await client.runtime.port_forward(cri.PortForwardRequest(pod_sandbox_id=args.pod))).url
    session = await SpdyClient.connect(url, "portforward.k8s.io", _tls(args))
    numbers = iter(range(1, 2**31))
    servers = []
    try:
        for local, remote in pairs:

            async def serve(
                reader: asyncio.StreamReader, writer: asyncio.StreamWriter, remote: int = remote
            ) -> None:
                await _connection(session, next(numbers), remote, reader, writer)

            server = await asyncio.start_server(serve, "127.0.0.1", local)
            servers.append(server)
            print(f"Forwarding from 127.0.0.1:{server.sockets[0].getsockname()[1]} -> {remote}", flush=True)
        await session.closed.wait()
        raise Unavailable("lost the connection to the pod")
    except OSError as exc:
        raise Unavailable(f"cannot listen: {exc.strerror}") from exc
    finally:
        for server in servers:
            server.close()
        await session.close()


async def _connection(
    session: SpdyClient, number: int, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    headers = (("port", str(port)), ("requestid", str(number)))
    try:
        error = await session.open((("streamtype", "error"), *headers))
        await error.end()
        data = await session.open((("streamtype", "data"), *headers))
        try:
            if await _both_ways(reader, writer, data) and (text := await error.read_all()):
                print(text.decode(errors="replace"), file=sys.stderr)
        finally:
            await data.reset()
            await error.reset()
    except HyperpodError as exc:
        print(f"hyperpod: {exc}", file=sys.stderr)
    finally:
        writer.close()


async def _both_ways(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: Stream) -> bool:
    """Until both directions have ended, or one has broken. False: it was our client that left."""
    tasks = {asyncio.ensure_future(_up(reader, data)), asyncio.ensure_future(_down(data, writer))}
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    return not any(isinstance(result, OSError) for result in results)


async def _up(reader: asyncio.StreamReader, stream: Stream) -> None:
    """Raises OSError: the client broke off; Unavailable."""
    while data := await reader.read(_PIECE):
        await stream.write(data)
    await stream.end()


async def _down(stream: Stream, writer: asyncio.StreamWriter) -> None:
    """Raises OSError: the client broke off; Unavailable."""
    while data := await stream.read():
        writer.write(data)
        await writer.drain()
    writer.write_eof()


def _pair(text: str) -> tuple[int, int]:
    """LOCAL:REMOTE, :REMOTE (any local port) or REMOTE (the same). Raises InvalidArgument."""
    local, colon, remote = text.rpartition(":")
    try:
        pair = (int(local or 0) if colon else int(remote)), int(remote)
    except ValueError as exc:
        raise InvalidArgument(f"{text!r} is not [LOCAL:]REMOTE") from exc
    if not (0 <= pair[0] < 65536 and 0 < pair[1] < 65536):
        raise InvalidArgument(f"{text!r}: a port is a number from 1 to 65535")
    return pair


async def _shell(args: argparse.Namespace) -> int:
    """With a terminal when we have one."""
    tty = sys.stdin.isatty() and sys.stdout.isatty()
    request = ShellRequest(pod_sandbox_id=args.pod, tty=tty, term=os.environ.get("TERM", ""))
    async with connect(args.endpoint) as client:
        url = (await client.admin.shell(request)).url
    return await _session(url, {"stdin": True, "stdout": True, "stderr": not tty, "tty": tty})


async def _console(args: argparse.Namespace) -> int:
    if args.shell:
        return await _shell(args)
    async with connect(args.endpoint) as client:
        tail = (await client.admin.console(ConsoleRequest(pod_sandbox_id=args.pod))).tail
    # The guest chose these bytes: nothing that a terminal would obey gets through.
    text = tail.decode(errors="replace").replace("\r\n", "\n")
    sys.stdout.write(
        "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    )
    return 0
