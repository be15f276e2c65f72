"""Network configurations and what plugins print: every version, and everything that is neither."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperpod.errors import InvalidArgument, Unavailable
from hyperpod.model.network import CniResult
from hyperpod.spec import cnitemplate
from hyperpod.spec.cni import (
    MAX_DOCUMENT,
    VERSIONS,
    CniError,
    decode,
    parse_conflist,
    parse_error,
    parse_result,
    plugin_input,
)


def conflist(**change: Any) -> str:
    document: dict[str, Any] = {
        "cniVersion": "1.0.0",
        "name": "net",
        "plugins": [
            {"type": "bridge", "ipam": {"type": "host-local"}, "mtu": 1400},
            {"type": "portmap", "capabilities": {"portMappings": True, "other": False}, "snat": True},
        ],
    }
    return json.dumps({key: value for key, value in {**document, **change}.items() if value is not None})


def test_a_list() -> None:
    found = parse_conflist("/f", conflist())
    assert (found.name, found.version, found.disable_check) == ("net", "1.0.0", False)
    assert [plugin.programs for plugin in found.plugins] == [("bridge", "host-local"), ("portmap",)]
    assert found.has("portMappings") and not found.has("other") and not found.has("bandwidth")
    assert found.supports("0.4.0") and not found.supports("1.1.0")


def test_a_single_plugin_is_a_list_of_one() -> None:
    found = parse_conflist("/f", '{"cniVersion": "0.3.1", "name": "n", "type": "ptp"}')
    assert [plugin.type for plugin in found.plugins] == ["ptp"]
    assert not found.supports("0.4.0")


@pytest.mark.parametrize("version", VERSIONS)
def test_versions(version: str) -> None:
    assert parse_conflist("/f", conflist(cniVersion=version)).version == version


def test_the_newest_known_version_is_used() -> None:
    many = conflist(cniVersion="1.0.0", cniVersions=["0.4.0", "1.1.0", "9.0.0"])
    assert parse_conflist("/f", many).version == "1.1.0"
    assert parse_conflist("/f", conflist(cniVersions=["0.4.0"])).version == "1.0.0"
    assert parse_conflist("/f", conflist(cniVersion=None, cniVersions=["0.4.0"])).version == "0.4.0"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("[" * 100_000, "not JSON"),
        ('{"a": NaN}', "not JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not JSON"),
        (" " * (MAX_DOCUMENT + 1), "larger than"),
        (conflist(name="a/b"), "is not a network's name"),
        (conflist(name=None), "is not a network's name"),
        (conflist(name=7), "name is 7, not a string"),
        (conflist(cniVersion="0.2.0"), r"cniVersion is '0.2.0'; 0.3.0 to 1.1.0 are supported"),
        (conflist(cniVersion=None), "cniVersion is ''"),
        (conflist(plugins=[]), "0 plugins"),
        (conflist(plugins=[{"type": "x"}] * 33), "33 plugins"),
        (conflist(plugins={}), "not a list"),
        (conflist(plugins=[3]), "plugin 0 is not an object"),
        (conflist(plugins=[{"type": "../../bin/sh"}]), "plugin 0: type '../../bin/sh'"),
        (conflist(plugins=[{"type": "b", "ipam": {"type": "/x"}}]), "ipam type '/x'"),
        (conflist(plugins=[{"type": "b", "ipam": []}]), "ipam is"),
        (conflist(plugins=[{"type": "b", "capabilities": []}]), "capabilities is"),
    ],
)
def test_configurations_that_are_none(text: str, why: str) -> None:
    with pytest.raises(CniError, match=why) as info:
        parse_conflist("/etc/cni/net.d/10-x.conflist", text)
    assert str(info.value).startswith("/etc/cni/net.d/10-x.conflist: ")
    assert isinstance(info.value, Unavailable), "a retry after the mend works"


def test_what_a_plugin_reads() -> None:
    network = parse_conflist("/f", conflist(cniVersions=["0.4.0"]))
    runtime = {"portMappings": [{"hostPort": 1}], "bandwidth": {"ingressRate": 1}}
    first = json.loads(plugin_input(network, network.plugins[0], None, runtime))
    assert first == {
        "type": "bridge",
        "ipam": {"type": "host-local"},
        "mtu": 1400,
        "name": "net",
        "cniVersion": "1.0.0",
    }
    second = json.loads(plugin_input(network, network.plugins[1], {"ips": []}, runtime))
    assert second["prevResult"] == {"ips": []}
    assert second["runtimeConfig"] == {"portMappings": [{"hostPort": 1}]}
    assert "capabilities" not in second and second["snat"] is True


OLD = {
    "cniVersion": "0.3.1",
    "interfaces": [{"name": "br0", "mac": "00:11:22:33:44:55"}, {"name": "eth0", "sandbox": "/ns"}],
    "ips": [
        {"version": "4", "address": "10.1.0.5/16", "gateway": "10.1.0.1", "interface": 1},
        {"version": "6", "address": "2001:db8::5/64", "gateway": "2001:db8::1", "interface": 1},
    ],
    "routes": [{"dst": "0.0.0.0/0"}, {"dst": "192.168.0.0/16", "gw": "10.1.0.9"}],
    "dns": {"nameservers": ["10.1.0.1"], "domain": "d", "search": ["s"], "options": ["o"]},
}


def test_a_result_of_0_3() -> None:
    found = parse_result("x", OLD)
    assert found.addresses("eth0") == ("10.1.0.5", "2001:db8::5")
    assert found.addresses("eth1") == ()
    assert found.routes[1].gateway == "10.1.0.9"
    assert (found.dns.nameservers, found.dns.domain) == (("10.1.0.1",), "d")


def test_a_result_of_1_1() -> None:
    interfaces = [{"name": "eth0", "mac": "0a:00:00:00:00:01", "mtu": 9000, "sandbox": "/ns", "pciID": "x"}]
    found = parse_result("x", {"interfaces": interfaces, "ips": [{"address": "10.0.0.1/32", "interface": 0}]})
    assert (found.interfaces[0].mtu, found.addresses("eth0")) == (9000, ("10.0.0.1",))


def test_an_address_of_no_interface_is_the_pod_s_and_a_bridge_s_is_not() -> None:
    document = {
        "interfaces": [{"name": "eth0"}, {"name": "eth0", "sandbox": "/ns"}],
        "ips": [{"address": "10.0.0.1/24"}, {"address": "10.0.0.254/24", "interface": 0}],
    }
    assert parse_result("x", document).addresses("eth0") == ("10.0.0.1",)


def test_a_plugin_that_does_not_say_where_its_interface_is() -> None:
    """containerd takes the name, too."""
    document = {
        "interfaces": [{"name": "veth1"}, {"name": "eth0"}],
        "ips": [{"address": "10.0.0.1/24", "interface": 1}, {"address": "10.0.0.254/24", "interface": 0}],
    }
    assert parse_result("x", document).addresses("eth0") == ("10.0.0.1",)


def test_an_empty_result_and_nulls() -> None:
    assert parse_result("x", {}) == CniResult()
    assert parse_result("x", {"ips": None, "interfaces": None, "routes": None, "dns": None}) == CniResult()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"ips": {}}, "ips is"),
        ({"ips": [1]}, "ips holds 1"),
        ({"ips": [{"address": "10.0.0.1"}]}, "address 0 is '10.0.0.1'"),
        ({"ips": [{"address": "fe80::1%eth0/64"}]}, "address 0"),
        ({"ips": [{"address": "10.0.0.1/33"}]}, "address 0"),
        ({"ips": [{}]}, "address 0"),
        ({"ips": [{"address": "10.0.0.1/8", "interface": 2}]}, "interface 2, which is not there"),
        ({"ips": [{"address": "10.0.0.1/8", "interface": -1}]}, "interface -1"),
        ({"ips": [{"address": "10.0.0.1/8", "interface": True}]}, "interface is True"),
        ({"ips": [{"address": "10.0.0.1/8", "gateway": "x"}]}, "gateway is 'x'"),
        ({"ips": [{"address": "10.0.0.1/8"}] * 257}, "257 items"),
        ({"interfaces": [{"mac": "zz"}]}, "mac is 'zz'"),
        ({"interfaces": [{"mtu": -1}]}, "mtu is -1"),
        ({"interfaces": [{"name": "\ud800"}]}, "surrogate"),
        ({"interfaces": [{"name": "x" * 5000}]}, "5000 characters"),
        ({"routes": [{"dst": "nowhere"}]}, "route 0 is 'nowhere'"),
        ({"dns": {"search": [1]}}, "search holds 1"),
        ({"dns": []}, "dns is"),
    ],
)
def test_results_that_are_none(change: dict[str, Any], why: str) -> None:
    with pytest.raises(CniError, match=why):
        parse_result("plugin x", {**OLD, **change})


def test_a_plugin_s_own_error() -> None:
    own = {"cniVersion": "1.0.0", "code": 7, "msg": "no addresses", "details": "in 10.0.0.0/30"}
    assert parse_error(json.dumps(own).encode()) == "no addresses; in 10.0.0.0/30"
    assert parse_error(b'{"code": 11}') == "try again later"
    assert parse_error(b'{"code": 199}') == "code 199"
    assert parse_error(b"Segmentation \x1b[31mfault\n") == "Segmentation \\x1b[31mfault"
    assert parse_error(b"") == ""


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
KEYS = (
    "interfaces",
    "ips",
    "routes",
    "dns",
    "name",
    "mac",
    "address",
    "interface",
    "dst",
    "gw",
    "search",
    "mtu",
)
SHAPED = st.recursive(
    JSON,
    lambda inner: st.dictionaries(st.sampled_from(KEYS), inner | st.lists(inner), max_size=6),
    max_leaves=30,
)


@settings(max_examples=500)
@given(st.binary(max_size=200) | SHAPED.map(lambda value: json.dumps(value).encode()))
def test_hostile_output_raises_nothing_but_our_error(data: bytes) -> None:
    assert isinstance(parse_error(data), str)
    try:
        document = decode("x", data)
        result = parse_result("x", document)
    except CniError as exc:
        assert str(exc).startswith("x")
    else:
        assert CniResult.model_validate_json(result.model_dump_json()) == result


@given(SHAPED.map(json.dumps) | st.text())
def test_hostile_configurations_raise_nothing_but_our_error(text: str) -> None:
    try:
        parse_conflist("x", text)
    except CniError as exc:
        assert str(exc).startswith("x: ")


def test_a_template_is_filled() -> None:
    bridge = {
        "type": "bridge",
        "ipam": {"type": "host-local", "ranges": "{{.PodCIDRRanges}}", "routes": "{{.Routes}}"},
    }
    text = conflist(plugins=[bridge, {"type": "x", "subnet": "{{.PodCIDR}}"}])
    filled = json.loads(cnitemplate.fill("t", text, cnitemplate.networks("10.4.0.0/24, fd00:4::/64")))
    ipam = filled["plugins"][0]["ipam"]
    assert ipam["ranges"] == [[{"subnet": "10.4.0.0/24"}], [{"subnet": "fd00:4::/64"}]]
    assert ipam["routes"] == [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
    assert filled["plugins"][1]["subnet"] == "10.4.0.0/24"
    with pytest.raises(CniError, match="t: not JSON"):
        cnitemplate.fill("t", "{{range .PodCIDRRanges}}", ["10.0.0.0/8"])
    for hole in ("{{ .PodCIDR }}", "{{.PodCIDR}},", "{{.Gateway}}"):
        with pytest.raises(CniError, match=rf"t: '{re.escape(hole)}' is no hole .* {{{{.PodCIDR}}}}, {{{{"):
            cnitemplate.fill("t", conflist(plugins=[{"type": "x", "subnet": hole}]), ["10.0.0.0/8"])
    with pytest.raises(InvalidArgument, match="pod_cidr: 'x' is not a network"):
        cnitemplate.networks("10.0.0.0/8,x")
    assert cnitemplate.networks(" ,") == ()
