"""Where an engine's smoke test goes."""

from __future__ import annotations

from qwen3emb_launch.up.events import Check
from qwen3emb_launch.up.machine import Phase
from qwen3emb_launch.up.member import Member
from qwen3emb_launch.up.overall import SERVING
from qwen3emb_launch.up.runner import EngineRunner


class Checks:
    """Smoke tests on their way: the first one through the gateway, so that users' whole way is proved; later ones to
    the engine itself. Of several the gateway would ask any, and a restarted one would have to answer everything that
    waited meanwhile, before it is proved and while its test waits in that queue."""

    def __init__(self, gateway: Member | None) -> None:
        self._gateway = gateway
        self._waiting: list[tuple[Member, Check]] = []  # for the gateway to listen

    def begin(self, member: Member, action: Check, *, first: bool) -> None:
        """Test one engine now, or as soon as the gateway listens. `first`: none has had traffic yet."""
        assert isinstance(member.runner, EngineRunner)  # noqa: S101 - a gateway's unit has no check
        member.checked_through_gateway = self._gateway is not None and first
        if member.checked_through_gateway:
            self._waiting.append((member, action))
            self.gateway_moved()
        else:
            member.runner.begin_check(action, member.runner.door)

    def gateway_moved(self) -> None:
        """The gateway is in another state: begin what waited for it."""
        if self._gateway is None or self._gateway.unit.state not in SERVING:
            return
        waiting, self._waiting = self._waiting, []
        for member, action in waiting:
            if member.unit.start == action.start and member.unit.phase is Phase.CHECKING:
                assert isinstance(member.runner, EngineRunner)  # noqa: S101 - only engines are checked
                member.runner.begin_check(action, self._gateway.runner.door)
