#!/usr/bin/env python3
"""The quick start: Debian's own cloud kernel with an initramfs that loads its modules; prints the folder.

No compiler needed and ready in seconds, but a start takes twice as long as with the kernel of build.py, and
packet filters inside pods are missing (they are modules, and nothing can load one later). Cached as
$HYPERPOD_CACHE/kernel-cloud-<hash of the inputs>/ with vmlinux (or vmlinuz), initrd and manifest.json.
"""

from __future__ import annotations

import argparse
import lzma
import re
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path, PurePosixPath

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from kernel import packages  # noqa: E402  (the path above is needed first)
from kernel.artifacts import (  # noqa: E402
    BuildError,
    cache_dir,
    hash_inputs,
    publishing,
    say,
    write_manifest,
)
from kernel.build import CMDLINE  # noqa: E402
from kernel.cpio import Archive  # noqa: E402

# Newest first; a meta package names the real one among its dependencies.
META_PACKAGES = ("linux-image-6.12-cloud-amd64", "linux-image-cloud-amd64")
_IMAGE = re.compile(r"Depends: (linux-image-\d\S*-cloud-amd64)$", re.MULTILINE)

# What a guest needs and Debian builds as modules. Those that this kernel has built in are skipped.
MODULES = (
    *("virtio_pci", "virtio_mmio", "virtio_blk", "virtio_scsi", "sd_mod", "virtio_net", "virtio_rng"),
    *("virtio_console", "virtio_balloon", "virtio_mem", "vmw_vsock_virtio_transport", "loop"),
    *("crc32c_generic", "squashfs", "erofs", "ext4", "quota_v2", "overlay", "fuse", "virtiofs"),
    *("af_packet", "veth", "dummy", "tun", "bridge"),
)

# PID 1 of the initramfs: loads the modules in their order, waits for the root disk, becomes its init.
INIT = """#!/bin/busybox sh
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
while read -r module; do
  insmod "/lib/$module.ko" || echo "initramfs: $module is not loaded"
done </modules
root=/dev/vda type=squashfs init=/init
for word in $(cat /proc/cmdline); do
  case $word in
    root=*) root=${word#root=} ;;
    rootfstype=*) type=${word#rootfstype=} ;;
    init=*) init=${word#init=} ;;
  esac
done
tries=0
until [ -b "$root" ]; do
  tries=$((tries + 1))
  [ $tries -lt 200 ] || { echo "initramfs: no disk $root"; poweroff -f; }
  usleep 50000
done
mount -r -t "$type" "$root" /root || { echo "initramfs: cannot mount $root as $type"; poweroff -f; }
mount -o move /dev /root/dev
umount /sys
umount /proc
exec switch_root /root "$init" "$@"
"""
APPLETS = ("mount", "umount", "insmod", "cat", "usleep", "poweroff", "switch_root", "sh", "[")


def image_package() -> str:
    """The newest cloud kernel that apt offers. Raises BuildError."""
    for meta in META_PACKAGES:
        done = subprocess.run(["apt-cache", "depends", meta], capture_output=True, text=True, check=False)
        if match := _IMAGE.search(done.stdout):
            return match.group(1)
    raise BuildError("apt offers no cloud kernel: apt-get update")


def inputs() -> dict[str, object]:
    """What decides the result, as plain JSON."""
    debs = packages.resolve([image_package(), "busybox-static"])
    return {
        "packages": {p.name: [p.version, p.sha256] for p in debs},
        "modules": MODULES,
        "init": INIT,
        "cmdline": CMDLINE,
        "zstd": shutil.which("zstd") is not None,
    }


def module_name(path: str) -> str:
    """kernel/fs/foo-bar.ko.xz -> foo_bar."""
    return PurePosixPath(path).name.split(".ko")[0].replace("-", "_")


def load_order(wanted: tuple[str, ...], modules: dict[str, bytes], builtin: set[str]) -> list[str]:
    """Modules in the order in which they load, dependencies first. Raises BuildError for an unknown one.

    The dependencies are in each module's own text (modules.dep is made by depmod, at installation).
    """
    order: list[str] = []

    def add(name: str, stack: tuple[str, ...]) -> None:
        if name in order or name in builtin:
            return
        if name not in modules:
            raise BuildError(
                f"the kernel package has no module {name} (wanted by {' < '.join(stack) or 'us'})"
            )
        if name in stack:
            raise BuildError(f"modules depend on each other: {stack}")
        for needed in depends(modules[name]):
            add(needed, (*stack, name))
        order.append(name)

    for name in wanted:
        add(name, ())
    return order


