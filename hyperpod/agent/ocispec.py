"""OCI documents on their way from the host's requests to the files that crun reads."""

from __future__ import annotations

import json
from typing import Any

from hyperpod.errors import InvalidArgument


def parse_object(what: str, data: bytes) -> dict[str, Any]:
    """A JSON object. Raises InvalidArgument."""
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise InvalidArgument(f"{what} is not JSON") from exc
    if not isinstance(parsed, dict):
        raise InvalidArgument(f"{what} is not a JSON object")
    return parsed


_FILTER = b',"seccomp":{'
"""In JSON this is a member and nothing else: in a string the quotes would be escaped, and after a string that ends
with the comma no name could follow."""

_ENDS = b"}}"
"""Of `linux` and of the whole."""


class OciSpec:
    """From a request to crun's file. Most of its text is the seccomp filter, which is the host's business alone and
    is neither parsed nor encoded again: `document` is all but that. It is looked for where the host puts it, at the
    end of `linux`, which is last (spec/oci.py); anywhere else it is a part of the document."""

    def __init__(self, data: bytes) -> None:
        """Raises InvalidArgument."""
        head, key, rest = data.partition(_FILTER)
        self._filter = b""
        if key and rest.endswith(b"}" + _ENDS):
            self._filter, data = key + rest.removesuffix(_ENDS), head + _ENDS
        self.document = parse_object("the OCI spec", data)
        self._check()

    def _check(self) -> None:
        """What closes last is what was open where the filter begins, or it would land elsewhere."""
        if self._filter and next(reversed(self.document)) != "linux":
            raise InvalidArgument("the OCI spec has a seccomp filter outside of its last member, linux")

    def write(self, path: str) -> None:
        """Raises OSError."""
        self._check()
        text = json.dumps(self.document).encode()
        if self._filter:
            text = text.removesuffix(_ENDS) + self._filter + _ENDS
        with open(path, "wb") as file:
            file.write(text)


def write_json(path: str, document: dict[str, Any]) -> None:
    """A file that crun is to read."""
    with open(path, "w") as file:
        file.write(json.dumps(document))
