"""Requests to records and back, without a daemon."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from typing import TypeVar

import pytest
from betterproto2 import Message
from hypothesis import given
from hypothesis import strategies as st

from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.container import signals
from hyperpod.cri import convert, replies, wellformed
from hyperpod.cri.image_service import ImageService
from hyperpod.cri.refusal import refuse
from hyperpod.cri.runtime_service import RuntimeService
from hyperpod.errors import HyperpodError, InvalidArgument, Unsupported
from hyperpod.model.container import Container, ContainerConfig, ContainerRecord, ContainerStatus
from hyperpod.model.images import Image, ImageConfig
from hyperpod.model.network import PodNetwork
from hyperpod.model.sandbox import Artifact, Sandbox, SandboxPhase, SandboxRecord, SandboxStatus, VmSize
from hyperpod.model.security import Device, SeccompKind, SeccompProfile, User
from hyperpod.rpc import strict

M = TypeVar("M", bound=Message)
REPO_DIGEST = "docker.io/library/busybox@sha256:" + "b" * 64
IMAGE_ID = "sha256:" + "a" * 64


def pod_config(**more: object) -> cri.PodSandboxConfig:
    values: dict[str, object] = {
        "metadata": cri.PodSandboxMetadata(name="web", uid="u-1", namespace="default", attempt=2),
        "labels": {"app": "web"},
        **more,
    }
    return cri.PodSandboxConfig(**values)  # type: ignore[arg-type]


def container_config(**more: object) -> cri.ContainerConfig:
    values: dict[str, object] = {
        "metadata": cri.ContainerMetadata(name="main", attempt=1),
        "image": cri.ImageSpec(image="busybox", annotations={"k": "v"}, user_specified_image="busybox:1"),
        **more,
    }
    return cri.ContainerConfig(**values)  # type: ignore[arg-type]


def sandbox(ident: str = "f" * 64, phase: SandboxPhase = SandboxPhase.READY, **more: object) -> Sandbox:
    record = SandboxRecord(
        id=ident,
        config=convert.sandbox_config(pod_config(**more)),
        runtime_handler="vm",
        created_at=int(ident[:1], 16) + 1,
        host_boot_id="b",
        slot=0,
        uid=1_500_000,
        gid=1_500_000,
        cid=100,
        token=b"secret-token-secret-token-secret",
        domain="hp-ffffffffffff",
        domain_uuid="0",
        kernel=Artifact(version="6.12", path="/k"),
        guest=Artifact(version="7", path="/g"),
        size=VmSize(memory_mib=512, vcpus=1, max_memory_mib=1024, max_vcpus=2),
    )
    return Sandbox(record=record, status=SandboxStatus(phase=phase, timings={"kernel": 0.5}))


def container(config: cri.ContainerConfig, ident: str = "c" * 64, **status: object) -> Container:
    record = ContainerRecord(
        id=ident,
        sandbox_id="f" * 64,
        config=convert.container_config(config),
        image_id=IMAGE_ID,
        image_ref=REPO_DIGEST,
        image_tag="docker.io/library/busybox:1",
        created_at=5,
        log_path="/var/log/pods/main.log",
        layers=(),
        stop_signal="SIGRTMIN+3",
        image_config=ImageConfig(user="7:8"),
    )
    return Container(record=record, status=ContainerStatus(**status))


def test_the_sandbox_status_echoes_the_namespaces() -> None:
    options = cri.NamespaceOption(pid=cri.NamespaceMode.CONTAINER)
    security = cri.LinuxSandboxSecurityContext(namespace_options=options)
    one = sandbox(linux=cri.LinuxPodSandboxConfig(security_context=security))
    reply = cri.PodSandboxStatusResponse.parse(bytes(replies.pod_status(one, [], verbose=True)))
    assert reply.status is not None and reply.status.linux is not None
    assert reply.status.linux.namespaces is not None
    assert reply.status.linux.namespaces.options == options
    assert reply.status.network is None
    assert reply.status.metadata == pod_config().metadata
    assert (reply.status.state, reply.status.runtime_handler) == (cri.PodSandboxState.SANDBOX_READY, "vm")
    assert json.loads(reply.info["timings"]) == {"kernel": 0.5}
    vm = json.loads(reply.info["vm"])
    assert (vm["size"]["memory_mib"], vm["kernel"], vm["domain"]) == (512, "6.12", "hp-ffffffffffff")
    assert "secret" not in str(reply.info)
    assert replies.pod_status(one, [], verbose=False).info == {}


def test_a_pod_without_its_namespace_has_no_address() -> None:
    """An empty network and not none: that is what a kubelet makes the pod anew for."""
    one = sandbox()
    network = PodNetwork(name="n", addresses=("10.0.0.5", "fd00::5"), interfaces=())
    one = one.model_copy(update={"status": one.status.model_copy(update={"network": network})})
    for connected, told in ((True, ["10.0.0.5", "fd00::5"]), (False, [""])):
        status = replies.pod_status(one, [], verbose=False, connected=connected).status
        assert status is not None and status.network is not None
        assert [status.network.ip, *(item.ip for item in status.network.additional_ips)] == told


@pytest.mark.parametrize("phase", [phase for phase in SandboxPhase if phase is not SandboxPhase.READY])
def test_a_sandbox_that_is_not_ready_is_notready(phase: SandboxPhase) -> None:
    assert replies.pod(sandbox(phase=phase)).state == cri.PodSandboxState.SANDBOX_NOTREADY


def test_pod_filters() -> None:
    items = [sandbox("a" * 64), sandbox("b" * 64, SandboxPhase.STOPPED), sandbox("c" * 64, labels={"x": "y"})]

    def ids(**wanted: object) -> str:
        found = replies.wanted_pods(items, cri.PodSandboxFilter(**wanted))  # type: ignore[arg-type]
        return "".join(item.id[0] for item in found)

    assert ids() == "cba"
    assert ids(id="b" * 9) == "b"
    assert ids(id="ab") == ""
    assert ids(label_selector={"app": "web"}) == "ba"
    assert ids(label_selector={"app": ""}) == ""
    ready = cri.PodSandboxStateValue(state=cri.PodSandboxState.SANDBOX_READY)  # zero, but present
    assert ids(state=ready) == "ca"
    assert [item.id[0] for item in replies.wanted_pods(items, None)] == ["c", "b", "a"]


def test_container_filters() -> None:
    items = [
        container(container_config(), "a" * 64),
        container(container_config(labels={"x": "y"}), "b" * 64, started_at=6),
    ]
    created = cri.ContainerStateValue(state=cri.ContainerState.CONTAINER_CREATED)
    assert [c.id[0] for c in replies.wanted_containers(items, cri.ContainerFilter(state=created))] == ["a"]
    assert [c.id[0] for c in replies.wanted_containers(items, cri.ContainerFilter(id="bb"))] == ["b"]
    labelled = cri.ContainerFilter(label_selector={"x": "y"}, pod_sandbox_id="ff")
    assert [c.id[0] for c in replies.wanted_containers(items, labelled)] == ["b"]
    assert replies.wanted_containers(items, cri.ContainerFilter(pod_sandbox_id="fe")) == []


def test_the_container_status() -> None:
    resources = cri.LinuxContainerResources(
        cpu_period=100_000,
        cpu_quota=50_000,
        cpu_shares=512,
        memory_limit_in_bytes=1 << 26,
        oom_score_adj=-5,
        unified={"memory.high": "1"},
    )
    one = container(
        container_config(linux=cri.LinuxContainerConfig(resources=resources)),
        started_at=6,
        user=User(uid=7, gid=8, groups=(8, 9)),
        finished_at=7,
        exit_code=3,
        reason="Error",
        message="why",
    )
    reply = cri.ContainerStatusResponse.parse(bytes(replies.container_status(one, verbose=True)))
    status = reply.status
    assert status is not None
    asked = container_config().image
    assert asked is not None
    assert status.image == replace(asked, image="docker.io/library/busybox:1")
    assert (status.image_id, status.image_ref) == (IMAGE_ID, REPO_DIGEST)
    listed = cri.Container.parse(bytes(replies.container(one)))
    assert listed.image == asked
    assert (listed.image_id, listed.image_ref) == (IMAGE_ID, IMAGE_ID)
    assert status.state == cri.ContainerState.CONTAINER_EXITED
    assert (status.created_at, status.started_at, status.finished_at) == (5, 6, 7)
    assert (status.exit_code, status.reason, status.message) == (3, "Error", "why")
    assert status.log_path == "/var/log/pods/main.log"
    assert status.resources is not None and status.resources.linux == resources
    assert status.user is not None and status.user.linux is not None
    assert (status.user.linux.uid, status.user.linux.gid) == (7, 8)
    assert status.user.linux.supplemental_groups == [8, 9]
    assert status.stop_signal == cri.Signal.SIGRTMINPLUS3
    assert json.loads(reply.info["container"])["sandbox_id"] == "f" * 64


def test_root_is_not_unset() -> None:
    def user(value: cri.Int64Value | None) -> int | None:
        security = cri.LinuxContainerSecurityContext(run_as_user=value)
        config = container_config(linux=cri.LinuxContainerConfig(security_context=security))
        return convert.container_config(cri.ContainerConfig.parse(bytes(config))).run_as_user

    assert user(cri.Int64Value(value=0)) == 0
    assert user(None) is None


@pytest.mark.parametrize("signal", [signal for signal in cri.Signal if signal])
def test_every_signal_has_a_number(signal: cri.Signal) -> None:
    name = convert.stop_signal(signal)
    again = replies._stop_signal(name)
    # SIGCLD, SIGIOT and SIGPOLL are second names of others.
    assert signals.number(convert.stop_signal(again)) == signals.number(name)
    assert again == signal or signal.name in ("SIGCLD", "SIGIOT", "SIGPOLL")


def test_no_signal_is_the_images_choice() -> None:
    assert convert.stop_signal(cri.Signal.RUNTIME_DEFAULT) == ""
    assert replies._stop_signal("SIGNONSENSE") == cri.Signal.RUNTIME_DEFAULT


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (None, "config is missing"),
        (cri.PodSandboxConfig(), "config.metadata is missing"),
        (pod_config(metadata=cri.PodSandboxMetadata(uid="b", namespace="c")), "metadata.name is missing"),
        (pod_config(metadata=cri.PodSandboxMetadata(name="a", namespace="c")), "metadata.uid is missing"),
        (pod_config(metadata=cri.PodSandboxMetadata(name="a", uid="b")), "metadata.namespace is missing"),
        (pod_config(hostname="h" * 65), "config.hostname has 65"),
        (pod_config(hostname="a/b"), "config.hostname 'a/b'"),
        (pod_config(hostname="a\n"), "config.hostname"),
        (pod_config(log_directory="var/log"), "config.log_directory 'var/log' is not absolute"),
        (pod_config(log_directory="/a\0b"), "config.log_directory holds a NUL"),
        (pod_config(annotations={"k": "v" * (1 << 20)}), "config.annotations has"),
        (
            pod_config(
                linux=cri.LinuxPodSandboxConfig(
                    resources=cri.LinuxContainerResources(memory_limit_in_bytes=-1)
                )
            ),
            "config.linux.resources.memory_limit_in_bytes is -1",
        ),
    ],
)
def test_bad_pods_are_refused_by_name(config: cri.PodSandboxConfig | None, field: str) -> None:
    with pytest.raises(InvalidArgument, match=field):
        convert.sandbox_config(config)


def _linux(**resources: object) -> cri.ContainerConfig:
    value = cri.LinuxContainerResources(**resources)  # type: ignore[arg-type]
    return container_config(linux=cri.LinuxContainerConfig(resources=value))


def _secured(**context: object) -> cri.ContainerConfig:
    value = cri.LinuxContainerSecurityContext(**context)  # type: ignore[arg-type]
    return container_config(linux=cri.LinuxContainerConfig(security_context=value))


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (None, "config is missing"),
        (container_config(metadata=None), "config.metadata is missing"),
        (container_config(metadata=cri.ContainerMetadata()), "config.metadata.name is missing"),
        (container_config(image=None), "config.image is missing"),
        (container_config(image=cri.ImageSpec()), "config.image.image is missing"),
        (container_config(command=["a", "b\0"]), r"config.command\[1\] holds a NUL"),
        (container_config(args=["x"] * 70_000), "config.args has 70000 items"),
        (_linux(cpu_period=5), "config.linux.resources.cpu_period is 5"),
        (_linux(cpu_quota=-2), "config.linux.resources.cpu_quota is -2"),
        (_linux(cpu_shares=1 << 40), "config.linux.resources.cpu_shares"),
        (_linux(oom_score_adj=2000), "config.linux.resources.oom_score_adj is 2000"),
        (_secured(run_as_user=cri.Int64Value(value=-1)), "security_context.run_as_user is -1"),
        (_secured(run_as_group=cri.Int64Value(value=2**32)), "security_context.run_as_group"),
        (_secured(supplemental_groups=[1, -5]), r"security_context.supplemental_groups\[1\] is -5"),
    ],
)
def test_bad_containers_are_refused_by_name(config: cri.ContainerConfig | None, field: str) -> None:
    with pytest.raises(InvalidArgument, match=field):
        convert.container_config(config)


def secured(**context: object) -> ContainerConfig:
    security = cri.LinuxContainerSecurityContext(**context)  # type: ignore[arg-type]
    raw = bytes(container_config(linux=cri.LinuxContainerConfig(security_context=security)))
    return convert.container_config(cri.ContainerConfig.parse(raw))


def test_seccomp_profiles() -> None:
    kinds = cri.SecurityProfileProfileType
    path = "/var/lib/kubelet/seccomp/x.json"
    assert secured().seccomp == SeccompProfile()
    assert secured(seccomp=cri.SecurityProfile()).seccomp.kind is SeccompKind.RUNTIME_DEFAULT
    local = SeccompProfile(kind=SeccompKind.LOCALHOST, path=path)
    assert (
        secured(seccomp=cri.SecurityProfile(profile_type=kinds.Localhost, localhost_ref=path)).seccomp
        == local
    )
    for old, want in (
        ("runtime/default", SeccompProfile(kind=SeccompKind.RUNTIME_DEFAULT)),
        ("docker/default", SeccompProfile(kind=SeccompKind.RUNTIME_DEFAULT)),
        ("unconfined", SeccompProfile(kind=SeccompKind.UNCONFINED)),
        (f"localhost/{path}", local),
    ):
        assert secured(seccomp_profile_path=old).seccomp == want
    newer = cri.SecurityProfile(profile_type=kinds.Unconfined)
    assert (
        secured(seccomp=newer, seccomp_profile_path="runtime/default").seccomp.kind is SeccompKind.UNCONFINED
    )
    for bad in ("", "x.json"):
        with pytest.raises(InvalidArgument, match="seccomp.localhost_ref: .* is not an absolute path"):
            secured(seccomp=cri.SecurityProfile(profile_type=kinds.Localhost, localhost_ref=bad))
    with pytest.raises(InvalidArgument, match="seccomp_profile_path 'what' is no profile"):
        secured(seccomp_profile_path="what")


def test_a_security_context_that_is_there_is_told_from_none() -> None:
    assert secured().has_security_context
    assert not convert.container_config(container_config()).has_security_context
    strict = secured(supplemental_groups_policy=cri.SupplementalGroupsPolicy.Strict)
    assert (strict.strict_groups, secured().strict_groups) == (True, False)


def test_devices() -> None:
    def devices(**values: str) -> tuple[Device, ...]:
        return convert.container_config(container_config(devices=[cri.Device(**values)])).devices

    full = Device(host_path="/dev/fuse", container_path="/dev/f", permissions="rw")
    assert devices(host_path="/dev/fuse", container_path="/dev/f", permissions="rw") == (full,)
    (short,) = devices(host_path="/dev/fuse")
    assert (short.container_path, short.permissions) == ("/dev/fuse", "rwm")
    for values, text in (
        ({"container_path": "/dev/x"}, r"devices\[0\].host_path is missing"),
        ({"host_path": "dev/fuse"}, "host_path 'dev/fuse' is not absolute"),
        ({"host_path": "/dev/fuse", "permissions": "rx"}, "permissions 'rx'"),
        ({"host_path": "/dev/fuse", "container_path": "fuse"}, "container_path 'fuse' is not absolute"),
    ):
        with pytest.raises(InvalidArgument, match=text):
            devices(**values)


def test_environment_values_are_bytes() -> None:
    config = container_config(envs=[cri.KeyValue(key="BIN", value=b"\xff\x00\xfe")])
    assert convert.container_config(config).envs == (("BIN", b"\xff\x00\xfe"),)


def _full_requests() -> list[bytes]:
    """One of each that sets much, as raw material to be damaged."""
    options = cri.NamespaceOption(
        pid=cri.NamespaceMode.CONTAINER, userns_options=cri.UserNamespace(mode=cri.NamespaceMode.NODE)
    )
    profile = cri.SecurityProfile(profile_type=cri.SecurityProfileProfileType.Unconfined)
    resources = cri.LinuxContainerResources(cpu_quota=2000, memory_limit_in_bytes=1 << 28)
    pod_security = cri.LinuxSandboxSecurityContext(namespace_options=options, seccomp=profile)
    linux = cri.LinuxPodSandboxConfig(security_context=pod_security, resources=resources)
    security = cri.LinuxContainerSecurityContext(
        run_as_user=cri.Int64Value(value=5), namespace_options=options, seccomp=profile
    )
    inner = cri.LinuxContainerConfig(security_context=security, resources=resources)
    config = container_config(linux=inner, stop_signal=cri.Signal.SIGINT, command=["a", "b"])
    ports = [cri.PortMapping(protocol=cri.Protocol.SCTP, container_port=9)]
    pod = pod_config(linux=linux, port_mappings=ports, dns_config=cri.DnsConfig(servers=["1.1.1.1"]))
    return [
        bytes(cri.RunPodSandboxRequest(config=pod)),
        bytes(cri.CreateContainerRequest(pod_sandbox_id="f", config=config)),
    ]


def _parse(kind: type[M], raw: bytes) -> M:
    strict.check(raw, kind)
    return kind.parse(raw)


def _accept(kind: int, raw: bytes) -> object:
    if kind == 0:
        run = _parse(cri.RunPodSandboxRequest, raw)
        wellformed.check(run)
        refuse(run)
        return convert.sandbox_config(run.config)
    create = _parse(cri.CreateContainerRequest, raw)
    wellformed.check(create)
    refuse(create)
    return convert.container_config(create.config)


@given(st.integers(0, 1), st.data())
def test_damaged_requests_convert_or_are_refused(kind: int, data: st.DataObject) -> None:
    raw = bytearray(_full_requests()[kind])
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(HyperpodError):
        _accept(kind, bytes(raw))


def test_the_undamaged_requests_are_taken() -> None:
    for kind, raw in enumerate(_full_requests()):
        assert _accept(kind, raw)


def test_timeouts() -> None:
    assert convert.seconds("timeout", 0) == 0
    assert convert.seconds("timeout", 2**62) == convert.MAX_SECONDS
    with pytest.raises(InvalidArgument, match="timeout is -1"):
        convert.seconds("timeout", -1)


def test_credentials_are_taken_whole_and_hidden() -> None:
    assert convert.auth(None) is None
    assert convert.auth(cri.AuthConfig()) is None
    auth = convert.auth(cri.AuthConfig(username="u", password="p4ss", identity_token="t0ken"))
    assert auth is not None
    assert (auth.username, auth.password, auth.identity_token) == ("u", "p4ss", "t0ken")
    assert "p4ss" not in repr(auth) and "t0ken" not in str(auth)


@pytest.mark.parametrize(
    ("user", "uid", "name"),
    [
        *(("", None, ""), ("0", 0, ""), ("1000:5", 1000, ""), ("www:www", None, "www")),
        *((name, None, name) for name in ("9" * 25, str(2**64 + 1000), "\u0663", "-5")),
    ],
)
def test_the_images_user(user: str, uid: int | None, name: str) -> None:
    item = Image(id=IMAGE_ID, size=1, layers=(), config=ImageConfig(user=user))
    reply = cri.Image.parse(bytes(replies.image(item)))
    assert (reply.uid.value if reply.uid is not None else None, reply.username) == (uid, name)


def test_pages() -> None:
    assert replies.pages([], 2) == []
    assert replies.pages([1, 2, 3], 2) == [[1, 2], [3]]


async def test_unbuilt_rpcs_name_themselves() -> None:
    service = RuntimeService.__new__(RuntimeService)
    with pytest.raises(Unsupported, match="CheckpointContainer is not built yet"):
        await service.checkpoint_container(cri.CheckpointContainerRequest())
    with pytest.raises(Unsupported, match="GetContainerEvents is not built yet"):
        async for _ in service.get_container_events(cri.GetEventsRequest()):
            raise AssertionError("no events")


def test_all_rpcs_are_registered() -> None:
    services = (RuntimeService.__new__(RuntimeService), ImageService.__new__(ImageService))
    names = [name for service in services for name in service.__mapping__()]
    assert len(names) == 43
    assert {name.split("/")[1] for name in names} == {"runtime.v1.RuntimeService", "runtime.v1.ImageService"}
