"""What an embedding server needs that a chat server does not, decided from model, GPU and engine release.

Each rule writes one setting into the ledger with its reason; a value given by profile, environment or flag stands.
Sources are in docs/profiles.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen3emb_launch import argv
from qwen3emb_launch.catalog import CATALOG
from qwen3emb_launch.errors import InvalidInputError
from qwen3emb_launch.facts import EngineFacts, GpuFacts, ModelFacts
from qwen3emb_launch.planning.ledger import Ledger

CARD_CONTEXT = 32768  # the model cards' own limit; the 4B's and 8B's config.json says 40960
PREFILL_TOKENS = 16384  # of one batch on a GPU: beyond it a bigger batch is no faster
CPU_PREFILL_TOKENS = 4096
RUNNING = 512  # requests of one batch; the engine's own 2048 to 4096 cost up to 0.5 GB of table at 32K
# Below about 300 tokens a pass costs what reading the weights costs, so padding up to a few sizes is free there.
# Without a graph the CPU launches kernels for 25 to 50 ms, whatever the size: as long as an H100 computes 2,000 to
# 4,000 tokens in bfloat16, or 4,000 to 7,000 in fp8. The steps are what 2 to 128 queries of 32 tokens and their end
# token come to, rounded up: clients that wait fill such batches. From 0.5.16 on SGLang runs a batch without a graph
# rather than pad it to more than GRAPH_PADDING times its tokens.
GRAPH_PADDING = 2
GRAPH_SIZES = (4, 8, 16, 34, 68, 132, 264, 396, 528, 792, 1056, 1584, 2112, 3168, 4224)
# A `full` graph is one launch, so that single short texts are no longer bound by Python: finer steps pay. Steps of two
# texts from 264 to 1,056 tokens and of four to 1,584, where batches of 64 clients lie, took these on one H200 from
# 1,866 texts/s to 2,030 with the engine alone, and from 1,864 to 1,958 through the gateway (4B, bfloat16; by round
# 1.04 to 1.17x and 0.93 to 1.05x). 256 clients had 1 to 2% less, within what rounds differed; the ten graphs more
# took 0.8 s of the start and 0.02 GB.
FULL_GRAPH_SIZES = (
    4, 8, 16, 24, 36, 48, 68, 100, 132, 200, 264, 330, 396, 462, 528, 594, 660, 726, 792, 858, 924, 990, 1056, 1188,
    1320, 1452, 1584, 1848, 2112, 2640, 3168, 3696, 4224,
)  # fmt: skip
FULL_GRAPH_REQUESTS = 129  # 128 texts and the padding
# Releases on which the plugin's `full` graphs, from 16 tokens on, were run on a GPU and their vectors compared.
FULL_GRAPHS_PROVEN = ("0.5.16",)


@dataclass(frozen=True)
class Surroundings:
    """What the rules look at. `gpu` is None on a CPU engine."""

    model: ModelFacts
    engine: EngineFacts
    gpu: GpuFacts | None

    @property
    def cuda(self) -> bool:
        """Whether the engine runs on a GPU."""
        return self.engine.flavour == "cuda"

    @property
    def major(self) -> int | None:
        """The GPU's compute capability before the dot, None where unknown."""
        return self.gpu.compute_capability[0] if self.gpu and self.gpu.compute_capability else None

    def has(self, flag: str) -> bool:
        """Whether this engine has the option."""
        return flag in self.engine.flags

    def page_size(self, ledger: Ledger) -> int:
        """Tokens of a KV page: given, or what the engine's default attention on this GPU takes."""
        given = ledger.value("page_size")
        if given:
            return int(given)
        if self.major == 10:  # trtllm_mha by default (64), or fa4 (128)
            return 128
        return 1


def decide(around: Surroundings, ledger: Ledger) -> None:
    """Every rule but those about memory (sizing.py), in an order in which each finds what it builds on."""
    numbers(around, ledger)
    attention(around, ledger)
    batching(around, ledger)
    graphs(around, ledger)
    serving(around, ledger)


