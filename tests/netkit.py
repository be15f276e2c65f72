"""A network for one daemon under test: a conflist with the real plugins, a bridge and subnets of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import secrets
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from tests import runs

VERSION = "1.0.0"

SUBNETS = iter(random.sample(range(128 * 256, 255 * 256), 127 * 256))
"""Of 10.0.0.0/8; a run uses none twice, as several daemons are there at once."""

PORTS = iter(random.sample(range(20_000, 32_000), 12_000))
"""Used once each: of 20 chosen anew two were the same in one of 64 runs."""


class Network:
    """`conf_dir` holds the conflist; addresses come out of 10.<x>.<y>.0/24 and fd00:<xy>::/64."""

    def __init__(self, base: Path) -> None:
        self.ident = secrets.token_hex(4)
        runs.record("network", self.ident)
        self.bridge = f"hpt{self.ident}"
        x, y = divmod(next(SUBNETS), 256)
        # One group, never 0: written as everybody writes it back, which a group of zeros before "::" is not.
        self.v4, self.v6 = f"10.{x}.{y}", f"fd00:{x:x}{y:02x}:"
        self.conf_dir, self.leases = base / "net.d", base / "leases"
        self.conf_dir.mkdir()
        self.name = f"test-{self.ident}"
        self.file = self.conf_dir / "10-test.conflist"
        self.write()

    def bridge_plugin(self, *, dual: bool = True, **more: Any) -> dict[str, Any]:
        ranges = [[{"subnet": f"{self.v4}.0/24"}]]
        routes = [{"dst": "0.0.0.0/0"}]
        if dual:
            ranges.append([{"subnet": f"{self.v6}:/64"}])
            routes.append({"dst": "::/0"})
        ipam = {"type": "host-local", "dataDir": str(self.leases), "ranges": ranges, "routes": routes}
        plugin = {
            "type": "bridge",
            "bridge": self.bridge,
            "isGateway": True,
            "hairpinMode": True,
            "ipam": ipam,
        }
        return {**plugin, **more}

    def write(self, *plugins: dict[str, Any], version: str = VERSION) -> None:
        """Replace the conflist; without arguments the usual one."""
        usual = (
            self.bridge_plugin(),
            {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True},
            {"type": "bandwidth", "capabilities": {"bandwidth": True}},
        )
        document = {"cniVersion": version, "name": self.name, "plugins": list(plugins or usual)}
        self.file.write_text(json.dumps(document))

    def leftovers(self, patience: float = 30.0) -> list[str]:
        """Leases, interfaces on the bridge, and rules of this network's pods.

        The kernel ends a namespace, and what is in it, some time after its last user: `patience`, seconds."""
        left = [str(p) for p in self.leases.glob("*/*") if p.name[0].isdigit() or ":" in p.name]
        left = [p for p in left if not Path(p).name.startswith("last_reserved_ip") and Path(p).name != "lock"]
        deadline = time.monotonic() + patience
        while (ports := self.ports()) and time.monotonic() < deadline:
            time.sleep(0.05)
        left += [f"bridge port {name}" for name in ports]
        for program in ("iptables-save", "ip6tables-save"):
            rules = subprocess.run([program], capture_output=True, text=True, check=True).stdout
            own = (self.name, f"{self.v4}.", self.v6)  # the firewall plugin's name no network
            left += [f"{program}: {x}" for x in rules.splitlines() if any(word in x for word in own)]
        return left

    def ports(self) -> list[str]:
        """The host's ends of the pods' links."""
        folder = Path(f"/sys/class/net/{self.bridge}/brif")
        return [path.name for path in folder.iterdir()] if folder.exists() else []

    def destroy(self) -> None:
        subprocess.run(["ip", "link", "delete", self.bridge], capture_output=True, check=False)


def free_port() -> int:
    """Not an ephemeral one, which could be given to somebody before it is used; a port mapping of such a one would
    even take that one's connections."""
    while True:
        port = next(PORTS)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


def taps() -> set[str]:
    """Names of all taps of sandboxes in the host's own namespace."""
    return {p.name for p in Path("/sys/class/net").iterdir() if p.name.startswith("hp") and len(p.name) == 15}


async def echoed(address: str, port: int) -> bool:
    """Whether what listens there, soon, sends back what it gets."""
    async with asyncio.timeout(120):
        while True:
            try:
                reader, writer = await asyncio.open_connection(address, port)
                break
            except ConnectionRefusedError:
                await asyncio.sleep(0.05)
        try:
            writer.write(b"ping")
            return await reader.readexactly(4) == b"ping"
        finally:
            writer.close()
            await writer.wait_closed()
