"""What is printed: one row per figure, each against its budget."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_START = time.monotonic()


@dataclass(frozen=True)
class Figure:
    """A measured value. `at_least`: the budget is a lower bound. Without a budget it is told for its own sake."""

    what: str
    value: float
    unit: str
    budget: float | None = None
    at_least: bool = False
    note: str = ""

    @property
    def share(self) -> float | None:
        """How much of the budget is used up; 1 is all of it, more is a miss."""
        if self.budget is None:
            return None
        return self.budget / self.value if self.at_least else self.value / self.budget

    @property
    def verdict(self) -> str:
        return "" if self.share is None else "within" if self.share <= 1 else "MISSED"

    def row(self) -> list[str]:
        limit = "" if self.budget is None else f"{'>=' if self.at_least else '<='} {number(self.budget)}"
        share = "" if self.share is None else f"{self.share:.2f}"
        return [self.what, f"{number(self.value)} {self.unit}", limit, share, self.verdict, self.note]


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    everything = [list(head), *map(list, rows)]
    widths = [max(len(row[column]) for row in everything) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in everything
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def spread(values: Sequence[float]) -> str:
    """Median, and the range around it."""
    return f"median {number(statistics.median(values))}, {number(min(values))} to {number(max(values))}"


def progress(text: str) -> None:
    print(f"[{time.monotonic() - _START:6.1f} s] {text}", file=sys.stderr, flush=True)