def numbers(around: Surroundings, ledger: Ledger) -> None:
    """Precision, split and length."""
    shape = around.model.shape
    ledger.decide("dtype", "bfloat16", "the models are published in bfloat16, and float16 overflows in the 8B")
    ledger.decide("quantization", "none", "the weights as published", origin="default")
    tp = ledger.decide("tp", 1, "the largest model fits one GPU", origin="default")
    if shape.kv_heads % tp or shape.heads % tp:
        raise InvalidInputError(
            "bad_setting",
            f"tp {tp} does not divide the model's {shape.heads} heads and {shape.kv_heads} KV heads",
            "--set tp=1",
        )
    replicas = ledger.decide("replicas", 1, "one engine keeps the device busy", origin="default")
    if replicas > 1 and tp > 1:
        raise InvalidInputError(
            "incompatible_settings",
            f"replicas {replicas} share one device, and tp {tp} splits the model over several",
            "--set tp=1, or --set replicas=1",
        )
    known = CATALOG.get(around.model.catalog_key or "")
    card = known.card_context if known else CARD_CONTEXT
    longest = min(card, shape.max_positions)
    reason = f"the model card's limit; config.json says {shape.max_positions}" if shape.max_positions > card else (
        "the model's own limit"
    )  # fmt: skip
    length = ledger.decide("context_length", longest, reason)
    if length > shape.max_positions and ledger.settings["context_length"].origin == "profile":
        # The profile was written for another model: `up --model` must not fail for that.
        ledger.respell("context_length", longest, f"the profile's {length} passes the model's {shape.max_positions}")
    elif length > shape.max_positions:
        raise InvalidInputError(
            "context_too_long",
            f"context_length {length} passes the {shape.max_positions} positions that {around.model.name} has",
            f"--set context_length={longest}",
        )


def attention(around: Surroundings, ledger: Ledger) -> None:
    """Prefix cache, KV pool, attention backend and prefill chunks: four settings that hang together."""
    radix = ledger.decide(
        "radix_cache", False, "every text is read once; ask for it where a long instruction is shared"
    )
    obstacle = _pool_needed_because(around, ledger, radix)
    asked = ledger.asked("kv_pool")
    if asked == "none" and obstacle:
        raise InvalidInputError(
            "incompatible_settings",
            f"kv_pool none ({ledger.given['kv_pool'].said_by}) cannot be had: {obstacle}",
            "--set kv_pool=full",
        )
    if asked == "auto":
        ledger.given = {key: value for key, value in ledger.given.items() if key != "kv_pool"}
    pool = ledger.decide(
        "kv_pool",
        "full" if obstacle else "none",
        obstacle or "an embedding needs no keys and values of earlier steps: the memory is not taken at all",
    )
    if not around.cuda:
        ledger.decide("attention_backend", None, "the engine chooses by the CPU's instruction set", origin="default")
        ledger.decide("kv_cache_dtype", "auto", "the model's own", origin="default")
        ledger.decide("chunked_prefill_size", -1, "each text is one pass")
        return
    if pool == "none":
        ledger.decide("attention_backend", "fa3", "the only kernels that leave the KV pool out on this GPU")
        ledger.decide("kv_cache_dtype", "auto", "there is no pool whose width could matter", origin="default")
        ledger.decide("chunked_prefill_size", -1, "without a pool a text is one pass, never chunks")
    else:
        backend = "fa3 on Hopper, trtllm_mha on data-centre Blackwell, flashinfer elsewhere"
        ledger.decide("attention_backend", None, f"the engine's own choice: {backend}", origin="default")
        ledger.decide("kv_cache_dtype", *_pool_dtype(around, radix))
        big = around.gpu is not None and around.gpu.total_bytes > 60 * 2**30
        ledger.decide("chunked_prefill_size", 8192 if big else 4096, "bounds the activations beside the pool")
    _spell_kv_dtype(around, ledger)


