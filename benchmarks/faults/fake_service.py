"""The supervisor around the fake engine, as a service manager starts it: `fake_service.py NAME PLAN [OPTION...]`."""

from __future__ import annotations

import sys
from pathlib import Path

from qwen3emb_launch import state
from qwen3emb_launch.errors import LaunchError
from qwen3emb_launch.up.detached import become


def main() -> int:
    """Claim the name, lay the plan down, become the supervisor. Exit status 3 when another one holds the name."""
    name, plan = sys.argv[1], Path(sys.argv[2])
    try:
        claim = state.claim(name)
        state.write_private(claim.plan, plan.read_text(encoding="utf-8"))
        become(claim, ["--json", *sys.argv[3:]])
    except LaunchError as error:
        print(f"{error.code}: {error.message}", file=sys.stderr)
        return int(error.exit)


if __name__ == "__main__":
    raise SystemExit(main())
