"""Whether ports of the host are free: portmap itself would let the first rule win, and nobody would know."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Iterable, Sequence

from hyperpod.errors import NetworkError
from hyperpod.model.sandbox import PortMapping

_KINDS = {"TCP": (socket.SOCK_STREAM, 0), "UDP": (socket.SOCK_DGRAM, 0), "SCTP": (socket.SOCK_STREAM, 132)}


def overlap(one: PortMapping, other: PortMapping) -> bool:
    """Whether both want the same port: an address of all zeros, or none, is every address."""
    same = (one.protocol, one.host_port) == (other.protocol, other.host_port)
    return same and (_every(one.host_ip) or _every(other.host_ip) or one.host_ip == other.host_ip)


def _every(address: str) -> bool:
    return not address or ipaddress.ip_address(address).is_unspecified


def need_unclaimed(
    wanted: Sequence[PortMapping], others: Iterable[tuple[str, Sequence[PortMapping]]]
) -> None:
    """`others`: name and host ports of every other pod. Raises NetworkError naming port and pod."""
    for name, taken in others:
        for port in wanted:
            if any(overlap(port, other) for other in taken):
                raise NetworkError(
                    f"host port {_text(port)} is in use by pod {name}; stop that pod or choose another port"
                )


def need_free(wanted: Sequence[PortMapping]) -> None:
    """Look by binding for a moment. Raises NetworkError naming a port that a process of the host has."""
    for port in wanted:
        kind, protocol = _KINDS[port.protocol]
        family = socket.AF_INET6 if ":" in port.host_ip else socket.AF_INET
        try:
            with socket.socket(family, kind, protocol) as sock:
                if kind == socket.SOCK_STREAM:  # connections in TIME_WAIT do not count
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind((port.host_ip or "0.0.0.0", port.host_port))
        except OSError as exc:
            if exc.errno == errno.EADDRINUSE:
                raise NetworkError(
                    f"host port {_text(port)} is in use by a process of the host; "
                    "end it or choose another port"
                ) from exc
            if exc.errno == errno.EADDRNOTAVAIL:
                raise NetworkError(f"host port {_text(port)}: the host has no such address") from exc
            # else: a protocol that the host's kernel lacks, and no process of it can use


def _text(port: PortMapping) -> str:
    address = f"[{port.host_ip}]:" if ":" in port.host_ip else f"{port.host_ip}:" if port.host_ip else ""
    return f"{address}{port.host_port}/{port.protocol}"
