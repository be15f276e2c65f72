"""For all tests: what killed runs have left is swept; properties are about results, not about how long an example
takes, which says how busy the machine is."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

from tests import runs

settings.register_profile("hyperpod", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("hyperpod")


def pytest_sessionstart(session: pytest.Session) -> None:
    if undone := runs.sweep():
        print(f"left by test runs that were killed, and gone now: {', '.join(undone)}")
