"""A minute of what `python -m tests.soak` does for an hour."""

from __future__ import annotations

import pytest

from tests.daemonkit import daemon
from tests.soak.kubelet import Kubelet

pytestmark = pytest.mark.vm


async def test_pods_as_a_kubelet_keeps_them() -> None:
    with daemon() as one:
        async with one.client() as client:
            await client.load_busybox()
            kubelet = Kubelet(one, client, pods=2, churn=40, kill=30)
            await kubelet.run(75)
        assert one.leftovers() == []
    for what in ("pod", "probe", "rotate", "swap", "tend", "stats", "samples", "list", "kill"):
        assert kubelet.done[what], f"no {what} in a minute: {dict(kubelet.done)}"
