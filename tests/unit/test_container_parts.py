"""Signals, log paths and what a container runs: pure rules of the container package."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperpod.container import process, signals
from hyperpod.container.logfile import log_path, open_log
from hyperpod.errors import HyperpodError, InvalidArgument
from hyperpod.model.container import ContainerConfig, ContainerMetadata, ContainerRecord
from hyperpod.model.images import ImageConfig
from hyperpod.model.security import NamespaceMode, NamespaceOptions


def config(**changes: object) -> ContainerConfig:
    base: dict[str, object] = {"metadata": ContainerMetadata(name="c"), "image": "i"}
    return ContainerConfig.model_validate({**base, **changes})


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("SIGTERM", 15),
        ("term", 15),
        ("9", 9),
        ("SIGRTMIN+3", 37),
        ("RTMIN", 34),
        ("SIGRTMAX-1", 63),
        ("64", 64),
    ],
)
def test_signal_names(name: str, want: int) -> None:
    assert signals.number(name) == want


@pytest.mark.parametrize(
    "name", ["", "SIGWHAT", "0", "65", "-1", "SIGRTMIN+31", "SIGRTMIN-1", "SIG_IGN", "SIGRTMAX+1"]
)
def test_no_such_signal(name: str) -> None:
    with pytest.raises(InvalidArgument, match="no such signal"):
        signals.number(name)


@given(st.text(max_size=20))
def test_any_text_is_a_signal_or_a_clear_error(name: str) -> None:
    with contextlib.suppress(HyperpodError):
        assert 0 < signals.number(name) <= 64


def test_command_and_args_merge_as_containerd_does() -> None:
    image = ImageConfig(entrypoint=("/e",), cmd=("a", "b"))
    assert process.arguments(config(), image) == ("/e", "a", "b")
    assert process.arguments(config(args=["x"]), image) == ("/e", "x")
    assert process.arguments(config(command=["c"]), image) == ("c",)
    assert process.arguments(config(command=["c"], args=["x"]), image) == ("c", "x")
    with pytest.raises(InvalidArgument, match="no command"):
        process.arguments(config(), ImageConfig())


def test_environment() -> None:
    env = process.environment(
        config(envs=[("A", b"\xff"), ("PATH", b"/mine")]), ImageConfig(env=("A=1", "B=2"))
    )
    assert set(env) == {b"A=\xff", b"PATH=/mine", b"B=2"}
    for bad in ("", "A=B", "A\0"):
        with pytest.raises(InvalidArgument, match="environment variable"):
            process.environment(config(envs=[(bad, b"x")]), ImageConfig())


def test_users() -> None:
    assert process.user(config(), ImageConfig()) == ""
    assert process.user(config(), ImageConfig(user="nginx:www")) == "nginx:www"
    assert process.user(config(run_as_user=0), ImageConfig(user="7:8")) == "0"
    assert process.user(config(run_as_user=5, run_as_group=6), ImageConfig(user="7")) == "5:6"
    assert process.user(config(run_as_user=5, run_as_username="bob"), ImageConfig()) == "bob"
    assert process.user(config(run_as_username="bob", run_as_group=0), ImageConfig()) == "bob:0"
    with pytest.raises(InvalidArgument, match="without run_as_user"):
        process.user(config(run_as_group=6), ImageConfig(user="7"))


def record(**changes: Any) -> ContainerRecord:
    return ContainerRecord(
        id="c" * 64, sandbox_id="s" * 64, config=config(command=("x",), **changes), image_id="i", image_ref="i",
        created_at=1, log_path="", layers=(), stop_signal="SIGTERM", image_config=ImageConfig(),
    )  # fmt: skip


def test_a_request_without_a_security_context_gets_the_safe_defaults() -> None:
    safe = process.spec_input(record())
    assert "/proc/kcore" in safe.masked_paths
    assert "/proc/sys" in safe.readonly_paths
    given = process.spec_input(record(has_security_context=True, masked_paths=("/bin/ls",)))
    assert (given.masked_paths, given.readonly_paths) == (("/bin/ls",), ())


def test_pid_namespaces() -> None:
    made = {
        mode: process.spec_input(record(namespaces=NamespaceOptions(pid=mode, target_id="t"))).own_pid
        for mode in (NamespaceMode.POD, NamespaceMode.CONTAINER, NamespaceMode.TARGET)
    }
    assert list(made.values()) == [False, True, False]


def test_log_paths() -> None:
    assert log_path("/var/log/pods/p", "c/0.log") == "/var/log/pods/p/c/0.log"
    assert log_path("", "c/0.log") == ""
    assert log_path("/var/log/pods/p", "") == ""
    for directory, path in (("rel", "x"), ("/d", "../x"), ("/d", "/x"), ("/d", "a/../../x")):
        with pytest.raises(InvalidArgument):
            log_path(directory, path)


def test_open_log_makes_parents_and_refuses_links(tmp_path: Path) -> None:
    os.close(open_log(str(tmp_path / "a" / "b" / "0.log")))
    assert (tmp_path / "a" / "b" / "0.log").stat().st_mode & 0o777 == 0o640
    (tmp_path / "link").symlink_to("/etc/passwd")
    with pytest.raises(InvalidArgument, match="check log_directory"):
        open_log(str(tmp_path / "link"))
