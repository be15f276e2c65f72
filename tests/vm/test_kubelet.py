"""A minute of what `python -m tests.soak` does for an hour."""

from __future__ import annotations

import asyncio

import pytest

from tests.daemonkit import daemon
from tests.soak.kubelet import Kubelet

pytestmark = pytest.mark.vm

LIMIT = 900.0
"""Seconds for everything to be done once: a busy machine takes its time."""

EVERYTHING = ("pod", "probe", "rotate", "swap", "tend", "stats", "samples", "list", "kill")


async def test_pods_as_a_kubelet_keeps_them() -> None:
    with daemon() as one:
        async with one.client() as client:
            await client.load_busybox()
            kubelet = Kubelet(one, client, pods=2, churn=40, kill=30)
            async with asyncio.timeout(LIMIT):
                await kubelet.run(75, EVERYTHING)
        assert one.leftovers() == []
