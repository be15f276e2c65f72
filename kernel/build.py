#!/usr/bin/env python3
"""Build the guest kernel from Debian's linux-source package; prints the folder that has it.

The result is cached as $HYPERPOD_CACHE/kernel-<hash of the inputs>/ with
  vmlinux         stripped ELF with a PVH entry, for `qemu -kernel`
  config          the complete configuration
  System.map      addresses, for reading an oops on the host (the guest has no symbol table)
  manifest.json   {"kind":"kernel","version","kernel","initrd","cmdline",...}: what the daemon reads
The same inputs give the same bytes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from kernel.artifacts import (  # noqa: E402  (the path above is needed first)
    BuildError,
    cache_dir,
    hash_inputs,
    publishing,
    say,
    write_manifest,
)
from kernel.fragment import Fragment, lost_options, read_config  # noqa: E402

FRAGMENT = HERE / "hyperpod.config"
SOURCE_PACKAGE = "linux-source-6.12"
SOURCE = Path(f"/usr/src/{SOURCE_PACKAGE}.tar.xz")

# What the daemon puts on the command line for any root image. panic=-1: reboot at once, and QEMU's
# -no-reboot turns that into the end of the VM. no_timer_check, tsc and rcu_expedited save boot time.
CMDLINE = (
    "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check cryptomgr.notests rcupdate.rcu_expedited=1"
    " random.trust_cpu=on"
)

# Everything besides the fragment that shapes the bytes; part of the hash (a change of this file's wording
# should not cost everybody a kernel build).
RECIPE = {
    "make": ["allnoconfig", "vmlinux"],
    "strip": ["--strip-all", "--remove-section=.comment"],
    "environment": {
        "KBUILD_BUILD_TIMESTAMP": "1970-01-01 00:00:00 UTC",
        "KBUILD_BUILD_USER": "hyperpod",
        "KBUILD_BUILD_HOST": "build",
        "KBUILD_BUILD_VERSION": "1",
        "LC_ALL": "C",
        "TZ": "UTC",
    },
}

# Steps that `make vmlinux` prints, from a finished build; only the percentage shown depends on it.
EXPECTED_STEPS = 2323


def package_version(package: str) -> str:
    """The installed version of a Debian package. Raises BuildError with the mend if it is not there."""
    done = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Version}", package], capture_output=True, text=True, check=False
    )
    if done.returncode != 0 or not done.stdout:
        raise BuildError(f"{package} is not installed: apt-get install {package}")
    return done.stdout


def compiler_version() -> str:
    """The first line of `gcc --version`."""
    return subprocess.run(["gcc", "--version"], capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )[0]


def inputs() -> dict[str, object]:
    """What decides the result, as plain JSON."""
    return {
        "options": Fragment.read(FRAGMENT).lines(),
        "recipe": RECIPE,
        "cmdline": CMDLINE,
        "source": package_version(SOURCE_PACKAGE),
        "gcc": compiler_version(),
    }


def target() -> Path:
    """The folder in which the kernel of these inputs is, or would be."""
    return cache_dir() / f"kernel-{hash_inputs(inputs())}"


def make(tree: Path, goal: str, *arguments: str) -> subprocess.Popen[str]:
    """Start `make goal` in the kernel tree, its output merged into one pipe."""
    return subprocess.Popen(
        ["make", "-C", str(tree), *arguments, goal],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={"PATH": os.environ["PATH"], **RECIPE["environment"]},  # type: ignore[dict-item]
    )


def finish(process: subprocess.Popen[str], log: Path, *, progress: bool) -> int:
    """Read `make` to its end into `log`, showing a percentage. Returns the number of steps seen."""
    assert process.stdout is not None
    steps, shown, started = 0, 0.0, time.monotonic()
    with open(log, "a") as out:
        for line in process.stdout:
            out.write(line)
            if not line.startswith("  "):
                continue
            steps += 1
            now = time.monotonic()
            if progress and now - shown >= (0.5 if sys.stderr.isatty() else 20):
                shown = now
                percent = min(99, steps * 100 // EXPECTED_STEPS)
                text = f"kernel: {percent:3d}%  {steps} files  {now - started:4.0f} s"
                print(text, file=sys.stderr, end="\r" if sys.stderr.isatty() else "\n", flush=True)
    if process.wait() != 0:
        tail = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-30:])
        raise BuildError(f"make failed ({process.returncode}); its last lines:\n{tail}")
    return steps


def configure(tree: Path, log: Path) -> None:
    """Write .config from the fragment, and fail naming every option that Kconfig did not honour."""
    finish(make(tree, "allnoconfig", f"KCONFIG_ALLCONFIG={FRAGMENT}"), log, progress=False)
    lost = lost_options(Fragment.read(FRAGMENT), read_config(tree / ".config"))
    if lost:
        raise BuildError("options of hyperpod.config that Kconfig did not honour:\n  " + "\n  ".join(lost))


def build(folder: Path, jobs: int) -> None:
    """Unpack, configure and compile below `folder`, and leave only the results in it."""
    started = time.monotonic()
    tree, log = folder / "tree", folder / "build.log"
    tree.mkdir()
    say(f"kernel: unpacking {SOURCE}")
    subprocess.run(["tar", "-C", str(tree), "--strip-components=1", "-xJf", str(SOURCE)], check=True)
    configure(tree, log)
    release = subprocess.run(
        ["make", "-s", "-C", str(tree), "kernelrelease"], capture_output=True, text=True, check=True
    ).stdout.strip()
    say(f"kernel: compiling {release} with {jobs} jobs")
    steps = finish(make(tree, "vmlinux", f"-j{jobs}"), log, progress=True)
    arguments: list[str] = RECIPE["strip"]  # type: ignore[assignment]
    subprocess.run(["strip", *arguments, "-o", str(folder / "vmlinux"), str(tree / "vmlinux")], check=True)
    shutil.copyfile(tree / ".config", folder / "config")
    shutil.copyfile(tree / "System.map", folder / "System.map")
    shutil.rmtree(tree)
    log.unlink()
    write_manifest(
        folder,
        {
            "kind": "kernel",
            "version": f"{release}-{hash_inputs(inputs())}",
            "release": release,
            "kernel": "vmlinux",
            "initrd": None,
            "cmdline": CMDLINE,
            "patches_itself": read_config(folder / "config").get("JUMP_LABEL") == "y",
            "inputs": inputs(),
            "steps": steps,
        },
    )
    say(f"kernel: done in {time.monotonic() - started:.0f} s ({steps} steps)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--print-path", action="store_true", help="only say where the result is or would be")
    parser.add_argument(
        "--check-config", action="store_true", help="only check that every option is honoured"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    try:
        path = target()
        if arguments.print_path:
            print(path)
            return 0
        if not SOURCE.is_file():
            raise BuildError(f"{SOURCE} is missing: apt-get install {SOURCE_PACKAGE}")
        with publishing(path) as folder:
            if folder is not None:
                build(folder, arguments.jobs)
    except (BuildError, subprocess.CalledProcessError) as error:
        say(f"kernel/build.py: {error}")
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
