"""Where the agent keeps its things."""

from __future__ import annotations

import os
from dataclasses import dataclass

from hyperpod.spec.share import FOLDER


@dataclass(frozen=True)
class Layout:
    """Folders below `root`; `scratch` holds the writable layers. Short, for socket paths and mount options."""

    root: str
    scratch: str
    cgroup: str
    guest: bool

    @property
    def crun_root(self) -> str:
        return f"{self.root}/r"

    @property
    def layers(self) -> str:
        """The working folder of the agent as well, so that overlay options can name layers `0:1:2`."""
        return f"{self.root}/l"

    @property
    def pod_files(self) -> str:
        return f"{self.root}/e"

    @property
    def share(self) -> str:
        return f"{self.root}/{FOLDER}"

    @property
    def trash(self) -> str:
        return f"{self.scratch}/t"

    def bundle(self, container: str) -> str:
        return f"{self.root}/b/{container}"

    def writable(self, container: str) -> str:
        return f"{self.scratch}/c/{container}"

    def make(self) -> None:
        for path in (self.crun_root, self.layers, f"{self.root}/b", f"{self.scratch}/c", self.trash):
            os.makedirs(path, mode=0o700, exist_ok=True)
        os.chdir(self.layers)
