"""Reads and checks the JSON documents of an image: index, manifest, configuration (OCI image-spec, schema 2).

All of it comes from a registry or an archive and is believed only as far as digests prove it.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from hyperpod.errors import ImageError, ResourceExhausted
from hyperpod.image.settings import Limits
from hyperpod.model.images import ImageConfig

OS, ARCHITECTURE = "linux", "amd64"
INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
MANIFEST_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
CONFIG_TYPES = ("application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json")
LAYER_TYPES = ("application/vnd.oci.image.layer.v1.tar", "application/vnd.docker.image.rootfs.diff.tar")
MAX_USER = 1024
"""Bytes of a configuration's user: it is in each list of all images, which a client takes 16 MiB of."""
MAX_KEPT = 1 << 20
"""Bytes of what is kept of a configuration: it is in memory and on record once for each container."""
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Blob:
    """A descriptor: digest `sha256:<hex>`, size in bytes as declared."""

    digest: str
    size: int

    @property
    def hex(self) -> str:
        return self.digest.removeprefix("sha256:")


@dataclass(frozen=True)
class Manifest:
    """A checked manifest; layers lowest first."""

    digest: str
    config: Blob
    layers: tuple[Blob, ...]


def digest_of(raw: bytes) -> str:
    return f"sha256:{hashlib.sha256(raw).hexdigest()}"


