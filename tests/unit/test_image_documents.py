"""Indexes, manifests, configurations that lie or are something else; credentials; messages of skopeo."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from hyperpod import errors
from hyperpod.image import manifest as m
from hyperpod.image.reference import parse
from hyperpod.image.settings import ImageSettings, Limits
from hyperpod.image.skopeo import auth_file, explain, host_of, is_loopback, location
from hyperpod.model.images import RegistryAuth
from tests import imagekit as kit

LAYER = kit.tar(kit.Item("f", b"x"))
LIMITS = Limits(max_blob=1 << 20, max_image=1 << 20, max_layers=3)


def test_index_chooses_this_platform() -> None:
    here, there = kit.image(LAYER), kit.image(LAYER, change_config={"architecture": "arm64"})
    both = kit.index((there, "linux/arm64"), (here, "linux/amd64"))
    data = m.parse_json(both.top, "x")
    assert m.is_index(data)
    assert m.choose(data, "x").digest == here.digest
    only = m.parse_json(kit.index((there, "linux/arm64")).top, "x")
    with pytest.raises(errors.ImageError, match=r"linux/amd64, only linux/arm64"):
        m.choose(only, "x")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"schemaVersion": 1}, "schema 1"),
        ({"schemaVersion": 3}, "unknown type"),
        ({"mediaType": "text/html"}, "unknown type"),
        ({"config": {"mediaType": "application/vnd.cncf.helm.config.v1+json"}}, "no container image"),
        ({"config": None}, "no container image"),
        ({"layers": "many"}, "no list 'layers'"),
        ({"layers": []}, "no layers"),
        ({"layers": [{"mediaType": "application/zip"}]}, "unsupported type"),
        ({"layers": [{"mediaType": kit.OCI_LAYER + "+encrypted"}]}, "encrypted"),
        ({"layers": [{"mediaType": kit.OCI_LAYER, "digest": "sha512:00", "size": 1}]}, "only sha256"),
        ({"layers": [{"mediaType": kit.OCI_LAYER, "digest": kit.sha256(b""), "size": -1}]}, "size '-1'"),
        ({"layers": [{"mediaType": kit.OCI_LAYER, "digest": kit.sha256(b""), "size": True}]}, "size 'True'"),
    ],
)
def test_bad_manifests(change: dict[str, Any], why: str) -> None:
    built = kit.image(LAYER, change_manifest=change)
    with pytest.raises(errors.ImageError) as caught:
        m.read_manifest(built.top, "x", LIMITS)
    assert why in str(caught.value)


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"\xff", b"[" * 100_000])
def test_no_json(raw: bytes) -> None:
    with pytest.raises(errors.ImageError):
        m.read_manifest(raw, "x", LIMITS)


def test_declared_sizes_are_capped_before_anything_is_fetched() -> None:
    def layers(*sizes: int) -> bytes:
        parts = [
            {"mediaType": kit.OCI_LAYER, "digest": kit.sha256(b"%d" % n), "size": s}
            for n, s in enumerate(sizes)
        ]
        return kit.image(LAYER, change_manifest={"layers": parts}).top

    with pytest.raises(errors.ResourceExhausted, match="layer sha256:"):
        m.read_manifest(layers(1 << 21), "x", LIMITS)
    with pytest.raises(errors.ResourceExhausted, match="bytes of layers"):
        m.read_manifest(layers(1 << 19, 1 << 19, 1 << 19), "x", LIMITS)
    with pytest.raises(errors.ResourceExhausted, match="4 layers"):
        m.read_manifest(layers(1, 1, 1, 1), "x", LIMITS)


def test_config_is_read() -> None:
    section: dict[str, Any] = {
        "User": "7:8",
        "Env": ["A=b"],
        "Entrypoint": ["/e"],
        "Cmd": None,
        "WorkingDir": "/w",
    }
    section |= {
        "StopSignal": "SIGQUIT",
        "Labels": {"k": "v"},
        "Volumes": {"/v": {}},
        "ExposedPorts": {"80/tcp": {}},
    }
    built = kit.image(LAYER, config=section)
    manifest = m.read_manifest(built.top, "x", LIMITS)
    config, diff_ids = m.read_config(built.blobs[built.config_digest], manifest, "x")
    assert diff_ids == (kit.sha256(LAYER),)
    assert (
        config.user == "7:8" and config.env == ("A=b",) and config.entrypoint == ("/e",) and config.cmd == ()
    )
    assert config.working_dir == "/w" and config.stop_signal == "SIGQUIT" and config.labels == {"k": "v"}
    assert config.volumes == ("/v",) and config.exposed_ports == ("80/tcp",)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"architecture": "arm64"}, "linux/arm64"),
        ({"os": "windows"}, "windows/amd64"),
        ({"rootfs": None}, "diff_ids"),
        ({"rootfs": {"diff_ids": []}}, "1 layers, but 0 diff ids"),
        ({"rootfs": {"diff_ids": ["../../x"]}}, "diff id '../../x'"),
        ({"config": {"Env": "A"}}, "Env"),
        ({"config": {"User": ["root"]}}, "User"),
        ({"config": {"WorkingDir": "/a\0b"}}, "WorkingDir"),
        ({"config": {"Labels": []}}, None),
        ({"config": {"Labels": ["x"]}}, "Labels"),
        ({"config": {"User": "u" * 1025}}, "User in the configuration has 1025 bytes"),
        ({"config": {"Labels": {"x": "\ud800"}}}, "not Unicode"),
        ({"config": {"Env": ["A=\udc80"]}}, "not Unicode"),
    ],
)
def test_bad_configurations(change: dict[str, Any], why: str | None) -> None:
    built = kit.image(LAYER, change_config=change)
    manifest = m.read_manifest(built.top, "x", LIMITS)
    raw = built.blobs[built.config_digest]
    if why is None:
        m.read_config(raw, manifest, "x")
        return
    with pytest.raises(errors.ImageError) as caught:
        m.read_config(raw, manifest, "x")
    assert why in str(caught.value)


def test_what_is_kept_of_a_configuration_is_bounded() -> None:
    """A tenant's image must not fill the list of images, nor each container's record."""
    built = kit.image(LAYER, config={"Labels": {"x": "y" * (1 << 20)}})
    with pytest.raises(errors.ResourceExhausted, match="at most 1048576 are kept"):
        m.read_config(built.blobs[built.config_digest], m.read_manifest(built.top, "x", LIMITS), "x")


def test_config_with_another_digest() -> None:
    built = kit.image(LAYER)
    manifest = m.read_manifest(built.top, "x", LIMITS)
    with pytest.raises(errors.ImageError, match="digest"):
        m.read_config(built.blobs[built.config_digest] + b" ", manifest, "x")


def test_credentials() -> None:
    def entry(auth: RegistryAuth, host: str = "r.io") -> Any:
        return json.loads(auth_file(auth, host))["auths"].get(host)

    pair = base64.b64encode(b"u:p:q").decode()
    assert json.loads(auth_file(None, "r.io")) == {"auths": {}}
    assert entry(RegistryAuth(username="u", password="p:q")) == {"auth": pair}
    assert entry(RegistryAuth(auth=pair)) == {"auth": pair}
    assert entry(RegistryAuth(identity_token="T"))["identitytoken"] == "T"
    assert entry(RegistryAuth(username="u", password="p", server_address="https://other.io/v1/")) is None
    assert entry(RegistryAuth(username="u", password="p", server_address="https://r.io/v1/")) is not None
    assert (
        entry(RegistryAuth(username="u", password="p", server_address="index.docker.io"), "docker.io")
        is not None
    )
    for bad in ("%%%", base64.b64encode(b"nocolon").decode()):
        with pytest.raises(errors.InvalidArgument):
            auth_file(RegistryAuth(auth=bad), "r.io")
    shown = repr(
        RegistryAuth(username="name", password="hidden", identity_token="hidden", registry_token="hidden")
    )
    assert "hidden," not in shown and "name" not in shown


def test_catch_all_mirror_keeps_the_path() -> None:
    settings = ImageSettings(mirror="127.0.0.1:5000")
    for text, source in (("busybox", "library/busybox:latest"), ("quay.io/a/b", "a/b:latest")):
        reference = parse(text)
        assert location(reference, "", host_of(reference, settings)) == f"docker://127.0.0.1:5000/{source}"
    reference = parse("quay.io/a/b")
    assert (
        location(reference, "sha256:1", host_of(reference, ImageSettings()))
        == "docker://quay.io/a/b@sha256:1"
    )


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:5000", "127.0.0.1:1", "127.9.9.9", "[::1]:80", "[::1]"]
)
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["127.0.0.1.evil.io", "localhost.io", "r.io:5000", "10.0.0.1:5000", "[::2]"])
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("reading manifest v9 in r.io/a: manifest unknown", errors.NotFound),
        ("reading manifest: name unknown: repository name not known to registry", errors.NotFound),
        ("reading manifest: unauthorized: authentication required", errors.PermissionDenied),
        ("reading manifest: requested access to the resource is denied", errors.PermissionDenied),
        (
            "pinging container registry r: Get https://r/v2/: dial tcp: connect: connection refused",
            errors.Unavailable,
        ),
        ("dial tcp: lookup r.invalid: no such host", errors.Unavailable),
        ("received unexpected HTTP status: 503 Service Unavailable", errors.Unavailable),
        ("writing blob: write /x: no space left on device", errors.ResourceExhausted),
        ("Digest did not match, expected sha256:1, got sha256:2", errors.ImageError),
        ("something new", errors.ImageError),
    ],
)
def test_messages(message: str, kind: type[Exception]) -> None:
    line = f'time="2026-01-01T00:00:00Z" level=fatal msg="Error: {message}"\n'
    error = explain(b"earlier noise\n" + line.encode(), "pull of x")
    assert type(error) is kind
    assert str(error) == f"pull of x: Error: {message}"


def test_signed_addresses_are_cut_from_messages() -> None:
    error = explain(b'level=fatal msg="Get \\"https://cdn/x?Signature=secret&Key=1\\": EOF"', "p")
    assert "secret" not in str(error) and isinstance(error, errors.Unavailable)
