"""What the first use of a message class costs.

betterproto2 0.10 evaluates the annotations of all fields of a class once for each of its fields: 80 evaluations for
a HelloRequest, of a guest's first call.
"""

from __future__ import annotations

import functools

from betterproto2 import Message


def evaluate_once() -> None:
    """From now on once for each class. For a process that makes no classes: they are kept."""
    evaluated = functools.cache(Message._type_hints.__func__)  # type: ignore[attr-defined]
    Message._type_hints = classmethod(evaluated)  # type: ignore[assignment, arg-type]
