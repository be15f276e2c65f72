"""A pod's folder on the node as the kubelet lays it out, and the mounts that it makes of it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from hyperpod.api.gen.runtime import v1 as cri

SHARED = b"what the node has\n"


class Volumes:
    """configMap, emptyDir on disk and in memory, hostPath, single files, below `root`."""

    def __init__(self, root: Path, uid: str) -> None:
        self.root, self.uid, self.generation = root, uid, 0
        self.config, self.empty = root / "volumes/configmap", root / "volumes/empty"
        self.memory, self.host = root / "volumes/memory", root / "host"
        self.hosts = root / "etc-hosts"

    def make(self) -> None:
        for folder in (self.config, self.empty / "sub", self.memory, self.host):
            folder.mkdir(parents=True)
        self.empty.chmod(0o777)
        (self.host / "note").write_bytes(SHARED)
        self.hosts.write_text(f"127.0.0.1 localhost\n127.0.0.1 of-{self.uid}\n")
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "soak", self.memory], check=True)
        self.swap()

    def swap(self) -> None:
        """A new generation of the configMap, put in place as the kubelet's atomic writer does."""
        self.generation += 1
        old = self.config / "..data"
        before = self.config / old.readlink() if old.is_symlink() else None
        now = self.config / f"..{self.generation}"
        now.mkdir()
        for name in ("a", "b"):
            (now / name).write_text(f"{self.generation}\n")
            if before is None:
                (self.config / name).symlink_to(f"..data/{name}")
        fresh = self.config / "..data_tmp"
        fresh.symlink_to(now.name)
        fresh.rename(old)
        if before is not None:
            shutil.rmtree(before)

    def termination_log(self, container: str) -> Path:
        """The file of one attempt; made empty like the kubelet does."""
        path = self.root / "containers" / container
        path.parent.mkdir(exist_ok=True)
        path.touch(mode=0o666)
        return path

    def mounts(self, container: str, ids: cri.UserNamespace | None = None) -> list[cri.Mount]:
        pairs: tuple[tuple[str, Path, bool], ...] = (
            ("/etc/config", self.config, True),
            ("/data", self.empty, False),
            ("/data-sub", self.empty / "sub", False),
            ("/memory", self.memory, False),
            ("/host", self.host, True),
            ("/etc/hosts", self.hosts, False),
            ("/dev/termination-log", self.termination_log(container), False),
        )
        return [
            cri.Mount(
                container_path=inside,
                host_path=str(path),
                readonly=readonly,
                uid_mappings=ids.uids if ids else [],
                gid_mappings=ids.gids if ids else [],
            )
            for inside, path, readonly in pairs
        ]

    def remove(self) -> None:
        if os.path.ismount(self.memory):
            subprocess.run(["umount", self.memory], check=True)
        shutil.rmtree(self.root, ignore_errors=True)
