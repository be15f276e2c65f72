"""One daemon for the VM tests; after each test nothing of a pod may be left."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.daemonkit import Cri, Daemon, daemon
from tests.recoverykit import leaving_nothing


@pytest.fixture(scope="session")
def shared_daemon() -> Iterator[Daemon]:
    with daemon() as one:
        yield one


@pytest.fixture
async def cri_client(shared_daemon: Daemon) -> AsyncIterator[Cri]:
    """A client of the shared daemon. The leak check runs after the test, pods it left are a failure."""
    async with leaving_nothing(shared_daemon) as client:
        yield client


@pytest.fixture
async def pod(cri_client: Cri) -> AsyncIterator[str]:
    """A pod that the test may use and even remove."""
    ident = await cri_client.run_pod()
    yield ident
    await cri_client.remove_pod(ident)
