"""virtiofsd: one process pair per sandbox, started by us so that it has the flags it needs and the pod's cgroup.

libvirt starts one as well, but offers neither of these: `announce_submounts` (else files of two host file systems
share a device number in the guest, and cp or tar take them for one), a cache that never shows old names and yet
allows shared mappings, and no CAP_MKNOD (a guest could leave device nodes in the host's folders).

Two programs have that name: QEMU's in C (Debian 12) and its successor in Rust (Debian 13); their options differ.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hyperpod import mountapi, processes
from hyperpod.errors import FailedPrecondition, HyperpodError
from hyperpod.logs import printable
from hyperpod.share import binds
from hyperpod.spec import mountinfo
from hyperpod.spec.share import FOLDER

PLACES = "/usr/lib/qemu:/usr/libexec:/usr/lib:/usr/bin:/usr/local/bin"
"""Neither Debian puts it into PATH."""

PACKAGE = "qemu-system-common (Debian 12) or virtiofsd (Debian 13)"

XATTRS = ":ok:all:user.:::ok:all:security.capability:::unsupported:all:::"
"""Attributes of files that a guest may have: no labels, no access control lists, nothing trusted."""

NICE_END = 0.3
"""Seconds that it gets to leave by itself: it does when QEMU has gone."""

DEATH_TIMEOUT = 5.0
SANDBOX_TIMEOUT = 10.0
RETRY = 0.002

_LISTENER = 3
"""The descriptor that it finds its listening socket on."""

_START = (
    'while [ "$1" != -- ]; do echo 0 > "$1/cgroup.procs" || exit 125; shift; done; shift; '
    'exec setpriv --securebits=+no_setuid_fixup "$@"'
)
"""sh: join each cgroup, then become the program: before its first thread and child, so that none is missed.

The secure bit lets it keep CAP_DAC_OVERRIDE while it makes a file as a guest's user: QEMU's virtiofsd takes uid and
gid from a request but no supplementary groups, so a folder that is writable by an fsGroup would refuse its members.
The guest's kernel has checked the permissions, groups and all; a hostile one could as well say that it is root."""


@dataclass(frozen=True)
class Program:
    """`rust`: the successor's options, not QEMU's."""

    path: str
    rust: bool


def program() -> Program | None:
    """What this host has, or None."""
    path = shutil.which("virtiofsd", path=PLACES)
    if path is None:
        return None
    told = subprocess.run([path, "--help"], capture_output=True, check=False, timeout=10)
    return Program(path, b"--shared-dir" in told.stdout + told.stderr)


def arguments(which: Program, share: str) -> list[str]:
    """Its command line. Names are never cached and file data is checked at each open and read, so that what the
    host changes is seen at once."""
    if which.rust:
        return [
            *(
                which.path,
                f"--fd={_LISTENER}",
                f"--shared-dir={share}",
                "--sandbox=namespace",
                "--seccomp=kill",
            ),
            *("--cache=never", "--allow-mmap", "--announce-submounts", "--xattr", f"--xattrmap={XATTRS}"),
            *("--modcaps=-mknod", "--rlimit-nofile=0", "--log-level=error"),
        ]
    source = share.replace("\\", "\\\\").replace(",", "\\,")
    options = [
        *(f"source={source}", "sandbox=namespace", "cache=auto", "timeout=0", "announce_submounts"),
        *("xattr", f"xattrmap={XATTRS}", "modcaps=-mknod", "log_level=err"),
    ]
    flags = [flag for option in options for flag in ("-o", option)]
    return [which.path, f"--fd={_LISTENER}", "--rlimit-nofile=0", *flags]


