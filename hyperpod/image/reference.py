"""Docker image references, parsed and made canonical (distribution/reference, as containerd's CRI does).

`busybox` means `docker.io/library/busybox:latest`. A reference with tag and digest means the digest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from hyperpod.errors import InvalidArgument

DEFAULT_HOST = "docker.io"
MAX_NAME = 255
"""Characters of host and path together (distribution/reference NameTotalLengthMax)."""

_COMPONENT = re.compile(r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*")
_HOST = re.compile(
    r"(?:(?:[A-Za-z0-9]|[A-Za-z0-9][A-Za-z0-9-]*[A-Za-z0-9])"
    r"(?:\.(?:[A-Za-z0-9]|[A-Za-z0-9][A-Za-z0-9-]*[A-Za-z0-9]))*|\[[0-9A-Fa-f:]+\])(?::[0-9]{1,5})?"
)
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_HEX = re.compile(r"[0-9a-f]{1,64}")


@dataclass(frozen=True)
class Reference:
    """A canonical reference. `tag` or `digest` is set; both may be."""

    host: str
    path: str
    tag: str = ""
    digest: str = ""

    @property
    def name(self) -> str:
        """Without tag and digest: docker.io/library/busybox."""
        return f"{self.host}/{self.path}"

    @property
    def tagged(self) -> str:
        """The repo tag, or empty for a reference by digest."""
        return f"{self.name}:{self.tag}" if self.tag and not self.digest else ""

    def by_digest(self, digest: str) -> str:
        return f"{self.name}@{digest}"

    def __str__(self) -> str:
        return self.by_digest(self.digest) if self.digest else f"{self.name}:{self.tag}"


def _bad(text: str, why: str) -> InvalidArgument:
    return InvalidArgument(f"image reference {text[:200]!r}: {why}")


def parse(text: str) -> Reference:
    """The canonical form. Raises InvalidArgument that names the part which is wrong."""
    if not text:
        raise InvalidArgument("image reference is empty")
    if len(text) > MAX_NAME + 128 + 80 or not text.isascii() or not text.isprintable():
        raise _bad(text, "too long, or characters other than printable ASCII")
    rest, at, digest = text.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        raise _bad(text, f"the digest {digest[:80]!r} is not sha256: and 64 lower-case hex digits")
    head, colon, tail = rest.rpartition(":")
    tag = ""
    if colon and "/" not in tail:
        rest, tag = head, tail
        if not _TAG.fullmatch(tag):
            raise _bad(text, f"the tag {tag[:80]!r} is not 1 to 128 of letters, digits and _.-")
    first, slash, others = rest.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost" or first != first.lower()):
        host, path = first, others
    else:
        host, path = DEFAULT_HOST, rest
    if host in ("index.docker.io", "registry-1.docker.io"):
        host = DEFAULT_HOST
    if not _HOST.fullmatch(host):
        raise _bad(text, f"the registry host {host[:80]!r} is not a host name with an optional port")
    if host == DEFAULT_HOST and "/" not in path:
        path = f"library/{path}"
    for component in path.split("/"):
        if not _COMPONENT.fullmatch(component):
            raise _bad(
                text,
                f"the path part {component[:80]!r} is not lower-case letters and digits joined by . _ or -",
            )
    if len(host) + 1 + len(path) > MAX_NAME:
        raise _bad(text, f"the name is longer than {MAX_NAME} characters")
    if re.fullmatch(r"[0-9a-f]{64}", rest) and not tag and not digest:
        raise _bad(text, "64 hex digits are an image id, which cannot be pulled")
    return Reference(host, path, tag or ("" if digest else "latest"), digest)


def id_prefix(text: str) -> str | None:
    """The hex digits when `text` can be an image id or its prefix, with or without `sha256:`; else None."""
    digits = text.removeprefix("sha256:")
    return digits if _HEX.fullmatch(digits) else None
