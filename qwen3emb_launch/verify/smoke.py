"""The quick level as a child process, started before the engine is ready: `python -m qwen3emb_launch.verify.smoke`.

Reads one JSON line, `{"base_url", "model", "max_dims", "context_length", "key", "plan"}` (all but the first may be
missing; `plan` is the plan's file), and prints one, `{"faults": [sentence, ...], "warnings": [...], "report": {...}}`.
Libraries are loaded while the order is awaited, so that the check itself takes what its requests take. End of input
instead of an order ends it.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from qwen3emb_launch.engine_process.guard import die_with_parent
from qwen3emb_launch.errors import LaunchError
from qwen3emb_launch.paths import paths
from qwen3emb_launch.results import plain
from qwen3emb_launch.verify import noise
from qwen3emb_launch.verify.contact import Contact, Misanswer
from qwen3emb_launch.verify.identity import from_plan
from qwen3emb_launch.verify.runner import Request, verify
from qwen3emb_launch.verify.session import Options


def main() -> int:
    """Load, wait, check, answer."""
    die_with_parent()
    warm()
    line = sys.stdin.readline()
    if not line:
        return 0
    sys.stdout.write(json.dumps(answer(json.loads(line)), ensure_ascii=False) + "\n")
    sys.stdout.flush()
    os._exit(0)  # the supervisor waits for the end of it, and taking an interpreter down takes 40 ms


def warm() -> None:
    """Have both clients load what they load at their first request, at a port of our own where nobody listens."""
    gc.disable()  # a process of one check has nothing to collect; walking what it loads takes a tenth of loading it
    import numpy as np  # noqa: F401 - the openai client reads base64 with it

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        contact = Contact(f"http://127.0.0.1:{taken.getsockname()[1]}/v1")
        contact.model = "none"
        for ask in (contact.embed, contact.openai_vector):
            with suppress(Misanswer):
                ask("nobody answers")
        contact.close()


def answer(order: dict[str, Any]) -> dict[str, Any]:
    """What is wrong with the endpoint, a sentence a fault, what to know of it all the same, and the whole report."""
    plan = json.loads(Path(order["plan"]).read_text(encoding="utf-8")) if order.get("plan") else {}
    known = from_plan(plan)
    request = Request(
        base_url=order["base_url"],
        options=Options("quick", context=order.get("context_length"), openai_client=True),
        memory=paths().cache / "weights.json",
        model=order.get("model"),
        api_key=order.get("key"),
        known=known,
    )
    try:
        report, _ = verify(request)
    except LaunchError as error:
        return {"faults": [error.message], "warnings": [], "report": None}
    faults = [f"{c.title}: {c.seen}: {c.cause}" for c in report.failures]
    dims = order.get("max_dims")
    if dims and report.width and report.width != dims:
        faults.append(f"{report.width} numbers a vector, the plan says {dims}")
    return {"faults": faults, "warnings": noise.warnings(report.checks), "report": plain(report)}


if __name__ == "__main__":
    sys.exit(main())
