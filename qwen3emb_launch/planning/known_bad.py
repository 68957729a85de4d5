"""Combinations known to be bad, as data: what, on which releases, why, and where it is reported.

`refuse` stops the plan; `warn` goes with it. A row whose `fixed` is None holds for every release seen so far.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qwen3emb_launch.argv import Option
from qwen3emb_launch.catalog import ModelShape
from qwen3emb_launch.errors import InvalidInputError
from qwen3emb_launch.facts import version_key

ISSUES = "https://github.com/sgl-project/sglang/issues/"


@dataclass(frozen=True)
class Combination:
    """What is about to be launched, as far as the table asks. `capability` is the GPU's, None on a CPU."""

    version: str
    flavour: str
    capability: tuple[int, int] | None
    settings: Mapping[str, Any]
    options: Mapping[str, Option]
    model_path: str
    shape: ModelShape


@dataclass(frozen=True)
class KnownBad:
    """One row. It holds on releases from `first` up to, without, `fixed`."""

    code: str
    when: Callable[[Combination], bool]
    why: str
    instead: str
    link: str = ""
    first: str = "0.0.0"
    fixed: str | None = None
    verdict: Literal["refuse", "warn"] = "refuse"

    def applies(self, combination: Combination) -> bool:
        """Whether the release is in the range and the combination is the bad one."""
        version = version_key(combination.version)
        if version < version_key(self.first) or (self.fixed and version >= version_key(self.fixed)):
            return False
        return self.when(combination)


def _has(flag: str) -> Callable[[Combination], bool]:
    return lambda c: flag in c.options


def _no_pool(c: Combination) -> bool:
    return c.settings.get("kv_pool") == "none"


def _fa3(c: Combination) -> bool:
    return c.flavour == "cuda" and c.settings.get("attention_backend") == "fa3"


def _fp8_pool(c: Combination) -> bool:
    return str(c.settings.get("kv_cache_dtype", "")).startswith("fp8")


def _sm(c: Combination) -> int | None:
    return c.capability[0] if c.capability else None


