"""Whether one more engine of a plan fits beside those that run, and what it must be told then. Pure."""

from __future__ import annotations

import math

from qwen3emb_launch.argv import with_option
from qwen3emb_launch.facts import LaunchPlan
from qwen3emb_launch.planning.memory import CUDA_CONTEXT, gigabytes
from qwen3emb_launch.planning.sizing import LARGEST_SHARE

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
    share = plan.setting("mem_fraction_static")
    if plan.engine.flavour != "cuda" or share is None or FRACTION not in plan.argv:
        return plan.argv, there
    planned_on = (plan.memory.available_bytes or 0) - CUDA_CONTEXT
    static = share * planned_on - (plan.replicas - 1) * one
    if plan.setting("max_total_tokens") is None:
        static = one  # its pool fills what it is given: no more than the estimate
    needed = math.ceil(100 * static / max(1, free_bytes - CUDA_CONTEXT)) / 100
    if needed > LARGEST_SHARE:
        return None, f"{there}; the engine counts its tokens' memory besides, {gigabytes(static)} in all"
    return with_option(plan.argv, FRACTION, f"{needed:g}"), there
