"""The planner's tables: memory arithmetic, combinations known to be bad, GPUs and their profiles."""

from __future__ import annotations

import pytest
from planning_cases import card, load, model, plan, shipped

from qwen3emb_launch import planning, recorded_flags
from qwen3emb_launch.argv import Option
from qwen3emb_launch.errors import InvalidInputError, UnfitError
from qwen3emb_launch.planning import known_bad, memory
from qwen3emb_launch.planning.known_bad import KNOWN_BAD, Combination

# Gigabytes of 1e9: model, weights in bfloat16, weights in fp8, unused lm_head. From the models' published shapes.
WEIGHTS = [("0.6b", 1.19, 0.75, 0.0), ("4b", 8.04, 4.41, 0.0), ("8b", 15.13, 8.19, 1.24)]


@pytest.mark.parametrize(("key", "wide", "narrow", "head"), WEIGHTS)
def test_weights(key: str, wide: float, narrow: float, head: float) -> None:
    """bfloat16 is the published file size; fp8 halves the layers' matrices and nothing else."""
    known = model(key)
    assert memory.weight_bytes(known, "bfloat16", "none") / 1e9 == pytest.approx(wide, abs=0.005)
    assert memory.weight_bytes(known, "bfloat16", "none") == pytest.approx(known.weight_bytes, rel=1e-4)
    assert memory.weight_bytes(known, "bfloat16", "fp8") / 1e9 == pytest.approx(narrow, abs=0.005)
    assert memory.head_bytes(known.shape, "bfloat16") / 1e9 == pytest.approx(head, abs=0.005)
    assert memory.weight_bytes(known, "float32", "none", tp=2) == memory.weight_bytes(known, "bfloat16", "none")


def test_pool_and_fraction_are_each_others_inverse() -> None:
    """The share asked for holds the tokens it was asked for, and a hundredth less does not."""
    weights, cell, free, tokens = 8_043_548_672, 147_456, 24_000_000_000, 40_000
    share = memory.fraction_for(weights, tokens, cell, free)
    assert memory.pool_tokens(int(free * share), weights, cell) >= tokens
    assert memory.pool_tokens(int(free * (share - 0.01)), weights, cell) < tokens
    assert memory.pool_tokens(0, weights, cell) == 0


def test_the_estimate_is_near_what_was_measured() -> None:
    """The 4B without a pool took 9.26 GB on an H100 under short texts, and 9.58 GB with prefill graphs."""
    terms = plan("h100").memory.terms
    short_texts = sum(terms.values()) - terms["activations"]
    assert 8.5e9 < short_texts < 9.6e9
    assert set(terms) == {"weights", "activations", "request table", "CUDA graphs", "CUDA context"}


def test_graphs_hold_the_tensors_of_the_largest() -> None:
    """Eleven sizes to 2,048 tokens of the 4B took 0.32 GB on an H100; without a size there is nothing."""
    shape, sizes = model("4b").shape, (32, 48, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048)
    assert memory.graph_bytes(shape, sizes, "bfloat16") == pytest.approx(0.32e9, rel=0.2)
    larger = memory.graph_bytes(shape, (*sizes[:-1], 4224), "bfloat16") - memory.graph_bytes(shape, sizes, "bfloat16")
    assert larger == memory.activation_bytes(shape, 4224 - 2048, "bfloat16")
    assert memory.graph_bytes(shape, (), "bfloat16") == 0


def test_fp8_weights_pass_through_full_width() -> None:
    """The engine loads as published and quantises then: a card that holds only the fp8 weights is refused."""
    tight = card("NVIDIA L4", 22.5, (8, 9), free=14)
    with pytest.raises(UnfitError) as caught:
        plan("l4:fp8", "8b", gpu=tight)
    assert "quantised" in caught.value.message


def combination(**change: object) -> Combination:
    base = {
        "version": "0.5.16",
        "flavour": "cuda",
        "capability": (9, 0),
        "settings": {"kv_pool": "none", "dtype": "bfloat16", "prefill_graphs": True, "attention_backend": "fa3"},
        "options": {},
        "model_path": "/models/Qwen3-Embedding-4B",
        "shape": model("4b").shape,
    }
    settings = {**base["settings"], **change.pop("settings", {})}
    return Combination(**{**base, "settings": settings, **change})


