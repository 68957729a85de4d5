"""Every shipped profile with every model on every recorded release; layers, rules, addresses, the plan's JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from planning_cases import CUDA_RELEASES, GIB, SHIPPED, card, load, model, plan, request, said, shipped

from qwen3emb_launch import planning, profile_files, recorded_flags
from qwen3emb_launch.errors import Exit, InvalidInputError, LaunchError, UnfitError
from qwen3emb_launch.facts import LaunchPlan
from qwen3emb_launch.planning.front import workers_for
from qwen3emb_launch.planning.ledger import setting_keys
from qwen3emb_launch.planning.memory import CUDA_CONTEXT, LOADER, kv_bytes_per_token
from qwen3emb_launch.planning.rules import GRAPH_PADDING
from qwen3emb_launch.profile import Profile

COMBINATIONS = [
    (profile, key, release)
    for profile in shipped()
    for key in ("0.6b", "4b", "8b")
    for release in (CUDA_RELEASES if profile.gpu else ["0.5.15.post1"])
]


@pytest.mark.parametrize(("profile", "key", "release"), COMBINATIONS, ids=lambda v: getattr(v, "name", v))
def test_every_plan_is_one_the_engine_takes(profile: Profile, key: str, release: str) -> None:
    """Whatever is shipped fits its card, uses options that the release has, once each, and keeps what must hold."""
    made = plan(profile, key, release)
    flags = recorded_flags.flags(release)
    options = [word for word in made.argv if word.startswith("--")]
    assert set(options) <= set(flags)
    assert len(options) == len(set(options))
    assert "--is-embedding" in options
    assert json.loads(said(made, "--json-model-override-args")[0]) == {"is_matryoshka": True}
    assert "--trust-remote-code" not in options
    assert said(made, "--host") == ["127.0.0.1"]
    assert said(made, "--context-length") == [str(made.context_length)]
    assert not {"--api-key", "--admin-api-key", "--config"} & set(options)
    assert made.memory.fits is not False
    tokens = said(made, "--max-total-tokens")
    assert tokens is None or int(tokens[0]) >= made.context_length + 1 + 8
    for flag in options:
        values = said(made, flag)
        assert flags[flag].takes_value == bool(values), flag
        assert not flags[flag].choices or set(values) <= set(flags[flag].choices)
    assert not made.warnings


@pytest.mark.parametrize("profile", [p for p in shipped() if p.gpu], ids=lambda p: p.name)
def test_no_pool_only_where_its_preconditions_hold(profile: Profile) -> None:
    """Without a KV pool the engine demands no chunks, no prefix cache and FlashAttention 3."""
    made = plan(profile)
    if said(made, "--prefill-only-disable-kv-cache") is None:
        assert made.setting("kv_pool") == "full"
        assert int(said(made, "--chunked-prefill-size")[0]) > 0
        return
    assert said(made, "--chunked-prefill-size") == ["-1"]
    assert said(made, "--disable-radix-cache") == []
    assert said(made, "--attention-backend") == ["fa3"]
    assert said(made, "--kv-cache-dtype") is None
    assert profile.gpu.capability[0] in (8, 9)


@pytest.mark.parametrize("release", CUDA_RELEASES)
def test_rtx4090_is_what_its_card_was_given(release: str) -> None:
    """85% of the card, bfloat16, an fp8 pool in the engine's spelling, one GPU."""
    made = plan("rtx4090", "4b", release)
    assert said(made, "--mem-fraction-static") == ["0.85"]
    assert said(made, "--dtype") == ["bfloat16"]
    assert said(made, "--kv-cache-dtype") == ["fp8_e4m3"]
    assert said(made, "--tp-size") == ["1"]
    assert {s.key: s.origin for s in made.settings}["kv_cache_dtype"] == "profile"


def test_lean_asks_for_the_model_not_for_the_card() -> None:
    """The variant needs half of what the shipped profile takes of the same card."""
    lean, shipped_profile = plan("rtx4090:lean"), plan("rtx4090")
    assert lean.memory.needed_bytes < 0.55 * shipped_profile.memory.needed_bytes
    assert lean.setting("kv_pool") == "none"
    assert lean.name == "rtx4090-lean"


