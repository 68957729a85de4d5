"""What a unit of the tests runs: the supervisor around the fake engine, told by FAKE_ENGINE, in quick deadlines.

`python notified_service.py NAME PORT`; prints nothing. The watchdog's period is the unit's, however short.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace

from supervised import EAGER, QUICK, fake_plan

from qwen3emb_launch import notify, state
from qwen3emb_launch.cli.up_view import UpView
from qwen3emb_launch.console import Console
from qwen3emb_launch.notify import service_manager
from qwen3emb_launch.up.signals import stop_on_signals
from qwen3emb_launch.up.supervisor import Supervisor


def main() -> int:
    name, port = sys.argv[1], int(sys.argv[2])
    notify.WATCHDOG_MARGIN = 0.0  # the shortest period that QUICK allows: 8 s
    plan = fake_plan(name=name, port=port, engine_port=port, deadlines=QUICK, restart=EAGER)
    argv = (*plan.argv[:4], "--port", str(port), "--is-embedding")
    env = {"FAKE_ENGINE": os.environ.get("FAKE_ENGINE", plan.env["FAKE_ENGINE"])}
    manager = service_manager(plan.deadlines)
    assert manager is not None
    with UpView(Console("up"), behind=True) as view:
        supervisor = Supervisor(
            replace(plan, argv=argv, env=env), state.claim(name), listeners=[view, manager], pulse=manager.pulse
        )
        with stop_on_signals(supervisor.stop):
            outcome = supervisor.run()
    return int(outcome.error.exit) if outcome.error else 0


if __name__ == "__main__":
    raise SystemExit(main())
