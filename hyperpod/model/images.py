"""Images as the store keeps them: what was pulled, from where, and which block images its layers became."""

from __future__ import annotations

from hyperpod.model.base import Record


class ImageConfig(Record):
    """The part of the OCI image configuration that a runtime honours (OCI image-spec, config.md)."""

    user: str = ""
    env: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    working_dir: str = ""
    stop_signal: str = ""
    labels: dict[str, str] = {}
    volumes: tuple[str, ...] = ()
    exposed_ports: tuple[str, ...] = ()


class LayerRef(Record):
    """One layer of an image as a file of the store."""

    name: str
    """`sha256:<hex>` of the uncompressed tar, computed here: its diff id; another one for a variant of the layer
    (image/naming.py)."""
    file: str
    """File name below the store's layers folder."""
    fstype: str = "squashfs"
    size: int
    """Bytes of the file."""


class Image(Record):
    """An image in the store. `layers` is lowest first and holds no layer twice (see image/convert.py)."""

    id: str
    """`sha256:<hex>` of the configuration blob; PullImageResponse.image_ref."""
    repo_tags: tuple[str, ...] = ()
    """Canonical: docker.io/library/busybox:latest."""
    repo_digests: tuple[str, ...] = ()
    """Canonical: docker.io/library/busybox@sha256:...; the index's digest and the manifest's."""
    size: int
    """Bytes that its layer files and its configuration take."""
    config: ImageConfig = ImageConfig()
    layers: tuple[LayerRef, ...]
    pinned: bool = False


class StoredImage(Record):
    """The durable record of an image. A removed one stays until the last container using it is gone."""

    image: Image
    updated_at: int
    """Nanoseconds since the epoch; of two records with one tag the later wins."""
    removed: bool = False


class RegistryAuth(Record):
    """CRI AuthConfig. Never in a log: repr and str hide every secret."""

    username: str = ""
    password: str = ""
    auth: str = ""
    """base64 of `username:password`; used when both of those are empty."""
    identity_token: str = ""
    """OAuth 2 refresh token that the registry's token server exchanges."""
    registry_token: str = ""
    """Bearer token sent to the registry as it is."""
    server_address: str = ""
    """When set, the credentials are for this host only."""

    def __repr__(self) -> str:
        return f"RegistryAuth(server_address={self.server_address!r}, secrets hidden)"

    __str__ = __repr__
