"""Every field of the two big requests is in exactly one class, and the classes do what they say."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path

import betterproto2
import pytest

from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.cri import refusal, wellformed
from hyperpod.errors import InvalidArgument, Unsupported


def _message_of(kind: type[betterproto2.Message], name: str) -> tuple[type[betterproto2.Message] | None, str]:
    """The message type that a field holds (None: it holds none), and "[]" when it is repeated."""
    hint = typing.get_type_hints(kind, vars(cri))[name]
    mark = "[]" if typing.get_origin(hint) is list else ""
    for inner in (hint, *typing.get_args(hint)):
        if isinstance(inner, type) and issubclass(inner, betterproto2.Message):
            return inner, mark
    return None, ""


def _leaves(kind: type[betterproto2.Message], table: refusal.Table, path: str = "") -> Iterator[str]:
    """Paths that need a rule: a rule covers what is below it."""
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]  # every message is a dataclass
        here = f"{path}.{field.name}" if path else field.name
        inner, mark = _message_of(kind, field.name)
        if inner is None or here in table:
            yield here
        else:
            yield from _leaves(inner, table, here + mark)


@pytest.mark.parametrize("kind", refusal.TABLES, ids=lambda kind: kind.__name__)
def test_every_field_is_classified_once(kind: type[betterproto2.Message]) -> None:
    table = refusal.TABLES[kind]
    leaves = list(_leaves(kind, table))
    assert len(leaves) > 10
    assert sorted(leaves) == sorted(table)


def _set_one(kind: type[betterproto2.Message], path: str) -> betterproto2.Message:
    """A request in which the field at `path` alone is set."""
    first, _, rest = path.partition(".")
    name = first.removesuffix("[]")
    inner, mark = _message_of(kind, name)
    value: object
    if inner is not None:
        item = _set_one(inner, rest) if rest else inner()
        value = [item] if mark else item
    else:
        hint = typing.get_type_hints(kind, vars(cri))[name]
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        many = {"k": "v"} if origin is dict else [kind(1) for kind in args]
        value = many if origin else hint(1)
    message = kind(**{name: value})
    if isinstance(message, cri.UserNamespace):  # without this mode its other fields are not reached
        message.mode = cri.NamespaceMode.NODE
    return message


REFUSED = [
    (kind, path)
    for kind, table in refusal.TABLES.items()
    for path, rule in table.items()
    if isinstance(rule, refusal.Refused)
]


@pytest.mark.parametrize(("kind", "path"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_refused_fields_are_named(
    kind: type[betterproto2.Message], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "exists", lambda _: True)  # of the files that tell what a host has
    raw = bytes(_set_one(kind, path))
    with pytest.raises(Unsupported) as info:
        refusal.refuse(kind.parse(raw))
    assert str(info.value).startswith(path.replace("[]", "[0]") + " is set")


@pytest.mark.parametrize("kind", refusal.TABLES, ids=lambda kind: kind.__name__)
def test_other_fields_pass(kind: type[betterproto2.Message]) -> None:
    for path, rule in refusal.TABLES[kind].items():
        if isinstance(rule, refusal.Honoured | refusal.Harmless):
            message = _set_one(kind, path)
            refusal.refuse(kind.parse(bytes(message)))


def _container(**context: object) -> cri.CreateContainerRequest:
    security = cri.LinuxContainerSecurityContext(**context)  # type: ignore[arg-type]
    return cri.CreateContainerRequest(
        config=cri.ContainerConfig(linux=cri.LinuxContainerConfig(security_context=security))
    )


def test_what_a_kubelet_sends_for_a_plain_pod_passes() -> None:
    namespaces = cri.NamespaceOption(
        pid=cri.NamespaceMode.CONTAINER, userns_options=cri.UserNamespace(mode=cri.NamespaceMode.NODE)
    )
    plain = cri.SecurityProfile(profile_type=cri.SecurityProfileProfileType.Unconfined)
    refusal.refuse(_container(namespace_options=namespaces, seccomp=plain))
    huge = [cri.HugepageLimit(page_size="2MB", limit=0)]
    resources = cri.LinuxContainerResources(hugepage_limits=huge, cpu_shares=2)
    refusal.refuse(
        cri.CreateContainerRequest(
            config=cri.ContainerConfig(linux=cri.LinuxContainerConfig(resources=resources))
        )
    )


def test_what_a_kubelet_on_cgroup_v2_sends_with_every_pod_passes() -> None:
    resources = cri.LinuxContainerResources(
        cpu_period=100_000, cpu_shares=2, unified={"memory.oom.group": "1"}
    )
    linux = cri.LinuxPodSandboxConfig(resources=resources, overhead=resources)
    refusal.refuse(cri.RunPodSandboxRequest(config=cri.PodSandboxConfig(linux=linux)))
    refusal.refuse(cri.UpdatePodSandboxResourcesRequest(resources=resources, overhead=resources))


def test_what_is_listed_is_named() -> None:
    config = cri.ContainerConfig(CDI_devices=[cri.CdiDevice(name="vendor.com/gpu=0")])
    with pytest.raises(Unsupported, match=r"is set \('vendor.com/gpu=0'\)"):
        refusal.refuse(cri.CreateContainerRequest(config=config))


def test_another_container_s_processes_are_a_container_s_business() -> None:
    options = cri.NamespaceOption(pid=cri.NamespaceMode.TARGET, target_id="c")
    refusal.refuse(_container(namespace_options=options))
    security = cri.LinuxSandboxSecurityContext(namespace_options=options)
    pod = cri.PodSandboxConfig(linux=cri.LinuxPodSandboxConfig(security_context=security))
    with pytest.raises(InvalidArgument, match="namespace_options.pid is TARGET"):
        refusal.refuse(cri.RunPodSandboxRequest(config=pod))


@pytest.mark.parametrize("mode", [cri.NamespaceMode.CONTAINER, cri.NamespaceMode.TARGET])
def test_a_user_namespace_is_the_pods_or_the_nodes(mode: cri.NamespaceMode) -> None:
    options = cri.NamespaceOption(userns_options=cri.UserNamespace(mode=mode))
    with pytest.raises(InvalidArgument, match=f"userns_options.mode is {mode.name}"):
        refusal.refuse(_container(namespace_options=options))


def test_apparmor_profiles_are_refused() -> None:
    profile = cri.SecurityProfile(profile_type=cri.SecurityProfileProfileType.Localhost)
    refusal.refuse(_container(seccomp=profile))
    with pytest.raises(Unsupported, match="apparmor.profile_type is Localhost: the guest has no AppArmor"):
        refusal.refuse(_container(apparmor=profile))
    with pytest.raises(Unsupported, match="apparmor_profile is 'localhost/x'"):
        refusal.refuse(_container(apparmor_profile="localhost/x"))


def test_selinux_labels_mean_nothing_on_a_node_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda _: False)
    refusal.refuse(_container(selinux_options=cri.SeLinuxOption(type="spc_t", level="s0")))


def test_an_empty_list_and_an_empty_selinux_context_are_not_set() -> None:
    refusal.refuse(_container(selinux_options=cri.SeLinuxOption()))


def test_unknown_enum_values_are_refused_in_every_request() -> None:
    raw = bytes([0x0A, 4, 0x12, 2, 8, 9])  # filter {state {state: 9}}
    with pytest.raises(InvalidArgument, match="filter.state.state has the unknown value 9"):
        wellformed.check(cri.ListContainersRequest.parse(raw))
    request = cri.CreateContainerRequest.parse(bytes([0x12, 3, 0x90, 1, 99]))  # config {stop_signal: 99}
    with pytest.raises(InvalidArgument, match="config.stop_signal has the unknown value 99"):
        wellformed.check(request)