@pytest.mark.parametrize("name", [n for n in SHIPPED if n not in ("cpu", "demo")])
def test_prefill_graphs_are_sized_by_hand(name: str) -> None:
    """Sizes are given, none passes what one prefill step or the context can hold; decode graphs are off."""
    made = plan(name)
    sizes = [int(size) for size in said(made, "--cuda-graph-bs-prefill")]
    chunk = made.setting("chunked_prefill_size")
    assert sizes == sorted(sizes)
    for tokens in range(2, max(sizes)):
        fitting = next(size for size in sizes if size >= tokens)
        assert fitting <= GRAPH_PADDING * tokens, f"{tokens} tokens would run without a graph"
    assert max(sizes) <= (chunk if chunk > 0 else made.context_length)
    assert said(made, "--disable-decode-cuda-graph") == []
    if chunk == -1:
        assert {64 * 33, 128 * 33} <= set(sizes), "64 and 128 waiting clients with 32 tokens and an end token each"
    short = plan(name, overrides={"context_length": "300"})
    assert max(int(s) for s in said(short, "--cuda-graph-bs-prefill")) <= 300


def test_the_cpu_gets_no_gpu_options_and_a_small_pool() -> None:
    """The CPU engine's own default pool takes gigabytes; the demo's takes megabytes."""
    made = plan("demo", "demo")
    assert said(made, "--device") == ["cpu"]
    assert not [word for word in made.argv if "cuda-graph" in word or word == "--attention-backend"]
    assert made.memory.terms["KV pool"] < 32e6
    assert made.env["SGLANG_USE_CPU_ENGINE"] == "1"
    assert made.gpu is None


@pytest.mark.parametrize(
    ("cores", "gpu", "limited", "workers"),
    [(1, True, False, 1), (4, True, False, 1), (7, True, False, 1), (8, True, False, 2), (208, True, False, 2),
     (208, False, False, 1), (16, True, True, 1)],
)  # fmt: skip
def test_gateway_workers_go_by_cores_before_a_gpu(cores: int, gpu: bool, limited: bool, workers: int) -> None:
    """A CPU engine wants the cores itself; a key's limit a minute holds in one process."""
    assert workers_for(cores, gpu=gpu, limited=limited) == workers


def test_each_gateway_worker_has_a_cache_of_the_usual_size() -> None:
    """Divided among workers the hot texts would lie in each part and leave less room; and who says a number has it."""
    one, four = plan("h100").gateway, plan("h100", gateway_workers=4).gateway
    assert (one["workers"], one["cache_bytes"]) == (1, 128 << 20)
    assert (four["workers"], four["cache_bytes"]) == (4, 4 * one["cache_bytes"])
    said_so = plan("h100", gateway_workers=4, overrides={"gateway.workers": "2", "gateway.cache_mb": "100"}).gateway
    assert (said_so["workers"], said_so["cache_bytes"]) == (2, 100 << 20)


def test_an_upgrade_keeps_the_number_of_gateway_workers() -> None:
    made = plan("h100", gateway_workers=4)
    asked = planning.again(made, load("h100"), made.engine, engine_port=12000, ram_bytes=None)
    assert planning.plan(asked).gateway["workers"] == 4


def test_batches_overlap_on_a_gpu_only() -> None:
    """A pass on a CPU blocks: the answers before it would wait for it."""
    assert said(plan("demo", "demo"), "--disable-overlap-schedule") == []
    assert said(plan("demo", "demo", overrides={"overlap_schedule": "true"}), "--disable-overlap-schedule") is None
    assert said(plan("h100"), "--disable-overlap-schedule") is None


