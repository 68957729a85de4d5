"""Whether a second engine fits beside the first, and what share of the card it is told."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planning_cases import plan, said

from qwen3emb_launch.planning.beside import FRACTION, one_more
from qwen3emb_launch.planning.memory import CUDA_CONTEXT, LOADER, kv_bytes_per_token


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("name", ["h100", "a100-80g", "l40s"])
def test_one_more_finds_its_tokens(name: str, replicas: int) -> None:
    """Beside those that run, the new engine's share of the rest holds weights and tokens as planned."""
    made = plan(name, "0.6b", overrides={"replicas": str(replicas)})
    assert made.memory is not None
    assert made.gpu is not None
    free = made.gpu.free_bytes - made.memory.needed_bytes
    argv, why = one_more(made, free)
    assert argv is not None, why
    share = float(said(replace(made, argv=argv), FRACTION)[0])
    cell = kv_bytes_per_token(made.model.shape, made.setting("kv_cache_dtype"), "bfloat16")
    static = made.memory.terms["weights"] + LOADER + made.setting("max_total_tokens") * cell
    assert share * (free - CUDA_CONTEXT) >= static
    assert [w for w in argv if w != f"{share:g}"] == [w for w in made.argv if w not in said(made, FRACTION)]
    assert "GB" in why


def test_no_room_is_said_with_the_sum() -> None:
    """Too little memory, too little for what the engine counts, or nobody knows: no command, and why."""
    made = plan("rtx4090", "4b")
    assert one_more(made, made.gpu.free_bytes - made.memory.needed_bytes)[0] is None
    assert one_more(made, None) == (None, "nobody knows how much memory is free")
    counted = plan("h100", "4b")
    one = counted.memory.needed_bytes
    argv, why = one_more(counted, one + 1_000_000)
    assert argv is None
    assert "counts" in why


def test_a_cpu_engine_is_started_as_it_is() -> None:
    """On the CPU only the room is looked at."""
    made = plan("demo", "demo", ram_bytes=16_000_000_000)
    assert one_more(made, 8_000_000_000)[0] == made.argv
    assert one_more(made, 1_000_000_000)[0] is None


def test_one_more_leaves_room_for_others_unless_a_share_was_given() -> None:
    """The second engine is told as generous a share as the first, of what is left; a given one stays what is needed."""
    made = plan("h100", "0.6b")
    free = made.gpu.free_bytes - made.memory.needed_bytes
    argv, _ = one_more(made, free)
    assert said(replace(made, argv=argv), FRACTION) == ["0.98"]
    pooled = plan("h100:pooled", "0.6b")
    argv, _ = one_more(pooled, free)
    assert 0.9 < float(said(replace(pooled, argv=argv), FRACTION)[0]) <= 0.95
    given = plan("h100", "0.6b", overrides={"mem_fraction_static": "0.3", "max_total_tokens": "40000"})
    argv, _ = one_more(given, free)
    assert float(said(replace(given, argv=argv), FRACTION)[0]) < 0.3
