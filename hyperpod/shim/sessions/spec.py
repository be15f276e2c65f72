"""What the daemon asks a shim for, beside the client's socket; as a control message and back."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass, field
from typing import Any

from hyperpod.errors import InvalidArgument
from hyperpod.wire.control import Request
from hyperpod.wire.remotecommand import Wanted
from hyperpod.wire.upgrade import Transport

MAX_EARLY = 16 * 1024
"""Bytes that a client may have sent behind its request, before it has the answer."""
_MAX_PORTS = 128


@dataclass(frozen=True)
class SessionSpec:
    """`container` is empty for a port-forward and an operator's shell, `exec_id` for a port-forward and an attach.

    Times in seconds, idle 0 is none."""

    transport: Transport
    protocol: str
    head: bytes
    """The HTTP response, to be written first."""
    early: bytes
    """What the client has sent behind its request."""
    idle: float
    creation: float
    """How long the client has for opening its streams."""
    container: str = ""
    exec_id: str = ""
    wanted: Wanted = field(default_factory=Wanted)
    tty: bool = False
    """The process has a terminal."""
    stdin_once: bool = False
    ports: tuple[int, ...] = ()

    @property
    def kind(self) -> str:
        """For logs: exec, shell, attach or port-forward."""
        if self.exec_id:
            return "exec" if self.container else "shell"
        return "attach" if self.container else "port-forward"


def to_json(spec: SessionSpec) -> dict[str, Any]:
    wanted = spec.wanted
    return {
        "transport": spec.transport.value,
        "protocol": spec.protocol,
        "head": base64.b64encode(spec.head).decode(),
        "early": base64.b64encode(spec.early).decode(),
        "idle_ms": int(spec.idle * 1000),
        "creation_ms": int(spec.creation * 1000),
        "container": spec.container,
        "exec": spec.exec_id,
        "wanted": [wanted.stdin, wanted.stdout, wanted.stderr, wanted.tty],
        "tty": spec.tty,
        "stdin_once": spec.stdin_once,
        "ports": list(spec.ports),
    }


def from_request(request: Request) -> SessionSpec:
    """Raises InvalidArgument that names the field."""
    try:
        transport = Transport(request.text("transport"))
        early = base64.b64decode(request.text("early", 2 * MAX_EARLY), validate=True)
        head = base64.b64decode(request.text("head"), validate=True)
    except (ValueError, binascii.Error) as exc:
        raise InvalidArgument(f"{request.op}: {exc}") from exc
    wanted, ports = request.args.get("wanted"), request.args.get("ports")
    if not isinstance(wanted, list) or len(wanted) != 4 or not all(isinstance(w, bool) for w in wanted):
        raise InvalidArgument(f"{request.op}: wanted must be four flags")
    if not isinstance(ports, list) or len(ports) > _MAX_PORTS:
        raise InvalidArgument(f"{request.op}: ports must be a list of at most {_MAX_PORTS}")
    if not all(type(port) is int and 0 < port < 65536 for port in ports):
        raise InvalidArgument(f"{request.op}: a port is a number from 1 to 65535")
    return SessionSpec(
        transport=transport,
        protocol=request.text("protocol", 100),
        head=head,
        early=early,
        idle=request.number("idle_ms") / 1000,
        creation=request.number("creation_ms", 1) / 1000,
        container=request.ident("container") if request.args.get("container") else "",
        exec_id=request.ident("exec", 32) if request.args.get("exec") else "",
        wanted=Wanted(*wanted),
        tty=request.flag("tty"),
        stdin_once=request.flag("stdin_once"),
        ports=tuple(ports),
    )
