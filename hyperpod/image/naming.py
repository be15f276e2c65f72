"""Names of layers and their files: a layer is called by its diff id, or by that and what it has from the layers
below it (spec/parents.py)."""

from __future__ import annotations

import hashlib

SUFFIX = ".squashfs"
_HEX = 64


def layer_file(diff_id: str, variant: str) -> str:
    """`<hex of the diff id>[-<start of the variant>].squashfs`."""
    return diff_id.removeprefix("sha256:") + (f"-{variant[:32]}" if variant else "") + SUFFIX


def layer_name(diff_id: str, variant: str) -> str:
    """`sha256:<hex>`, another one for each variant."""
    return f"sha256:{hashlib.sha256((diff_id + variant).encode()).hexdigest()}" if variant else diff_id


def diff_of(file: str) -> str:
    """The diff id of a layer file."""
    return f"sha256:{file[:_HEX]}"
