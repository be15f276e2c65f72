"""The OCI spec builder."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperpod.errors import InvalidArgument
from hyperpod.model.security import LinuxResources
from hyperpod.spec.capabilities import ALL, DEFAULT, effective
from hyperpod.spec.oci import MASKED_PATHS, ContainerSpecInput, build_process, build_spec
from hyperpod.spec.seccomp import without_host_sockets


def built(**changes: Any) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(build_spec(ContainerSpecInput(**{"args": ("sh",), **changes})))
    return document


def test_defaults() -> None:
    spec = built()
    assert [n["type"] for n in spec["linux"]["namespaces"]] == ["pid", "ipc", "mount", "cgroup"]
    assert spec["process"]["user"] == {"uid": 0, "gid": 0, "additionalGids": []}
    assert spec["process"]["capabilities"]["bounding"] == sorted(DEFAULT)
    assert "inheritable" not in spec["process"]["capabilities"]
    assert spec["linux"]["resources"] == {"devices": [{"allow": False, "access": "rwm"}]}
    assert spec["linux"]["maskedPaths"] == list(MASKED_PATHS)
    options = {m["destination"]: m["options"] for m in spec["mounts"]}
    assert "ro" in options["/sys"]
    assert "ro" in options["/sys/fs/cgroup"]


def test_what_is_given_is_in_it() -> None:
    resources = LinuxResources(
        cpu_period=1, cpu_quota=2, cpu_shares=3, memory_limit=4, memory_swap_limit=5, cpuset_cpus="0-1"
    )
    spec = built(
        env=(b"A=1", 'B=ü=\n"\\'.encode()),
        uid=5,
        gid=6,
        additional_gids=(7,),
        tty=True,
        readonly_rootfs=True,
        no_new_privileges=True,
        masked_paths=("/x",),
        readonly_paths=("/y",),
        resources=resources,
        annotations=(("a", "b"),),
        cwd="/w",
    )
    process, linux = spec["process"], spec["linux"]
    assert process["env"] == ["A=1", 'B=ü=\n"\\']
    assert process["user"] == {"uid": 5, "gid": 6, "additionalGids": [7]}
    assert (process["terminal"], process["noNewPrivileges"], process["cwd"]) == (True, True, "/w")
    assert spec["root"]["readonly"] is True
    assert (linux["maskedPaths"], linux["readonlyPaths"]) == (["/x"], ["/y"])
    assert linux["resources"]["cpu"] == {"period": 1, "quota": 2, "shares": 3, "cpus": "0-1"}
    assert linux["resources"]["memory"] == {"limit": 4, "swap": 5}
    assert spec["annotations"] == {"a": "b"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"args": ()}, "command"),
        ({"args": ("a\0b",)}, "argument 0"),
        ({"args": ("\udcff",)}, "argument 0"),
        ({"cwd": "relative"}, "relative"),
        ({"env": (b"NAME=\xff",)}, "NAME"),
        ({"env": (b"NAME",)}, "NAME"),
        ({"env": (b"=x",)}, "no name"),
        ({"env": (b"NAME=\0",)}, "NUL"),
        ({"args": ("x" * (1 << 16),) * 16 + ("y",)}, "1048577"),
        ({"args": ("x", "\u00e9" * (1 << 16))}, "argument 1 has 131072 bytes"),
        ({"env": (b"A=" + b"x" * (1 << 17),)}, "'A' has 131074 bytes"),
        ({"add_capabilities": ("FLY",)}, "FLY"),
        ({"drop_capabilities": ("CAP_FLY",)}, "CAP_FLY"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        built(**changes)


@given(args=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=1))
def test_arguments_survive(args: list[str]) -> None:
    process = json.loads(build_process(ContainerSpecInput(args=tuple(args))))
    assert process["args"] == args


def test_capabilities() -> None:
    assert effective((), ()) == sorted(DEFAULT)
    assert effective(("ALL",), ()) == sorted(ALL)
    assert effective((), ("all",)) == []
    assert effective(("net_admin",), ("ALL",)) == ["CAP_NET_ADMIN"]
    assert effective(("ALL",), ("CAP_SYS_ADMIN",)) == sorted(set(ALL) - {"CAP_SYS_ADMIN"})
    assert effective((), ("chown",)) == sorted(set(DEFAULT) - {"CAP_CHOWN"})


def verdict(profile: dict[str, Any], family: int) -> str:
    """What a filter does with socket(family, ...)."""
    compare = {
        "SCMP_CMP_EQ": int.__eq__,
        "SCMP_CMP_LT": int.__lt__,
        "SCMP_CMP_GT": int.__gt__,
        "SCMP_CMP_NE": int.__ne__,
    }
    for rule in profile["syscalls"]:
        if "socket" in rule["names"]:
            args = rule.get("args", [])
            if all(compare[a["op"]](family, a["value"]) for a in args):
                return str(rule["action"])
    return str(profile["defaultAction"])


@pytest.mark.parametrize(
    "profile",
    [
        None,
        {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": []},
        {
            "defaultAction": "SCMP_ACT_ERRNO",
            "syscalls": [{"names": ["read", "socket"], "action": "SCMP_ACT_ALLOW"}],
        },
        {
            "defaultAction": "SCMP_ACT_ERRNO",
            "syscalls": [
                {
                    "names": ["socket"],
                    "action": "SCMP_ACT_ALLOW",
                    "args": [{"index": 0, "value": 40, "op": "SCMP_CMP_NE"}],
                },
            ],
        },
    ],
)
def test_vsock_and_alg_are_denied_whatever_the_profile(profile: dict[str, Any] | None) -> None:
    filtered = without_host_sockets(profile)
    for family in range(60):
        expected = "SCMP_ACT_ERRNO" if family in (38, 40) else "SCMP_ACT_ALLOW"
        assert verdict(filtered, family) == expected, family


def test_a_profile_that_denies_sockets_stays_that_way() -> None:
    filtered = without_host_sockets(
        {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}]}
    )
    assert verdict(filtered, 2) == "SCMP_ACT_ERRNO"
    assert filtered["syscalls"][0]["names"] == ["read"]
