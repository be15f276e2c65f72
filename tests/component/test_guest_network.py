"""The agent's network code in namespaces of the host: what it makes of a card is what the plugins made."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hyperpod.agent import network
from hyperpod.api.gen.hyperpod.agent import v1
from hyperpod.errors import InvalidArgument, NetworkError
from hyperpod.model.network import GuestInterface, GuestNeighbour, GuestRoute
from hyperpod.network import links
from hyperpod.network.netns import Namespaces
from tests.component.test_cni import shell

GUEST = "ef" * 32


@pytest.fixture
async def guest(tmp_path: Path) -> AsyncIterator[Namespaces]:
    """A namespace with a card `enp1s0` (one end of a veth pair), as a booted guest has it."""
    namespaces = Namespaces(tmp_path / "run")
    path = await namespaces.make(GUEST)
    await shell(
        path, "ip link add enp1s0 address 0a:00:00:00:00:01 type veth peer name other; ip link set other up"
    )
    yield namespaces
    await namespaces.remove(GUEST)


def interface(**more: object) -> v1.NetworkInterface:
    values: dict[str, object] = {
        "name": "eth0",
        "mac": "0A:00:00:00:00:01",
        "mtu": 1400,
        "addresses": ["10.7.0.5/32", "fd00:7::5/64"],
        "neighbours": [v1.Neighbour(address="169.254.1.1", mac="ee:ee:ee:ee:ee:ee")],
        "routes": [
            v1.Route(destination="169.254.1.1/32"),
            v1.Route(destination="0.0.0.0/0", gateway="169.254.1.1", source="10.7.0.5", metric=7),
            v1.Route(destination="::/0", gateway="fe80::1", onlink=True),
        ],
        **more,
    }
    return v1.NetworkInterface(**values)  # type: ignore[arg-type]


async def test_a_card_becomes_the_interface(guest: Namespaces) -> None:
    path = guest.path(GUEST)
    for _ in range(2):  # a second Hello changes nothing
        await guest.run(path, lambda: network.configure([interface()]))
    await shell(path, "ip link set other down; ip link set other address 0a:00:00:00:00:02")
    [found] = await guest.run(path, lambda: links.read_interfaces(GUEST))
    assert found == GuestInterface(
        name="eth0",
        mac="0a:00:00:00:00:01",
        mtu=1400,
        tap=f"hp{GUEST[:12]}0",
        addresses=("10.7.0.5/32", "fd00:7::5/64"),
        routes=(
            GuestRoute(destination="169.254.1.1/32"),
            GuestRoute(destination="0.0.0.0/0", gateway="169.254.1.1", source="10.7.0.5", metric=7),
            GuestRoute(destination="::/0", gateway="fe80::1", metric=1024, onlink=True),
        ),
        neighbours=(GuestNeighbour(address="169.254.1.1", mac="ee:ee:ee:ee:ee:ee"),),
    )


async def test_no_address_waits_and_no_router_is_heard(guest: Namespaces) -> None:
    path = guest.path(GUEST)
    await guest.run(path, lambda: network.configure([interface()]))
    assert "tentative" not in await shell(path, "ip -6 addr show dev eth0 scope global")

    def settings() -> list[str]:
        base = Path("/proc/sys/net/ipv6/conf/eth0")
        return [(base / name).read_text().strip() for name in ("accept_ra", "accept_dad")]

    assert await guest.run(path, settings) == ["0", "0"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"mac": "0a:00:00:00:00:99"}, "no such network card"),
        ({"addresses": ["10.0.0.1/99"]}, "prefix length"),
        ({"addresses": ["nonsense"]}, "illegal IP address"),
        ({"routes": [v1.Route(destination="10.9.0.0/16", gateway="10.66.0.1")]}, r"route 10.9.0.0/16"),
    ],
)
async def test_what_cannot_be_is_named(
    guest: Namespaces, change: dict[str, object], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "CARD_TIMEOUT", 0.05)
    with pytest.raises(InvalidArgument, match=rf"interface eth0 .*{why}"):
        await guest.run(guest.path(GUEST), lambda: network.configure([interface(**change)]))


async def test_too_many_interfaces(guest: Namespaces) -> None:
    path = guest.path(GUEST)
    await shell(
        path,
        "for i in 1 2 3; do ip link add a$i type veth peer b$i; ip link set a$i up; ip link set b$i up; done",
    )
    with pytest.raises(NetworkError, match=r"7 interfaces; a VM takes 4"):
        await guest.run(path, lambda: links.read_interfaces(GUEST))
