"""Builders of layers, OCI layouts, docker archives and hostile variants of them, in pure Python."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
V2_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
V2_CONFIG = "application/vnd.docker.container.image.v1+json"
V2_LAYER = "application/vnd.docker.image.rootfs.diff.tar"


@dataclass
class Item:
    """One tar entry to be written."""

    name: str
    data: bytes = b""
    kind: bytes = tarfile.REGTYPE
    link: str = ""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    device: tuple[int, int] = (0, 0)
    pax: dict[str, str] = field(default_factory=dict)


def folder(name: str, mode: int = 0o755, **more: Any) -> Item:
    return Item(name, kind=tarfile.DIRTYPE, mode=mode, **more)


def symlink(name: str, target: str) -> Item:
    return Item(name, kind=tarfile.SYMTYPE, link=target, mode=0o777)


def hardlink(name: str, target: str) -> Item:
    return Item(name, kind=tarfile.LNKTYPE, link=target)


def tar(*items: Item, format: int = tarfile.PAX_FORMAT) -> bytes:
    """An uncompressed tar of exactly these entries in this order."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for item in items:
            info = tarfile.TarInfo(item.name)
            info.type, info.mode, info.linkname = item.kind, item.mode, item.link
            info.uid, info.gid, info.mtime, info.size = item.uid, item.gid, item.mtime, len(item.data)
            info.devmajor, info.devminor = item.device
            info.pax_headers = item.pax
            archive.addfile(info, io.BytesIO(item.data))
    return out.getvalue()


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def pack(data: bytes) -> bytes:
    return gzip.compress(data, 1, mtime=0)


@dataclass
class Built:
    """An image as blobs by digest, with its top document (manifest or index)."""

    top: bytes
    media: str
    config_digest: str
    blobs: dict[str, bytes]

    @property
    def digest(self) -> str:
        return sha256(self.top)


def image(
    *layers: bytes,
    packed: bool = True,
    schema2: bool = False,
    config: dict[str, Any] | None = None,
    change_config: dict[str, Any] | None = None,
    change_manifest: dict[str, Any] | None = None,
    diff_ids: list[str] | None = None,
    packer: Any = pack,
    suffix: str = "",
) -> Built:
    """An image of uncompressed tars; the `change_*` entries overwrite top-level keys of the documents."""
    blobs: dict[str, bytes] = {}

    def put(data: bytes, media: str) -> dict[str, Any]:
        blobs[sha256(data)] = data
        return {"mediaType": media, "digest": sha256(data), "size": len(data)}

    base = V2_LAYER if schema2 else OCI_LAYER
    end = suffix or ((".gzip" if schema2 else "+gzip") if packed else "")
    parts = [put(packer(layer) if packed else layer, base + end) for layer in layers]
    document: dict[str, Any] = {
        "architecture": "amd64",
        "os": "linux",
        "config": config or {},
        "rootfs": {"type": "layers", "diff_ids": diff_ids or [sha256(layer) for layer in layers]},
        **(change_config or {}),
    }
    described = put(json.dumps(document).encode(), V2_CONFIG if schema2 else OCI_CONFIG)
    media = V2_MANIFEST if schema2 else OCI_MANIFEST
    manifest = {"schemaVersion": 2, "mediaType": media, "config": described, "layers": parts}
    manifest.update(change_manifest or {})
    top = json.dumps(manifest).encode()
    return Built(top, media, described["digest"], blobs)


def index(*images: tuple[Built, str]) -> Built:
    """An index of images with their platforms, such as "linux/arm64"."""
    blobs: dict[str, bytes] = {}
    entries = []
    for built, platform in images:
        blobs.update(built.blobs)
        blobs[built.digest] = built.top
        system, machine = platform.split("/")
        entries.append(
            {
                "mediaType": built.media,
                "digest": built.digest,
                "size": len(built.top),
                "platform": {"os": system, "architecture": machine},
            }
        )
    top = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()
    return Built(top, OCI_INDEX, images[0][0].config_digest, blobs)


def write_layout(path: Path, built: Built, name: str = "") -> Path:
    """An OCI image layout folder."""
    blobs = path / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    for digest, data in {**built.blobs, built.digest: built.top}.items():
        (blobs / digest.removeprefix("sha256:")).write_bytes(data)
    top: dict[str, Any] = {"mediaType": built.media, "digest": built.digest, "size": len(built.top)}
    if name:
        top["annotations"] = {"org.opencontainers.image.ref.name": name, "io.containerd.image.name": name}
    (path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [top]}))
    (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return path


def layout_tar(path: Path) -> bytes:
    """A layout folder as an OCI archive."""
    files = sorted(item for item in path.rglob("*") if item.is_file())
    return tar(*(Item(str(item.relative_to(path)), item.read_bytes()) for item in files))


def docker_archive(built: Built, layers: list[bytes], tags: list[str]) -> bytes:
    """What `docker save` wrote before version 25; an equal layer is a symlink to the first one."""
    items: list[Item] = []
    names: list[str] = []
    seen: dict[bytes, str] = {}
    for number, layer in enumerate(layers):
        name = f"layer{number}/layer.tar"
        names.append(name)
        items.append(symlink(name, f"../{seen[layer]}") if layer in seen else Item(name, layer))
        seen.setdefault(layer, name)
    config = built.blobs[built.config_digest]
    items.append(Item("config.json", config))
    entry = [{"Config": "config.json", "RepoTags": tags, "Layers": names}]
    items.append(Item("manifest.json", json.dumps(entry).encode()))
    return tar(*items)