def test_layers_win_in_order() -> None:
    """default < rule < profile < environment < flag, and each value knows where it came from."""
    environ = {"QWEN3EMB_SET_MAX_RUNNING_REQUESTS": "64", "QWEN3EMB_SET_MAX_PREFILL_TOKENS": "8192", "PATH": "/bin"}
    made = plan("rtx4090", environ=environ, overrides={"max_prefill_tokens": "4096", "enable-metrics": "true"})
    origins = {s.key: (s.value, s.origin) for s in made.settings}
    assert origins["tp"] == (1, "profile")
    assert origins["tokenizer_workers"] == (1, "default")
    assert origins["decode_graphs"] == (False, "rule")
    assert origins["mem_fraction_static"] == (0.85, "profile")
    assert origins["max_running_requests"] == (64, "env")
    assert origins["max_prefill_tokens"] == (4096, "flag")
    assert origins["--enable-metrics"] == (True, "flag")
    assert all(s.reason for s in made.settings)


@pytest.mark.parametrize(
    ("folder", "served"),
    [
        ("/home/alice/models/my-embedder", "my-embedder"),
        ("/home/alice/我的 模型/", "我的 模型"),
        ("/home/alice/models/v1/..", "models"),
        ("/models/e5:v2", "e5-v2"),
        ("/c/hub/models--Qwen--Qwen3-Embedding-0.6B/snapshots/97b0c6", "Qwen/Qwen3-Embedding-0.6B"),
    ],
)
def test_a_folder_is_served_by_its_name(folder: str, served: str) -> None:
    """Where a model lies on the server is not told to clients; in the hub's cache it has its repository's name."""
    mine = replace(model("4b"), name=folder, path=Path(folder), source="folder", catalog_key=None)
    made = plan("h100", model=mine)
    assert made.served_model_name == served
    assert made.gateway["models"][0] == served
    assert all("/home/" not in name for name in made.gateway["models"])
    assert plan("h100", model=mine, overrides={"server.served_name": "emb"}).served_model_name == "emb"


def test_parts_and_environment_can_be_set() -> None:
    """`server.port`, `deadlines.start`, `restart.limit` and `env.NAME` are set as settings are."""
    made = plan(
        "h100",
        overrides={"server.port": "8001", "deadlines.start": "900", "restart.limit": "2", "env.OMP_NUM_THREADS": "4"},
        environ={"QWEN3EMB_SET_SERVER__SERVED_NAME": "emb", "QWEN3EMB_SET_ENV__Mixed": "x"},
    )
    assert (made.port, made.served_model_name, made.deadlines.start, made.restart.limit) == (8001, "emb", 900, 2)
    assert made.env["OMP_NUM_THREADS"] == "4"
    assert made.env["Mixed"] == "x"
    assert plan("h100", overrides={"server.port": "8001"}, port=8002).port == 8002


def test_a_given_share_of_the_memory_is_the_engine_s_on_a_cpu_too() -> None:
    """It takes the place of the token count, so it has to arrive; the estimate has the pool that fills it."""
    made = plan("demo", "demo", overrides={"mem_fraction_static": "0.1"})
    assert said(made, "--mem-fraction-static") == ["0.1"]
    assert said(made, "--max-total-tokens") is None
    asked = planning.again(made, load("demo"), made.engine, engine_port=12000, ram_bytes=16 * GIB)
    assert planning.plan(asked).memory.terms["KV pool"] == pytest.approx(1.6 * GIB, abs=2 * LOADER)


def test_an_empty_override_gives_the_decision_back() -> None:
    """`--set mem_fraction_static=` makes the planner decide what the profile had decided."""
    made = plan("rtx4090", overrides={"mem_fraction_static": "", "kv_cache_dtype": "null"})
    assert made.setting("mem_fraction_static") != 0.85
    assert made.setting("kv_pool") == "none"


