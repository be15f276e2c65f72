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
        logging.getLogger("x").warning("told: %s", "a\tb\r\x1b]0;title\x07\x9b31m\u2028ä")
        try:
            raise ValueError("inner")
        except ValueError:
            logging.getLogger("x").exception("with a traceback")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    first, terminal, second, *traceback = capsys.readouterr().err.splitlines()
    assert first.endswith(r"daemon x: boot failed: one\n2026-01-01T00:00:00.000 I forged")
    assert terminal.endswith("told: a\tb" + r"\r\x1b]0;title\x07\x9b31m\u2028ä")
    assert second.endswith("with a traceback")
    assert traceback[-1] == "ValueError: inner"
