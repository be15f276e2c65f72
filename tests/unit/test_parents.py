"""Folders that a layer only implies get what the layers below say of them."""

from __future__ import annotations

import pytest

from hyperpod.errors import ResourceExhausted
from hyperpod.spec import layers
from hyperpod.spec.layers import Plan
from hyperpod.spec.parents import inherit, told
from tests.imagekit import Item, folder, hardlink, symlink, tar
from tests.unit.test_layers import plan_of

TMP = folder("tmp", 0o1777)
HOME = folder("home/me", 0o700, uid=1000, gid=100, pax={"SCHILY.xattr.user.k": "v\0é"})


def below(*above_first: bytes) -> list[list[bytes]]:
    return [list(told(plan_of(raw))) for raw in above_first]


def folders(plan: Plan) -> dict[str, tuple[int, int, int]]:
    return {path.decode(): (node.mode, node.uid, node.gid) for path, node in plan.folders}


def upper(*items: Item) -> Plan:
    return plan_of(tar(*items))


def test_topmost_that_tells_of_it_counts() -> None:
    plan = upper(Item("tmp/x"), Item("home/me/.cache/deep/f"), Item("new/f"))
    lower = tar(folder("tmp", 0o700), HOME)
    middle = tar(TMP, Item("home/me/.cache/y"))  # implies home/me as well
    assert inherit(plan, below(middle, lower))
    assert folders(plan) == {
        "home": (0o755, 0, 0),
        "home/me": (0o700, 1000, 100),
        "home/me/.cache": (0o755, 0, 0),
        "home/me/.cache/deep": (0o755, 0, 0),
        "new": (0o755, 0, 0),
        "tmp": (0o1777, 0, 0),
    }
    home = next(node for path, node in plan.folders if path == b"home/me")
    assert home.xattrs == {b"user.k": "v\0é".encode()}
    assert plan.ids == {0, 1000, 100}


def test_what_the_layer_tells_itself_stays() -> None:
    plan = upper(Item("tmp/x"), folder("tmp", 0o711))
    assert inherit(plan, below(tar(TMP))) == ""
    assert folders(plan) == {"tmp": (0o711, 0, 0)}
    assert not plan.implies


@pytest.mark.parametrize(
    "between",
    [
        Item(".wh.a"),
        Item("a/.wh.b"),
        Item("a"),
        Item("a/b"),
        symlink("a", "elsewhere"),
        symlink("a/b", "/c"),
    ],
    ids=lambda item: item.name,
)
def test_what_was_something_else_in_between_is_new(between: Item) -> None:
    plan = upper(Item("a/b/c"))
    assert inherit(plan, below(tar(between), tar(folder("a"), folder("a/b", 0o700)))) == ""
    assert folders(plan) == {"a": (0o755, 0, 0), "a/b": (0o755, 0, 0)}


def test_a_hard_link_is_no_folder_either() -> None:
    plan = upper(Item("a/b"))
    assert inherit(plan, below(tar(Item("f"), hardlink("a", "f")), tar(folder("a", 0o700)))) == ""


def test_a_variant_is_what_differs_from_the_default() -> None:
    def variant(*lower: Item) -> str:
        return inherit(upper(Item("tmp/x"), Item("home/me/y")), below(tar(*lower)))

    assert variant() == variant(folder("tmp"), folder("home/me", mtime=7)) == ""
    found = {variant(TMP), variant(HOME), variant(TMP, HOME), variant(folder("tmp", 0o777))}
    assert len(found) == 4
    assert variant(HOME, TMP, folder("other", 0o700)) == variant(TMP, HOME)


def test_names_that_are_no_text() -> None:
    name = 'd\n\xff"'.encode("latin-1").decode("utf-8", "surrogateescape")
    plan = upper(Item(f"{name}/x"))
    assert inherit(plan, below(tar(folder(name, 0o700))))
    assert [node.mode for _, node in plan.folders] == [0o700]


def test_owners_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "MAX_IDS", 4)
    plan = upper(Item("a/x"), Item("b/x", uid=3))
    with pytest.raises(ResourceExhausted, match="different user and group ids"):
        inherit(plan, below(tar(folder("a", uid=1), folder("b", gid=2))))
