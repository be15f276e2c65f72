"""What is logged cannot be forged by text that it quotes."""

from __future__ import annotations

import logging

import pytest

from hyperpod import logs


def test_a_quoted_newline_begins_no_event(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        logs.setup("info", "daemon")
        logging.getLogger("x").warning("boot failed: %s", "one\n2026-01-01T00:00:00.000 I forged")
        try:
            raise ValueError("inner")
        except ValueError:
            logging.getLogger("x").exception("with a traceback")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    first, second, *traceback = capsys.readouterr().err.splitlines()
    assert first.endswith(r"daemon x: boot failed: one\n2026-01-01T00:00:00.000 I forged")
    assert second.endswith("with a traceback")
    assert traceback[-1] == "ValueError: inner"
