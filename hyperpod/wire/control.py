"""Requests and replies on the local control sockets of shim and supervisor. Sans-IO.

One SEQPACKET message each, JSON, at most MAX_MESSAGE bytes; descriptors ride beside it:

    {"id": 7, "op": "log_start", ...}   ->   {"id": 7, "ok": true, ...} | {"id": 7, "error": text, "code": code}

Id 0 asks for no reply. Errors cross as the class they were raised with.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from hyperpod import errors
from hyperpod.errors import HyperpodError, InvalidArgument, ProtocolError

MAX_MESSAGE = 64 * 1024
MAX_ERROR = 4096
MAX_ID = 2**53

_CODES: dict[str, type[HyperpodError]] = {
    "internal": HyperpodError,
    "invalid_argument": errors.InvalidArgument,
    "not_found": errors.NotFound,
    "already_exists": errors.AlreadyExists,
    "failed_precondition": errors.FailedPrecondition,
    "permission_denied": errors.PermissionDenied,
    "unsupported": errors.Unsupported,
    "resource_exhausted": errors.ResourceExhausted,
    "unavailable": errors.Unavailable,
    "deadline_exceeded": errors.DeadlineExceeded,
    "aborted": errors.Aborted,
    "guest": errors.GuestError,
    "protocol": errors.ProtocolError,
}
_NAMES = {kind: name for name, kind in _CODES.items()}


@dataclass(frozen=True)
class Request:
    """One request; the accessors raise InvalidArgument that names the field."""

    id: int
    op: str
    args: dict[str, Any] = field(default_factory=dict)

    def text(self, name: str, limit: int = 4096) -> str:
        value = self.args.get(name)
        if not isinstance(value, str) or len(value) > limit:
            raise InvalidArgument(f"{self.op}: {name} must be a text of at most {limit} characters")
        return value

    def ident(self, name: str, length: int = 64) -> str:
        """A lower-case hexadecimal id of `length` digits."""
        value = self.text(name)
        if len(value) != length or value.strip("0123456789abcdef"):
            raise InvalidArgument(f"{self.op}: {name} must be {length} lower-case hexadecimal digits")
        return value

    def number(self, name: str, low: int = 0, high: int = 2**53) -> int:
        value = self.args.get(name)
        if type(value) is not int or not low <= value <= high:
            raise InvalidArgument(f"{self.op}: {name} must be a number from {low} to {high}")
        return value

    def flag(self, name: str) -> bool:
        value = self.args.get(name)
        if not isinstance(value, bool):
            raise InvalidArgument(f"{self.op}: {name} must be true or false")
        return value

    def texts(self, name: str, limit: int = 64) -> list[str]:
        value = self.args.get(name)
        if not isinstance(value, list) or len(value) > limit or not all(isinstance(v, str) for v in value):
            raise InvalidArgument(f"{self.op}: {name} must be a list of at most {limit} texts")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        value = self.args.get(name)
        if not isinstance(value, dict):
            raise InvalidArgument(f"{self.op}: {name} must be an object")
        return value


@dataclass(frozen=True)
class Reply:
    """`error` is None for a good one."""

    id: int
    fields: dict[str, Any]
    error: HyperpodError | None = None


def encode_request(ident: int, op: str, args: dict[str, Any]) -> bytes:
    """Raises InvalidArgument when it is too long."""
    return _encode({"id": ident, "op": op, **args})


def encode_reply(ident: int, fields: dict[str, Any]) -> bytes:
    """Raises InvalidArgument when it is too long."""
    return _encode({"id": ident, "ok": True, **fields})


def encode_error(ident: int, error: HyperpodError) -> bytes:
    code = next((_NAMES[kind] for kind in type(error).__mro__ if kind in _NAMES), "internal")
    return _encode({"id": ident, "error": str(error)[:MAX_ERROR], "code": code})


def decode_request(data: bytes) -> Request:
    """Raises ProtocolError."""
    fields = _decode(data)
    op = fields.pop("op", None)
    if not isinstance(op, str):
        raise ProtocolError("control message without an op")
    return Request(_pop_id(fields), op, fields)


def decode_reply(data: bytes) -> Reply:
    """Raises ProtocolError."""
    fields = _decode(data)
    ident = _pop_id(fields)
    if fields.pop("ok", None) is True:
        return Reply(ident, fields)
    text, code = fields.get("error"), fields.get("code")
    if not isinstance(text, str) or not isinstance(code, str):
        raise ProtocolError("control reply that is neither good nor an error")
    return Reply(ident, {}, _CODES.get(code, HyperpodError)(text))


def _encode(message: dict[str, Any]) -> bytes:
    data = json.dumps(message, separators=(",", ":")).encode()
    if len(data) > MAX_MESSAGE:
        raise InvalidArgument(f"control message of {len(data)} bytes, at most {MAX_MESSAGE} fit")
    return data


def _decode(data: bytes) -> dict[str, Any]:
    try:
        message = json.loads(data) if len(data) <= MAX_MESSAGE else None
    except (ValueError, RecursionError) as exc:
        raise ProtocolError("control message is not JSON") from exc
    if not isinstance(message, dict):
        raise ProtocolError("control message is not an object")
    return message


def _pop_id(fields: dict[str, Any]) -> int:
    ident = fields.pop("id", None)
    if type(ident) is not int or not 0 <= ident <= MAX_ID:
        raise ProtocolError("control message without a usable id")
    return ident
