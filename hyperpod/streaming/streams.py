"""Exec, Attach and PortForward of the CRI: what is asked for gets a URL, and what comes there goes to the shim."""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
from dataclasses import replace

from hyperpod.config import Config
from hyperpod.container import process
from hyperpod.container.known import KnownContainers
from hyperpod.container.live import LiveContainer
from hyperpod.errors import FailedPrecondition, InvalidArgument, PermissionDenied
from hyperpod.model.container import ContainerState
from hyperpod.sandbox.manager import SandboxManager
from hyperpod.shim.sessions.spec import SessionSpec
from hyperpod.spec.oci import build_process
from hyperpod.streaming.operator import OperatorServer, who
from hyperpod.streaming.server import StreamingServer
from hyperpod.streaming.tokens import Target, Tokens
from hyperpod.wire.remotecommand import Wanted
from hyperpod.wire.upgrade import Upgrade

log = logging.getLogger(__name__)

SHELL_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MAX_TERM = 64


class Streams:
    """Owns the streaming server, and the operators' own."""

    def __init__(self, config: Config, sandboxes: SandboxManager, containers: KnownContainers) -> None:
        """Raises InvalidArgument: the certificates cannot be used."""
        self._config, self._sandboxes, self._containers = config.streaming, sandboxes, containers
        self._operator_socket = config.operator_socket
        self.server = StreamingServer(config.streaming, Tokens(), self._hand_over)
        self.operator: OperatorServer | None = None
        if config.operator_shell:
            self.operator = OperatorServer(config.operator_socket, Tokens(), self._hand_over)

    async def listen(self) -> None:
        """Raises FailedPrecondition: an address is taken, or not ours."""
        await self.server.listen()
        if self.operator is not None:
            await self.operator.listen()
        else:  # what a daemon that was killed has left
            self._operator_socket.unlink(missing_ok=True)

    async def close(self) -> None:
        """Sessions in the shims go on; those through TLS end."""
        await self.server.close()
        if self.operator is not None:
            await self.operator.close()

    def exec(self, ident: str, argv: tuple[str, ...], wanted: Wanted) -> str:
        """The URL. Raises NotFound, FailedPrecondition, InvalidArgument, ResourceExhausted."""
        _check(wanted)
        if not argv:
            raise InvalidArgument("Exec without a command")
        return self.server.url(Target("exec", self._running(ident).id, argv=argv, wanted=wanted))

    def attach(self, ident: str, wanted: Wanted) -> str:
        """The URL. Raises NotFound, FailedPrecondition, InvalidArgument, ResourceExhausted."""
        _check(wanted)
        return self.server.url(Target("attach", self._running(ident).id, wanted=wanted))

    def port_forward(self, ident: str, ports: tuple[int, ...]) -> str:
        """The URL. Raises NotFound, FailedPrecondition, InvalidArgument, ResourceExhausted."""
        for port in ports:
            if not 0 < port < 65536:
                raise InvalidArgument(f"there is no port {port}")
        sandbox = self._sandboxes.get(ident)
        self._sandboxes.live(sandbox.id).need_ready()
        return self.server.url(Target("portforward", sandbox.id, ports=ports))

    def shell(self, ident: str, *, tty: bool, term: str) -> str:
        """The URL of a shell in the sandbox itself. Raises PermissionDenied, NotFound, FailedPrecondition."""
        if self.operator is None:
            raise PermissionDenied(
                "operators' shells are off: set operator_shell = true in the daemon's configuration and restart it "
                "(pods go on)"
            )
        if len(term) > MAX_TERM or not term.isascii() or not term.isprintable():
            raise InvalidArgument(f"term {term[:MAX_TERM]!r} is no terminal's name")
        sandbox = self._sandboxes.get(ident)
        self._sandboxes.live(sandbox.id).need_ready()
        wanted = Wanted(stdin=True, stdout=True, stderr=not tty, tty=tty)
        return self.operator.url(Target("shell", sandbox.id, argv=(term or "dumb",), wanted=wanted))

    def _running(self, ident: str) -> LiveContainer:
        container = self._containers.index.get(ident)
        if container.state is not ContainerState.RUNNING:
            raise FailedPrecondition(f"container {container.short} is {container.state.value}, not running")
        return container

    async def _hand_over(
        self, target: Target, upgrade: Upgrade, sock: socket.socket, head: bytes, early: bytes
    ) -> None:
        spec = SessionSpec(
            transport=upgrade.transport,
            protocol=upgrade.protocol,
            head=head,
            early=early,
            idle=self._config.idle_timeout,
            creation=self._config.creation_timeout,
            wanted=target.wanted,
            ports=target.ports,
        )
        if target.kind == "portforward":
            sandbox = self._sandboxes.live(target.ident)
            sandbox.need_ready()
            await (await sandbox.living_shim()).session(spec, sock.fileno())
            return
        if target.kind == "shell":
            await self._hand_over_shell(target, spec, sock)
            return
        container = self._running(target.ident)
        shim = await self._containers.sandboxes.live(container.sandbox_id).living_shim()
        record = container.record
        spec = replace(spec, container=container.id)
        if target.kind == "attach":
            config = record.config
            spec = replace(spec, tty=config.tty, stdin_once=config.stdin_once)
            await shim.session(spec, sock.fileno())
            return
        tty = target.wanted.tty
        spec = replace(spec, exec_id=secrets.token_hex(16), tty=tty)
        given = process.spec_input(record)
        if tty and not any(item.startswith(b"TERM=") for item in given.env):
            given = replace(given, env=(*given.env, b"TERM=xterm"))
        document = build_process(replace(given, args=target.argv, tty=tty))
        file = os.memfd_create("exec", os.MFD_CLOEXEC)
        try:
            os.write(file, document)
            await shim.session(spec, sock.fileno(), file)
        finally:
            os.close(file)

    async def _hand_over_shell(self, target: Target, spec: SessionSpec, sock: socket.socket) -> None:
        sandbox, exec_id = self._sandboxes.live(target.ident), secrets.token_hex(16)
        sandbox.need_ready()
        shim, agent = await sandbox.living_shim(), await sandbox.session.client()
        log.warning(
            "sandbox %s (%s): operator's shell %s for %s",
            sandbox.short,
            sandbox.record.config.metadata.key,
            exec_id,
            who(sock),
        )
        tty, term = target.wanted.tty, target.argv[0]
        environment = [SHELL_PATH, "HOME=/root", f"TERM={term}", f"PS1=[{sandbox.short}] \\w # "]
        # Started by us: the shim, which reads what tenants write, cannot have one of its own accord.
        await agent.start_exec(
            "", exec_id, process_json=json.dumps({"env": environment}).encode(), tty=tty, stdin=True
        )
        await shim.session(replace(spec, exec_id=exec_id, tty=tty), sock.fileno())


def _check(wanted: Wanted) -> None:
    if not (wanted.stdin or wanted.stdout or wanted.stderr):
        raise InvalidArgument("one of stdin, stdout and stderr must be set")
    if wanted.tty and wanted.stderr:
        raise InvalidArgument("tty and stderr cannot both be set: a terminal has one output")
