"""What the image component may use, and what each bound protects."""

from __future__ import annotations

from dataclasses import dataclass, field

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True)
class Limits:
    """Caps checked before, and while, disk is used. Sizes in bytes."""

    max_manifest: int = 4 * MIB
    """A manifest, an index or a configuration; all are read into memory."""
    max_layers: int = 127
    """Lower folders of one overlay mount, and LUNs of one VM."""
    max_blob: int = 16 * GIB
    """One compressed layer as its manifest declares it."""
    max_layer: int = 32 * GIB
    """One uncompressed layer."""
    max_image: int = 64 * GIB
    """All layers of one image, compressed (checked before the download) and again uncompressed."""
    max_ratio: int = 200
    """Uncompressed over compressed, once a layer is past `ratio_floor`: a bomb stops early."""
    ratio_floor: int = 512 * MIB
    max_entries: int = 600_000
    """Entries of one layer; each takes about 1.5 KB of the converter's memory."""
    max_metadata: int = 256 * MIB
    """Names, link targets and extended attributes of one layer together."""
    max_archive_members: int = 10_000
    """Files in a docker or OCI archive given to load."""


@dataclass(frozen=True)
class ImageSettings:
    """Times in seconds."""

    uid: int = 64999
    """Unprivileged user of skopeo and the converter; needs no passwd entry, must own nothing else."""
    gid: int = 64998
    """Another number than `uid`, so that each is replaceable in a built layer (image/rootinode.py)."""
    layer_gid: int = 0
    """Group that may read layer files (mode 0440): the one QEMU processes run with."""
    mirror: str = ""
    """`host:port` asked instead of every registry; paths are kept, references keep their own host."""
    insecure_registries: tuple[str, ...] = ()
    """Hosts reached over plain HTTP or with unknown certificates; loopback hosts always may be."""
    max_concurrent_pulls: int = 3
    max_concurrent_conversions: int = 2
    stall_timeout: float = 60.0
    """Without one more byte for so long, a pull or a conversion is given up."""
    pull_timeout: float = 3600.0
    """For one whole pull: a registry that trickles must not hold a slot for ever."""
    progress_interval: float = 5.0
    """Between progress lines in the log."""
    compressor: str = "lz4"
    """Of the block images: lz4 packs 200 MB in 0.1 s where zstd takes 3 s."""
    limits: Limits = field(default_factory=Limits)
