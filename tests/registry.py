"""A real docker-registry process on a loopback port, and pushes to it over its HTTP API."""

from __future__ import annotations

import base64
import contextlib
import http.client
import http.server
import json
import signal
import ssl
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from tests.imagekit import Built
from tests.netkit import free_port

USER, PASSWORD = "puller", "s3cret-password"
_HTPASSWD = "puller:$2y$05$abcdefghijklmnopqrstuuUXKlvQTwfK/kphhjbeRlh5zvpJx1LLu\n"
"""USER and PASSWORD by bcrypt."""


SERVICE, IDENTITY = "test-registry", "identity-t0ken"


class Registry:
    """`address` is host:port. Pushes carry `authorization` if there is one."""

    def __init__(self, address: str, folder: Path, authorization: str) -> None:
        self.address, self.folder = address, folder
        self._headers = {"Authorization": authorization} if authorization else {}

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


class Issuer:
    """Makes JSON web tokens that a registry takes (distribution's token authentication specification)."""

    def __init__(self, folder: Path) -> None:
        self.realm = "http://127.0.0.1:1/unused"
        self._key, self.certificate = folder / "key.pem", folder / "cert.pem"
        command = [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-subj",
            "/CN=issuer",
            "-days",
            "2",
        ]
        subprocess.run(
            [*command, "-keyout", self._key, "-out", self.certificate], check=True, capture_output=True
        )

    def token(self, repository: str) -> str:
        """Access to push and pull one repository for an hour."""
        der = ssl.PEM_cert_to_DER_cert(self.certificate.read_text())
        now = int(time.time())
        header = {"typ": "JWT", "alg": "RS256", "x5c": [base64.b64encode(der).decode()]}
        claims = {"iss": SERVICE, "aud": SERVICE, "sub": "x", "jti": "1", "nbf": now - 60, "exp": now + 3600}
        access = [{"type": "repository", "name": repository, "actions": ["push", "pull"]}]
        parts = [
            _base64url(json.dumps(x).encode()) for x in (header, {**claims, "iat": now, "access": access})
        ]
        signing: list[str | Path] = ["openssl", "dgst", "-sha256", "-sign", self._key]
        signed = subprocess.run(
            signing, input=".".join(parts).encode(), check=True, capture_output=True
        ).stdout
        return ".".join([*parts, _base64url(signed)])

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """The server at `realm`: trades the refresh token IDENTITY for an access token (OAuth 2)."""
        issuer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                form = urllib.parse.parse_qs(self._body().decode())
                good = form.get("refresh_token") == [IDENTITY] and form.get("grant_type") == ["refresh_token"]
                body = json.dumps({"access_token": issuer.token("team/app")} if good else {}).encode()
                self.send_response(200 if good else 401)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def _body(self) -> bytes:
                """Go sends forms chunked (RFC 9112 7.1)."""
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

            def do_GET(self) -> None:
                self.send_error(401)

            def log_message(self, format: str, *args: object) -> None:
                pass

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            self.realm = f"http://127.0.0.1:{server.server_port}/token"
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            try:
                yield
            finally:
                server.shutdown()
                thread.join()


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@contextlib.contextmanager
def running(folder: Path, *, auth: bool = False, issuer: Issuer | None = None) -> Iterator[Registry]:
    """A registry until the end of the block; 127.0.0.1 with a free port.

    `auth`: with USER and PASSWORD; `issuer`: with bearer tokens of that issuer."""
    folder.mkdir(parents=True, exist_ok=True)
    address = f"127.0.0.1:{free_port()}"
    config = f"version: 0.1\nlog: {{level: error}}\nhttp: {{addr: '{address}'}}\n"
    config += f"storage: {{filesystem: {{rootdirectory: '{folder}'}}, cache: {{}}}}\n"
    authorization = ""
    if auth:
        (folder / "htpasswd").write_text(_HTPASSWD)
        config += f"auth: {{htpasswd: {{realm: test, path: '{folder}/htpasswd'}}}}\n"
        authorization = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    if issuer is not None:
        config += f"auth: {{token: {{realm: '{issuer.realm}', service: {SERVICE}, issuer: {SERVICE}, "
        config += f"rootcertbundle: '{issuer.certificate}'}}}}\n"
        authorization = f"Bearer {issuer.token('team/app')}"
    (folder / "config.yml").write_text(config)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            ["docker-registry", "serve", folder / "config.yml"], stdout=log, stderr=log
        )
    try:
        registry = Registry(address, folder, authorization)
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
