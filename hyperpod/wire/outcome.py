"""How an exec or attach ended, as the error stream tells it: metav1.Status from v4 on, plain text before."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

MAX_MESSAGE = 4096


@dataclass(frozen=True)
class Outcome:
    """`exit_code` of the process, None when there is none: then `message` says why, empty for a good end."""

    exit_code: int | None = None
    message: str = ""

    @property
    def good(self) -> bool:
        return not self.exit_code and not self.message


def as_status(outcome: Outcome) -> bytes:
    """The JSON of a metav1.Status, as the kubelet's streaming library writes it."""
    status: dict[str, Any] = {"metadata": {}, "status": "Success" if outcome.good else "Failure"}
    if outcome.exit_code:
        code = outcome.exit_code
        status["message"] = f"command terminated with non-zero exit code: {code}"
        if outcome.message:
            status["message"] += f": {outcome.message[:MAX_MESSAGE]}"
        status["reason"] = "NonZeroExitCode"
        status["details"] = {"causes": [{"reason": "ExitCode", "message": str(code)}]}
    elif outcome.message:
        status["message"] = f"Internal error occurred: {outcome.message[:MAX_MESSAGE]}"
        status["reason"] = "InternalError"
        status["details"] = {"causes": [{"message": outcome.message[:MAX_MESSAGE]}]}
        status["code"] = 500
    return json.dumps(status, separators=(",", ":")).encode()


def as_text(outcome: Outcome) -> bytes:
    """Empty for a good end."""
    if outcome.exit_code:
        text = f"command terminated with non-zero exit code: {outcome.exit_code}"
        return (f"{text}: {outcome.message}" if outcome.message else text)[:MAX_MESSAGE].encode()
    return outcome.message[:MAX_MESSAGE].encode()
