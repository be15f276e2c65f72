"""What a pod's configuration asks of its network: capabilities of the plugins, CNI_ARGS, annotations. Pure."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import Any

from hyperpod.errors import InvalidArgument
from hyperpod.model.sandbox import PortMapping, SandboxConfig
from hyperpod.model.security import NamespaceMode

INGRESS, EGRESS = "kubernetes.io/ingress-bandwidth", "kubernetes.io/egress-bandwidth"
MIN_RATE, MAX_RATE = 1000, 10**15
"""Bits per second: Kubernetes takes 1k to 1P."""

BURST = 2**32 - 1
"""Bits that may go at once; what other runtimes give, since Kubernetes has no word for it."""

_QUANTITY = re.compile(
    r"\+?(\d{1,30}(?:\.\d{0,30})?|\.\d{1,30})(?:([numkMGTPE]|[KMGTPE]i)|[eE]([+-]?\d{1,2}))?\Z"
)
_DECIMAL = {"n": -9, "u": -6, "m": -3, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40, "Pi": 50, "Ei": 60}


def quantity(text: str) -> int:
    """A Kubernetes quantity as a whole number, rounded up. Raises ValueError."""
    if not (match := _QUANTITY.match(text)):
        raise ValueError(f"{text[:80]!r} is not a quantity such as 10M")
    number, suffix, exponent = match.groups()
    value = Decimal(number)
    if suffix in _BINARY:
        value *= 2 ** _BINARY[suffix]
    else:
        value = value.scaleb(_DECIMAL[suffix] if suffix else int(exponent or 0))
    return int(value.to_integral_value(rounding="ROUND_CEILING"))


def bandwidth(annotations: dict[str, str]) -> dict[str, int]:
    """The bandwidth capability's value, empty without annotations. Raises InvalidArgument naming the annotation."""
    found: dict[str, int] = {}
    for name, direction in ((INGRESS, "ingress"), (EGRESS, "egress")):
        if (text := annotations.get(name)) is None:
            continue
        try:
            rate = quantity(text)
        except ValueError as exc:
            raise InvalidArgument(f"annotation {name}: {exc}") from exc
        if not MIN_RATE <= rate <= MAX_RATE:
            raise InvalidArgument(
                f"annotation {name} is {text[:80]!r}; 1k to 1P (bits per second) is possible"
            )
        found |= {f"{direction}Rate": rate, f"{direction}Burst": BURST}
    return found


def host_ports(config: SandboxConfig) -> tuple[PortMapping, ...]:
    """Those that open a port of the host; a host_port of 0 opens none, nor does a pod in the host's network."""
    if config.namespaces.network is NamespaceMode.NODE:
        return ()
    return tuple(port for port in config.port_mappings if port.host_port)


def runtime(config: SandboxConfig) -> dict[str, Any]:
    """Values by capability (conventions: https://github.com/containernetworking/cni/blob/main/CONVENTIONS.md)."""
    values: dict[str, Any] = {}
    if config.namespaces.network is NamespaceMode.NODE:
        return values
    if ports := host_ports(config):
        values["portMappings"] = [
            {
                "hostPort": port.host_port,
                "containerPort": port.container_port,
                "protocol": port.protocol.lower(),
                **({"hostIP": port.host_ip} if port.host_ip else {}),
            }
            for port in ports
        ]
    if rates := bandwidth(config.annotations):
        values["bandwidth"] = rates
    if config.dns is not None:
        values["dns"] = {
            "servers": config.dns.servers,
            "searches": config.dns.searches,
            "options": config.dns.options,
        }
    if config.annotations:
        values["io.kubernetes.cri.pod-annotations"] = config.annotations
    return values


def runtime_json(config: SandboxConfig) -> str:
    return json.dumps(runtime(config), separators=(",", ":"))


def arguments(config: SandboxConfig, sandbox_id: str) -> str:
    """CNI_ARGS as every kubelet runtime gives them. Raises InvalidArgument for names that would break them."""
    meta = config.metadata
    pairs = {
        "K8S_POD_NAMESPACE": meta.namespace,
        "K8S_POD_NAME": meta.name,
        "K8S_POD_INFRA_CONTAINER_ID": sandbox_id,
        "K8S_POD_UID": meta.uid,
    }
    for name, value in pairs.items():
        if any(c in ";=" or not c.isprintable() for c in value):
            raise InvalidArgument(
                f"{value[:80]!r} cannot be given to CNI plugins as {name}: ';' or '=' in it"
            )
    return ";".join(["IgnoreUnknown=1", *(f"{name}={value}" for name, value in pairs.items())])
