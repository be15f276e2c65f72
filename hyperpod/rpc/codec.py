"""What grpclib calls to make messages out of bytes and the other way round."""

from __future__ import annotations

from typing import Any

from grpclib.encoding.base import CodecBase

from hyperpod.rpc import strict
from hyperpod.rpc.encode import encode


class Codec(CodecBase):
    """betterproto2 messages. A request that does not parse is the caller's fault, not an unknown error."""

    __content_subtype__ = "proto"

    def encode(self, message: Any, message_type: Any) -> bytes:
        return encode(message)

    def decode(self, data: bytes, message_type: Any) -> Any:
        """Raises InvalidArgument, or ResourceExhausted for too many fields."""
        strict.check(data, message_type)
        return message_type.parse(data)
