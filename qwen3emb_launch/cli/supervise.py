"""The supervising process: `python -m qwen3emb_launch.cli.supervise NAME --lock-fd N`, started by `qwen3emb up`.

No command for users: `up` has planned everything, holds the instance's lock and hands it over. This process stays
small: it imports neither typer nor anything that planning needed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

from qwen3emb_launch import state
from qwen3emb_launch.cli.up_view import UpView
from qwen3emb_launch.console import Console, escape_what_the_locale_lacks
from qwen3emb_launch.engine_process.ports import let_go
from qwen3emb_launch.errors import Exit, InterruptedByUser, LaunchError
from qwen3emb_launch.facts import LaunchPlan
from qwen3emb_launch.lifecycle import State
from qwen3emb_launch.listening import take_kept
from qwen3emb_launch.notify import ServiceManager, service_manager
from qwen3emb_launch.planning.serialise import plan_from_dict
from qwen3emb_launch.up.control_server import ControlServer
from qwen3emb_launch.up.gateway_runner import GatewaySpec
from qwen3emb_launch.up.signals import stop_on_signals
from qwen3emb_launch.up.supervisor import Outcome, Supervisor

SMOKE = (sys.executable, "-P", "-m", "qwen3emb_launch.verify.smoke")
KEYS_VARIABLE = "QWEN3EMB_GATEWAY_API_KEYS"  # gateway.config's; importing that would double this process
GATEWAY = (sys.executable, "-P", "-m", "qwen3emb_launch", "gateway", "--json")


def main() -> int:
    """Supervise one instance to its end; the exit status says how it ended."""
    parser = argparse.ArgumentParser(prog="supervise")
    parser.add_argument("name")
    parser.add_argument("--lock-fd", type=int, required=True)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--behind", action="store_true")
    parser.add_argument("--no-verify", action="store_true")
    options = parser.parse_args()
    escape_what_the_locale_lacks()
    console = Console("up", options.json)
    view = UpView(console, behind=options.behind)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # `up` held it back
        kept = take_kept(os.environ)
        claim = state.adopt(options.name, options.lock_fd)
        plan = plan_from_dict(json.loads(claim.plan.read_text(encoding="utf-8")))
        with view:
            manager = service_manager(plan.deadlines)
            supervisor = Supervisor(
                plan,
                claim,
                check_argv=None if options.no_verify else SMOKE,
                gateway=gateway_spec(plan, kept, manager),
                listeners=[view, manager] if manager else [view],
                pulse=manager.pulse if manager else None,
            )
            with stop_on_signals(supervisor.stop), ControlServer(supervisor):
                outcome = supervisor.run()
    except LaunchError as error:
        view.failed(error)
        return int(error.exit)
    except KeyboardInterrupt:  # before the handlers were there
        view.failed(InterruptedByUser())
        return int(Exit.INTERRUPTED)
    return finish(view, outcome)


def gateway_spec(
    plan: LaunchPlan, kept: Sequence[socket.socket] = (), manager: ServiceManager | None = None
) -> GatewaySpec | None:
    """The plan's gateway as the supervisor runs it. `kept` sockets are from before; the manager keeps the new ones."""
    if plan.gateway is None:
        if kept:  # the engine itself is to listen there now
            drop = (lambda: manager.store(())) if manager else (lambda: None)
            with contextlib.suppress(LaunchError):  # its start says it
                let_go(kept, drop, plan.host, plan.port)
        return None

    def admin(path: str, method: str, route: str, body: dict[str, Any] | None = None, timeout: float = 60.0) -> Any:
        from qwen3emb_launch.gateway.admin_client import call

        return call(path, method, route, body, timeout)

    return GatewaySpec(
        argv=GATEWAY,
        settings=plan.gateway,
        base_url=plan.base_url,
        admin=admin,
        keys_variable=KEYS_VARIABLE,
        kept=tuple(kept),
        keep=manager.store if manager else None,
        secured=bool(plan.gateway.get("keys_file") or os.environ.get(KEYS_VARIABLE)),
    )


def finish(view: UpView, outcome: Outcome) -> int:
    """Say how it ended. A stop by SIGTERM after serving is what was asked for: 0, for service managers."""
    if outcome.error:
        if outcome.was_ready or not view.behind:  # else the command that waits tells it, from the record
            view.failed(outcome.error)
        return int(outcome.error.exit)
    if outcome.state is State.STOPPED and outcome.was_ready:
        return int(Exit.INTERRUPTED if outcome.stopped_by == "SIGINT" else Exit.OK)
    view.failed(InterruptedByUser(f"stopped by {outcome.stopped_by} before it was ready"))
    return int(Exit.INTERRUPTED)


if __name__ == "__main__":
    raise SystemExit(main())
