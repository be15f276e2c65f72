"""For all tests: what killed runs have left is swept; properties are about results, not about how long an example
takes, which says how busy the machine is. A property's examples are the same in each run, so that a run says what
has become of a change; `--hypothesis-profile=explore` looks for new ones."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

from tests import runs

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", PATIENT, print_blob=True)
settings.register_profile("hyperpod", PATIENT, derandomize=True)
settings.load_profile("hyperpod")


def pytest_sessionstart(session: pytest.Session) -> None:
    if undone := runs.sweep():
        print(f"left by test runs that were killed, and gone now: {', '.join(undone)}")