def _pool_needed_because(around: Surroundings, ledger: Ledger, radix: bool) -> str:
    """Why the KV pool cannot be left out, or an empty string."""
    if not around.cuda:
        return "only GPU attention kernels can leave the KV pool out"
    if not around.has("--prefill-only-disable-kv-cache"):
        return f"sglang {around.engine.version} has no --prefill-only-disable-kv-cache (0.5.12.post1 and later do)"
    if radix:
        return "the prefix cache lives in the KV pool"
    if (ledger.asked("chunked_prefill_size") or -1) != -1:
        return "prefill chunks read earlier ones from the KV pool"
    if str(ledger.asked("kv_cache_dtype") or "auto") != "auto":
        return f"kv_cache_dtype {ledger.asked('kv_cache_dtype')} asks for a KV pool"
    backend = ledger.asked("attention_backend")
    if backend not in (None, "fa3", "fa4"):
        return f"attention backend {backend} always uses the KV pool; fa3 and fa4 can do without"
    if backend is None and around.major not in (8, 9):
        return "FlashAttention 3, which can do without a KV pool, runs on compute capability 8.x and 9.0 only"
    return ""


def _pool_dtype(around: Surroundings, radix: bool) -> tuple[str, str]:
    if radix:
        return "auto", "a cached instruction is read back from the pool: not narrowed unasked"
    capability = around.gpu.compute_capability if around.gpu else None
    if capability is None or capability < (8, 9):
        return "auto", "fp8 arithmetic starts at compute capability 8.9"
    return "fp8_e4m3", "half the pool; nothing that is stored is read by another text"


def _spell_kv_dtype(around: Surroundings, ledger: Ledger) -> None:
    """`fp8` in the engine's words. e4m3 everywhere: FA3 and TensorRT-LLM take nothing else, FlashInfer takes both."""
    if ledger.value("kv_cache_dtype") == "fp8":
        ledger.respell("kv_cache_dtype", "fp8_e4m3", "the engine spells fp8 as fp8_e4m3, which every backend reads")
    if ledger.value("kv_cache_dtype") == "bfloat16" and ledger.value("dtype") == "bfloat16":
        ledger.respell("kv_cache_dtype", "auto", "the model's own width")


def batching(around: Surroundings, ledger: Ledger) -> None:
    """How much one forward pass takes."""
    tokens = PREFILL_TOKENS if around.cuda else CPU_PREFILL_TOKENS
    ledger.decide("max_prefill_tokens", tokens, "tokens of one batch; more make it no faster, only wider")
    ledger.decide("prefill_max_requests", None, "no limit beside the tokens", origin="default")
    ledger.decide(
        "max_running_requests", RUNNING, "texts of one batch; the engine reserves a row of positions for each"
    )
    ledger.decide("max_queued_requests", None, "no limit in the engine: a gateway sheds load", origin="default")
    ledger.decide("page_size", None, "the attention backend's own", origin="default")


