"""The HTTP request that becomes a stream: which transport and protocol, or which refusal. Sans-IO.

Order and answers are those of k8s.io/cri-streaming and x/net/websocket, which every client was made against.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from wsproto.utilities import generate_accept_token

from hyperpod.errors import HyperpodError

HeaderList = Sequence[tuple[bytes, bytes]]
"""As h11 has them: names in lower case."""

COMMAND_PROTOCOLS = ("v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io")
FORWARD_PROTOCOL = "portforward.k8s.io"
TUNNEL_PROTOCOL = f"SPDY/3.1+{FORWARD_PROTOCOL}"
COMMAND_WEBSOCKET = ("v5.channel.k8s.io", "v4.channel.k8s.io", "v4.base64.channel.k8s.io", "channel.k8s.io",
                     "base64.channel.k8s.io")  # fmt: skip
FORWARD_WEBSOCKET = (TUNNEL_PROTOCOL, "v4.channel.k8s.io", "v4.base64.channel.k8s.io")
_MAX_OFFERS = 32


class Transport(StrEnum):
    SPDY = "spdy"
    WEBSOCKET = "websocket"
    TUNNEL = "tunnel"
    """SPDY within WebSocket messages."""


@dataclass(frozen=True)
class Upgrade:
    """What was agreed. `protocol` is empty for a WebSocket without one; `headers` are the 101 response's."""

    transport: Transport
    protocol: str
    headers: tuple[tuple[str, str], ...]


class Refused(HyperpodError):
    """The HTTP answer instead."""

    def __init__(self, status: int, text: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
        self.status, self.headers = status, headers
        super().__init__(text)


def negotiate(headers: HeaderList, *, forward: bool) -> Upgrade:
    """For a port-forward or (not `forward`) an exec or attach. Raises Refused."""
    connection = b",".join(_all(headers, b"connection")).lower()
    upgrade = b",".join(_all(headers, b"upgrade")).lower()
    if b"upgrade" in connection and upgrade.strip() == b"websocket":
        return _websocket(headers, FORWARD_WEBSOCKET if forward else COMMAND_WEBSOCKET)
    return _spdy(headers, (FORWARD_PROTOCOL,) if forward else COMMAND_PROTOCOLS, connection, upgrade)


def _all(headers: HeaderList, name: bytes) -> list[bytes]:
    return [value for key, value in headers if key == name]


def _offers(headers: HeaderList, name: bytes) -> list[str]:
    values = (part.strip() for value in _all(headers, name) for part in value.decode("latin-1").split(","))
    return [value for value in values if value][:_MAX_OFFERS]


def _spdy(headers: HeaderList, supported: Sequence[str], connection: bytes, upgrade: bytes) -> Upgrade:
    if b"upgrade" not in connection or b"spdy/3.1" not in upgrade:
        raise Refused(400, "unable to upgrade: the request must ask for an upgrade to SPDY/3.1 or websocket")
    name = "X-Stream-Protocol-Version"
    offers = _offers(headers, name.lower().encode())
    if not offers:
        raise Refused(400, f"unable to upgrade: header {name} is missing or empty")
    chosen = next((offer for offer in offers if offer in supported), None)
    if chosen is None:
        text = f"unable to upgrade: client supports {_listed(offers)}, server accepts {_listed(supported)}"
        raise Refused(403, text, tuple(("X-Accepted-Stream-Protocol-Versions", item) for item in supported))
    return Upgrade(
        Transport.SPDY, chosen, (("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1"), (name, chosen))
    )


def _websocket(headers: HeaderList, supported: Sequence[str]) -> Upgrade:
    if _all(headers, b"sec-websocket-version") != [b"13"]:
        raise Refused(400, "WebSocket version 13 is needed", (("Sec-WebSocket-Version", "13"),))
    keys = _all(headers, b"sec-websocket-key")
    if len(keys) != 1 or not _is_key(keys[0]):
        raise Refused(400, "Sec-WebSocket-Key is missing or malformed")
    offers = _offers(headers, b"sec-websocket-protocol")
    chosen = next((offer for offer in offers if offer in supported), None)
    if offers and chosen is None:
        text = (
            f"requested protocols are not supported: {_listed(offers)}; the server has {_listed(supported)}"
        )
        raise Refused(403, text)
    accept = generate_accept_token(keys[0]).decode("ascii")
    answer = [("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Accept", accept)]
    if chosen is not None:
        answer.append(("Sec-WebSocket-Protocol", chosen))
    transport = Transport.TUNNEL if chosen == TUNNEL_PROTOCOL else Transport.WEBSOCKET
    return Upgrade(transport, chosen or "", tuple(answer))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)[:500]


def _is_key(key: bytes) -> bool:
    try:
        return len(base64.b64decode(key, validate=True)) == 16
    except (binascii.Error, ValueError):
        return False
