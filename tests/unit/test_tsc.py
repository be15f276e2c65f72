"""The rate of the time-stamp counter, for emulated guests."""

from __future__ import annotations

import platform
import time

import pytest

from hyperpod.hypervisor import tsc


@pytest.mark.parametrize(
    ("first", "second", "khz"),
    [((0, 0), (1_000_000, 2596), 2596), ((5, 7), (200_000_005, 519_224_007), 2_596_120)],
)
def test_rate(first: tuple[int, int], second: tuple[int, int], khz: int) -> None:
    assert tsc.rate(first, second) == khz


@pytest.mark.skipif(platform.machine() != "x86_64", reason="another machine has another counter")
def test_this_hosts_counter_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two measurements agree to a tenth of a percent, whatever else the host does."""
    monkeypatch.setattr(tsc, "PERIOD", 0.02)
    first = tsc.measure()
    time.sleep(0.01)
    assert first > 100_000
    assert abs(tsc.measure() - first) <= first / 1000


def test_another_machine_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert tsc.measure() == 0