def graphs(around: Surroundings, ledger: Ledger) -> None:
    """CUDA graphs: prefill is all an embedding does, decoding never happens."""
    if not around.cuda:
        return
    wanted = ledger.decide("prefill_graphs", True, "one launch for the layers' hundreds of kernels: half the latency")
    if wanted:
        chunk = ledger.value("chunked_prefill_size")
        ceiling = min(ledger.value("context_length"), chunk if chunk > 0 else ledger.value("max_prefill_tokens"))
        backend, reason = _graph_backend(around, ledger)
        _if_known(around, ledger, "prefill_graph_backend", backend, reason)
        full = ledger.value("prefill_graph_backend") == "full"
        grid = FULL_GRAPH_SIZES if full else GRAPH_SIZES
        sizes = tuple(size for size in grid if size <= ceiling) or (ceiling,)
        if full:
            why = "the engine's own default comes from the chunk size and would be one request"
            _if_known(around, ledger, "prefill_graph_requests", FULL_GRAPH_REQUESTS, why)
            why = "a batch of more texts than the graph has places would run without it"
            _if_known(around, ledger, "prefill_max_requests", _texts_of_a_graph(ledger), why)
        _if_known(
            around,
            ledger,
            "prefill_graph_sizes",
            sizes,
            "given one by one: without prefill chunks the engine would capture none, with only a warning",
        )
        too_long = [size for size in ledger.value("prefill_graph_sizes") or () if size > ledger.value("context_length")]
        if too_long:
            raise InvalidInputError(
                "bad_setting",
                f"prefill_graph_sizes {too_long} pass context_length {ledger.value('context_length')}",
                "capturing past the model's buffers is an illegal memory access in the engine: leave them out",
            )
    _if_known(
        around, ledger, "decode_graphs", False, "an embedding never decodes: capturing would cost start time and memory"
    )


def _texts_of_a_graph(ledger: Ledger) -> int | None:
    """The engine captures no more places than it has rows for running requests; one of them is the padding's."""
    places = min(int(ledger.value("prefill_graph_requests") or 0), int(ledger.value("max_running_requests")))
    return places - 1 if places > 1 else None


def _graph_backend(around: Surroundings, ledger: Ledger) -> tuple[str, str]:
    """`full` where it was proven. Without a KV pool it needs the plugin: stock SGLang spoils padded batches there."""
    pool = ledger.value("kv_pool") != "none"
    plugin = bool(around.engine.plugin) and ledger.asked("plugin") is not False
    if ledger.asked("prefill_graph_backend") == "full" and not pool and not plugin:
        raise InvalidInputError(
            "full_graph_needs_plugin",
            "prefill_graph_backend full without a KV pool is wrong on stock SGLang: padding spoils the pooled token",
            "--set plugin=true and an engine that has it, or --set prefill_graph_backend=breakable",
        )
    if pool or not plugin:
        return "breakable", "works with prompts of any length and batches of any mix"
    if around.engine.version not in FULL_GRAPHS_PROVEN:
        proven = ", ".join(FULL_GRAPHS_PROVEN)
        return "breakable", f"the plugin's `full` graphs were proven on {proven}, not on {around.engine.version}"
    return "full", "one launch a batch; the plugin gives the padding a place of its own, which stock SGLang does not"


def serving(around: Surroundings, ledger: Ledger) -> None:
    """Tokenising, scheduling, logging, plugin."""
    _if_known(around, ledger, "batch_tokenize", "lists", "the texts of one request are tokenised by one call")
    ledger.decide("tokenizer_workers", 1, "more than one breaks embeddings before 0.5.23", origin="default")
    if around.cuda:
        ledger.decide("overlap_schedule", None, "the engine's own: on", origin="default")
    else:
        why = "a pass on a CPU is over before the next begins: with overlap, answers wait for the batch behind them"
        _if_known(around, ledger, "overlap_schedule", False, why)
    _if_known(around, ledger, "sleep_on_idle", True, "an idle scheduler would spin on a whole CPU core")
    ledger.decide("trust_remote_code", False, "the models need none of a checkpoint's own Python")
    ledger.decide("log_level", None, "the engine's own: info", origin="default")
    _if_known(around, ledger, "log_level_http", "warning", "one access line a request costs the HTTP process time")
    ledger.decide(
        "plugin", True, f"embedding plugin {around.engine.plugin}" if around.engine.plugin else "the engine has none",
        origin="default",
    )  # fmt: skip


def _if_known(around: Surroundings, ledger: Ledger, key: str, value: object, reason: str) -> None:
    """A rule that steps back where this engine has no such option. What somebody gave is checked later instead."""
    said = argv.option(key, value)
    if said and not around.has(said.flag):
        value, reason = None, f"sglang {around.engine.version} has no {said.flag}"
    ledger.decide(key, value, reason)