BAD_OVERRIDES = [
    ({"mem_fraction_statics": "1"}, "unknown_setting", "did you mean mem_fraction_static?"),
    ({"enable-metrix": "1"}, "unknown_setting", "did you mean enable-metrics?"),
    ({"tp": "two"}, "bad_setting", ""),
    ({"tp": "3"}, "bad_setting", "--set tp=1"),
    ({"mem_fraction_static": "1.5"}, "bad_setting", ""),
    ({"dtype": "int4"}, "bad_setting", ""),
    ({"quantization": "fp9"}, "bad_flag_value", "did you mean"),
    ({"attention_backend": "fa33"}, "bad_flag_value", "did you mean fa3?"),
    ({"enable-metrics": "perhaps"}, "bad_flag_value", "true or false"),
    ({"host": "0.0.0.0"}, "reserved_flag", "--host"),
    ({"api-key": "k"}, "reserved_flag", "gateway"),
    ({"env.MY_API_KEY": "k"}, "bad_setting", ""),
    ({"context_length": "50000"}, "context_too_long", "--set context_length=32768"),
    ({"max_total_tokens": "1000"}, "pool_too_small", "--set max_total_tokens=32777"),
    ({"kv_pool": "none"}, "incompatible_settings", "--set kv_pool=full"),
    ({"kv_pool": "none", "kv_cache_dtype": "auto", "radix_cache": "true"}, "incompatible_settings", ""),
    ({"prefill_graph_sizes": "64,40000"}, "bad_setting", ""),
    ({"tokenizer_workers": "0"}, "bad_setting", ""),
    ({"chunked_prefill_size": "0"}, "bad_setting", ""),
]


@pytest.mark.parametrize(
    ("overrides", "code", "hint"), BAD_OVERRIDES, ids=lambda v: next(iter(v)) if isinstance(v, dict) else ""
)
def test_a_bad_override_says_what_is_meant(overrides: dict[str, str], code: str, hint: str) -> None:
    """Nothing is ignored: an unknown key, a wrong type, a value out of range each name the way out."""
    with pytest.raises(InvalidInputError) as caught:
        plan("rtx4090", overrides=overrides)
    assert caught.value.code == code
    assert hint in caught.value.hint
    assert caught.value.exit is Exit.INVALID


def test_a_secret_is_not_repeated() -> None:
    """An environment variable that names a secret is refused without showing its value."""
    with pytest.raises(InvalidInputError) as caught:
        plan("h100", overrides={"env.HF_TOKEN": "hf_verysecret"})
    assert "verysecret" not in json.dumps(caught.value.to_dict())


def test_a_made_up_option_names_the_real_one() -> None:
    """`--enable-prompt-trust-remote-code` is no option; `--trust-remote-code` is."""
    profile = profile_files.load("rtx4090").model_copy(update={"extra_args": ("--enable-prompt-trust-remote-code",)})
    with pytest.raises(InvalidInputError) as caught:
        plan(profile)
    assert caught.value.code == "unknown_flag"
    assert "--trust-remote-code" in caught.value.hint


def test_trust_remote_code_only_when_asked() -> None:
    """Asked for by setting, it is passed."""
    assert said(plan("h100", overrides={"trust_remote_code": "true"}), "--trust-remote-code") == []


def test_a_rule_steps_back_where_the_engine_lacks_the_option() -> None:
    """A release without an option gets a plan without it, and the reason says so; asking for it is an error."""
    asked = request("h100")
    flags = {n: f for n, f in asked.engine.flags.items() if n != "--enable-tokenizer-batch-encode"}
    older = type(asked.engine)(**{**vars(asked.engine), "flags": flags})
    made = plan("h100", engine=older)
    batch = next(s for s in made.settings if s.key == "batch_tokenize")
    assert (batch.value, "has no --enable-tokenizer-batch-encode" in batch.reason) == (None, True)
    with pytest.raises(InvalidInputError) as caught:
        plan("h100", engine=older, overrides={"batch_tokenize": "lists"})
    assert caught.value.code == "unknown_flag"


def test_a_shared_instruction_keeps_its_cache_and_width() -> None:
    """With the prefix cache there is a pool, its values are not narrowed, and prefill goes in chunks."""
    made = plan("h100", overrides={"radix_cache": "true"})
    assert said(made, "--disable-radix-cache") is None
    assert said(made, "--prefill-only-disable-kv-cache") is None
    assert said(made, "--kv-cache-dtype") is None
    assert said(made, "--chunked-prefill-size") == ["8192"]


def test_a_profile_bends_to_a_shorter_model_and_a_flag_does_not() -> None:
    """`up --profile demo --model short` serves the model's own length; asking for more by hand is an error."""
    short = model("demo")
    shape = type(short.shape)(**{**vars(short.shape), "max_positions": 512})
    short = type(short)(**{**vars(short), "shape": shape})
    made = plan("demo", model=short)
    assert made.context_length == 512
    with pytest.raises(InvalidInputError):
        plan("demo", model=short, overrides={"context_length": "8192"})


