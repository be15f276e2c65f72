"""Contents of the three files below /etc that a runtime gives to the containers of a pod. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from hyperpod.model.sandbox import DnsConfig

HOSTS_HEAD = """\
127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
fe00::0\tip6-localnet
ff00::0\tip6-mcastprefix
ff02::1\tip6-allnodes
ff02::2\tip6-allrouters
"""


def resolv_conf(dns: DnsConfig | None, host: str) -> str:
    """What the request says, or the host's own file when it says nothing (resolv.conf(5))."""
    if dns is None or not (dns.servers or dns.searches or dns.options):
        return host
    lines = []
    if dns.searches:
        lines.append(f"search {' '.join(dns.searches)}")
    lines += [f"nameserver {server}" for server in dns.servers]
    if dns.options:
        lines.append(f"options {' '.join(dns.options)}")
    return "\n".join(lines) + "\n"


def only_loopback(text: str) -> bool:
    """Whether a resolv.conf names servers, and none that a pod could reach: a stub of the host (127.0.0.53)."""
    words = [line.split() for line in text.splitlines()]
    servers = [word[1].partition("%")[0] for word in words if len(word) > 1 and word[0] == "nameserver"]
    return bool(servers) and all(_loopback(server) for server in servers)


def _loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def hosts(hostname: str, addresses: Sequence[str]) -> str:
    """Localhost, and the pod's name at its addresses; the kubelet mounts its own file over it."""
    return HOSTS_HEAD + "".join(f"{address}\t{hostname}\n" for address in addresses)
