"""The agent's messages are the same with their annotations evaluated once for each class."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import typing
from hyperpod.agent import messages
from hyperpod.api.gen.hyperpod.agent import v1

counted, real = [], typing.get_type_hints
import betterproto2
betterproto2.get_type_hints = lambda cls, *more: counted.append(cls) or real(cls, *more)
classes = [c for c in vars(v1).values() if isinstance(c, type) and issubclass(c, betterproto2.Message)]
before = {c: c._type_hints() for c in classes}
counted.clear()
messages.evaluate_once()
assert {c: c._type_hints() for c in classes} == before and len(before) > 20
route = v1.Route(destination="10.0.0.0/8", metric=7)
hello = v1.HelloRequest(api_version=1, sysctls={"a": "b"}, interfaces=[v1.NetworkInterface(routes=[route])])
assert v1.HelloRequest.parse(bytes(hello)) == hello
assert len([c for c in counted if c.__module__ == v1.__name__]) == len(set(classes))
"""
"""In a process of its own, since the change is for a whole process."""


def test_each_class_is_evaluated_once_and_means_the_same() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
