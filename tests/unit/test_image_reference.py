"""References as docker and containerd read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperpod.errors import InvalidArgument
from hyperpod.image.catalog import Catalog, known_as
from hyperpod.image.reference import id_prefix, parse
from hyperpod.model.images import Image, StoredImage

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("busybox:1.36", "docker.io/library/busybox:1.36"),
        ("me/app", "docker.io/me/app:latest"),
        ("docker.io/busybox", "docker.io/library/busybox:latest"),
        ("index.docker.io/busybox", "docker.io/library/busybox:latest"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app", "localhost:5000/app:latest"),
        ("127.0.0.1:5000/a/b/c:v1", "127.0.0.1:5000/a/b/c:v1"),
        ("[::1]:5000/app:v1", "[::1]:5000/app:v1"),
        ("ghcr.io/a-b/c_d/e__f:X-1.y_z", "ghcr.io/a-b/c_d/e__f:X-1.y_z"),
        (f"busybox@{DIGEST}", f"docker.io/library/busybox@{DIGEST}"),
        (f"quay.io/a/b:v2@{DIGEST}", f"quay.io/a/b@{DIGEST}"),
    ],
)
def test_canonical(text: str, canonical: str) -> None:
    assert str(parse(text)) == canonical
    assert str(parse(canonical)) == canonical


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "empty"),
        ("Busybox", "path part 'Busybox'"),
        ("a//b", "path part ''"),
        ("app:", "tag ''"),
        ("app:" + "t" * 129, "tag"),
        ("app:-x", "tag '-x'"),
        ("app@sha256:12", "digest 'sha256:12'"),
        ("app@md5:" + "0" * 32, "digest"),
        (f"app@{DIGEST}@{DIGEST}", "digest"),
        ("bad_host.:80/app", "host"),
        ("reg.io:port/app", "host"),
        ("reg.io/-app", "path part '-app'"),
        ("a" * 300, "longer than 255"),
        ("../../etc", "host"),
        ("docker://busybox", "host 'docker:'"),
        ("bü", "printable ASCII"),
        ("a\nb", "printable ASCII"),
        ("0" * 64, "image id"),
    ],
)
def test_refused_naming_the_part(text: str, part: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse(text)
    assert part in str(caught.value)


@given(st.text(max_size=80))
def test_any_text_is_canonical_or_refused(text: str) -> None:
    try:
        reference = parse(text)
    except InvalidArgument:
        return
    assert parse(str(reference)).name == reference.name
    assert not any(c in str(reference) for c in " \n\"'\\")
    assert not str(reference).startswith("-")


def test_tagged_is_empty_for_digests() -> None:
    assert parse("a:1").tagged == "docker.io/library/a:1"
    assert parse(f"a:1@{DIGEST}").tagged == ""


def test_id_prefix() -> None:
    assert id_prefix("sha256:ab") == "ab"
    assert id_prefix("ab" * 32) == "ab" * 32
    assert id_prefix("") is None
    assert id_prefix("xyz") is None
    assert id_prefix("ab" * 33) is None


def test_an_id_is_no_tag_of_a_repository_named_sha256() -> None:
    catalog = Catalog()
    tag = f"docker.io/library/{DIGEST}"
    for ident, tags in ((DIGEST, ()), ("sha256:" + "cd" * 32, (tag,))):
        image = Image(id=ident, repo_tags=tags, size=0, layers=())
        catalog.put(StoredImage(image=image, updated_at=1))
    assert parse(DIGEST).tagged == tag
    found = catalog.find(DIGEST)
    assert found is not None and found.id == DIGEST


def test_what_users_are_told_of_an_image() -> None:
    """Of its names the one that they asked by; a kubelet passes the id on and their words beside it."""
    tags = ("docker.io/library/a:12", "docker.io/library/a:1", "quay.io/b:2")
    digests = (f"docker.io/library/a@{DIGEST}", f"quay.io/b@{DIGEST}")
    image = Image(id="sha256:" + "cd" * 32, repo_tags=tags, repo_digests=digests, size=0, layers=())
    for asked, tag, digest in (
        (("a:1", image.id), tags[1], digests[0]),
        (("quay.io/b:other", image.id), tags[2], digests[1]),
        ((f"quay.io/b@{DIGEST}",), tags[2], digests[1]),
        (("", image.id[:20]), tags[0], digests[0]),
        (("elsewhere/c",), tags[0], digests[0]),
    ):
        assert known_as(image, asked) == (tag, digest), asked
    assert known_as(image.model_copy(update={"repo_tags": (), "repo_digests": ()}), ("a",)) == ("", "")
