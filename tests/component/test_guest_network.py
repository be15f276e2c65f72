"""The agent's network code in namespaces of the host: what it makes of a card is what the plugins made."""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from hyperpod.agent import network
from hyperpod.agentclient.client import _interface
from hyperpod.api.gen.hyperpod.agent import v1
from hyperpod.errors import InvalidArgument, NetworkError
from hyperpod.model.network import GuestInterface, GuestNeighbour, GuestRoute
from hyperpod.network import links, tap
from hyperpod.network.netns import Namespaces
from tests.component.test_cni import shell

GUEST = secrets.token_hex(32)
"""Its tap is the whole host's, where another run may be."""
T = TypeVar("T")


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
            v1.Route(destination="0.0.0.0/0", gateway="169.254.1.1", source="10.7.0.5", metric=7, mtu=1350),
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
            GuestRoute(destination="0.0.0.0/0", gateway="169.254.1.1", source="10.7.0.5", metric=7, mtu=1350),
            GuestRoute(destination="::/0", gateway="fe80::1", metric=1024, onlink=True),
        ),
        neighbours=(GuestNeighbour(address="169.254.1.1", mac="ee:ee:ee:ee:ee:ee"),),
    )


CARD = """
card() {  # name, MAC
  ip link add $1 address 0a:00:00:00:00:$2 type veth peer name $3$1 netns $FAR
  nsenter --net=$FAR ip link set $3$1 up; ip link set $1 up
}
v6() { ip addr add $1 dev ${2:-eth0} nodad; }
"""
"""The other ends are in a third namespace, as a pod's are the host's."""

MADE = {
    "a network on the link": "ip addr add 10.7.0.5/24 dev eth0; v6 fd00:7::5/64; "
    "ip route add default via 10.7.0.1; ip route add default via fd00:7::1",
    "a network behind a gateway, as ptp has it": "ip addr add 10.7.0.5/24 dev eth0; ip route del 10.7.0.0/24; "
    "ip route add 10.7.0.1 dev eth0 src 10.7.0.5; ip route add 10.7.0.0/24 via 10.7.0.1 src 10.7.0.5; "
    "v6 fd00:7::5/64; ip route del fd00:7::/64 dev eth0; ip route add fd00:7::1 dev eth0; "
    "ip route add fd00:7::/64 via fd00:7::1",
    "sizes of what leaves the node, as Cilium has it": "ip addr add 10.7.0.5/32 dev eth0; v6 fd00:7::5/128; "
    "ip route add 10.7.0.1 dev eth0; ip route add default via 10.7.0.1 mtu 1350 advmss 1310; "
    "ip route add fd00:7::1 dev eth0; ip route add default via fd00:7::1 mtu 1350",
    "two cards in one network": "card eth1 02 p; ip addr add 10.7.0.5/24 dev eth0; v6 fd00:7::5/64; "
    "ip addr add 10.7.0.6/24 dev eth1; v6 fd00:7::6/64 eth1; ip route add default via 10.7.0.1 dev eth0",
    "names in another order": "card eth2 02 p; card eth1 03 p; ip addr add 10.7.0.5/24 dev eth0; "
    "ip addr add 10.8.0.5/24 dev eth2; ip addr add 10.9.0.5/24 dev eth1",
    "one MAC twice, as with ipvlan": "card eth1 01 p; ip addr add 10.7.0.5/24 dev eth0; "
    "ip addr add 10.8.0.5/24 dev eth1",
}


@pytest.mark.parametrize("made", MADE)
async def test_the_guest_gets_what_the_plugins_made(tmp_path: Path, made: str) -> None:
    """Read in one namespace, and made in another whose cards have the names that a kernel gives."""
    namespaces = Namespaces(tmp_path / "run")
    pod, guest, far = [await namespaces.make(digits * 32) for digits in ("ab", "cd", "ef")]
    script, show = f"FAR={far}{CARD}", "ip -o route; ip -o -6 route | sed /^fe80/d"
    try:
        await shell(pod, f"{script} card eth0 01 p; {MADE[made]}")
        wanted = await namespaces.run(pod, lambda: links.read_interfaces(GUEST))
        cards = (f"card eth{i} {interface.mac[-2:]} g" for i, interface in enumerate(wanted))
        await shell(guest, f"{script} {'; '.join(cards)}")
        for _ in range(2):  # a second Hello changes nothing
            await namespaces.run(guest, lambda: network.configure(map(_interface, wanted)))
            assert await namespaces.run(guest, lambda: links.read_interfaces(GUEST)) == wanted
        routes = [(await shell(path, show)).replace(" proto kernel", "") for path in (pod, guest)]
        assert sorted(routes[1].splitlines()) == sorted(routes[0].splitlines())
    finally:
        for path in (pod, guest, far):
            await namespaces.remove(path.name)


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


async def test_packets_that_no_card_takes(guest: Namespaces) -> None:
    path = guest.path(GUEST)
    await shell(path, "ip link set enp1s0 mtu 65535 up")
    with pytest.raises(NetworkError, match=r"enp1s0 has an MTU of 65535.* 65521 at most: set mtu"):
        await guest.run(path, lambda: links.read_interfaces(GUEST))
    await shell(path, "ip link set enp1s0 mtu 65521")
    assert 65521 in [x.mtu for x in await guest.run(path, lambda: links.read_interfaces(GUEST))]


async def test_a_tap_is_joined_to_its_interface(guest: Namespaces) -> None:
    path = guest.path(GUEST)
    card = GuestInterface(name="enp1s0", mac="0a:00:00:00:00:01", mtu=1400, tap=links.tap_name(GUEST, 1))
    subprocess.run(["ip", "tuntap", "add", card.tap, "mode", "tap"], check=True)
    await tap.connect(guest, str(path), [card])
    text = await shell(path, f"ip -o link show {card.tap}; ip -o addr show {card.tap}")
    assert "mtu 1400" in text and ",UP" in text and "inet" not in text
    for here, there in ((card.tap, card.name), (card.name, card.tap)):
        assert f"Redirect to device {there}" in await shell(path, f"tc filter show dev {here} ingress")
    await shell(path, f"ip link del {card.tap}")


async def test_a_tap_that_goes_with_qemu_while_it_is_joined(guest: Namespaces) -> None:
    card = GuestInterface(name="enp1s0", mac="0a:00:00:00:00:01", mtu=1500, tap=links.tap_name(GUEST, 0))

    class Late(Namespaces):
        async def run(self, path: str | Path, call: Callable[[], T]) -> T:
            await shell(Path(path), f"ip link del {card.tap}")
            return await super().run(path, call)

    subprocess.run(["ip", "tuntap", "add", card.tap, "mode", "tap"], check=True)
    with pytest.raises(NetworkError, match=f"tap {card.tap} is not there: has the VM ended"):
        await tap.connect(Late(guest.root.parent), str(guest.path(GUEST)), [card])
    with pytest.raises(NetworkError, match=f"tap {card.tap} is not there: has the VM ended"):
        await tap.connect(guest, str(guest.path(GUEST)), [card])
