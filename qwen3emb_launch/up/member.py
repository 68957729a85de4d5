"""One supervised process of an instance: an engine or the gateway, with its machine and its effects."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen3emb_launch.errors import LaunchError
from qwen3emb_launch.lifecycle import State
from qwen3emb_launch.state import UnitRecord, identify
from qwen3emb_launch.up.gateway_runner import GatewayRunner
from qwen3emb_launch.up.machine import Phase, Unit
from qwen3emb_launch.up.runner import EngineRunner


@dataclass(eq=False)
class Member:
    """What the supervisor knows of one process. `stage` is what its start is busy with, `error` why it failed.

    `asides` is what its log said of parts of the plugin that do not run, and somebody has been told.
    """

    name: str
    unit: Unit
    runner: EngineRunner | GatewayRunner
    reason: str = "starting"
    stage: str = ""
    asides: set[str] = field(default_factory=set)
    error: LaunchError | None = None
    held_back: bool = False  # no traffic, whatever its state: being replaced, or not yet approved
    checked_through_gateway: bool = False

    @property
    def is_engine(self) -> bool:
        """Whether it embeds; else it is the gateway."""
        return isinstance(self.runner, EngineRunner)

    @property
    def ended(self) -> bool:
        """Whether nothing of it is left."""
        return self.unit.phase is Phase.ENDED

    @property
    def wants_traffic(self) -> bool:
        """Whether the gateway should have it: while it serves, and while the check goes through the gateway."""
        phase = self.unit.phase
        return not self.held_back and (
            phase is Phase.SERVING or (phase is Phase.CHECKING and self.checked_through_gateway)
        )

    def record(self) -> UnitRecord:
        """As instance.json keeps it."""
        runner, pid = self.runner, self.unit.pid
        return UnitRecord(
            name=self.name,
            kind="engine" if self.is_engine else "gateway",
            state=self.unit.state,
            reason=self.reason,
            process=identify(pid) if pid and self.unit.state not in (State.STOPPED, State.FAILED) else None,
            url=runner.url,
            restarts=self.unit.restart_count,
            log=str(runner.log) if runner.log else None,
            keys=runner.keys_file.name if isinstance(runner, EngineRunner) else None,
        )