REFUSED = [
    ("tokenizer_workers_broken", {"settings": {"tokenizer_workers": 4}}, {"version": "0.5.23"}),
    ("prefill_graph_nan", {"version": "0.5.12"}, {"version": "0.5.14"}),
    ("full_batch_deadlock", {"version": "0.5.10.post1"}, {"version": "0.5.14"}),
    ("path_needs_embedding", {"version": "0.5.8", "model_path": "/m/tuned"}, {"model_path": "/m/My-Embedding"}),
    ("dimensions_ignored", {"version": "0.5.3"}, {"version": "0.5.5"}),
    ("cpu_release", {"version": "0.5.16", "flavour": "cpu", "capability": None}, {"version": "0.5.15.post1"}),
    ("cpu_release", {"version": "0.5.12.post1", "flavour": "cpu", "capability": None}, {"version": "0.5.13.post1"}),
    (
        "full_graph_without_a_text",
        {"settings": {"prefill_graph_backend": "full", "prefill_graph_requests": 1, "max_running_requests": 512}},
        {"settings": {"prefill_graph_backend": "full", "prefill_graph_requests": 2, "max_running_requests": 512}},
    ),
    (
        "full_graph_without_a_text",
        {"settings": {"prefill_graph_backend": "full", "prefill_graph_requests": 129, "max_running_requests": 1}},
        {"settings": {"prefill_graph_backend": "breakable", "max_running_requests": 1}},
    ),
    ("float16_nan", {"settings": {"dtype": "float16"}, "shape": model("8b").shape}, {"shape": model("4b").shape}),
    (
        "auto_truncate_drops_eos",
        {"options": {"--allow-auto-truncate": Option("--allow-auto-truncate")}},
        {"options": {}},
    ),
    ("no_tokenizer", {"options": {"--skip-tokenizer-init": Option("--skip-tokenizer-init")}}, {"options": {}}),
    (
        "fa3_needs_e4m3",
        {"settings": {"kv_pool": "full", "kv_cache_dtype": "fp8_e5m2"}},
        {"settings": {"kv_pool": "full", "kv_cache_dtype": "fp8_e4m3"}},
    ),
    (
        "fa3_fp8_needs_hopper",
        {"settings": {"kv_pool": "full", "kv_cache_dtype": "fp8_e4m3"}, "capability": (8, 9)},
        {"capability": (9, 0)},
    ),
    ("float32_attention", {"settings": {"dtype": "float32"}}, {"settings": {"dtype": "bfloat16"}}),
    (
        "no_pool_prefill_backend",
        {"options": {"--prefill-attention-backend": Option("--prefill-attention-backend", ("triton",))}},
        {"options": {"--prefill-attention-backend": Option("--prefill-attention-backend", ("fa3",))}},
    ),
    ("fa3_capability", {"capability": (12, 0)}, {"capability": (8, 6)}),
]
WARNED = [
    ("float16_unproven", {"settings": {"dtype": "float16"}}),
    ("fp8_weights_capability", {"settings": {"quantization": "fp8"}, "capability": (8, 6)}),
    ("data_parallel_one_gpu", {"options": {"--dp-size": Option("--dp-size", ("2",))}}),
]


@pytest.mark.parametrize(("code", "bad", "cure"), REFUSED, ids=[f"{r[0]}-{i}" for i, r in enumerate(REFUSED)])
def test_a_known_bad_combination_is_refused_and_its_cure_is_not(
    code: str, bad: dict[str, object], cure: dict[str, object]
) -> None:
    """Each row of the table stops what it describes, says why and what to do, and lets the fixed version through."""
    with pytest.raises(InvalidInputError) as caught:
        known_bad.judge(combination(**bad), tuple(row for row in KNOWN_BAD if row.code == code))
    assert (caught.value.code, caught.value.details["rule"]) == ("known_bad", code)
    assert caught.value.hint
    assert known_bad.judge(combination(**{**bad, **cure}), tuple(r for r in KNOWN_BAD if r.code == code)) == []


@pytest.mark.parametrize(("code", "bad"), WARNED)
def test_a_doubtful_combination_is_warned_about(code: str, bad: dict[str, object]) -> None:
    """It goes on, with a sentence that says what is doubtful and how to be sure."""
    rows = tuple(row for row in KNOWN_BAD if row.code == code)
    assert len(known_bad.judge(combination(**bad), rows)) == 1
    assert known_bad.judge(combination(), rows) == []


