#!/usr/bin/env python3
"""Write an OCI image layout of Debian's busybox into a folder, for demos and tests that must not need a registry.

The image is docker.io/library/busybox:latest with one layer: /bin/busybox, a link per applet, and the folders
that programs expect. The same package gives the same digests.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kernel import packages  # noqa: E402  (the path above is needed first)
from kernel.artifacts import BuildError, say  # noqa: E402

NAME = "docker.io/library/busybox:latest"
FOLDERS = {
    "bin": 0o755,
    "etc": 0o755,
    "root": 0o700,
    "tmp": 0o1777,
    "var": 0o755,
    "var/tmp": 0o1777,
    "home": 0o755,
}
TEXTS = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/home:/bin/false\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
}
_OCI = "application/vnd.oci.image"


def applets(busybox: bytes) -> list[str]:
    """The names that this busybox answers to; it is a static program, so the host can ask it."""
    with tempfile.NamedTemporaryFile(prefix="busybox-", delete=False) as file:
        file.write(busybox)
    path = Path(file.name)
    try:
        path.chmod(0o700)
        listed = subprocess.run([str(path), "--list"], capture_output=True, text=True, check=True).stdout
    finally:
        path.unlink()
    return sorted(name for name in listed.split() if name != "busybox")


def layer(busybox: bytes) -> bytes:
    """The image's one layer, an uncompressed tar."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path, mode in sorted(FOLDERS.items()):
            folder = tarfile.TarInfo(path)
            folder.type, folder.mode = tarfile.DIRTYPE, mode
            tar.addfile(folder)
        files = {"bin/busybox": (busybox, 0o755), **{p: (t.encode(), 0o644) for p, t in TEXTS.items()}}
        for path, (data, mode) in sorted(files.items()):
            file = tarfile.TarInfo(path)
            file.size, file.mode = len(data), mode
            tar.addfile(file, io.BytesIO(data))
        for name in applets(busybox):
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname, link.mode = tarfile.SYMTYPE, "busybox", 0o777
            tar.addfile(link)
    return out.getvalue()


def write(folder: Path, busybox: bytes) -> None:
    """Write the layout. The folder must not exist."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def blob(kind: str, data: bytes) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": f"{_OCI}.{kind}", "digest": f"sha256:{digest}", "size": len(data)}

    def document(value: object) -> bytes:
        return json.dumps(value, sort_keys=True).encode()

    content = layer(busybox)
    layers = [blob("layer.v1.tar", content)]
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": ["sh"], "Env": ["PATH=/bin:/usr/bin:/sbin:/usr/sbin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(content).hexdigest()}"]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{_OCI}.manifest.v1+json",
        "config": blob("config.v1+json", document(config)),
        "layers": layers,
    }
    entry = blob("manifest.v1+json", document(manifest))
    entry["annotations"] = {"org.opencontainers.image.ref.name": NAME, "io.containerd.image.name": NAME}
    (folder / "index.json").write_bytes(document({"schemaVersion": 2, "manifests": [entry]}))
    (folder / "oci-layout").write_bytes(document({"imageLayoutVersion": "1.0.0"}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="where to write; must not exist")
    folder: Path = parser.parse_args().folder
    try:
        deb = packages.fetch(packages.resolve(["busybox-static"]))["busybox-static"]
        busybox = packages.contents(deb)["usr/bin/busybox"].data
        if busybox is None:
            raise BuildError("busybox-static has changed: /bin/busybox is a link")
        write(folder, busybox)
    except (BuildError, FileExistsError, subprocess.CalledProcessError) as error:
        say(f"images/busybox.py: {error}")
        return 1
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
