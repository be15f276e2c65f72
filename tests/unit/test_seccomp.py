"""Seccomp profiles: what is read from a host, what it comes to for one container, and what nobody gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperpod.config import ContainerConfig as Settings
from hyperpod.container.seccomp import PROFILE_LIMIT, SeccompProfiles
from hyperpod.errors import FailedPrecondition, HyperpodError, InvalidArgument
from hyperpod.model.container import Capabilities, ContainerConfig, ContainerMetadata
from hyperpod.model.security import SeccompKind, SeccompProfile
from hyperpod.spec.capabilities import DEFAULT
from hyperpod.spec.profile import ACTIONS, OPERATORS, Target, resolve
from hyperpod.spec.seccomp import ALLOW_ALL, without_host_sockets

ALLOW, ERRNO, LOG, TRACE = (f"SCMP_ACT_{name}" for name in ("ALLOW", "ERRNO", "LOG", "TRACE"))
FAMILIES = range(46)

COMPARE = {
    "SCMP_CMP_EQ": lambda value, arg: value == arg["value"],
    "SCMP_CMP_NE": lambda value, arg: value != arg["value"],
    "SCMP_CMP_LT": lambda value, arg: value < arg["value"],
    "SCMP_CMP_LE": lambda value, arg: value <= arg["value"],
    "SCMP_CMP_GT": lambda value, arg: value > arg["value"],
    "SCMP_CMP_GE": lambda value, arg: value >= arg["value"],
    "SCMP_CMP_MASKED_EQ": lambda value, arg: value & arg["value"] == arg["valueTwo"],
}


def verdicts(profile: dict[str, Any], name: str, *args: int) -> set[str]:
    """What the rules that match a call say; the default when none does."""
    values = (*args, *([0] * (6 - len(args))))
    found = {
        rule["action"]
        for rule in profile.get("syscalls", [])
        if name in rule["names"]
        and all(COMPARE[arg["op"]](values[arg["index"]], arg) for arg in rule.get("args") or [])
    }
    return found or {profile["defaultAction"]}


def socket_rule(action: str, *args: tuple[int, str, int]) -> dict[str, Any]:
    conditions = [{"index": i, "op": f"SCMP_CMP_{op}", "value": value} for i, op, value in args]
    names = ["read", "socket", "socketcall", "io_uring_setup"]
    return {"names": names, "action": action, "args": conditions}


@pytest.mark.parametrize("high", [0, 1 << 32, (1 << 64) - (1 << 32)])
@pytest.mark.parametrize(
    "profile",
    [
        ALLOW_ALL,
        {"defaultAction": LOG, "syscalls": [socket_rule(ALLOW)]},
        {"defaultAction": ERRNO, "syscalls": [socket_rule(ALLOW)]},
        {"defaultAction": ERRNO, "syscalls": [socket_rule(LOG)]},
        {"defaultAction": ERRNO, "syscalls": [socket_rule(TRACE)]},
        {"defaultAction": TRACE, "syscalls": [socket_rule(LOG)]},
        {"defaultAction": ERRNO, "syscalls": [socket_rule(ALLOW, (0, "NE", 50))]},
        {
            "defaultAction": ERRNO,
            "syscalls": [socket_rule(ALLOW, (0, "LT", 50)), socket_rule(ALLOW, (0, "GE", 50))],
        },
    ],
)
def test_vsock_and_alg_are_denied_whatever_the_profile(profile: dict[str, Any], high: int) -> None:
    """The kernel takes the low 32 bits of the family; what is above must not matter."""
    filtered = without_host_sockets(profile)
    for family in FAMILIES:
        got = verdicts(filtered, "socket", high | family)
        assert got <= ({ERRNO} if family in (38, 40) else {ALLOW, LOG, TRACE}), family
    for untold in ("socketcall", "io_uring_setup"):
        assert verdicts(filtered, untold) == {ERRNO}
    if profile["defaultAction"] == ERRNO:
        assert verdicts(filtered, "read") <= {ALLOW, LOG, TRACE}


def test_a_profile_that_denies_sockets_stays_that_way() -> None:
    filtered = without_host_sockets(
        {"defaultAction": ERRNO, "syscalls": [{"names": ["read"], "action": ALLOW}]}
    )
    assert verdicts(filtered, "socket", 2) == {ERRNO}
    assert filtered["syscalls"] == [{"names": ["read"], "action": ALLOW}]


CONDITIONS = st.lists(
    st.tuples(
        st.sampled_from([0, 2]),
        st.sampled_from(sorted(op.removeprefix("SCMP_CMP_") for op in OPERATORS - {"SCMP_CMP_MASKED_EQ"})),
        st.integers(0, 50),
    ),
    max_size=2,
    unique_by=lambda item: item[0],
)


@given(rules=st.lists(CONDITIONS, max_size=4), family=st.sampled_from(FAMILIES), protocol=st.integers(0, 12))
def test_narrowing_takes_the_denied_families_and_nothing_else(
    rules: list[list[tuple[int, str, int]]], family: int, protocol: int
) -> None:
    profile = {"defaultAction": ERRNO, "syscalls": [socket_rule(ALLOW, *rule) for rule in rules]}
    before = verdicts(profile, "socket", family, 0, protocol)
    after = verdicts(without_host_sockets(profile), "socket", family, 0, protocol)
    assert after == ({ERRNO} if family in (38, 40) else before)
    for rule in without_host_sockets(profile)["syscalls"]:
        indices = [arg["index"] for arg in rule.get("args", [])]
        assert len(indices) == len(set(indices))  # libseccomp takes no more


def test_two_conditions_on_one_argument_are_alternatives() -> None:
    either = socket_rule(ALLOW, (0, "EQ", 2), (0, "EQ", 40))
    filtered = without_host_sockets({"defaultAction": ERRNO, "syscalls": [either]})
    allowed = [family for family in FAMILIES if verdicts(filtered, "socket", family) == {ALLOW}]
    assert allowed == [2]


# -- profiles ----------------------------------------------------------------------------------------------


def target(*caps: str, machine: str = "x86_64", kernel: str = "6.12.1-x") -> Target:
    return Target(frozenset(caps), machine, kernel)


def rule(**more: Any) -> dict[str, Any]:
    return {"names": ["chroot"], "action": ALLOW, **more}


@pytest.mark.parametrize(
    ("more", "where", "there"),
    [
        ({}, target(), True),
        ({"includes": None, "excludes": {}, "args": None, "comment": "x"}, target(), True),
        ({"includes": {"caps": ["CAP_A"]}}, target("CAP_A"), True),
        ({"includes": {"caps": ["CAP_A"]}}, target(), False),
        ({"includes": {"caps": ["CAP_A", "CAP_B"]}}, target("CAP_A"), False),
        ({"excludes": {"caps": ["CAP_A", "CAP_B"]}}, target("CAP_A"), False),
        ({"excludes": {"caps": ["CAP_B"]}}, target("CAP_A"), True),
        ({"includes": {"arches": ["amd64", "x86"]}}, target(), True),
        ({"includes": {"arches": ["arm64"]}}, target(), False),
        ({"includes": {"arches": ["arm64"]}}, target(machine="aarch64"), True),
        ({"excludes": {"arches": ["amd64"]}}, target(), False),
        ({"includes": {"minKernel": "4.8"}}, target(), True),
        ({"includes": {"minKernel": "6.12"}}, target(), True),
        ({"includes": {"minKernel": "6.13"}}, target(), False),
        ({"includes": {"minKernel": "6.9"}}, target(), True),
        ({"excludes": {"minKernel": "4.8"}}, target(), False),
        ({"names": [], "name": "chroot"}, target(), True),
    ],
)
def test_rules_that_depend_on_the_container(more: dict[str, Any], where: Target, there: bool) -> None:
    built = resolve({"defaultAction": ERRNO, "syscalls": [rule(**more)]}, where)
    assert built["syscalls"] == ([{"names": ["chroot"], "action": ALLOW}] if there else [])


def test_what_is_in_a_profile_is_kept() -> None:
    args = [{"index": 1, "value": 2**64 - 1, "valueTwo": 7, "op": "SCMP_CMP_MASKED_EQ"}]
    built = resolve(
        {
            "defaultAction": ERRNO,
            "defaultErrno": "ENOSYS",
            "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}],
            "flags": ["SECCOMP_FILTER_FLAG_LOG"],
            "syscalls": [
                {"names": ["a", "b"], "action": ERRNO, "errno": "EPERM", "args": args},
                rule(errnoRet=1),
            ],
        },
        target(),
    )
    assert built == {
        "defaultAction": ERRNO,
        "defaultErrnoRet": 38,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "flags": ["SECCOMP_FILTER_FLAG_LOG"],
        "syscalls": [{"names": ["a", "b"], "action": ERRNO, "errnoRet": 1, "args": args}, rule()],
    }


@pytest.mark.parametrize(
    ("profile", "named"),
    [
        ([], "not an object"),
        ({}, "defaultAction is 'None'"),
        ({"defaultAction": "ALLOW"}, "defaultAction is 'ALLOW'"),
        ({"defaultAction": "SCMP_ACT_NOTIFY"}, "NOTIFY"),
        ({"defaultAction": ALLOW, "listenerPath": "/x"}, "listenerPath"),
        ({"defaultAction": ALLOW, "architectures": ["x86"]}, "'x86'"),
        ({"defaultAction": ALLOW, "flags": ["X"]}, "flags is 'X'"),
        ({"defaultAction": ERRNO, "defaultErrnoRet": 5000}, "defaultErrnoRet is '5000'"),
        ({"defaultAction": ALLOW, "syscalls": {}}, "syscalls is not a list"),
        ({"defaultAction": ALLOW, "syscalls": [rule(), 3]}, r"syscalls\[1\] is not an object"),
        ({"defaultAction": ALLOW, "syscalls": [{"action": ALLOW}]}, r"syscalls\[0\] has no names"),
        ({"defaultAction": ALLOW, "syscalls": [rule(names=["a b"])]}, "'a b' is no system call"),
        ({"defaultAction": ALLOW, "syscalls": [rule(names=[1])]}, "'1' is no system call"),
        ({"defaultAction": ALLOW, "syscalls": [rule(action="x")]}, r"syscalls\[0\].action is 'x'"),
        ({"defaultAction": ALLOW, "syscalls": [rule(action=ERRNO, errno="EWHAT")]}, "EWHAT"),
        (
            {"defaultAction": ALLOW, "syscalls": [rule(args=[{"index": 6, "op": "SCMP_CMP_EQ"}])]},
            "index is '6'",
        ),
        ({"defaultAction": ALLOW, "syscalls": [rule(args=[{"index": True, "op": "SCMP_CMP_EQ"}])]}, "index"),
        (
            {"defaultAction": ALLOW, "syscalls": [rule(args=[{"value": -1, "op": "SCMP_CMP_EQ"}])]},
            "value is '-1'",
        ),
        ({"defaultAction": ALLOW, "syscalls": [rule(args=[{"op": "="}])]}, r"args\[0\].op is '='"),
        ({"defaultAction": ALLOW, "syscalls": [rule(includes={"caps": [["x"]]})]}, "includes.caps"),
        ({"defaultAction": ALLOW, "syscalls": [rule(includes={"minKernel": "new"})]}, "'new' is no kernel"),
    ],
)
def test_what_is_wrong_with_a_profile_is_named(profile: Any, named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        resolve(profile, target())


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=8)
    | st.sampled_from(sorted(ACTIONS | OPERATORS)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    *(
                        "defaultAction",
                        "syscalls",
                        "names",
                        "action",
                        "args",
                        "index",
                        "op",
                        "value",
                        "includes",
                    ),
                    *("excludes", "caps", "arches", "minKernel", "archMap", "architecture", "flags", "errno"),
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@given(JSON)
def test_any_json_is_a_profile_or_a_clear_error(document: Any) -> None:
    try:
        built = resolve(document, target())
    except InvalidArgument as exc:
        assert len(str(exc)) < 700
        return
    json.dumps(without_host_sockets(built))


# -- which one ---------------------------------------------------------------------------------------------


def config(kind: SeccompKind = SeccompKind.UNSET, path: str = "", **more: Any) -> ContainerConfig:
    profile = SeccompProfile(kind=kind, path=path)
    return ContainerConfig(metadata=ContainerMetadata(name="c"), image="i", seccomp=profile, **more)


def test_which_profile_it_is() -> None:
    plain, strict = (
        SeccompProfiles(Settings()),
        SeccompProfiles(Settings(unset_seccomp_profile="RuntimeDefault")),
    )
    unset = config(has_security_context=True)
    assert plain.kind(config()) is SeccompKind.RUNTIME_DEFAULT  # nothing said: the safe one
    assert plain.kind(unset) is SeccompKind.UNCONFINED  # as CRI says
    assert strict.kind(unset) is SeccompKind.RUNTIME_DEFAULT
    assert plain.kind(config(SeccompKind.LOCALHOST, "/x", has_security_context=True)) is SeccompKind.LOCALHOST
    assert strict.kind(config(SeccompKind.RUNTIME_DEFAULT, privileged=True)) is SeccompKind.UNCONFINED


async def test_unconfined_has_no_filter_unless_configured() -> None:
    unconfined = config(SeccompKind.UNCONFINED)
    assert await SeccompProfiles(Settings()).of(unconfined, "6.12") is None
    filtered = await SeccompProfiles(Settings(filter_unconfined=True)).of(unconfined, "6.12")
    assert filtered is not None
    assert verdicts(filtered, "socket", 40) == {ERRNO}
    assert verdicts(filtered, "reboot") == {ALLOW}


@pytest.mark.skipif(not Settings().seccomp_profile.exists(), reason="containers-common is not installed")
@pytest.mark.parametrize("drop", [(), ("ALL",), ("AUDIT_WRITE",)])
async def test_the_default_profile(drop: tuple[str, ...]) -> None:
    def of(**caps: tuple[str, ...]) -> ContainerConfig:
        return config(SeccompKind.RUNTIME_DEFAULT, capabilities=Capabilities(drop=drop, **caps))

    profiles = SeccompProfiles(Settings())
    built = await profiles.of(of(), "6.12")
    assert built is not None
    assert "architectures" not in built
    assert verdicts(built, "read") == verdicts(built, "clone3") == {ALLOW}
    for name in ("sethostname", "bpf", "kexec_load", "init_module", "io_uring_setup", "userfaultfd"):
        assert ALLOW not in verdicts(built, name), name
    for family in FAMILIES:
        assert (ALLOW in verdicts(built, "socket", family, 3, 0)) == (family not in (38, 40)), family
    audit = 16, 3, 9
    assert (ALLOW in verdicts(built, "socket", *audit)) == (drop == ())
    admin = await profiles.of(of(add=("SYS_ADMIN",)), "6.12")
    assert admin is not None
    assert ALLOW in verdicts(admin, "sethostname")
    assert "CAP_AUDIT_WRITE" in DEFAULT


async def test_files_that_are_no_profile(tmp_path: Path) -> None:
    good = tmp_path / "good.json"
    good.write_text(json.dumps({"defaultAction": ALLOW, "syscalls": [{"names": ["chmod"], "action": ERRNO}]}))
    profiles = SeccompProfiles(Settings(seccomp_profile=tmp_path / "missing.json"))
    built = await profiles.of(config(SeccompKind.LOCALHOST, str(good)), "6.12")
    assert built is not None
    assert verdicts(built, "chmod") == {ERRNO}

    (tmp_path / "huge").write_bytes(b" " * (PROFILE_LIMIT + 1))
    (tmp_path / "broken").write_text('{"defaultAction": ')
    (tmp_path / "deep").write_text("[" * 100_000)
    (tmp_path / "wrong").write_text('{"defaultAction": "ALLOW"}')
    cases: list[tuple[str, type[HyperpodError], str]] = [
        ("none.json", FailedPrecondition, "No such file"),
        (".", InvalidArgument, "not a file"),
        ("huge", InvalidArgument, "larger than"),
        ("broken", InvalidArgument, "not JSON"),
        ("deep", InvalidArgument, "not JSON"),
        ("wrong", InvalidArgument, "defaultAction"),
    ]
    for name, error, text in cases:
        path = str(tmp_path / name)
        with pytest.raises(HyperpodError) as info:
            await profiles.of(config(SeccompKind.LOCALHOST, path), "6.12")
        assert path in str(info.value)
        assert text in str(info.value)
        assert isinstance(info.value, error)
    with pytest.raises(FailedPrecondition, match=r"missing.json.*No such file.*container.seccomp_profile"):
        await profiles.of(config(SeccompKind.RUNTIME_DEFAULT), "6.12")
