"""For all tests: what killed runs have left is swept; a failure shows what daemons said; properties are about
results, not about how long an example takes, which says how busy the machine is. A property's examples are the same
in each run, so that a run says what has become of a change; `--hypothesis-profile=explore` looks for new ones."""

from __future__ import annotations

import resource
from collections.abc import Generator

import pytest
from hypothesis import HealthCheck, settings

from tests import daemonlogs, runs

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
OPEN_FILES = 16384
"""At most: tests are a thousand clients and their server at once, and a shell's usual limit is 1024."""

settings.register_profile("explore", PATIENT, print_blob=True)
settings.register_profile("hyperpod", PATIENT, derandomize=True)
settings.load_profile("hyperpod")


def pytest_sessionstart(session: pytest.Session) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, OPEN_FILES)), hard))
    if undone := runs.sweep():
        print(f"left by test runs that were killed, and gone now: {', '.join(undone)}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    daemonlogs.test_begins()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        report.sections += [(f"daemon, {log}", text) for log, text in daemonlogs.said()]
    return report
