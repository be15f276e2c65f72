"""One daemon for the tests of host pods; after each test nothing of a pod may be left."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from images import envexec
from tests.daemonkit import Cri, Daemon, daemon
from tests.recoverykit import leaving_nothing

ALLOWED = 'host_pods = ["test"]\n---'


def host_daemon_of(config: str, log_level: str = "debug") -> contextlib.AbstractContextManager[Daemon]:
    """Host pods need neither a guest kernel nor a guest image."""
    none = Path("/nonexistent")
    return daemon(config, none, none, log_level, HYPERPOD_ENVEXEC=str(envexec.build()))


@pytest.fixture(scope="session")
def host_daemon() -> Iterator[Daemon]:
    with host_daemon_of(ALLOWED) as one:
        yield one


@pytest.fixture
async def cri_client(host_daemon: Daemon) -> AsyncIterator[Cri]:
    """A client of the shared daemon. The leak check runs after the test, pods it left are a failure."""
    async with leaving_nothing(host_daemon, "host") as client:
        yield client


@pytest.fixture
async def pod(cri_client: Cri) -> AsyncIterator[str]:
    """A host pod with namespaces of its own."""
    ident = await cri_client.run_pod()
    yield ident
    await cri_client.remove_pod(ident)
