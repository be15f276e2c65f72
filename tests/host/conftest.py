"""One daemon for the tests of host pods; after each test nothing of a pod may be left."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from hyperpod.api.gen.runtime import v1 as cri
from images import envexec
from tests.daemonkit import Cri, Daemon, daemon

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
    async with host_daemon.client() as client:
        client.handler = "host"
        await client.load_busybox()
        try:
            yield client
        finally:
            pods = (await client.runtime.list_pod_sandbox(cri.ListPodSandboxRequest())).items
            for item in pods:
                await client.remove_pod(item.id)
        left = host_daemon.leftovers()
        assert left == [], f"left behind: {left}"


@pytest.fixture
async def pod(cri_client: Cri) -> AsyncIterator[str]:
    """A host pod with namespaces of its own."""
    ident = await cri_client.run_pod()
    yield ident
    await cri_client.remove_pod(ident)
