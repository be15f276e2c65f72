"""What is known of a pod's network: the plugins' result, what DEL will need, and the guest's interfaces."""

from __future__ import annotations

from hyperpod.model.base import Record


class CniInterface(Record):
    """`sandbox`: the path of the namespace it is in, empty for one of the host."""

    name: str
    mac: str = ""
    mtu: int = 0
    sandbox: str = ""


class CniAddress(Record):
    """`address` is an address with a prefix length; `interface` an index into the result's interfaces."""

    address: str
    gateway: str = ""
    interface: int | None = None


class CniRoute(Record):
    destination: str
    gateway: str = ""


class CniDns(Record):
    nameservers: tuple[str, ...] = ()
    domain: str = ""
    search: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


class CniResult(Record):
    """A plugin's answer to ADD, of whatever version of the specification."""

    interfaces: tuple[CniInterface, ...] = ()
    ips: tuple[CniAddress, ...] = ()
    routes: tuple[CniRoute, ...] = ()
    dns: CniDns = CniDns()

    def addresses(self, ifname: str) -> tuple[str, ...]:
        """Of `ifname` in the pod, without prefix; an address of no named interface counts as its, and one of that
        name when the plugin says of none that it is in the pod."""
        named = [i for i, interface in enumerate(self.interfaces) if interface.name == ifname]
        own = [i for i in named if self.interfaces[i].sandbox] or named
        return tuple(
            ip.address.partition("/")[0] for ip in self.ips if ip.interface is None or ip.interface in own
        )


class Attachment(Record):
    """A pod's place in a network, written before ADD is called, and again with its result.

    DEL uses this and not what the configuration folder holds by then. `conflist` is the file's text; `args` and
    `runtime` are CNI_ARGS and the values of the capabilities. `result` is the raw answer of the last plugin that
    answered ADD; empty before.
    """

    source: str
    conflist: str
    container_id: str
    netns: str
    ifname: str = "eth0"
    args: str = ""
    runtime: str = "{}"
    """JSON object."""
    result: str = ""
    """JSON object or empty."""
    added: int = 1 << 20
    """How many of the plugins have answered ADD; records of before this was kept count as all."""


class GuestRoute(Record):
    """`destination` as address/prefix. An empty gateway: reached on the link itself."""

    destination: str
    gateway: str = ""
    source: str = ""
    metric: int = 0
    onlink: bool = False
    mtu: int = 0
    advmss: int = 0


class GuestNeighbour(Record):
    """A fixed entry of the neighbour table, as plugins with point-to-point links make them."""

    address: str
    mac: str


class GuestInterface(Record):
    """A network card of the VM: stands in the guest for an interface that the plugins made in the namespace."""

    name: str
    mac: str
    mtu: int
    tap: str
    addresses: tuple[str, ...] = ()
    """With prefix length."""
    routes: tuple[GuestRoute, ...] = ()
    neighbours: tuple[GuestNeighbour, ...] = ()


class PodNetwork(Record):
    """Where a running pod is. `addresses`: all of its default interface, the first the pod's address."""

    name: str
    addresses: tuple[str, ...]
    interfaces: tuple[GuestInterface, ...]