class FileServer:
    """The virtiofsd of one folder `<run_dir>/m/<12 digits>`; all that it needs after a restart lies in there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.share, self.socket = folder, folder / FOLDER, folder / "fs.sock"
        self._pid, self._log = folder / "pid", folder / "log"
        self._child = 0
        """What this process has to reap; what an earlier daemon started is the supervisor's."""
        self._words = -1
        """A reader of the FIFO, without which the words of a dead writer are lost."""

    def start(self, which: Program, uid: int, gid: int, cgroups: Sequence[str]) -> int:
        """Make the folders, listen, start it in `cgroups`; gives its pid. Raises HyperpodError."""
        try:
            self.folder.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o711, exist_ok=True)
            self.share.mkdir(mode=0o711, exist_ok=True)
            self.socket.unlink(missing_ok=True)
            with contextlib.suppress(FileExistsError):
                os.mkfifo(self._log, 0o600)
            self.listen()
            self._cover()
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                listener.bind(str(self.socket))
                self.socket.chmod(0o600)
                os.chown(self.socket, uid, gid)
                listener.listen(1)
                pid = self._spawn(arguments(which, str(self.share)), listener.fileno(), cgroups)
            self._child = pid
            processes.remember(self._pid, pid, processes.running_since(pid))
        except OSError as exc:
            raise HyperpodError(
                f"virtiofsd cannot be started: {exc.filename or which.path}: {exc.strerror}"
            ) from exc
        return pid

    def _cover(self) -> None:
        """Lay the folder over itself, read-only.

        virtiofsd copies the mounts that it finds when QEMU has connected, and guests may be hostile by then: so it
        never has a writable one of this folder, where they would have a place on the host, and no quota. What is
        mounted in it is not covered: that comes later."""
        above = os.open(self.folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        share = os.open(FOLDER, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
        try:
            tree = mountapi.clone_tree(share)
            try:
                flags = mountapi.MOUNT_ATTR_RDONLY | mountapi.MOUNT_ATTR_NODEV | mountapi.MOUNT_ATTR_NOSUID
                private = mountapi.MS_PRIVATE
                mountapi.set_attributes(tree, b"", attributes=flags, propagation=private, recursive=False)
                mountapi.attach(tree, above, FOLDER.encode())
            finally:
                os.close(tree)
        finally:
            os.close(share)
            os.close(above)

    def uncover(self) -> None:
        """Once virtiofsd has its copies: from here on mount points can be made in the folder. Safe to repeat.

        Raises FailedPrecondition as `namespace` does, HyperpodError."""
        self.namespace()
        try:
            self._take_off()
        except OSError as exc:
            raise HyperpodError(f"{self.share} cannot be used: {exc.strerror}") from exc

    def _take_off(self) -> None:
        try:
            while True:
                mountapi.detach(os.fsencode(self.share))
        except OSError as exc:
            if exc.errno not in (errno.EINVAL, errno.ENOENT):  # not covered any more, or not there
                raise

    def _spawn(self, command: list[str], listener: int, cgroups: Sequence[str]) -> int:
        # Opened for both: a writer never waits for a reader, nor dies for want of one.
        words = os.open(self._log, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        try:
            actions = [(os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, words, 1)]
            actions += [(os.POSIX_SPAWN_DUP2, words, 2), (os.POSIX_SPAWN_DUP2, listener, _LISTENER)]
            return os.posix_spawn(
                "/bin/sh",
                ["sh", "-c", _START, "sh", *cgroups, "--", *command],
                {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
                file_actions=actions,
                setsid=True,
                setsigmask=(),
                setsigdef=(signal.SIGPIPE, signal.SIGINT, signal.SIGTERM),
            )
        finally:
            os.close(words)
            os.close(null)

    def pid(self) -> int:
        """Of the process that `start` made, 0 when it is not there any more."""
        return processes.recall(self._pid)

    def namespace(self) -> str:
        """Of its mounts once it has confined itself, which it does when QEMU has connected: a path in /proc.

        Raises FailedPrecondition when it has ended or does not get there.
        """
        own = Path("/proc/self/ns/mnt").readlink()
        deadline = time.monotonic() + SANDBOX_TIMEOUT
        while (pid := self.pid()) and time.monotonic() < deadline:
            for child in _children(pid):
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{child}/ns/mnt").readlink() != own and self._confined(child):
                        return f"/proc/{child}/ns/mnt"
            time.sleep(RETRY)
        why = "does not confine itself" if pid else f"has ended{self.last_words()}"
        raise FailedPrecondition(f"the pod's virtiofsd {why}; make the pod anew")

    def _confined(self, pid: int) -> bool:
        """Its root is the share's folder, and the host's root does not lie over it any more (pivot_root(2))."""
        root, share = Path(f"/proc/{pid}/root").stat(), self.share.stat()
        if (root.st_dev, root.st_ino) != (share.st_dev, share.st_ino):
            return False
        table = mountinfo.parse(Path(f"/proc/{pid}/mountinfo").read_bytes()).values()
        return [mount.path for mount in table].count("/") == 1

    def listen(self) -> None:
        """Keep its words from now on; also after a restart of this daemon."""
        if self._words < 0:
            with contextlib.suppress(OSError):
                self._words = os.open(self._log, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def last_words(self) -> str:
        """What it wrote to its standard error last, escaped, after a colon; read once."""
        with contextlib.suppress(OSError):
            if text := printable(os.read(self._words, 65536)[-500:].strip()):
                return f": {text}"
        return ""

    def end(self) -> None:
        """Kill it if it does not leave by itself, wait, and remove the folder; with it go all its mounts.

        Safe to repeat. Raises HyperpodError."""
        if pid := self.pid():
            ended = _await_death(pid, NICE_END)
            for one in () if ended else (*_children(pid), pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one, signal.SIGKILL)
            if not ended and not _await_death(pid, DEATH_TIMEOUT):
                raise HyperpodError(f"virtiofsd, process {pid}, does not die")
        self.reap()
        if self._words >= 0:
            os.close(self._words)
            self._words = -1
        self._remove()

    def reap(self) -> None:
        """After its death; nothing to do for one that lives, or of an earlier daemon."""
        if self._child:
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(self._child, os.WNOHANG) == (0, 0):
                    return
            self._child = 0

    def _remove(self) -> None:
        """Never by a recursive removal: what is below are mount points of a tenant's files."""
        try:
            self._take_off()
            for name in os.listdir(self.share):
                binds.release(self.share, name)
            self.share.rmdir()
        except FileNotFoundError:
            pass  # an earlier end got so far
        except OSError as exc:
            raise HyperpodError(f"{exc.filename or self.share} cannot be removed: {exc.strerror}") from exc
        for path in (self.socket, self._pid, self._log):
            path.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self.folder.rmdir()


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _await_death(pid: int, seconds: float) -> bool:
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    except OSError as exc:
        if exc.errno == errno.EINVAL:  # a zombie's number is still taken; it is dead all the same
            return True
        raise
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    finally:
        os.close(handle)
