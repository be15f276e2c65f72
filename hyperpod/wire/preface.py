"""The first bytes of every connection to an agent: both sides prove that they know the sandbox's token.

    host   "HPOD" version kind sandbox_id[32] host_nonce[32]   (kind CLAIM: followed by token[32])
    agent  status agent_nonce[32] HMAC(token, "agent" + host_nonce + agent_nonce + sandbox_id)
    host   HMAC(token, "host" + agent_nonce + host_nonce + sandbox_id)
    agent  status

HMAC is HMAC-SHA256. A status other than 0 is the last byte that the agent sends. CLAIM gives the agent its
identity: once per boot and only while there is no container (a repetition with the same id and token is
fine: the daemon may have died in between). AUTH never shows the token.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from dataclasses import dataclass

from hyperpod.errors import ProtocolError

MAGIC = b"HPOD"
VERSION = 1
KIND_CLAIM, KIND_AUTH = 1, 2
TOKEN_LEN = 32
NONCE_LEN = 32
_HELLO_LEN = 4 + 1 + 1 + 32 + NONCE_LEN
_PROOF_LEN = 32
_ANSWER_LEN = 1 + NONCE_LEN + _PROOF_LEN

TIMEOUT = 10.0
"""Seconds that each side gives the other for all of it. An agent that wants for CPU answers late, and has more to
do for a host that has given up before and comes again."""

STATUS_OK = 0
STATUS_REFUSED = 1
"""Malformed, or the proof is wrong."""
STATUS_UNCLAIMED = 2
"""AUTH to an agent that has no identity yet."""
STATUS_CLAIMED = 3
"""CLAIM of an agent that has another identity, or containers."""
_STATUS_TEXT = {
    STATUS_REFUSED: "refused (wrong sandbox or token)",
    STATUS_UNCLAIMED: "it has not been claimed since its boot",
    STATUS_CLAIMED: "it has another identity or runs containers already",
}


class PrefaceRefused(ProtocolError):
    """The connection must be closed, after sending `reply` (empty on the host's side)."""

    def __init__(self, text: str, reply: bytes = b"") -> None:
        self.reply = reply
        super().__init__(text)


def _proof(token: bytes, role: bytes, first: bytes, second: bytes, sandbox: bytes) -> bytes:
    return hmac.digest(token, role + first + second + sandbox, "sha256")


class HostPreface:
    """The host's side. `nonce` is NONCE_LEN random bytes, new for each connection."""

    def __init__(self, sandbox_id: str, token: bytes, claim: bool, *, nonce: bytes) -> None:
        self._sandbox = bytes.fromhex(sandbox_id)
        if len(self._sandbox) != 32 or len(token) != TOKEN_LEN or len(nonce) != NONCE_LEN:
            raise ValueError("sandbox id, token and nonce are 32 bytes each")
        self._token, self._claim, self._nonce = token, claim, nonce
        self._buffer = bytearray()
        self._answered = self.done = False

    def start(self) -> bytes:
        """What the host sends first."""
        kind = KIND_CLAIM if self._claim else KIND_AUTH
        hello = MAGIC + bytes((VERSION, kind)) + self._sandbox + self._nonce
        return hello + self._token if self._claim else hello

    @property
    def trailing(self) -> bytes:
        """What came after the preface; meaningful once `done`."""
        return bytes(self._buffer) if self.done else b""

    def feed(self, data: bytes) -> bytes:
        """Take bytes of the agent; returns bytes to send. Raises PrefaceRefused."""
        self._buffer += data
        if self.done or not self._buffer:
            return b""
        self._check_status()
        if not self._answered:
            if len(self._buffer) < _ANSWER_LEN:
                return b""
            agent_nonce = bytes(self._buffer[1 : 1 + NONCE_LEN])
            proof = bytes(self._buffer[1 + NONCE_LEN : _ANSWER_LEN])
            del self._buffer[:_ANSWER_LEN]
            expected = _proof(self._token, b"agent", self._nonce, agent_nonce, self._sandbox)
            if not hmac.compare_digest(proof, expected):
                raise PrefaceRefused("what answers is not this sandbox's agent: its proof is wrong")
            self._answered = True
            reply = _proof(self._token, b"host", agent_nonce, self._nonce, self._sandbox)
            if self._buffer:
                raise PrefaceRefused("the agent spoke out of turn in the preface")
            return reply
        del self._buffer[:1]
        self.done = True
        return b""

    def _check_status(self) -> None:
        status = self._buffer[0]
        if status != STATUS_OK:
            raise PrefaceRefused(f"the agent refused: {_STATUS_TEXT.get(status, f'status {status}')}")


@dataclass
class Identity:
    """Who the agent is: set by the first CLAIM of a boot, kept in memory only."""

    sandbox: bytes = b""
    token: bytes = b""
    claimable: Callable[[], bool] = lambda: True
    """False once a container exists: then only the known identity may CLAIM again."""

    def check(self, sandbox: bytes, token: bytes | None) -> int:
        """The status for a hello. `token` is None for AUTH."""
        if token is None:
            if not self.token:
                return STATUS_UNCLAIMED
            return STATUS_OK if hmac.compare_digest(sandbox, self.sandbox) else STATUS_REFUSED
        if self.token:
            same = hmac.compare_digest(sandbox + token, self.sandbox + self.token)
            return STATUS_OK if same else STATUS_CLAIMED
        return STATUS_OK if self.claimable() else STATUS_CLAIMED


class AgentPreface:
    """The agent's side of one connection. `nonce` as for the host."""

    def __init__(self, identity: Identity, *, nonce: bytes) -> None:
        if len(nonce) != NONCE_LEN:
            raise ValueError("the nonce is 32 bytes")
        self._identity, self._nonce = identity, nonce
        self._buffer = bytearray()
        self._sandbox = self._token = self._host_nonce = b""
        self._claim = self.done = False

    @property
    def trailing(self) -> bytes:
        """What came after the preface; meaningful once `done`."""
        return bytes(self._buffer) if self.done else b""

    def feed(self, data: bytes) -> bytes:
        """Take bytes of the host; returns bytes to send. Raises PrefaceRefused with a last reply."""
        self._buffer += data
        if self.done:
            return b""
        return self._finish() if self._host_nonce else self._hello()

    def _hello(self) -> bytes:
        buffer = self._buffer
        if not (MAGIC + bytes((VERSION,))).startswith(buffer[:5]):
            raise PrefaceRefused("not a preface, or of another version", bytes((STATUS_REFUSED,)))
        if len(buffer) < _HELLO_LEN:
            return b""
        kind = buffer[5]
        if kind not in (KIND_CLAIM, KIND_AUTH):
            raise PrefaceRefused(f"preface of unknown kind {kind}", bytes((STATUS_REFUSED,)))
        length = _HELLO_LEN + (TOKEN_LEN if kind == KIND_CLAIM else 0)
        if len(buffer) < length:
            return b""
        hello = bytes(buffer[:length])
        del buffer[:length]
        self._sandbox, host_nonce, token = hello[6:38], hello[38:_HELLO_LEN], hello[_HELLO_LEN:]
        status = self._identity.check(self._sandbox, token if kind == KIND_CLAIM else None)
        if status != STATUS_OK:
            raise PrefaceRefused("wrong identity", bytes((status,)))
        self._claim, self._host_nonce = kind == KIND_CLAIM, host_nonce
        self._token = token or self._identity.token
        proof = _proof(self._token, b"agent", host_nonce, self._nonce, self._sandbox)
        return bytes((STATUS_OK,)) + self._nonce + proof

    def _finish(self) -> bytes:
        if len(self._buffer) < _PROOF_LEN:
            return b""
        proof = bytes(self._buffer[:_PROOF_LEN])
        del self._buffer[:_PROOF_LEN]
        expected = _proof(self._token, b"host", self._nonce, self._host_nonce, self._sandbox)
        if not hmac.compare_digest(proof, expected):
            raise PrefaceRefused("the host's proof is wrong", bytes((STATUS_REFUSED,)))
        if self._claim:
            # Looked at again: another connection may have claimed since the hello.
            status = self._identity.check(self._sandbox, self._token)
            if status != STATUS_OK:
                raise PrefaceRefused("claimed by another connection", bytes((status,)))
            self._identity.sandbox, self._identity.token = self._sandbox, self._token
        self.done = True
        return bytes((STATUS_OK,))