def depends(module: bytes) -> list[str]:
    """The modules that a module says it needs."""
    match = re.search(rb"\0depends=([^\0]*)\0", module)
    names = match.group(1).decode() if match else ""
    return [name.replace("-", "_") for name in names.split(",") if name]


def vmlinux(image: bytes) -> bytes | None:
    """The ELF file inside a bzImage, or None if nothing here can unpack it.

    The bzImage would do as well. Offsets are those of the x86 boot protocol, "The real-mode kernel header".
    """
    if image[0x202:0x206] != b"HdrS":
        raise BuildError("the kernel image is no bzImage")
    setup = (image[0x1F1] or 4) + 1
    start = setup * 512 + int.from_bytes(image[0x248:0x24C], "little")
    payload = image[start : start + int.from_bytes(image[0x24C:0x250], "little")]
    if payload.startswith(b"\xfd7zXZ\0"):
        elf = lzma.LZMADecompressor().decompress(payload)
    elif payload.startswith(b"\x1f\x8b"):
        elf = zlib.decompressobj(wbits=31).decompress(payload)
    elif payload.startswith(b"\x28\xb5\x2f\xfd") and shutil.which("zstd"):
        # The kernel's build appends the unpacked size, 4 bytes that are not part of the stream.
        elf = subprocess.run(["zstd", "-dc"], input=payload[:-4], capture_output=True, check=True).stdout
    else:
        return None
    return elf if elf.startswith(b"\x7fELF") else None


def initramfs(order: list[str], modules: dict[str, bytes], busybox: bytes) -> bytes:
    """The archive, not compressed: unpacking costs an emulated guest more than reading."""
    archive = Archive()
    for folder in ("bin", "dev", "lib", "proc", "root", "sys"):
        archive.folder(folder)
    archive.file("bin/busybox", busybox, 0o755)
    for applet in APPLETS:
        archive.link(f"bin/{applet}", "busybox")
    for name in order:
        archive.file(f"lib/{name}.ko", modules[name])
    archive.file("modules", "".join(f"{name}\n" for name in order).encode())
    archive.file("init", INIT.encode(), 0o755)
    return archive.finish()


def build(folder: Path, given: dict[str, object]) -> None:
    """Fetch, choose, write kernel, initrd and manifest into `folder`."""
    started = time.monotonic()
    name = image_package()
    debs = packages.resolve([name, "busybox-static"])
    files = packages.fetch(debs)
    say(f"cloud kernel: opening {name}")
    release = name.removeprefix("linux-image-")
    entries = packages.contents(files[name])
    modules: dict[str, bytes] = {}
    for path, entry in entries.items():
        if re.search(r"\.ko(\.xz)?$", path) and entry.data is not None:
            modules[module_name(path)] = entry.data
    builtin = {
        module_name(line)
        for path, entry in entries.items()
        if path.endswith("/modules.builtin") and entry.data is not None
        for line in entry.data.decode().splitlines()
    }
    modules = {
        name: lzma.decompress(data) if data.startswith(b"\xfd7zXZ\0") else data
        for name, data in modules.items()
    }
    order = load_order(MODULES, modules, builtin)
    busybox = packages.contents(files["busybox-static"])["usr/bin/busybox"].data
    image = entries[f"boot/vmlinuz-{release}"].data
    if busybox is None or image is None:
        raise BuildError("busybox or the kernel image is a link: the packages have changed")
    elf = vmlinux(image)
    kernel = "vmlinuz" if elf is None else "vmlinux"
    (folder / kernel).write_bytes(image if elf is None else elf)
    (folder / "initrd").write_bytes(initramfs(order, modules, busybox))
    write_manifest(
        folder,
        {
            "kind": "kernel",
            "version": f"{release}-{hash_inputs(given)}",
            "release": release,
            "kernel": kernel,
            "initrd": "initrd",
            "cmdline": CMDLINE,
            "patches_itself": True,
            "inputs": given,
        },
    )
    say(f"cloud kernel: {release}, {len(order)} modules, in {time.monotonic() - started:.0f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--print-path", action="store_true", help="only say where the result is or would be")
    arguments = parser.parse_args()
    try:
        given = inputs()
        path = cache_dir() / f"kernel-cloud-{hash_inputs(given)}"
        if not arguments.print_path:
            with publishing(path) as folder:
                if folder is not None:
                    build(folder, given)
    except (BuildError, subprocess.CalledProcessError) as error:
        say(f"kernel/cloud.py: {error}")
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
