"""skopeo's command line, its private configuration, and what its error messages mean.

It runs as an unprivileged user with a HOME, a temporary folder and configuration of its own, all inside the
folder of one pull. Credentials are in a 0600 file there, never among the arguments.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
from pathlib import Path

from hyperpod.errors import (
    HyperpodError,
    ImageError,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from hyperpod.image.convert import give
from hyperpod.image.reference import DEFAULT_HOST, Reference
from hyperpod.image.settings import ImageSettings
from hyperpod.logs import printable
from hyperpod.model.images import RegistryAuth

_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
_PASSED_ON = ("PATH", "SSL_CERT_FILE", "SSL_CERT_DIR", *_PROXIES)
_MESSAGE = re.compile(r'level=(?:fatal|error) msg="((?:[^"\\]|\\.)*)"')

# Looked for in this order in the last message, in lower case.
_MEANINGS: tuple[tuple[type[HyperpodError], tuple[str, ...]], ...] = (
    (ResourceExhausted, ("no space left on device", "disk quota exceeded", "file too large")),
    (ImageError, ("digest did not match", "digests did not match", "does not match", "mismatch", "corrupt")),
    (PermissionDenied, ("unauthorized", "authentication required", "denied", "forbidden", "status code 403")),
    (PermissionDenied, ("invalid username/password", "status code 401")),
    (
        Unavailable,
        (
            *("connection refused", "no such host", "timeout", "timed out", "network is unreachable"),
            *(
                "no route to host",
                "connection reset",
                "tls handshake",
                "toomanyrequests",
                "too many requests",
            ),
            *("unexpected eof", "server gave http response", "status code 5", "internal server error"),
            *(
                "bad gateway",
                "service unavailable",
                "temporary failure",
                ": eof",
                "x509:",
                "server misbehaving",
            ),
            "status 5",
        ),
    ),
    (NotFound, ("manifest unknown", "name unknown", "not found", "status code 404", "not known to registry")),
)


def host_of(reference: Reference, settings: ImageSettings) -> str:
    """The registry that is really asked."""
    return settings.mirror or reference.host


def location(reference: Reference, digest: str, host: str) -> str:
    """skopeo's name of the image; registries.conf has no mirror for all hosts, so the host is put in here."""
    name = f"{host}/{reference.path}"
    return f"docker://{name}@{digest}" if digest else f"docker://{name}:{reference.tag}"


def is_loopback(host: str) -> bool:
    """Loopback registries may speak plain HTTP, as in docker and containerd."""
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    return name in ("localhost", "[::1]") or re.fullmatch(r"127(\.\d{1,3}){3}", name) is not None


def is_for(auth: RegistryAuth, host: str) -> bool:
    """Whether the credentials may be shown to this registry."""
    server = re.sub(r"^https?://", "", auth.server_address).partition("/")[0]
    if server in ("index.docker.io", "registry-1.docker.io"):
        server = DEFAULT_HOST
    return server in ("", host)


def auth_file(auth: RegistryAuth | None, host: str) -> bytes:
    """containers-auth.json(5). Raises InvalidArgument for credentials that cannot be read."""
    empty = b'{"auths":{}}'
    if auth is None or not is_for(auth, host):
        return empty
    entry: dict[str, str] = {}
    if auth.identity_token:
        entry["identitytoken"] = auth.identity_token
        entry["auth"] = base64.b64encode(f"{auth.username or '<token>'}:".encode()).decode()
    elif auth.username or auth.password:
        entry["auth"] = base64.b64encode(f"{auth.username}:{auth.password}".encode()).decode()
    elif auth.auth:
        try:
            pair = base64.b64decode(auth.auth, validate=True).rstrip(b"\0")
        except (binascii.Error, ValueError) as exc:
            raise InvalidArgument("the auth field of the credentials is no base64") from exc
        if b":" not in pair:
            raise InvalidArgument("the auth field of the credentials is not base64 of username:password")
        entry["auth"] = base64.b64encode(pair).decode()
    if not entry:
        return empty
    return json.dumps({"auths": {host: entry}}).encode()


class Skopeo:
    """Prepares the folder of one pull and builds command lines that run in it."""

    def __init__(self, folder: Path, host: str, settings: ImageSettings) -> None:
        self.folder, self.host, self.settings = folder, host, settings

    def prepare(self, auth: RegistryAuth | None) -> None:
        """Write the configuration. Blocking. Raises InvalidArgument for the credentials."""
        secret = auth_file(auth, self.host)
        uid, gid = self.settings.uid, self.settings.gid
        for name in ("home", "tmp", "registries.d"):
            give(self.folder / name, self.settings)
        hosts = {*self.settings.insecure_registries, *([self.host] if is_loopback(self.host) else [])}
        lines = ["unqualified-search-registries = []", 'short-name-mode = "disabled"']
        for host in sorted(hosts):
            lines += ["[[registry]]", f"location = {json.dumps(host)}", "insecure = true"]
        files = {
            "auth.json": secret,
            "policy.json": b'{"default":[{"type":"insecureAcceptAnything"}]}',
            "registries.conf": "\n".join(lines).encode(),
        }
        for name, data in files.items():
            fd = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(data)
            os.chown(self.folder / name, uid, gid)

    def environment(self) -> dict[str, str]:
        """Nothing of the daemon's but proxies and certificates."""
        env = {key: os.environ[key] for key in _PASSED_ON if key in os.environ}
        home, tmp = str(self.folder / "home"), str(self.folder / "tmp")
        return {**env, "HOME": home, "TMPDIR": tmp, "XDG_RUNTIME_DIR": tmp}

    def inspect(self, source: str) -> list[str]:
        """Print the manifest or index as it is."""
        return [*self._base(), "inspect", "--raw", "--authfile", "auth.json", source]

    def copy(self, source: str, target: str) -> list[str]:
        """Copy byte for byte into `dir:` form: manifest.json and one file per blob, named by its hex."""
        flags = ["--quiet", "--preserve-digests", "--remove-signatures", "--src-authfile", "auth.json"]
        return [*self._base(), "copy", *flags, source, f"dir:{target}"]

    def _base(self) -> list[str]:
        uid, gid = self.settings.uid, self.settings.gid
        drop = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--no-new-privs"]
        drop += ["--inh-caps=-all", "--bounding-set=-all", "--pdeathsig=KILL"]
        bound = ["prlimit", "--core=0", "--nofile=1024", f"--fsize={self.settings.limits.max_blob}"]
        files = ["--policy", "policy.json", "--registries-conf", "registries.conf"]
        files += ["--registries.d", "registries.d", "--tmpdir", str(self.folder / "tmp")]
        return [*drop, "--", *bound, "--", "skopeo", *files, "--override-os=linux", "--override-arch=amd64"]


def explain(stderr: bytes, what: str) -> HyperpodError:
    """The error that skopeo's last message stands for; secrets of redirect URLs are cut off."""
    text = printable(stderr)
    messages = _MESSAGE.findall(text)
    last = messages[-1].replace('\\"', '"') if messages else (text.strip().splitlines() or ["no message"])[-1]
    last = re.sub(r"\?[^\s\"]+", "?...", last)[:600]
    lower = last.lower()
    for kind, signs in _MEANINGS:
        if any(sign in lower for sign in signs):
            return kind(f"{what}: {last}")
    return ImageError(f"{what}: {last}")
