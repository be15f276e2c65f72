"""`hyperpod load FILE`."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from hyperpod.api.gen.hyperpod.admin.v1 import LoadRequest
from hyperpod.cli.client import connect


async def load(endpoint: str, path: str) -> int:
    async with connect(endpoint) as client:
        reply = await client.admin.load(LoadRequest(path=str(Path(path).resolve())))
    for image in reply.images:
        print(image.id, *image.tags)
    return 0


def main(args: argparse.Namespace) -> int:
    return asyncio.run(load(args.endpoint, args.file))
