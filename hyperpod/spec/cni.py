"""The Container Network Interface, versions 0.3.0 to 1.1.0, without running anything.

https://github.com/containernetworking/cni/blob/main/SPEC.md; "section" below means a section of it. What plugins
print is as untrusted as any input: every size and count is bounded, and nothing but CniError comes out.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hyperpod.errors import NetworkError
from hyperpod.logs import printable
from hyperpod.model.network import CniAddress, CniDns, CniInterface, CniResult, CniRoute

VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
MAX_DOCUMENT = 1 << 20
"""Bytes of a configuration or of a plugin's answer."""

MAX_PLUGINS = 32
MAX_ITEMS = 256
"""Interfaces, addresses, routes or name servers of one result."""

MAX_TEXT = 4096
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,254}\Z")
_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}\Z")
_MAC = re.compile(r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5,19}\Z")

CODES = {
    1: "incompatible CNI version",
    2: "unsupported field in the network configuration",
    3: "unknown container",
    4: "invalid environment variable",
    5: "I/O failure",
    6: "content does not decode",
    7: "invalid network configuration",
    11: "try again later",
    50: "the plugin is not available",
    51: "the plugin is not available, existing pods may have limited connectivity",
}
"""Section 5, "Error"."""


class CniError(NetworkError):
    """A configuration or a plugin's output that cannot be used, or an error that a plugin reports."""


@dataclass(frozen=True)
class Plugin:
    """One element of `plugins`; `capabilities` are those that are switched on."""

    type: str
    document: Mapping[str, Any]
    capabilities: frozenset[str]

    @property
    def programs(self) -> tuple[str, ...]:
        """The plugin and the one that it delegates addresses to (section 4)."""
        ipam = self.document.get("ipam")
        delegate = ipam.get("type") if isinstance(ipam, dict) else None
        return (self.type, delegate) if isinstance(delegate, str) and delegate else (self.type,)


@dataclass(frozen=True)
class Conflist:
    """A network configuration. `source` names its file; `text` is what was read."""

    name: str
    version: str
    plugins: tuple[Plugin, ...]
    disable_check: bool
    source: str
    text: str

    def supports(self, version: str) -> bool:
        """Whether the configuration is of at least this version of the specification."""
        return VERSIONS.index(self.version) >= VERSIONS.index(version)

    def has(self, capability: str) -> bool:
        return any(capability in plugin.capabilities for plugin in self.plugins)