KNOWN_BAD: tuple[KnownBad, ...] = (
    KnownBad(
        "tokenizer_workers_broken",
        lambda c: (c.settings.get("tokenizer_workers") or 1) > 1,
        "more than one tokenizer worker breaks every embedding request: never healthy, or an error for each",
        "leave tokenizer_workers at 1, or install 0.5.23: qwen3emb engine install cuda --version 0.5.23",
        ISSUES + "31890",
        fixed="0.5.23",
    ),
    KnownBad(
        "prefill_graph_nan",
        lambda c: (
            c.flavour == "cuda" and c.settings.get("prefill_graphs") is True and not c.settings.get("radix_cache")
        ),
        "short inputs come back as NaN under a prefill CUDA graph when the KV pool is skipped",
        "install 0.5.14 or later: qwen3emb engine install cuda",
        ISSUES + "27343",
        first="0.5.11",
        fixed="0.5.14",
    ),
    KnownBad(
        "full_batch_deadlock",
        lambda c: True,
        "a full embedding batch can deadlock the scheduler",
        "install 0.5.14 or later: qwen3emb engine install cuda",
        ISSUES + "22518",
        fixed="0.5.11",
    ),
    KnownBad(
        "path_needs_embedding",
        lambda c: "Embedding" not in c.model_path,
        "weights load only when the model's path contains the word Embedding",
        "rename the folder, or install 0.5.9 or later: qwen3emb engine install cuda",
        first="0.5.3",
        fixed="0.5.9",
    ),
    KnownBad(
        "dimensions_ignored",
        lambda c: True,
        "the `dimensions` of a request are ignored without an error",
        "install 0.5.14 or later: qwen3emb engine install cuda",
        fixed="0.5.5",
    ),
    KnownBad(
        "cpu_release",
        lambda c: c.flavour == "cpu",
        "this release does not start on a CPU without sgl_kernel; 0.5.13.post1 to 0.5.15.post1 do",
        "qwen3emb engine install cpu",
        fixed="0.5.13.post1",
    ),
    KnownBad(
        "cpu_release",
        lambda c: c.flavour == "cpu",
        "this release does not start on a CPU without sgl_kernel; 0.5.13.post1 to 0.5.15.post1 do",
        "qwen3emb engine install cpu",
        first="0.5.16",
    ),
    KnownBad(
        "full_graph_without_a_text",
        lambda c: (
            _no_pool(c)
            and c.settings.get("prefill_graph_backend") == "full"
            and 1 in (c.settings.get("prefill_graph_requests"), c.settings.get("max_running_requests"))
        ),
        "the only place of a `full` graph would be the padding's: all would be captured and none ever run",
        "--set prefill_graph_requests=129, or --set prefill_graph_backend=breakable",
    ),
    KnownBad(
        "float16_nan",
        lambda c: c.settings.get("dtype") == "float16" and c.shape.hidden_size >= 4096,
        "float16 overflows in the 8B: some texts come back as NaN",
        "use bfloat16: --set dtype=bfloat16",
        "https://github.com/QwenLM/Qwen3-Embedding/issues/164",
    ),
    KnownBad(
        "float16_unproven",
        lambda c: c.settings.get("dtype") == "float16" and c.shape.hidden_size < 4096,
        "the models are published in bfloat16; float16 overflows in the 8B, and nobody has shown that it does not here",
        "use bfloat16, or prove the vectors: qwen3emb verify --level full",
        "https://github.com/QwenLM/Qwen3-Embedding/issues/164",
        verdict="warn",
    ),
    KnownBad(
        "auto_truncate_drops_eos",
        _has("--allow-auto-truncate"),
        "it cuts six tokens early and drops the pooled token <|endoftext|>, also from inputs that fit: a wrong vector "
        "(cosine 0.82) without an error",
        "cut in front of the engine, where the token can be put back: qwen3emb gateway",
    ),
    KnownBad(
        "no_tokenizer",
        _has("--skip-tokenizer-init"),
        "without its tokenizer the engine takes no text",
        "leave it out",
    ),
    KnownBad(
        "fa3_needs_e4m3",
        lambda c: _fa3(c) and c.settings.get("kv_cache_dtype") == "fp8_e5m2",
        "FlashAttention 3 reads fp8_e4m3 only; the engine would quietly take Triton instead",
        "--set kv_cache_dtype=fp8_e4m3",
    ),
    KnownBad(
        "fa3_fp8_needs_hopper",
        lambda c: _fa3(c) and _fp8_pool(c) and _sm(c) == 8 and not _no_pool(c),
        "FlashAttention 3 has no fp8 kernels before Hopper (compute capability 9.0)",
        "--set attention_backend=flashinfer, or keep no pool: --set kv_pool=none --set kv_cache_dtype=auto",
    ),
    KnownBad(
        "fa3_capability",
        lambda c: _fa3(c) and _sm(c) not in (8, 9, None),
        "FlashAttention 3 runs on compute capability 8.x and 9.0 only",
        "--set attention_backend=flashinfer",
    ),
    KnownBad(
        "float32_attention",
        lambda c: (
            c.flavour == "cuda"
            and c.settings.get("dtype") == "float32"
            and c.settings.get("attention_backend") in (None, "fa3", "fa4", "flashinfer")
        ),
        "FlashAttention and FlashInfer compute in 16 bits or less",
        "--set dtype=bfloat16, or for a reference: --set attention_backend=triton --set dtype=float32",
    ),
    KnownBad(
        "no_pool_prefill_backend",
        lambda c: (
            _no_pool(c)
            and "--prefill-attention-backend" in c.options
            and c.options["--prefill-attention-backend"].values not in (("fa3",), ("fa4",))
        ),
        "only fa3 and fa4 can prefill without a KV pool",
        "--set kv_pool=full, or leave --prefill-attention-backend out",
    ),
    KnownBad(
        "fp8_weights_capability",
        lambda c: c.settings.get("quantization") == "fp8" and c.capability is not None and c.capability < (8, 9),
        "before compute capability 8.9 there is no fp8 arithmetic: fp8 weights save memory and cost speed",
        "leave quantization out where the weights fit as they are",
        verdict="warn",
    ),
    KnownBad(
        "data_parallel_one_gpu",
        _has("--dp-size"),
        "data parallelism does not put two copies on one GPU",
        "start several instances",
        ISSUES + "31891",
        verdict="warn",
    ),
)


def judge(combination: Combination, table: tuple[KnownBad, ...] = KNOWN_BAD) -> list[str]:
    """The warnings that apply. Raises InvalidInputError (`known_bad`, details.rule) for the first refused row."""
    warnings = []
    for row in table:
        if not row.applies(combination):
            continue
        link = f" ({row.link})" if row.link else ""
        text = f"sglang {combination.version}: {row.why}{link}"
        if row.verdict == "refuse":
            raise InvalidInputError("known_bad", text, row.instead, {"rule": row.code, "link": row.link})
        warnings.append(f"{text}; {row.instead}")
    return warnings
