"""What a pod asks of its network: quantities, ports, names, files."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.cri import convert
from hyperpod.errors import InvalidArgument, NetworkError
from hyperpod.model.network import GuestInterface
from hyperpod.model.sandbox import DnsConfig, PortMapping
from hyperpod.network import ports
from hyperpod.network.tap import batch
from hyperpod.spec import podfiles, podnet


def request(**more: object) -> cri.PodSandboxConfig:
    values: dict[str, object] = {
        "metadata": cri.PodSandboxMetadata(name="web", uid="u-1", namespace="shop"),
        **more,
    }
    return cri.PodSandboxConfig(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1k", 1000),
        ("10M", 10**7),
        ("1.5G", 1_500_000_000),
        ("1Ki", 1024),
        ("2e3", 2000),
        ("1E3", 1000),
        ("1E", 10**18),
        ("100m", 1),
        ("+5", 5),
        (".5k", 500),
        ("0.0001", 1),
    ],
)
def test_quantities(text: str, value: int) -> None:
    assert podnet.quantity(text) == value


@pytest.mark.parametrize("text", ["", "k", "1 k", "-1", "1kk", "0x10", "1e", "1e999", "NaN", "1Mi5", "1\n"])
def test_no_quantities(text: str) -> None:
    with pytest.raises(ValueError, match="not a quantity"):
        podnet.quantity(text)


@given(st.text(st.sampled_from("0123456789.eE+-kKMGTPimnu"), max_size=40))
def test_any_text_is_a_quantity_or_a_value_error(text: str) -> None:
    try:
        assert podnet.quantity(text) >= 0
    except ValueError as exc:
        assert "not a quantity" in str(exc)


def test_bandwidth() -> None:
    found = podnet.bandwidth({podnet.INGRESS: "10M", podnet.EGRESS: "1P"})
    assert (found["ingressRate"], found["egressRate"]) == (10**7, 10**15)
    for text in ("999", "1001T", "fast"):
        with pytest.raises(InvalidArgument, match=podnet.EGRESS):
            convert.sandbox_config(request(annotations={podnet.EGRESS: text}))


def test_what_the_plugins_are_told() -> None:
    config = convert.sandbox_config(
        request(
            dns_config=cri.DnsConfig(servers=["10.0.0.10"], searches=["a.b"], options=["ndots:5"]),
            port_mappings=[
                cri.PortMapping(protocol=cri.Protocol.SCTP, container_port=9, host_port=90, host_ip="::1"),
                cri.PortMapping(container_port=80, host_port=8080),
                cri.PortMapping(container_port=81),
            ],
        )
    )
    runtime = json.loads(podnet.runtime_json(config))
    assert runtime == {
        "portMappings": [
            {"hostPort": 90, "containerPort": 9, "protocol": "sctp", "hostIP": "::1"},
            {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
        ],
        "dns": {"servers": ["10.0.0.10"], "searches": ["a.b"], "options": ["ndots:5"]},
    }
    assert podnet.arguments(config, "id").split(";") == [
        "IgnoreUnknown=1",
        "K8S_POD_NAMESPACE=shop",
        "K8S_POD_NAME=web",
        "K8S_POD_INFRA_CONTAINER_ID=id",
        "K8S_POD_UID=u-1",
    ]


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"port_mappings": [cri.PortMapping(host_port=80)]}, r"port_mappings\[0\].container_port is 0"),
        ({"port_mappings": [cri.PortMapping(host_port=70000, container_port=1)]}, "host_port is 70000"),
        ({"port_mappings": [cri.PortMapping(host_port=-1)]}, "host_port is -1"),
        ({"port_mappings": [cri.PortMapping(host_ip="here")]}, "host_ip is 'here'"),
        ({"port_mappings": [cri.PortMapping(host_ip="fe80::1%eth0")]}, "with a zone"),
        ({"dns_config": cri.DnsConfig(servers=["dns.example"])}, r"servers\[0\] is 'dns.example'"),
        ({"dns_config": cri.DnsConfig(searches=["a\nnameserver 6.6.6.6"])}, r"searches\[0\]"),
        ({"dns_config": cri.DnsConfig(options=[""])}, r"options\[0\]"),
        (
            {"linux": cri.LinuxPodSandboxConfig(sysctls={"../../x": "1"})},
            "'../../x' is not the name of a sysctl",
        ),
        ({"linux": cri.LinuxPodSandboxConfig(sysctls={"net.x": "1\n2"})}, "net.x has the value"),
        ({"metadata": cri.PodSandboxMetadata(name="a;K8S=1", uid="u", namespace="n")}, "K8S_POD_NAME"),
    ],
)
def test_requests_that_cannot_be_meant(more: dict[str, object], why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        convert.sandbox_config(request(**more))


def test_bandwidth_is_nothing_to_a_pod_in_the_nodes_network() -> None:
    node = cri.LinuxSandboxSecurityContext(
        namespace_options=cri.NamespaceOption(network=cri.NamespaceMode.NODE)
    )
    linux = cri.LinuxPodSandboxConfig(security_context=node)
    config = convert.sandbox_config(request(linux=linux, annotations={podnet.INGRESS: "5"}))
    assert podnet.runtime(config) == {}


def test_ports_that_collide() -> None:
    every, local = PortMapping(host_port=80), PortMapping(host_port=80, host_ip="127.0.0.1")
    assert ports.overlap(every, local) and ports.overlap(local, local)
    assert not ports.overlap(local, PortMapping(host_port=80, host_ip="10.0.0.1"))
    assert not ports.overlap(every, PortMapping(host_port=80, protocol="UDP"))
    assert ports.overlap(local, PortMapping(host_port=80, host_ip="::"))
    with pytest.raises(NetworkError, match="host port 127.0.0.1:80/TCP is in use by pod other"):
        ports.need_unclaimed([local], [("free", []), ("other", [every])])


def test_resolv_conf() -> None:
    dns = DnsConfig(servers=("10.0.0.10", "fd00::a"), searches=("a", "b"), options=("ndots:5",))
    text = podfiles.resolv_conf(dns, "host")
    assert text == "search a b\nnameserver 10.0.0.10\nnameserver fd00::a\noptions ndots:5\n"
    assert podfiles.resolv_conf(None, "host") == podfiles.resolv_conf(DnsConfig(), "host") == "host"
    assert podfiles.resolv_conf(DnsConfig(searches=("x",)), "host") == "search x\n"


@pytest.mark.parametrize(
    ("text", "stub"),
    [
        ("nameserver 127.0.0.53\noptions edns0\n", True),
        ("nameserver ::1\nnameserver 127.0.0.1\n", True),
        ("nameserver 127.0.0.53\nnameserver 10.0.0.1\n", False),
        ("# nameserver 127.0.0.53\n", False),
        ("nameserver\n", False),
        ("nameserver fe80::1%eth0\n", False),
    ],
)
def test_stubs_of_the_host(text: str, stub: bool) -> None:
    assert podfiles.only_loopback(text) is stub


def test_hosts() -> None:
    text = podfiles.hosts("web", ["10.0.0.5", "fd00::5"])
    assert text.startswith("127.0.0.1\tlocalhost\n")
    assert text.endswith("10.0.0.5\tweb\nfd00::5\tweb\n")


def test_frames_go_both_ways() -> None:
    lines = batch([GuestInterface(name="eth0", mac="", mtu=1500, tap="hp0")]).splitlines()
    assert [line for line in lines if line.startswith("qdisc")] == [
        "qdisc add dev eth0 clsact",
        "qdisc add dev hp0 clsact",
    ]
    assert lines[1].endswith("redirect dev hp0") and lines[3].endswith("redirect dev eth0")
