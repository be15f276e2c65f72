"""One daemon for the VM tests; after each test nothing of a pod may be left."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from hyperpod.api.gen.runtime import v1 as cri
from tests.daemonkit import Cri, Daemon, daemon


@pytest.fixture(scope="session")
def shared_daemon() -> Iterator[Daemon]:
    with daemon() as one:
        yield one


@pytest.fixture
async def cri_client(shared_daemon: Daemon) -> AsyncIterator[Cri]:
    """A client of the shared daemon. The leak check runs after the test, pods it left are a failure."""
    async with shared_daemon.client() as client:
        await client.load_busybox()
        try:
            yield client
        finally:
            pods = (await client.runtime.list_pod_sandbox(cri.ListPodSandboxRequest())).items
            for item in pods:
                await client.remove_pod(item.id)
        left = shared_daemon.leftovers()
        assert left == [], f"left behind: {left}"


@pytest.fixture
async def pod(cri_client: Cri) -> AsyncIterator[str]:
    """A pod that the test may use and even remove."""
    ident = await cri_client.run_pod()
    yield ident
    await cri_client.remove_pod(ident)