def decode(what: str, text: str | bytes) -> dict[str, Any]:
    """A JSON object, whatever was given. Raises CniError that starts with `what`."""
    if len(text) > MAX_DOCUMENT:
        raise CniError(f"{what}: larger than {MAX_DOCUMENT} bytes")
    try:
        found = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as exc:
        raise CniError(f"{what}: not JSON: {printable(str(exc), 200)}") from exc
    if not isinstance(found, dict):
        raise CniError(f"{what}: not a JSON object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _get(what: str, document: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    """A member of the right type; null counts as absent. Raises CniError."""
    value = document.get(key)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise CniError(f"{what}: {key} is {printable(repr(value), 80)}, not a {_KINDS[kind]}")
    if isinstance(value, str):
        _check_text(f"{what}: {key}", value)
    if isinstance(value, list) and len(value) > MAX_ITEMS:
        raise CniError(f"{what}: {key} has {len(value)} items, over {MAX_ITEMS}")
    return value


def _check_text(what: str, value: str) -> None:
    if len(value) > MAX_TEXT:
        raise CniError(f"{what} has {len(value)} characters, over {MAX_TEXT}")
    if any("\ud800" <= c <= "\udfff" for c in value):  # JSON can escape them, UTF-8 cannot carry them
        raise CniError(f"{what} holds half a surrogate pair")


_KINDS = {str: "string", int: "number", list: "list", dict: "object", bool: "boolean"}


# -- configuration -----------------------------------------------------------------------------------------


def parse_conflist(source: str, text: str) -> Conflist:
    """A list, or a single plugin's configuration, which becomes a list of one. Raises CniError naming `source`."""
    document = decode(source, text)
    name = _get(source, document, "name", str, "")
    if not _NAME.match(name):
        raise CniError(f"{source}: name {printable(repr(name), 80)} is not a network's name")
    if "plugins" in document:
        items = _get(source, document, "plugins", list, [])
        if not 1 <= len(items) <= MAX_PLUGINS:
            raise CniError(f"{source}: {len(items)} plugins; 1 to {MAX_PLUGINS} are possible")
    else:
        items = [document]
    check = document.get("disableCheck", False)
    return Conflist(
        name=name,
        version=_version(source, document),
        plugins=tuple(_plugin(f"{source}: plugin {i}", item) for i, item in enumerate(items)),
        disable_check=check is True or check == "true",  # 0.4.0 to 1.0.0 allow the string
        source=source,
        text=text,
    )


def _version(source: str, document: Mapping[str, Any]) -> str:
    """The newest of `cniVersions` (1.1.0) that is known here, else `cniVersion`."""
    many = [v for v in _get(source, document, "cniVersions", list, []) if v in VERSIONS]
    one = _get(source, document, "cniVersion", str, "")
    if many:
        return str(max([*many, one] if one in VERSIONS else many, key=VERSIONS.index))
    if one not in VERSIONS:
        known = f"{VERSIONS[0]} to {VERSIONS[-1]}"
        raise CniError(f"{source}: cniVersion is {printable(repr(one), 40)}; {known} are supported")
    return str(one)


def _plugin(where: str, item: object) -> Plugin:
    if not isinstance(item, dict):
        raise CniError(f"{where} is not an object")
    kind = _get(where, item, "type", str, "")
    if not _TYPE.match(kind):
        raise CniError(f"{where}: type {printable(repr(kind), 80)} is not a plugin's name")
    ipam = _get(where, item, "ipam", dict, {})
    delegate = _get(f"{where}: ipam", ipam, "type", str, "")
    if delegate and not _TYPE.match(delegate):
        raise CniError(f"{where}: ipam type {printable(repr(delegate), 80)} is not a plugin's name")
    capabilities = _get(where, item, "capabilities", dict, {})
    return Plugin(kind, item, frozenset(name for name, on in capabilities.items() if on is True))


def plugin_input(
    network: Conflist, plugin: Plugin, previous: Mapping[str, Any] | None, runtime: Mapping[str, Any]
) -> bytes:
    """What the plugin reads from its stdin (section 3, "Deriving execution configuration from plugin
    configuration")."""
    document = {key: value for key, value in plugin.document.items() if key not in _NOT_PASSED}
    document |= {"name": network.name, "cniVersion": network.version}
    if previous is not None:
        document["prevResult"] = dict(previous)
    given = {name: value for name, value in runtime.items() if name in plugin.capabilities}
    if given:
        document["runtimeConfig"] = given
    return json.dumps(document, separators=(",", ":")).encode()


_NOT_PASSED = frozenset({"capabilities", "runtimeConfig", "prevResult", "cniVersions"})


# -- results -----------------------------------------------------------------------------------------------


def parse_result(what: str, document: Mapping[str, Any]) -> CniResult:
    """Section 5, "Success", of every version from 0.3.0 on. Raises CniError that starts with `what`."""
    interfaces = tuple(
        _interface(f"{what}: interface {i}", item)
        for i, item in enumerate(_objects(what, document, "interfaces"))
    )
    ips = tuple(_address(f"{what}: address {i}", x) for i, x in enumerate(_objects(what, document, "ips")))
    for ip in ips:
        if ip.interface is not None and not 0 <= ip.interface < len(interfaces):
            raise CniError(f"{what}: address {ip.address} is of interface {ip.interface}, which is not there")
    return CniResult(
        interfaces=interfaces,
        ips=ips,
        routes=tuple(
            _route(f"{what}: route {i}", x) for i, x in enumerate(_objects(what, document, "routes"))
        ),
        dns=_dns(f"{what}: dns", _get(what, document, "dns", dict, {})),
    )


def _objects(what: str, document: Mapping[str, Any], key: str) -> Sequence[Mapping[str, Any]]:
    items = _get(what, document, key, list, [])
    for item in items:
        if not isinstance(item, dict):
            raise CniError(f"{what}: {key} holds {printable(repr(item), 80)}, not an object")
    return list(items)


def _interface(what: str, item: Mapping[str, Any]) -> CniInterface:
    mac = _get(what, item, "mac", str, "")
    if mac and not _MAC.match(mac):
        raise CniError(f"{what}: mac is {printable(repr(mac), 80)}")
    mtu = _get(what, item, "mtu", int, 0)
    if not 0 <= mtu <= 1 << 20:
        raise CniError(f"{what}: mtu is {mtu}")
    return CniInterface(
        name=_get(what, item, "name", str, ""), mac=mac, mtu=mtu, sandbox=_get(what, item, "sandbox", str, "")
    )


def _address(what: str, item: Mapping[str, Any]) -> CniAddress:
    address = _get(what, item, "address", str, "")
    try:
        ipaddress.ip_interface(address)
        if "/" not in address or "%" in address:
            raise ValueError("no prefix length, or a scope")
    except ValueError as exc:
        raise CniError(f"{what} is {printable(repr(address), 80)}: {printable(str(exc), 120)}") from exc
    interface = _get(what, item, "interface", int, None)
    return CniAddress(address=address, gateway=_ip(what, item, "gateway"), interface=interface)


def _ip(what: str, item: Mapping[str, Any], key: str) -> str:
    value = _get(what, item, key, str, "")
    try:
        if "%" in value:
            raise ValueError("a scope")
        return str(ipaddress.ip_address(value)) if value else ""
    except ValueError as exc:
        raise CniError(f"{what}: {key} is {printable(repr(value), 80)}, not an address") from exc


def _route(what: str, item: Mapping[str, Any]) -> CniRoute:
    destination = _get(what, item, "dst", str, "")
    try:
        if "%" in destination:
            raise ValueError("a scope")
        network = ipaddress.ip_network(destination, strict=False)
    except ValueError as exc:
        raise CniError(f"{what} is {printable(repr(destination), 80)}, not a network") from exc
    return CniRoute(destination=str(network), gateway=_ip(what, item, "gw"))


def _dns(what: str, item: Mapping[str, Any]) -> CniDns:
    return CniDns(
        nameservers=_texts(what, item, "nameservers"),
        domain=_get(what, item, "domain", str, ""),
        search=_texts(what, item, "search"),
        options=_texts(what, item, "options"),
    )


def _texts(what: str, item: Mapping[str, Any], key: str) -> tuple[str, ...]:
    values = _get(what, item, key, list, [])
    for value in values:
        if not isinstance(value, str):
            raise CniError(f"{what}: {key} holds {printable(repr(value), 80)}, not a string")
        _check_text(f"{what}: {key}", value)
    return tuple(values)


def parse_error(stdout: bytes) -> str:
    """A failed plugin's own words (section 5, "Error"), escaped and bounded; empty when it printed none."""
    try:
        document = decode("error", stdout)
        code = _get("error", document, "code", int, 0)
        message = _get("error", document, "msg", str, "")
        details = _get("error", document, "details", str, "")
    except CniError:
        return printable(stdout[:500], 500).strip()
    words = "; ".join(printable(text, 1000) for text in (message, details) if text)
    return words or CODES.get(code, f"code {code}")
