"""Calls the plugins of a network: ADD in order, DEL in reverse, CHECK, STATUS (specification, section 2).

An Attachment goes in and out: the caller writes it down before ADD and at each plugin's answer, and DEL needs
nothing else.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from hyperpod.errors import NetworkError
from hyperpod.logs import printable
from hyperpod.model.network import Attachment, CniResult
from hyperpod.network.confdir import ConfDir
from hyperpod.network.process import Finished, outlived, run
from hyperpod.spec.cni import (
    Conflist,
    Plugin,
    decode,
    parse_conflist,
    parse_error,
    parse_result,
    plugin_input,
)

log = logging.getLogger(__name__)

STATUS_TIMEOUT = 5.0
_OURS = ("CNI_", "HYPERPOD_", "NOTIFY_")
"""Variables of our environment that are not handed on."""


class Cni:
    """`timeout`: seconds for one plugin. `notes`: a volatile folder, for what a DEL's successor has to know."""

    def __init__(self, conf: ConfDir, timeout: float, notes: Path) -> None:
        self.conf, self.timeout, self.notes = conf, timeout, notes

    async def status(self) -> Conflist:
        """The network that a new pod would join, ready to be joined. Raises NetworkError with the reason."""
        network = self.conf.current()
        if network.supports("1.1.0"):
            for plugin in network.plugins:
                await self._call("STATUS", network, plugin, {}, timeout=STATUS_TIMEOUT)
        return network

    async def add(
        self, attachment: Attachment, keep: Callable[[Attachment], Awaitable[None]] | None = None
    ) -> tuple[Attachment, CniResult]:
        """Join; the attachment with its result. A failure leaves things behind: call `delete` then.

        `keep` is given the attachment with each plugin's result: when a later one fails, or we end, some plugins
        (firewall) remove nothing without."""
        network = _network(attachment)
        runtime = json.loads(attachment.runtime)
        result = CniResult()
        previous: dict[str, Any] | None = None
        for number, plugin in enumerate(network.plugins, 1):
            done = await self._call(
                "ADD", network, plugin, _variables(attachment), previous=previous, runtime=runtime
            )
            what = _name("ADD", network, plugin)
            if not done.stdout.strip():
                raise NetworkError(f"{what} printed no result")
            previous = decode(what, done.stdout)
            result = parse_result(what, previous)
            attachment = attachment.model_copy(update={"result": json.dumps(previous), "added": number})
            if keep is not None:
                await keep(attachment)
        return attachment, result

    async def delete(self, attachment: Attachment, *, netns: str) -> None:
        """Leave; every plugin in reverse order, also when ADD was cut short. `netns` is empty when it is gone.

        The first failure ends it, for a later plugin may need what is still there. Raises NetworkError.

        A plugin that is at it goes on when we end, and the next DEL waits for it: of half a DEL the other half is
        not always found again (bridge has the rules of ipMasq by the addresses of what it removes first).
        """
        with contextlib.suppress(OSError):  # without a note it works as well, if nothing goes wrong
            self.notes.mkdir(parents=True, exist_ok=True, mode=0o700)
        note = self.notes / attachment.container_id[:12]
        await outlived(note, self.timeout)
        network = _network(attachment)
        variables = _variables(attachment) | {"CNI_NETNS": netns}
        # 0.3.x has no prevResult for DEL (section 2 of its specification)
        keep = attachment.result and network.supports("0.4.0")
        previous = json.loads(attachment.result) if keep else None
        runtime = json.loads(attachment.runtime)

        async def leave(network: Conflist, plugin: Plugin) -> None:
            await self._call("DEL", network, plugin, variables, previous=previous, runtime=runtime, note=note)

        for number, plugin in reversed([*enumerate(network.plugins)]):
            try:
                await leave(network, plugin)
            except NetworkError as exc:
                if number < attachment.added or (mended := self._mended(network)) is None:
                    raise
                log.warning("%s; so did its ADD, and the configuration was changed since", exc)
                for other in mended.plugins:
                    if (mended.name, other.type) == (network.name, plugin.type):
                        await leave(mended, other)

    def _mended(self, network: Conflist) -> Conflist | None:
        """What pods join now, when that is not what this one was to join.

        One mistake in a plugin's configuration may fail both ADD and DEL, and nobody can mend our copy of it."""
        with contextlib.suppress(NetworkError):
            if (now := self.conf.current()).text != network.text:
                return now
        return None

    async def check(self, attachment: Attachment) -> None:
        """Whether the network is as ADD left it. Raises NetworkError that says what is not."""
        network = _network(attachment)
        if network.disable_check or not network.supports("0.4.0") or not attachment.result:
            return
        previous, runtime = json.loads(attachment.result), json.loads(attachment.runtime)
        for plugin in network.plugins:
            await self._call(
                "CHECK", network, plugin, _variables(attachment), previous=previous, runtime=runtime
            )

    async def _call(
        self,
        command: str,
        network: Conflist,
        plugin: Plugin,
        variables: Mapping[str, str],
        *,
        previous: Mapping[str, Any] | None = None,
        runtime: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        note: Path | None = None,
    ) -> Finished:
        what = _name(command, network, plugin)
        program = self.conf.program(plugin.type, network.source)
        done = await run(
            # A daemon that is killed takes its plugin along: the next one's DEL must not meet a running ADD, and
            # undoes the half of one.
            [program] if note else ["setpriv", "--pdeathsig", "KILL", program],
            what=what,
            stdin=plugin_input(network, plugin, previous, runtime or {}),
            env=self._environment() | {"CNI_COMMAND": command, **variables},
            timeout=timeout or self.timeout,
            note=note,
        )
        if done.stderr:
            log.debug("%s: %s", what, printable(done.stderr, 1000))
        if done.code < 0:
            raise NetworkError(f"{what} was killed by signal {-done.code}{_words(done)}")
        if done.code:
            raise NetworkError(f"{what} failed{_words(done) or f' with exit code {done.code}'}")
        return done

    def _environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(_OURS)}
        kept.setdefault("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        return kept | {"CNI_PATH": ":".join(map(str, self.conf.bin_dirs))}


def _network(attachment: Attachment) -> Conflist:
    return parse_conflist(attachment.source, attachment.conflist)


def _name(command: str, network: Conflist, plugin: Plugin) -> str:
    return f"CNI plugin {plugin.type} of network {network.name} ({command})"


def _variables(attachment: Attachment) -> dict[str, str]:
    return {
        "CNI_CONTAINERID": attachment.container_id,
        "CNI_NETNS": attachment.netns,
        "CNI_IFNAME": attachment.ifname,
        "CNI_ARGS": attachment.args,
    }


def _words(done: Finished) -> str:
    words = parse_error(done.stdout) or printable(done.stderr, 500).strip()
    return f": {words}" if words else ""