def test_addresses_and_ports() -> None:
    """The engine port leaves room for port + 10000; an engine that others can reach is warned about."""
    bare = {"gateway.enabled": "false"}
    with pytest.raises(InvalidInputError) as caught:
        plan("h100", port=55536, overrides=bare)
    assert caught.value.code == "port_too_high"
    assert plan("h100", port=55536).port == 55536
    behind = plan("h100", port=60000, host="0.0.0.0", engine_host="127.0.0.1", engine_port=31000)
    assert (behind.port, behind.engine_port, behind.warnings) == (60000, 31000, ())
    assert said(behind, "--port") == ["31000"]
    assert "without a key" in plan("h100", host="0.0.0.0", overrides=bare).warnings[0]


def test_the_gateway_stands_in_front() -> None:
    """By default users call the gateway and the engine is private; what was given for it is passed on; without it the
    engine has the address itself."""
    made = plan("demo", "demo", port=8000, overrides={"gateway.hold": "7", "gateway.tasks": "t.yaml"})
    assert (made.port, made.engine_host, made.engine_port != 8000) == (8000, "127.0.0.1", True)
    assert made.gateway is not None
    assert (made.gateway["port"], made.gateway["hold"], made.gateway["tasks_file"]) == (8000, 7.0, "t.yaml")
    assert made.gateway["context_length"] == made.context_length
    assert made.setting("gateway.hold") == 7
    bare = plan("demo", "demo", port=8000, overrides={"gateway.enabled": "false"})
    assert (bare.engine_port, bare.gateway) == (8000, None)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", ["h100", "h200", "rtx4090", "a100-80g"])
def test_replicas_share_the_card(name: str, count: int) -> None:
    """Each of several engines finds its tokens whatever the others have taken before it or take beside it, and
    together they fit."""
    made = plan(name, "0.6b", overrides={"replicas": str(count)})
    assert made.replicas == count
    assert made.memory is not None
    assert made.memory.fits
    assert made.gpu is not None
    whole = made.gpu.free_bytes - CUDA_CONTEXT
    one = made.memory.needed_bytes / count
    share, tokens = made.setting("mem_fraction_static"), made.setting("max_total_tokens")
    kv_dtype = made.setting("kv_cache_dtype")
    cell = kv_bytes_per_token(made.model.shape, kv_dtype, "bfloat16")
    static = made.memory.terms["weights"] + LOADER + tokens * cell
    assert share < 1
    for before in range(count):  # engines that took theirs before this one started; the rest take it meanwhile
        room = share * (whole - before * one) - (count - 1 - before) * one
        assert room >= static, (before, room, static)


def tokens_by_sglang(made: LaunchPlan, before: float, after: float) -> int:
    """SGLang's rule (_profile_available_bytes, _apply_token_constraints; the same in 0.5.14 to 0.5.23): of what is free
    after loading (`after`), the share of what was free before it that is not static stays free. 0 ends the engine."""
    cell = kv_bytes_per_token(made.model.shape, made.setting("kv_cache_dtype"), made.setting("dtype"))
    rest = after - before * (1 - float(said(made, "--mem-fraction-static")[0]))
    return max(0, min(int(rest / cell), int(said(made, "--max-total-tokens")[0])))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("release", ["0.5.16", "0.5.23"])
