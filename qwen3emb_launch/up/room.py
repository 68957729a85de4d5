"""How much memory a plan's device has free at this moment."""

from __future__ import annotations

from pathlib import Path

from qwen3emb_launch.facts import LaunchPlan

MEMINFO = Path("/proc/meminfo")


def free_bytes(plan: LaunchPlan) -> int | None:
    """Free bytes of the plan's card, or of this machine for a CPU engine. None where that cannot be known."""
    if plan.gpu is None:
        return available_memory()
    from qwen3emb_launch import gpu

    return next((card.free_bytes for card in gpu.inventory() if card.uuid == plan.gpu.uuid), None)


def available_memory(meminfo: Path = MEMINFO) -> int | None:
    """What the kernel says can be had without swapping, in bytes."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = next((line.split() for line in lines if line.startswith("MemAvailable:")), None)
    return int(found[1]) * 1024 if found else None
