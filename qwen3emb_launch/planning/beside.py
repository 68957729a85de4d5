"""Whether one more engine of a plan fits beside those that run, and what it must be told then. Pure."""

from __future__ import annotations

import math

from qwen3emb_launch.argv import with_option
from qwen3emb_launch.facts import LaunchPlan
from qwen3emb_launch.planning.memory import CUDA_CONTEXT, LOADER, gigabytes, kv_bytes_per_token
from qwen3emb_launch.planning.sizing import AFTER_THE_POOL, LARGEST_SHARE, roomy

FRACTION = "--mem-fraction-static"


def one_more(plan: LaunchPlan, free_bytes: int | None) -> tuple[tuple[str, ...] | None, str]:
    """The command of one more engine beside the plan's own, or None; and why, in words.

    `free_bytes` is what the card, or the machine for a CPU engine, has free now; None is unknown. An engine takes
    mem_fraction_static of what is free at its start, so that a smaller rest needs a larger share.
    """
    if plan.memory is None or free_bytes is None:
        return None, "nobody knows how much memory is free"
    one = plan.memory.needed_bytes // plan.replicas
    there = f"one more engine takes {gigabytes(one)}, and {gigabytes(free_bytes)} are free"
    if one > free_bytes:
        return None, there
    if plan.engine.flavour != "cuda" or FRACTION not in plan.argv:
        return plan.argv, there
    # A pool without a token count fills what it is given: no more than the estimate then.
    static = one if plan.setting("max_total_tokens") is None else _static(plan)
    free = free_bytes - CUDA_CONTEXT
    needed = math.ceil(100 * static / max(1, free)) / 100
    if needed > LARGEST_SHARE:
        return None, f"{there}; the engine counts its tokens' memory besides, {gigabytes(static)} in all"
    if not _given(plan):
        needed = max(needed, roomy(free, _spare(plan)))
    return with_option(plan.argv, FRACTION, f"{needed:g}"), there


def _static(plan: LaunchPlan) -> int:
    """Bytes that mem_fraction_static has to cover: weights and tokens, counted or allocated."""
    terms = plan.memory.terms if plan.memory else {}
    dtype, tp = plan.setting("dtype"), int(plan.setting("tp") or 1)
    cell = kv_bytes_per_token(plan.model.shape, plan.setting("kv_cache_dtype"), dtype, tp)
    return terms["weights"] + terms.get("unused lm_head", 0) + LOADER + int(plan.setting("max_total_tokens")) * cell


def _spare(plan: LaunchPlan) -> int | None:
    """What it takes after its pool; None where it has none."""
    if plan.setting("kv_pool") == "none" or not plan.memory:
        return None
    return sum(plan.memory.terms.get(name, 0) for name in AFTER_THE_POOL)


def _given(plan: LaunchPlan) -> bool:
    """Whether somebody said the share: then no more is asked for than is needed."""
    return any(s.key == "mem_fraction_static" and s.origin in ("profile", "env", "flag") for s in plan.settings)