@pytest.mark.parametrize("name", ["h100", "h200", "h200:fp8", "h200:pooled", "a100-80g", "a100-80g:pooled", "l40s"])
def test_neighbours_that_load_meanwhile_are_no_obstacle(name: str, release: str, count: int) -> None:
    """Engines that take memory between SGLang's two looks, planned each as if it were alone, leave this one its tokens;
    and no more than what the model needs is taken: the tokens are bounded by their number."""
    made = plan(name, "4b", release, overrides={"replicas": str(count)})
    assert made.memory is not None
    assert made.gpu is not None
    one = made.memory.needed_bytes / count
    before = made.gpu.free_bytes - CUDA_CONTEXT
    own = made.memory.terms["weights"] + LOADER
    planned = made.setting("max_total_tokens")
    neighbour = plan(name, "4b", release).memory.needed_bytes
    for taken in (0, (count - 1) * one, (count - 1) * one + neighbour):
        assert taken + one < made.gpu.free_bytes, "the card holds them all"
        assert tokens_by_sglang(made, before, before - own - taken) == planned, taken
    pool = made.memory.terms.get("KV pool", 0)
    cell = kv_bytes_per_token(made.model.shape, made.setting("kv_cache_dtype"), "bfloat16")
    assert pool == (planned * cell if made.setting("kv_pool") == "full" else 0)


def test_the_start_that_failed_beside_others_is_planned_otherwise() -> None:
    """As seen on an H200: bfloat16 4B and fp8 4B planned at one moment, with 0.2178 needed and 0.21 said. The room that
    is left for batches stays free where a pool is allocated; a share that was given is not made larger."""
    gpu = card("NVIDIA H200", 139.8, (9, 0), free=96)
    fp8 = plan("h200", "4b", "0.5.16", gpu=gpu, overrides={"quantization": "fp8"})
    assert float(said(fp8, "--mem-fraction-static")[0]) > 0.2178
    assert tokens_by_sglang(fp8, gpu.free_bytes, (1 - 0.2178) * gpu.free_bytes) == fp8.setting("max_total_tokens")
    share = {s.key: s for s in fp8.settings}["mem_fraction_static"]
    assert "load on this GPU at the same time" in share.reason
    tight = plan("rtx5090", "8b", gpu=card("NVIDIA GeForce RTX 5090", 31.8, (12, 0), free=24))
    terms = tight.memory.terms
    left = (1 - tight.setting("mem_fraction_static")) * (tight.gpu.free_bytes - CUDA_CONTEXT)
    assert left >= terms["activations"] + terms["request table"] + terms["CUDA graphs"]
    told = plan("h200", "4b", "0.5.16", overrides={"mem_fraction_static": "0.3"})
    assert told.setting("mem_fraction_static") == 0.3


def test_replicas_that_cannot_be() -> None:
    """More engines than the card holds, engines without a gateway, engines split over cards: refused, with the sum."""
    with pytest.raises(UnfitError) as full:
        plan("rtx4090", "8b", overrides={"replicas": "2"})
    assert full.value.code == "vram"
    assert "1 more of it" in full.value.message
    for overrides in ({"replicas": "2", "gateway.enabled": "false"}, {"replicas": "2", "tp": "2"}):
        with pytest.raises(InvalidInputError) as caught:
            plan("h100", "4b", overrides=overrides)
        assert caught.value.code == "incompatible_settings"
    with pytest.raises(UnfitError) as ram:
        plan("demo", "demo", overrides={"replicas": "3"}, ram_bytes=8_000_000_000)
    assert ram.value.code == "memory"


def test_the_chosen_card_is_the_one_used() -> None:
    """On a host with several cards the engine sees the planned one only; splitting over GPUs sees all."""
    third = card("NVIDIA H100 80GB HBM3", 79.6, (9, 0), index=2)
    assert plan("h100", gpu=third).env["CUDA_VISIBLE_DEVICES"] == "2"
    assert "CUDA_VISIBLE_DEVICES" not in plan("h100", gpu=third, overrides={"tp": "2"}).env


def test_no_plugin_is_said_to_the_engine() -> None:
    """`plugin=false` gives the stock engine."""
    assert plan("h100", overrides={"plugin": "false"}).env["QWEN3EMB_PLUGIN"] == "0"


