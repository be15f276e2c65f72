"""containerd with runc as a peer, wholly in a folder of its own: nothing is installed, no service is touched.

It runs in a mount namespace with an empty /run: its shims' sockets lie in /run/containerd whatever it is told.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.imagekit import Item, image, layout_tar, tar, write_layout
from tests.netkit import Network

PAUSE = "registry.invalid/pause:1"
PAUSE_SOURCE = "#include <unistd.h>\nint main(void) { for (;;) pause(); }\n"
READY = 30.0
"""Seconds for it to listen."""

CONFIG = """\
version = 2
root = "{base}/root"
state = "{base}/state"
disabled_plugins = ["io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.zfs", "io.containerd.nri.v1.nri", "io.containerd.internal.v1.restart"]
[grpc]
  address = "{socket}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{base}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  netns_mounts_under_state_dir = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{conf_dir}"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
"""


def debian(folder: Path) -> list[Path]:
    """Folders with the programs of Debian's packages, downloaded and unpacked there."""
    folder.mkdir()
    folder.chmod(0o777)  # apt downloads as a user of its own
    command = ["apt-get", "-q", "download", "containerd", "runc"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
    return [folder / "usr/bin", folder / "usr/sbin"]


class Containerd:
    """A running one; `marker` is in the command line of every process of its pods' own."""

    def __init__(self, base: Path, bins: list[Path], network: Network) -> None:
        self.base, self.socket = base, base / "containerd.sock"
        self.marker = str(self.socket)
        path = ":".join([*map(str, bins), os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")])
        self._env = {**os.environ, "PATH": path}
        (base / "config.toml").write_text(
            CONFIG.format(base=base, socket=self.socket, pause=PAUSE, conf_dir=network.conf_dir)
        )
        self._log = (base / "containerd.log").open("wb")
        inside = "mount -t tmpfs none /run && exec containerd --config $0 --log-level warn"
        self._process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", inside, base / "config.toml"],
            env=self._env, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, start_new_session=True,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def version(self) -> str:
        words = self._run("containerd", "--version").split()
        return f"containerd {words[2]}, {self._run('runc', '--version').splitlines()[0]}"

    def wait_ready(self) -> None:
        deadline = time.monotonic() + READY
        while not self.socket.exists() or "OK" not in self._ctr("version", check=False):
            assert self._process.poll() is None, (self.base / "containerd.log").read_text()
            assert time.monotonic() < deadline, (self.base / "containerd.log").read_text()
            time.sleep(0.1)

    def load(self, archive: bytes) -> None:
        """An OCI archive, whose index names the image."""
        file = self.base / "image.tar"
        file.write_bytes(archive)
        self._ctr("images", "import", "--all-platforms", str(file))

    def _ctr(self, *arguments: str, check: bool = True) -> str:
        out = self._run(
            "ctr", "--address", str(self.socket), "--namespace", "k8s.io", *arguments, check=check
        )
        return out + "OK"

    def _run(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, env=self._env, capture_output=True, text=True, check=False)
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
        return done.stdout if done.returncode == 0 else ""

    def destroy(self) -> None:
        """The mounts end with its namespace."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._process.kill()
        self._process.wait()
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    if self.marker.encode() in (entry / "cmdline").read_bytes():
                        os.kill(int(entry.name), signal.SIGKILL)
        self._log.close()


def pause_archive(base: Path) -> bytes:
    """What holds a pod's namespaces, as small as the usual one: static, and only waits."""
    (base / "pause.c").write_text(PAUSE_SOURCE)
    subprocess.run(["gcc", "-Os", "-static", "-s", "-o", base / "pause", base / "pause.c"], check=True)
    layer = tar(Item("pause", (base / "pause").read_bytes(), mode=0o755))
    layout = write_layout(base / "pause-layout", image(layer, config={"Entrypoint": ["/pause"]}), PAUSE)
    return layout_tar(layout)


@contextlib.contextmanager
def running(folder: Path | None, busybox: Path) -> Iterator[Containerd]:
    """Wholly gone afterwards. `folder`: with its programs and runc's; None: Debian's. `busybox`: OCI layout."""
    base = Path(tempfile.mkdtemp(prefix="hyperpod-peer-"))
    base.chmod(0o711)
    network = Network(base)
    one = None
    try:
        bins = debian(base / "packages") if folder is None else [folder]
        one = Containerd(base, bins, network)
        one.wait_ready()
        one.load(pause_archive(base))
        one.load(layout_tar(busybox))
        yield one
    finally:
        if one is not None:
            one.destroy()
        network.destroy()
        shutil.rmtree(base, ignore_errors=True)