def parse_json(raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object. Raises ImageError."""
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise ImageError(f"{what} is no JSON: {exc}") from exc
    if not isinstance(data, dict):
        raise ImageError(f"{what} is no JSON object")
    return data


def is_index(data: dict[str, Any]) -> bool:
    return data.get("mediaType") in INDEX_TYPES or ("mediaType" not in data and "manifests" in data)


def choose(data: dict[str, Any], what: str) -> Blob:
    """The manifest for this platform out of an index. Raises ImageError that lists what there is."""
    offered: list[str] = []
    for item in items(data, "manifests", what):
        if not isinstance(item, dict) or item.get("mediaType") not in MANIFEST_TYPES:
            continue
        platform = item.get("platform")
        if not isinstance(platform, dict):
            platform = {
                "os": OS,
                "architecture": ARCHITECTURE,
            }  # optional in OCI; the config is checked later
        if platform.get("os") == OS and platform.get("architecture") == ARCHITECTURE:
            return descriptor(item, what)
        offered.append(f"{platform.get('os')}/{platform.get('architecture')}"[:40])
    raise ImageError(
        f"{what} has no image for {OS}/{ARCHITECTURE}, only {', '.join(offered[:20]) or 'nothing'}"
    )


def read_manifest(raw: bytes, what: str, limits: Limits) -> Manifest:
    """Raises ImageError for what is no container image, ResourceExhausted for one that is too large."""
    data = parse_json(raw, what)
    if data.get("schemaVersion") == 1:
        raise ImageError(f"{what} is of schema 1, which has been obsolete since 2017; push the image again")
    kind = data.get("mediaType", MANIFEST_TYPES[0])
    if data.get("schemaVersion") != 2 or kind not in MANIFEST_TYPES:
        raise ImageError(f"{what} has the unknown type {str(kind)[:100]!r}")
    config = data.get("config")
    if not isinstance(config, dict) or config.get("mediaType", CONFIG_TYPES[0]) not in CONFIG_TYPES:
        raise ImageError(f"{what} is no container image: its configuration is something else")
    layers = []
    for item in items(data, "layers", what):
        media = item.get("mediaType") if isinstance(item, dict) else None
        if not isinstance(media, str) or not media.removesuffix(".gzip").startswith(LAYER_TYPES):
            raise ImageError(f"{what} has a layer of the unsupported type {str(media)[:100]!r}")
        if "encrypted" in media:
            raise ImageError(f"{what} has an encrypted layer, which is not supported")
        layers.append(descriptor(item, what))
    manifest = Manifest(digest_of(raw), descriptor(config, what), tuple(layers))
    _bound(manifest, what, limits)
    return manifest


def _bound(manifest: Manifest, what: str, limits: Limits) -> None:
    if manifest.config.size > limits.max_manifest:
        raise ResourceExhausted(f"{what}: a configuration of {manifest.config.size} bytes")
    if not manifest.layers:
        raise ImageError(f"{what} has no layers")
    if len(manifest.layers) > limits.max_layers:
        raise ResourceExhausted(f"{what} has {len(manifest.layers)} layers, at most {limits.max_layers} work")
    for layer in manifest.layers:
        if layer.size > limits.max_blob:
            raise ResourceExhausted(
                f"{what}: layer {layer.digest} has {layer.size} bytes, the cap is {limits.max_blob}"
            )
    if (total := sum(layer.size for layer in manifest.layers)) > limits.max_image:
        raise ResourceExhausted(f"{what} has {total} bytes of layers, the cap is {limits.max_image}")


def read_config(raw: bytes, manifest: Manifest, what: str) -> tuple[ImageConfig, tuple[str, ...]]:
    """The configuration and the diff ids, one per layer. Raises ImageError if they do not fit together."""
    if digest_of(raw) != manifest.config.digest:
        raise ImageError(
            f"{what}: the configuration's digest is not the {manifest.config.digest} of its manifest"
        )
    data = parse_json(raw, f"{what}: the configuration")
    system, machine = data.get("os") or OS, data.get("architecture") or ARCHITECTURE
    if (system, machine) != (OS, ARCHITECTURE):
        raise ImageError(
            f"{what} is for {str(system)[:40]}/{str(machine)[:40]}, this node runs {OS}/{ARCHITECTURE}"
        )
    rootfs = data.get("rootfs")
    diff_ids = items(rootfs if isinstance(rootfs, dict) else {}, "diff_ids", f"{what}: the configuration")
    for diff_id in diff_ids:
        if not isinstance(diff_id, str) or not _DIGEST.fullmatch(diff_id):
            raise ImageError(f"{what}: the configuration has the diff id {str(diff_id)[:100]!r}")
    if len(diff_ids) != len(manifest.layers):
        raise ImageError(
            f"{what}: {len(manifest.layers)} layers, but {len(diff_ids)} diff ids in its configuration"
        )
    section = data.get("config")
    config = _section(section if isinstance(section, dict) else {}, what)
    try:
        size, user = len(config.model_dump_json()), len(config.user.encode())
    except ValueError as exc:  # JSON can spell half of a character, which no record or message can hold
        raise ImageError(f"{what}: the configuration holds text that is not Unicode") from exc
    if user > MAX_USER:
        raise ImageError(f"{what}: User in the configuration has {user} bytes, at most {MAX_USER} are taken")
    if size > MAX_KEPT:
        raise ResourceExhausted(f"{what}: a configuration of {size} bytes, at most {MAX_KEPT} are kept")
    return config, tuple(diff_ids)


def _section(section: dict[str, Any], what: str) -> ImageConfig:
    def text(key: str) -> str:
        value = section.get(key) or ""
        if not isinstance(value, str) or "\0" in value:
            raise ImageError(f"{what}: {key} in the configuration is no text")
        return value

    def texts(key: str) -> tuple[str, ...]:
        value = section.get(key) or []
        if not isinstance(value, list) or not all(isinstance(x, str) and "\0" not in x for x in value):
            raise ImageError(f"{what}: {key} in the configuration is no list of texts")
        return tuple(value)

    def mapping(key: str) -> dict[str, Any]:
        value = section.get(key) or {}
        if not isinstance(value, dict):
            raise ImageError(f"{what}: {key} in the configuration is no object")
        return value

    return ImageConfig(
        user=text("User"),
        env=texts("Env"),
        entrypoint=texts("Entrypoint"),
        cmd=texts("Cmd"),
        working_dir=text("WorkingDir"),
        stop_signal=text("StopSignal"),
        labels={str(k): str(v) for k, v in mapping("Labels").items()},
        volumes=tuple(mapping("Volumes")),
        exposed_ports=tuple(mapping("ExposedPorts")),
    )


def items(data: dict[str, Any], key: str, what: str) -> list[Any]:
    """A list of the document. Raises ImageError when it is something else."""
    value = data.get(key)
    if not isinstance(value, list):
        raise ImageError(f"{what} has no list {key!r}")
    return value


def descriptor(item: object, what: str) -> Blob:
    """A descriptor's digest and size. Raises ImageError."""
    if not isinstance(item, dict):
        raise ImageError(f"{what} has a descriptor that is no object")
    digest, size = item.get("digest"), item.get("size")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ImageError(f"{what} has the digest {str(digest)[:100]!r}; only sha256 is supported")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise ImageError(f"{what}: {digest} has the size {str(size)[:40]!r}")
    return Blob(digest, size)