def test_every_row_is_tested() -> None:
    """A new row without a case above fails here."""
    assert {row.code for row in KNOWN_BAD} == {r[0] for r in REFUSED} | {w[0] for w in WARNED}


def test_the_link_of_a_known_bad_combination_is_shown() -> None:
    """The plan's error names the report it rests on."""
    with pytest.raises(InvalidInputError) as caught:
        plan("h100", release="0.5.16", overrides={"tokenizer_workers": "4"})
    assert "https://github.com/sgl-project/sglang/issues/31890" in caught.value.message
    assert plan("h100", release="0.5.23", overrides={"tokenizer_workers": "4"}).setting("tokenizer_workers") == 4


# NVML's names and sizes (GiB) of cards in the field, and the profile each should get.
CARDS = [
    ("NVIDIA GeForce RTX 3090", 24.0, (8, 6), "rtx3090"),
    ("NVIDIA GeForce RTX 3090 Ti", 24.0, (8, 6), "rtx3090"),
    ("NVIDIA GeForce RTX 4090", 23.99, (8, 9), "rtx4090"),
    ("NVIDIA GeForce RTX 4090 D", 23.5, (8, 9), "rtx4090"),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.99, (8, 9), "generic"),
    ("NVIDIA GeForce RTX 5090", 31.8, (12, 0), "rtx5090"),
    ("NVIDIA L4", 22.5, (8, 9), "l4"),
    ("NVIDIA L40S", 45.0, (8, 9), "l40s"),
    ("NVIDIA A10", 22.5, (8, 6), "a10"),
    ("NVIDIA A10G", 22.5, (8, 6), "a10"),
    ("NVIDIA A100-SXM4-40GB", 40.0, (8, 0), "a100-40g"),
    ("NVIDIA A100-PCIE-40GB", 40.0, (8, 0), "a100-40g"),
    ("NVIDIA A100-SXM4-80GB", 80.0, (8, 0), "a100-80g"),
    ("NVIDIA A100 80GB PCIe", 80.0, (8, 0), "a100-80g"),
    ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 19.5, (8, 0), "generic"),
    ("NVIDIA H100 80GB HBM3", 79.6, (9, 0), "h100"),
    ("NVIDIA H100 PCIe", 79.6, (9, 0), "h100"),
    ("NVIDIA H100 NVL", 93.6, (9, 0), "h100"),
    ("NVIDIA H200", 140.4, (9, 0), "h200"),
    ("NVIDIA B200", 179.0, (10, 0), "generic"),
    ("NVIDIA GeForce RTX 3060", 12.0, (8, 6), "generic"),
    ("Orin [nvgpu]", 30.0, (8, 7), "generic"),
    ("NVIDIA Something", 48.0, None, "generic"),
]


@pytest.mark.parametrize(("name", "gib", "capability", "profile"), CARDS, ids=[c[0] for c in CARDS])
def test_a_card_gets_its_profile_and_a_plan(
    name: str, gib: float, capability: tuple[int, int] | None, profile: str
) -> None:
    """A known card gets its own; any other a generic one with a warning; either way there is a plan that fits."""
    found = card(name, gib, capability)
    match = planning.match_profile([found], [load(n) for n in {p.name.split(":")[0] for p in shipped()}])
    assert match.profile.name == profile
    assert (match.warning is None) == (profile != "generic")
    made = planning.plan(
        planning.PlanRequest(
            match.profile, model(match.profile.model), recorded_flags.engine("0.5.23", "cuda"), match.gpu
        )
    )
    assert made.memory.fits
    assert made.warnings == ()


def test_the_emptiest_card_is_taken() -> None:
    """Of several, the one with the most free memory decides."""
    busy = card("NVIDIA H100 80GB HBM3", 79.6, (9, 0), free=10, index=0)
    idle = card("NVIDIA GeForce RTX 4090", 24, (8, 9), index=1)
    assert planning.match_profile([busy, idle], [load("h100"), load("rtx4090")]).gpu.index == 1


def test_no_card_is_an_error_with_the_way_without_one() -> None:
    """The hint is a command that works without a GPU."""
    with pytest.raises(UnfitError) as caught:
        planning.match_profile([], [load("h100")])
    assert (caught.value.code, "--profile demo" in caught.value.hint) == ("no_gpu", True)