@pytest.mark.parametrize(
    ("release", "plugin", "overrides", "backend"),
    [
        ("0.5.16", "0.1.0", {}, "full"),
        ("0.5.16", None, {}, "breakable"),
        ("0.5.16", "0.1.0", {"plugin": "false"}, "breakable"),
        ("0.5.16", "0.1.0", {"kv_pool": "full"}, "breakable"),
        ("0.5.23", "0.1.0", {}, "breakable"),
        ("0.5.23", "0.1.0", {"prefill_graph_backend": "full"}, "full"),
    ],
)
def test_full_graphs_only_where_they_are_proven(release: str, plugin: str | None, overrides, backend: str) -> None:
    """One graph a batch needs the plugin wherever there is no KV pool, and is chosen on releases it was run on."""
    engine = replace(recorded_flags.engine(release, "cuda"), plugin=plugin)
    made = plan("h100", engine=engine, overrides=overrides)
    assert said(made, "--cuda-graph-backend-prefill") == [backend]
    slots = ['{"prefill": {"full_prefill_max_req": 129}}'] if backend == "full" else None
    assert said(made, "--cuda-graph-config") == slots
    assert said(made, "--prefill-max-requests") == (["128"] if backend == "full" else None)


def test_no_batch_has_more_texts_than_a_full_graph() -> None:
    """More places, more texts; a number that somebody gave stays."""
    engine = replace(recorded_flags.engine("0.5.16", "cuda"), plugin="0.4.0")
    assert said(plan("h100", engine=engine, overrides={"prefill_graph_requests": "257"}), "--prefill-max-requests") == [
        "256"
    ]
    assert said(plan("h100", engine=engine, overrides={"prefill_max_requests": "64"}), "--prefill-max-requests") == [
        "64"
    ]
    # Places are rows for running requests, so fewer of these are fewer places, and one is the padding's all the same.
    assert said(plan("h100", engine=engine, overrides={"max_running_requests": "64"}), "--prefill-max-requests") == [
        "63"
    ]


def test_full_graphs_without_the_plugin_are_refused() -> None:
    """Stock SGLang would spoil the pooled token of every padded batch."""
    engine = replace(recorded_flags.engine("0.5.16", "cuda"), plugin=None)
    with pytest.raises(InvalidInputError) as caught:
        plan("h100", engine=engine, overrides={"prefill_graph_backend": "full"})
    assert caught.value.code == "full_graph_needs_plugin"


UNFIT = [
    ({"gpu": None}, "no_gpu", "--profile demo"),
    ({"gpu": card("Tesla T4", 15, (7, 5))}, "gpu_too_old", "--profile cpu"),
    ({"gpu": card("NVIDIA RTX A2000", 6, (8, 6))}, "vram", "--model 0.6b"),
    ({"gpu": card("NVIDIA H100 80GB HBM3", 79, (9, 0), free=3)}, "vram", "--model 0.6b"),
    ({"gpu": card("tiny", 1, (9, 0))}, "vram", "larger GPU"),
    ({"engine": recorded_flags.engine("0.5.15.post1", "cpu")}, "engine_flavour", "qwen3emb engine install cuda"),
]


@pytest.mark.parametrize(("change", "code", "hint"), UNFIT, ids=[c[1] + str(i) for i, c in enumerate(UNFIT)])
def test_what_cannot_run_here_is_refused_before_anything_starts(
    change: dict[str, object], code: str, hint: str
) -> None:
    """No GPU, an old one, a small one, a full one, the wrong engine: exit status 3 and the next command."""
    with pytest.raises(UnfitError) as caught:
        plan("h100", **change)
    assert caught.value.code == code
    assert hint in caught.value.hint


def test_the_refusal_shows_its_arithmetic() -> None:
    """The addends, their sum and what is free stand in the message and, in bytes, in the details."""
    with pytest.raises(UnfitError) as caught:
        plan("h100", "8b", gpu=card("NVIDIA H100 80GB HBM3", 79, (9, 0), free=13))
    error = caught.value
    assert "weights 15.13 GB + unused lm_head 1.24 GB" in error.message
    assert "13.96 GB free of 84.83 GB" in error.message
    assert error.details["needed"] == sum(error.details["terms"].values())
    assert error.hint == "this would fit: qwen3emb up --profile h100:pooled --model 4b"


