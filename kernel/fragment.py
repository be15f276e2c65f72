"""Reading a kernel configuration fragment, and comparing it with what Kconfig made of it; no side effects."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

_SET = re.compile(r"CONFIG_(\w+)=(y|-?\d+|0x[0-9a-fA-F]+|\"[^\"]*\")")
_UNSET = re.compile(r"# CONFIG_(\w+) is not set")

# Options that Kconfig may refuse, each with the reason why that is fine. Empty on purpose.
EXCEPTIONS: dict[str, str] = {}


class FragmentError(ValueError):
    """A line of the fragment is malformed, repeats or contradicts another one."""


@dataclasses.dataclass(frozen=True)
class Fragment:
    """The options asked for: name without CONFIG_ -> value as written, or None for "must stay off"."""

    options: dict[str, str | None]

    @classmethod
    def parse(cls, text: str) -> Fragment:
        """Read a fragment. Raises FragmentError naming the line number."""
        options: dict[str, str | None] = {}
        for number, line in enumerate(text.splitlines(), 1):
            value: str | None
            if match := _SET.fullmatch(line):
                name, value = match.group(1), match.group(2)
            elif match := _UNSET.fullmatch(line):
                name, value = match.group(1), None
            elif not line or (line.startswith("#") and not line.startswith("# CONFIG_")):
                continue
            else:
                raise FragmentError(f"line {number}: {line!r} is neither an option nor a comment")
            if name in options:
                raise FragmentError(f"line {number}: {name} is named twice")
            options[name] = value
        return cls(options)

    @classmethod
    def read(cls, path: Path) -> Fragment:
        """Read the fragment in a file."""
        return cls.parse(path.read_text())

    def lines(self) -> list[str]:
        """The options alone, sorted: comments and order do not change the kernel."""
        return sorted(f"{name}={'n' if value is None else value}" for name, value in self.options.items())


def read_config(path: Path) -> dict[str, str]:
    """The options that are set in a complete .config."""
    return {m.group(1): m.group(2) for m in map(_SET.fullmatch, path.read_text().splitlines()) if m}


def lost_options(asked: Fragment, got: dict[str, str]) -> list[str]:
    """One line per option that is not as asked for; the exceptions left out."""
    return [
        f"{name}: asked for {value or 'off'}, is {got.get(name, 'off')}"
        for name, value in sorted(asked.options.items())
        if got.get(name) != value and name not in EXCEPTIONS
    ]
