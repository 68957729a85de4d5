"""What a new engine has to show before an upgrade gives it traffic: `verify`'s checks, and the old one's vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from qwen3emb_launch.errors import CheckFailedError

if TYPE_CHECKING:
    from qwen3emb_launch.facts import LaunchPlan
    from qwen3emb_launch.state import Instance, InstanceRecord
    from qwen3emb_launch.up.control import Candidate
    from qwen3emb_launch.verify.diff import Difference
    from qwen3emb_launch.verify.reference import ReferenceSet
    from qwen3emb_launch.verify.runner import Request
    from qwen3emb_launch.verify.tolerance import Precision

Level = Literal["quick", "full"]


class Comparison:
    """Judges each candidate: the checks of a level, then its vectors beside those of the engine it is to replace.

    The old vectors are asked for when this is made, while the old engine surely serves.
    """

    def __init__(
        self,
        instance: Instance,
        record: InstanceRecord,
        plans: tuple[LaunchPlan, LaunchPlan],
        level: Level,
        accept_close: bool,
        say: Callable[[str], None],
    ) -> None:
        old, new = plans
        self.verdict = ""
        self.cosine: float | None = None
        self._plan, self._level, self._accept_close, self._say = new, level, accept_close, say
        self._before = vectors_at(record.engine_url, instance.engine_api_key(), record.served_model_name, old)

    def __call__(self, candidate: Candidate) -> None:
        """Raises CheckFailedError `verify_failed` or `other_vectors`, NetworkError when it does not answer."""
        self._verify(candidate)
        found = self._difference(candidate)
        cosine = found.cosine.get("min")
        self._say(f"{candidate.unit}: vectors {found.verdict}: {found.reason}")
        if not found.may_share or (found.verdict != "same" and not self._accept_close):
            error = CheckFailedError(
                "other_vectors",
                f"the new engine's vectors are not those of the old one: {found.reason}",
                "the old one serves on; an index built with it would have to be built again"
                + ("" if not found.may_share else ", or say --accept-close"),
            )
            error.result = found
            raise error
        self.verdict = found.verdict if self.verdict in ("", "same") else self.verdict
        self.cosine = cosine if self.cosine is None or cosine is None else min(self.cosine, cosine)

    def _verify(self, candidate: Candidate) -> None:
        from qwen3emb_launch.verify.runner import verify

        report, _ = verify(
            _request(candidate.url, candidate.key, self._plan.served_model_name, self._plan, self._level)
        )
        if report.failures:
            faults = "; ".join(f"{c.title}: {c.seen}" for c in report.failures)
            error = CheckFailedError(
                "verify_failed", f"the new engine does not verify: {faults}", "the old one serves on"
            )
            error.result = report
            raise error
        self._say(f"{candidate.unit}: verified, {len(report.checks)} checks")

    def _difference(self, candidate: Candidate) -> Difference:
        from qwen3emb_launch.verify.diff import compare_sets

        before, old = self._before
        after, new = vectors_at(candidate.url, candidate.key, self._plan.served_model_name, self._plan)
        allowed = min(old.distance, new.distance) + max(old.distance, new.distance)
        return compare_sets(before, after, allowed)


def vectors_at(url: str, key: str | None, model: str, plan: LaunchPlan) -> tuple[ReferenceSet, Precision]:
    """What an engine embeds the comparison's texts as."""
    from qwen3emb_launch.verify.runner import vectors_for_diff

    return vectors_for_diff(_request(url, key, model, plan, "quick"))


def _request(url: str, key: str | None, model: str, plan: LaunchPlan, level: Level) -> Request:
    from qwen3emb_launch.paths import paths
    from qwen3emb_launch.planning import plan_to_dict
    from qwen3emb_launch.verify.identity import from_plan
    from qwen3emb_launch.verify.runner import Request
    from qwen3emb_launch.verify.session import Options

    options = Options(level, context=plan.context_length)
    known = from_plan(plan_to_dict(plan))
    return Request(url, options, paths().cache / "weights.json", model=model, api_key=key, known=known)
