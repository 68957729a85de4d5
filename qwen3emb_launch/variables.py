"""The environment variables that mean something to this program, so that a mistyped one does not pass in silence."""

from __future__ import annotations

from collections.abc import Iterable

from qwen3emb_launch.errors import nearest

PREFIX = "QWEN3EMB_"
# Settings are judged by the planner, by name and value; the engine plugin has a switch a part; tests have theirs.
OPEN = ("QWEN3EMB_SET_", "QWEN3EMB_PLUGIN_", "QWEN3EMB_TEST_")
KNOWN = frozenset(
    {
        "QWEN3EMB_CACHE_DIR",
        "QWEN3EMB_CONFIG_DIR",
        "QWEN3EMB_DATA_DIR",
        "QWEN3EMB_STATE_DIR",
        "QWEN3EMB_GATEWAY_API_KEYS",
        "QWEN3EMB_UPSTREAM_API_KEY",
        "QWEN3EMB_PLUGIN",
    }
)


def mistaken(names: Iterable[str]) -> list[str]:
    """A sentence for each variable that carries our prefix and is none of ours, with the nearest one that is."""
    strange = sorted(n for n in names if n.startswith(PREFIX) and n not in KNOWN and not n.startswith(OPEN))
    return [f"{name} means nothing to qwen3emb{_meant(name)}" for name in strange]


def _meant(name: str) -> str:
    guess = nearest(name, {*KNOWN, "QWEN3EMB_SET_"}, cutoff=0.75)
    if guess == "QWEN3EMB_SET_":
        guess += "<setting>"
    return f": did you mean {guess}?" if guess else ""