def test_the_alternative_really_fits() -> None:
    """Taking the hint's word gives a plan."""
    small = card("NVIDIA GeForce RTX 4090", 24, (8, 9), free=12.5)
    with pytest.raises(UnfitError) as caught:
        plan("rtx4090", "8b", gpu=small)
    words = caught.value.hint.split()
    profile, key = words[words.index("--profile") + 1], words[words.index("--model") + 1]
    assert plan(profile, key, gpu=small).memory.fits


def test_host_memory_is_checked_without_a_gpu() -> None:
    """The 8B does not go into 8 GB of RAM."""
    with pytest.raises(UnfitError) as caught:
        plan("cpu", "8b", ram_bytes=8 * GIB)
    assert caught.value.code == "memory"


def test_another_card_than_the_profiles_is_warned_about() -> None:
    """It runs by the real card's memory, and says that the profile was meant for another."""
    made = plan("rtx4090", gpu=card("NVIDIA H100 80GB HBM3", 79, (9, 0)))
    assert "this is NVIDIA H100" in made.warnings[0]


def test_versions_outside_the_profile_are_refused() -> None:
    """A profile for later releases does not start an older one."""
    profile = profile_files.load("h100")
    narrow = profile.model_copy(update={"engine": profile.engine.model_copy(update={"versions": ">=0.5.20"})})
    with pytest.raises(UnfitError) as caught:
        plan(narrow, "4b", "0.5.16")
    assert caught.value.code == "engine_version"


@pytest.mark.parametrize("profile", shipped(), ids=lambda p: p.name)
def test_a_plan_survives_json(profile: Profile) -> None:
    """What `up` writes is what the supervisor reads."""
    made = plan(profile)
    data = json.loads(json.dumps(planning.plan_to_dict(made), allow_nan=False))
    again = planning.plan_from_dict(data)
    assert planning.plan_to_dict(again) == planning.plan_to_dict(made)
    assert (again.argv, again.env, again.settings, again.gpu) == (made.argv, made.env, made.settings, made.gpu)
    assert again.base_url == made.base_url


@pytest.mark.parametrize(
    "data", [{}, {"schema": 2}, {"schema": 1}, {"schema": 1, "model": 3}, {"schema": 1, "argv": []}]
)
def test_a_broken_plan_file_is_an_error_of_ours(data: dict[str, object]) -> None:
    """Missing keys, other schemas and wrong types raise `bad_plan`, nothing else."""
    with pytest.raises(InvalidInputError) as caught:
        planning.plan_from_dict(data)
    assert caught.value.code == "bad_plan"


def test_read_overrides() -> None:
    """`key=value` words; the value may hold `=`."""
    assert planning.read_overrides(["tp=2", "env.X=a=b"]) == {"tp": "2", "env.X": "a=b"}
    for words in (["tp"], ["=2"], ["tp=1", "tp=2"]):
        with pytest.raises(InvalidInputError):
            planning.read_overrides(words)


def test_every_refusal_has_a_code_and_a_way_out() -> None:
    """No error of the table above is without a hint, but for values whose choices stand in the message."""
    for overrides, *_ in BAD_OVERRIDES:
        with pytest.raises(LaunchError) as caught:
            plan("rtx4090", overrides=overrides)
        assert caught.value.hint


WORDS = (
    st.text(max_size=12)
    | st.integers().map(str)
    | st.floats().map(str)
    | st.sampled_from(["true", "null", "[1]", "{a: 1}"])
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([*setting_keys(), "load-format", "enable-metrics", "env.X", "x"]), WORDS)
@example("prefill_graph_sizes", "64 128")
@example("prefill_graph_sizes", "64,x")
@example("quantization", "true")
@example("served-model-name", "a b")
def test_any_override_is_planned_or_refused(key: str, value: str) -> None:
    """No value of any setting raises anything but our own errors, and what is planned survives JSON."""
    try:
        made = plan("h100", overrides={key: value})
    except (InvalidInputError, UnfitError):
        return
    json.dumps(planning.plan_to_dict(made), allow_nan=False)


def test_the_supervisor_reads_a_plan_without_heavy_packages() -> None:
    """Reading a plan back needs neither pydantic nor yaml: the supervisor stays small."""
    code = "import sys, qwen3emb_launch.planning; print({'pydantic', 'yaml', 'typer', 'httpx'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
