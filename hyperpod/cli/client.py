"""A CRI client for the command line, over the daemon's UNIX socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from grpclib.client import Channel
from grpclib.exceptions import GRPCError

from hyperpod.api.gen.hyperpod.admin.v1 import AdminStub
from hyperpod.api.gen.runtime.v1 import ImageServiceStub, RuntimeServiceStub
from hyperpod.errors import HyperpodError, Unavailable


class Client:
    """The three services of one daemon."""

    def __init__(self, channel: Channel) -> None:
        self.runtime = RuntimeServiceStub(channel)
        self.images = ImageServiceStub(channel)
        self.admin = AdminStub(channel)


@asynccontextmanager
async def connect(endpoint: str) -> AsyncIterator[Client]:
    """Raises Unavailable when nobody listens, HyperpodError with the daemon's words when it refuses."""
    channel = Channel(path=endpoint.removeprefix("unix://"))
    try:
        yield Client(channel)
    except GRPCError as exc:
        raise HyperpodError(f"{exc.message} ({exc.status.name})") from exc
    except (ConnectionError, FileNotFoundError) as exc:
        raise Unavailable(f"no daemon answers at {endpoint}: {exc}; start one with `hyperpod serve`") from exc
    finally:
        channel.close()
