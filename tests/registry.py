"""A real docker-registry process on a loopback port, and pushes to it over its HTTP API."""

from __future__ import annotations

import base64
import contextlib
import http.client
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.imagekit import Built

USER, PASSWORD = "puller", "s3cret-password"
_HTPASSWD = "puller:$2y$05$abcdefghijklmnopqrstuuUXKlvQTwfK/kphhjbeRlh5zvpJx1LLu\n"
"""USER and PASSWORD by bcrypt."""


class Registry:
    """`address` is host:port. Pushes are authenticated when the registry is."""

    def __init__(self, address: str, folder: Path, auth: bool) -> None:
        self.address, self.folder = address, folder
        token = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        self._headers = {"Authorization": f"Basic {token}"} if auth else {}

    def request(self, method: str, path: str, body: bytes = b"", media: str = "") -> tuple[int, str]:
        """Status and Location."""
        connection = http.client.HTTPConnection(self.address, timeout=20)
        headers = {**self._headers, **({"Content-Type": media} if media else {})}
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            answer.read()
            return answer.status, answer.headers.get("Location") or ""
        finally:
            connection.close()

    def push_blob(self, repository: str, digest: str, data: bytes) -> None:
        status, location = self.request("POST", f"/v2/{repository}/blobs/uploads/")
        assert status == 202, status
        path = "/" + location.split("/", 3)[3]
        glue = "&" if "?" in path else "?"
        status, _ = self.request("PUT", f"{path}{glue}digest={digest}", data, "application/octet-stream")
        assert status == 201, status

    def push(self, repository: str, tag: str, built: Built, children: tuple[Built, ...] = ()) -> None:
        """Push an image, or an index after its `children`."""
        for child in children:
            self.push(repository, child.digest, child)
        manifests = {child.digest for child in children}
        for digest, data in built.blobs.items():
            if digest not in manifests:
                self.push_blob(repository, digest, data)
        status, _ = self.request("PUT", f"/v2/{repository}/manifests/{tag}", built.top, built.media)
        assert status == 201, status

    def blob_file(self, digest: str) -> Path:
        """Where the registry keeps the bytes of a blob: tests damage them there."""
        value = digest.removeprefix("sha256:")
        return self.folder / "docker/registry/v2/blobs/sha256" / value[:2] / value / "data"


@contextlib.contextmanager
def running(folder: Path, *, auth: bool = False) -> Iterator[Registry]:
    """A registry until the end of the block; 127.0.0.1 with a free port."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    config = f"version: 0.1\nlog: {{level: error}}\nhttp: {{addr: '{address}'}}\n"
    config += f"storage: {{filesystem: {{rootdirectory: '{folder}'}}, cache: {{}}}}\n"
    if auth:
        (folder / "htpasswd").write_text(_HTPASSWD)
        config += f"auth: {{htpasswd: {{realm: test, path: '{folder}/htpasswd'}}}}\n"
    (folder / "config.yml").write_text(config)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            ["docker-registry", "serve", folder / "config.yml"], stdout=log, stderr=log
        )
    try:
        registry = Registry(address, folder, auth)
        deadline = time.monotonic() + 20
        while True:
            try:
                registry.request("GET", "/v2/")
                break
            except OSError:
                assert time.monotonic() < deadline, (folder / "log").read_text()
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.05)
        yield registry
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)
