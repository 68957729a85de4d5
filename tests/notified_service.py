"""What a unit of the tests runs: the supervisor around the fake engine, told by FAKE_ENGINE, in quick deadlines.

`python notified_service.py NAME PORT [gateway]`; prints nothing. The watchdog's period is the unit's, however short.
GATEWAY_WORKERS is how many the gateway has, 0 for no gateway.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace

from supervised import EAGER, QUICK, fake_plan, gateway_plan

from qwen3emb_launch import notify, state
from qwen3emb_launch.cli.supervise import gateway_spec
from qwen3emb_launch.cli.up_view import UpView
from qwen3emb_launch.console import Console
from qwen3emb_launch.listening import take_kept
from qwen3emb_launch.notify import service_manager
from qwen3emb_launch.up.signals import stop_on_signals
from qwen3emb_launch.up.supervisor import Supervisor


def main() -> int:
    name, port = sys.argv[1], int(sys.argv[2])
    notify.WATCHDOG_MARGIN = 0.0  # the shortest period that QUICK allows: 8 s
    workers = int(os.environ.pop("GATEWAY_WORKERS", "1"))
    if "gateway" in sys.argv and workers:
        plan = gateway_plan(name=name, deadlines=QUICK, restart=EAGER)
        plan = replace(plan, port=port, gateway={**plan.gateway, "port": port, "workers": workers})
    else:
        plan = fake_plan(name=name, port=port, engine_port=port, deadlines=QUICK, restart=EAGER)
        argv = (*plan.argv[:4], "--port", str(port), "--is-embedding")
        plan = replace(plan, argv=argv, env={"FAKE_ENGINE": os.environ.get("FAKE_ENGINE", plan.env["FAKE_ENGINE"])})
    kept = take_kept(os.environ)
    manager = service_manager(plan.deadlines)
    assert manager is not None
    with UpView(Console("up"), behind=True) as view:
        supervisor = Supervisor(
            plan,
            state.claim(name),
            gateway=gateway_spec(plan, kept, manager),
            listeners=[view, manager],
            pulse=manager.pulse,
        )
        with stop_on_signals(supervisor.stop):
            outcome = supervisor.run()
    return int(outcome.error.exit) if outcome.error else 0


if __name__ == "__main__":
    raise SystemExit(main())
