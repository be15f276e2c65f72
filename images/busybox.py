#!/usr/bin/env python3
"""Makes a small OCI image layout from the host's static busybox: `python3 images/busybox.py OUTDIR [NAME]`.

For the demo and for tests, where no registry can be asked. Needs Debian's package busybox-static and nothing
else. The same busybox gives the same bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

BUSYBOX = "/bin/busybox"
DEFAULT_NAME = "docker.io/library/hyperpod-demo:latest"
PASSWD = b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"
GROUP = b"root:x:0:\nnogroup:x:65534:\n"
FOLDERS = {
    "bin": 0o755,
    "dev": 0o755,
    "etc": 0o755,
    "proc": 0o555,
    "root": 0o700,
    "sys": 0o555,
    "tmp": 0o1777,
}


def layer() -> bytes:
    """An uncompressed tar with busybox, a symlink per applet, /etc/passwd and the usual folders."""
    applets = subprocess.run([BUSYBOX, "--list"], check=True, capture_output=True, text=True).stdout.split()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:

        def add(name: str, kind: bytes, mode: int, data: bytes = b"", link: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.type, info.mode, info.size, info.linkname = kind, mode, len(data), link
            tar.addfile(info, io.BytesIO(data))

        for name, mode in FOLDERS.items():
            add(name, tarfile.DIRTYPE, mode)
        add("bin/busybox", tarfile.REGTYPE, 0o755, Path(BUSYBOX).read_bytes())
        add("etc/passwd", tarfile.REGTYPE, 0o644, PASSWD)
        add("etc/group", tarfile.REGTYPE, 0o644, GROUP)
        for applet in sorted(set(applets) - {"busybox"}):
            add(f"bin/{applet}", tarfile.SYMTYPE, 0o777, link="busybox")
    return out.getvalue()


def write_layout(folder: Path, name: str = DEFAULT_NAME, command: tuple[str, ...] = ("/bin/sh",)) -> str:
    """Write the layout; the image's id (`sha256:...` of its configuration)."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)

    def put(data: bytes, media: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": media, "digest": f"sha256:{digest}", "size": len(data)}

    tar = layer()
    packed = put(gzip.compress(tar, 6, mtime=0), "application/vnd.oci.image.layer.v1.tar+gzip")
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": list(command), "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(tar).hexdigest()}"]},
    }
    described = put(json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json")
    media = "application/vnd.oci.image.manifest.v1+json"
    manifest = {"schemaVersion": 2, "mediaType": media, "config": described, "layers": [packed]}
    top = put(json.dumps(manifest).encode(), media)
    top["platform"] = {"architecture": "amd64", "os": "linux"}
    top["annotations"] = {"org.opencontainers.image.ref.name": name}
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [top]}))
    (folder / "oci-layout").write_text(json.dumps({"imageLayoutVersion": "1.0.0"}))
    return str(described["digest"])


def main() -> int:
    if len(sys.argv) not in (2, 3):
        print("usage: busybox.py OUTDIR [NAME]", file=sys.stderr)
        return 2
    print(write_layout(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else DEFAULT_NAME))
    return 0


if __name__ == "__main__":
    sys.exit(main())
