"""A failed instance as an error: what happened, the engine's own last words, what to do next."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from qwen3emb_launch.engine_process.log_tail import last_lines
from qwen3emb_launch.errors import EngineFailedError, LaunchError
from qwen3emb_launch.results import plain
from qwen3emb_launch.up.diagnosis import diagnose
from qwen3emb_launch.up.events import Cause, Fault

DIAGNOSED_LINES = 400
SHOWN_LINES = 20

# Cause -> code, where the log says nothing more telling.
CODES = {
    Cause.EXIT: "engine_died",
    Cause.DEADLINE: "engine_not_ready",
    Cause.ANSWERS: "engine_wrong_answer",
    Cause.CHECK: "smoke_test_failed",
    Cause.LIVENESS: "engine_unresponsive",
    Cause.STUCK: "engine_unkillable",
}


class Evidence(Protocol):
    """What is known of the last start. `kind` is engine, engine-2 or gateway."""

    kind: str
    log: Path | None
    status: int | None
    unfit: LaunchError | None


def failure(fault: Fault, evidence: Evidence, stage: str) -> LaunchError:
    """The error for a unit that failed; `stage` is what its start was busy with last."""
    if evidence.unfit:
        return evidence.unfit
    lines = last_lines(evidence.log, DIAGNOSED_LINES) if evidence.log else []
    found = None
    if fault.cause in (Cause.EXIT, Cause.DEADLINE, Cause.LIVENESS):
        found = diagnose(lines, evidence.status if fault.cause is Cause.EXIT else None)
    message = fault.reason
    if found:
        message = f"{message}: {found.message}"
    elif fault.cause is Cause.DEADLINE and stage:
        message = f"{message}; it was busy with: {stage}"
    error = EngineFailedError(
        found.code if found else CODES[fault.cause].replace("engine", evidence.kind.partition("-")[0]),
        message,
        found.hint if found else HINTS[fault.cause],
        {"log": str(evidence.log) if evidence.log else None, "last_lines": lines[-SHOWN_LINES:]},
    )
    error.result = fault.report
    return error


def kept(error: LaunchError) -> dict[str, Any]:
    """The error as the instance's record keeps it, a failed smoke test's report included: `up --detach` shows it."""
    found = error.to_dict() | {"exit": int(error.exit)}
    return found | {"result": plain(error.result)} if error.result is not None else found


HINTS = {
    Cause.EXIT: "qwen3emb logs",
    Cause.DEADLINE: "qwen3emb logs; a longer deadline: --set deadlines.start=1800",
    Cause.ANSWERS: "is it an embedding model? qwen3emb profiles explain; qwen3emb logs",
    Cause.CHECK: "qwen3emb verify says more; --no-verify serves all the same",
    Cause.LIVENESS: "qwen3emb logs",
    Cause.STUCK: "a GPU driver holds on to them: see dmesg",
}
