"""Checks that a parsed message is what its interface says.

betterproto2 0.10 looks at the field's number only: a field that comes with another wire type ends up as an int
where a message or a text belongs, and enums keep unknown numbers. Neither may reach the services.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import betterproto2

from hyperpod.errors import InvalidArgument

log = logging.getLogger(__name__)

_TYPES: dict[str, type] = {
    betterproto2.TYPE_STRING: str,
    betterproto2.TYPE_BYTES: bytes,
    betterproto2.TYPE_BOOL: bool,
    betterproto2.TYPE_FLOAT: float,
    betterproto2.TYPE_DOUBLE: float,
    betterproto2.TYPE_ENUM: betterproto2.Enum,
    betterproto2.TYPE_MESSAGE: betterproto2.Message,
}
"""All others are kinds of int."""


def check(message: betterproto2.Message, where: str = "") -> None:
    """Look at all of it. Raises InvalidArgument that names the field."""
    if message._unknown_fields:
        log.warning("%s has fields of a newer CRI, which are ignored", where or type(message).__name__)
    for field in dataclasses.fields(message):  # type: ignore[arg-type]  # every message is a dataclass
        meta, value = field.metadata["betterproto"], getattr(message, field.name)
        place = f"{where}.{field.name}" if where else field.name
        if meta.map_meta is not None:
            _expect(place, value, dict)
            for key, item in value.items():
                _value(f"{place}[{str(key)[:60]!r}]", item, meta.map_meta[1].proto_type)
                _value(f"{place} key", key, meta.map_meta[0].proto_type)
        elif meta.repeated:
            _expect(place, value, list)
            for number, item in enumerate(value):
                _value(f"{place}[{number}]", item, meta.proto_type)
        elif value is not None or not meta.optional:
            _value(place, value, meta.proto_type)


def _expect(where: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise InvalidArgument(f"{where} is encoded as {type(value).__name__}, not as {kind.__name__}")


def _value(where: str, value: Any, proto_type: str) -> None:
    _expect(where, value, _TYPES.get(proto_type, int))
    if isinstance(value, betterproto2.Enum) and value not in list(type(value)):
        raise InvalidArgument(f"{where} has the unknown value {int(value)}")
    if isinstance(value, betterproto2.Message):
        check(value, where)
