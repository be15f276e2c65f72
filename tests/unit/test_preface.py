"""The preface: both sides against each other, split anywhere, and against liars."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperpod.errors import ProtocolError
from hyperpod.wire.preface import AgentPreface, HostPreface, Identity, PrefaceRefused

SANDBOX, OTHER = "ab" * 32, "cd" * 32
TOKEN, WRONG = b"t" * 32, b"w" * 32


def host(*, sandbox: str = SANDBOX, token: bytes = TOKEN, claim: bool = False) -> HostPreface:
    return HostPreface(sandbox, token, claim, nonce=b"h" * 32)


def agent(identity: Identity) -> AgentPreface:
    return AgentPreface(identity, nonce=b"a" * 32)


def known() -> Identity:
    return Identity(bytes.fromhex(SANDBOX), TOKEN)


def talk(left: HostPreface, right: AgentPreface) -> None:
    """Until both are done; raises what either raises, after the reply was delivered to the host."""
    to_agent = left.start()
    while to_agent:
        try:
            to_host = right.feed(to_agent)
        except PrefaceRefused as exc:
            left.feed(exc.reply)
            raise
        to_agent = left.feed(to_host)
    assert left.done
    assert right.done


def test_claim_then_auth() -> None:
    identity = Identity()
    talk(host(claim=True), agent(identity))
    assert (identity.sandbox, identity.token) == (bytes.fromhex(SANDBOX), TOKEN)
    talk(host(), agent(identity))


def test_auth_never_shows_the_token() -> None:
    assert TOKEN not in host().start()


@pytest.mark.parametrize(
    ("caller", "reason"),
    [
        (host(token=WRONG), "proof"),
        (host(sandbox=OTHER), "refused"),
        (host(claim=True, token=WRONG), "another identity"),
        (host(claim=True, sandbox=OTHER), "another identity"),
    ],
)
def test_wrong_identities(caller: HostPreface, reason: str) -> None:
    identity = known()
    with pytest.raises(ProtocolError, match=reason):
        talk(caller, agent(identity))
    assert (identity.sandbox, identity.token) == (bytes.fromhex(SANDBOX), TOKEN)


def test_auth_before_claim() -> None:
    with pytest.raises(ProtocolError, match="not been claimed"):
        talk(host(), agent(Identity()))


def test_claims_when_containers_exist() -> None:
    with pytest.raises(ProtocolError, match="containers"):
        talk(host(claim=True), agent(Identity(claimable=lambda: False)))
    identity = known()
    identity.claimable = lambda: False
    talk(host(claim=True), agent(identity))


def test_two_claims_at_once_have_one_winner() -> None:
    identity = Identity()
    first, second = agent(identity), agent(identity)
    one, two = host(claim=True), host(claim=True, token=WRONG)
    proof_one, proof_two = one.feed(first.feed(one.start())), two.feed(second.feed(two.start()))
    one.feed(first.feed(proof_one))
    with pytest.raises(PrefaceRefused):
        second.feed(proof_two)
    assert identity.token == TOKEN


def test_a_host_without_the_token_cannot_replay() -> None:
    identity = known()
    caller, first = host(), agent(identity)
    proof = caller.feed(first.feed(caller.start()))
    replayed = AgentPreface(identity, nonce=b"b" * 32)
    replayed.feed(caller.start())
    with pytest.raises(PrefaceRefused):
        replayed.feed(proof)


def test_an_agent_without_the_token_is_found_out() -> None:
    caller = host()
    with pytest.raises(PrefaceRefused, match="not this sandbox's agent"):
        caller.feed(bytes(65))


@pytest.mark.parametrize("claim", [False, True])
@given(cuts=st.lists(st.integers(1, 40), max_size=40), tail=st.binary(max_size=50))
def test_any_split_works_and_what_follows_is_kept(claim: bool, cuts: list[int], tail: bytes) -> None:
    identity = Identity() if claim else known()
    caller, callee = host(claim=claim), agent(identity)

    def split(data: bytes) -> list[bytes]:
        parts, at = [], 0
        for cut in cuts:
            parts.append(data[at : at + cut])
            at += cut
        return [part for part in (*parts, data[at:]) if part]

    answer = b"".join(callee.feed(part) for part in split(caller.start()))
    proof = b"".join(caller.feed(part) for part in split(answer))
    final = b"".join(callee.feed(part) for part in split(proof + tail))
    for part in split(final + tail):
        assert caller.feed(part) == b""
    assert caller.done
    assert callee.done
    assert callee.trailing == caller.trailing == tail


@given(st.binary(max_size=200))
def test_agents_take_no_garbage(data: bytes) -> None:
    preface = agent(known())
    try:
        reply = preface.feed(data)
    except PrefaceRefused as exc:
        assert exc.reply in (b"\x01", b"\x03")
    else:
        assert len(reply) in (0, 65)
    assert not preface.done


@given(st.binary(min_size=1, max_size=200))
def test_hosts_take_no_garbage(data: bytes) -> None:
    caller = host()
    with contextlib.suppress(PrefaceRefused):
        assert caller.feed(data) == b""
    assert not caller.done
