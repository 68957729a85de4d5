"""The profile schema, version 1: what to launch, on what, and the measured evidence for it.

A profile states only what its author decided. Everything left out is decided by the planner from the model, the GPU
and the engine's version, and shown by `qwen3emb profiles explain` with its reason. Lengths are tokens, memory is GiB
where a field says so, times are seconds.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from datetime import date
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from qwen3emb_launch.facts import version_key

SCHEMA = 1
NAME = r"^[a-z0-9][a-z0-9._-]*$"

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Words = Annotated[tuple[str, ...], Field(strict=False)]
Day = Annotated[date, Field(strict=False)]  # YAML reads a date, JSON an ISO string
Sizes = Annotated[tuple[Count, ...], Field(strict=False)]


class Part(BaseModel):
    """Frozen, no unknown keys, no silent conversions (`tp: "1"` is an error)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def check_variable(name: str) -> None:
    """ValueError for what cannot name an environment variable, or names a secret: profiles and plans are shown."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f"{name!r} is no name of an environment variable")
    if re.search(r"(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIALS?)$", name, flags=re.IGNORECASE):
        raise ValueError(f"{name} is a secret, and profiles are shown: export it, the engine inherits your environment")


class GpuMatch(Part):
    """Which GPUs the profile is for. `names` are NVML names, `*` and `?` as in a shell, any case."""

    names: Words = Field(min_length=1, description="NVML product names, with * and ?")
    vram_gib: float = Field(gt=0, description="nominal memory of the card, GiB")
    min_vram_gib: float = Field(gt=0, description="refuse smaller cards of that name (laptop versions, MIG slices)")
    compute_capability: str = Field(pattern=r"^\d+\.\d+$", description="for example 8.9")

    def matches(self, name: str, vram_gib: float) -> bool:
        """Whether a card of this name and memory is meant."""
        known = any(fnmatchcase(name.lower(), pattern.lower()) for pattern in self.names)
        return known and vram_gib >= self.min_vram_gib

    @property
    def capability(self) -> tuple[int, int]:
        """`8.9` as (8, 9)."""
        major, minor = self.compute_capability.split(".")
        return int(major), int(minor)


class EngineChoice(Part):
    """Which engine environments may run it. `versions` is a list of comparisons, such as `>=0.5.14,<0.6.0`."""

    flavour: Literal["cuda", "cpu"] = "cuda"
    versions: str | None = Field(
        default=None, pattern=r"^(>=|<=|==|<|>)\s*\d[\w.]*(\s*,\s*(>=|<=|==|<|>)\s*\d[\w.]*)*$"
    )

    def admits(self, version: str) -> bool:
        """Whether an SGLang release is within the range; a profile without one takes any."""
        seen = version_key(version)
        for clause in (self.versions or "").split(","):
            match = re.match(r"\s*(>=|<=|==|<|>)\s*(.+?)\s*$", clause)
            if match and not _compare(seen, match[1], version_key(match[2])):
                return False
        return True


def _compare(seen: tuple[int, ...], operator: str, wanted: tuple[int, ...]) -> bool:
    return {
        ">=": seen >= wanted,
        "<=": seen <= wanted,
        "==": seen == wanted,
        "<": seen < wanted,
        ">": seen > wanted,
    }[operator]


class Settings(Part):
    """What the engine is told. A key left out (or null) is the planner's to decide."""

    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        default=None, description="of weights and activations"
    )
    quantization: str | None = Field(default=None, description="of the weights: fp8, or none", min_length=1)
    tp: Count | None = Field(default=None, description="GPUs the model is split over")
    replicas: Count | None = Field(default=None, description="engines behind the gateway, all on one GPU (or the CPU)")
    mem_fraction_static: float | None = Field(
        default=None, gt=0, lt=1, description="share of the GPU's free memory for weights and KV pool together"
    )
    kv_pool: Literal["auto", "none", "full"] | None = Field(
        default=None, description="keep keys and values in a pool; embedding alone needs none where FA3 runs"
    )
    kv_cache_dtype: Literal["auto", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2"] | None = Field(
        default=None, description="of the KV pool; `fp8` is spelled as the engine and the GPU want it"
    )
    context_length: int | None = Field(
        default=None, ge=16, description="longest input plus one, in tokens, EOS included"
    )
    attention_backend: str | None = Field(default=None, min_length=1)
    radix_cache: bool | None = Field(default=None, description="prefix cache; pays where a long instruction is shared")
    chunked_prefill_size: Literal[-1] | Count | None = Field(
        default=None, description="tokens of one prefill step; -1 means no chunks"
    )
    max_prefill_tokens: Count | None = Field(default=None, description="tokens of one prefill batch")
    prefill_max_requests: Count | None = Field(default=None, description="texts of one prefill batch")
    max_total_tokens: Count | None = Field(default=None, description="tokens the KV pool holds, or counts without one")
    max_running_requests: Count | None = None
    max_queued_requests: Count | None = None
    page_size: Count | None = Field(default=None, description="tokens of one page of the KV pool")
    prefill_graphs: bool | None = Field(
        default=None, description="CUDA graphs for prefill: one launch instead of hundreds"
    )
    prefill_graph_sizes: Sizes | None = Field(
        default=None, description="batch sizes in tokens to capture", min_length=1
    )
    prefill_graph_backend: str | None = Field(default=None, min_length=1)
    prefill_graph_requests: Count | None = Field(
        default=None, description="requests of one `full` graph, one of them the padding's"
    )
    decode_graphs: bool | None = Field(default=None, description="CUDA graphs for decoding, which embedding never does")
    batch_tokenize: Literal["lists", "singles", "off"] | None = Field(
        default=None, description="tokenise the items of a request together, or many requests together"
    )
    tokenizer_workers: Count | None = None
    overlap_schedule: bool | None = Field(default=None, description="prepare the next batch while one runs")
    sleep_on_idle: bool | None = Field(default=None, description="an idle scheduler waits instead of spinning")
    trust_remote_code: bool | None = Field(default=None, description="run Python that the checkpoint brings along")
    log_level: str | None = Field(default=None, min_length=1)
    log_level_http: str | None = Field(
        default=None, min_length=1, description="of the HTTP server; info logs every request"
    )
    plugin: bool | None = Field(default=None, description="load the embedding plugin, where the engine has it")

    def given(self) -> dict[str, Any]:
        """Only what the author decided: null counts as left out."""
        return {key: value for key, value in self.model_dump().items() if value is not None}


class Server(Part):
    """The address users call."""

    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=30000, ge=1, le=65535)
    served_name: str | None = Field(default=None, min_length=1, description="the model's name for clients")


class GatewayChoice(Part):
    """The gateway that `up` starts before the engines; what it can do is in docs/gateway.md."""

    enabled: bool | None = Field(default=None, description="false: users call the engine itself")
    workers: Count | None = Field(default=None, description="processes that share the port")
    cache_mb: Annotated[int, Field(ge=0)] | None = Field(default=None, description="memory for vectors, MiB; 0: none")
    disk_cache: str | None = Field(default=None, min_length=1, description="file for vectors that survive a restart")
    hold: Seconds | None = Field(default=None, description="how long a request waits for an engine to come back")
    tasks: str | None = Field(default=None, min_length=1, description="file with a table of tasks, see docs/tasks.md")
    api_keys: str | None = Field(default=None, min_length=1, description="file with the API keys of those who may call")
    insecure: bool | None = Field(default=None, description="serve other machines without API keys")
    overflow: Literal["refuse", "truncate"] | None = Field(default=None, description="inputs over the context length")
    access_log: str | None = Field(default=None, min_length=1, description="file for one JSON line a request")
    admin_port: int | None = Field(default=None, ge=1, le=65535, description="loopback port for /metrics and /ui")


class DeadlineChoice(Part):
    """Named time-outs in seconds, as in facts.Deadlines; left out: decided from the model's size."""

    start: Seconds | None = None
    probe: Seconds | None = None
    probe_every: Seconds | None = None
    probe_failures: Count | None = None
    drain: Seconds | None = None
    reap: Seconds | None = None


class RestartChoice(Part):
    """How a crash is answered, as in facts.RestartPolicy."""

    first: Seconds | None = None
    factor: Annotated[float, Field(ge=1)] | None = None
    longest: Seconds | None = None
    limit: Annotated[int, Field(ge=0)] | None = None
    window: Seconds | None = None


class Evidence(Part):
    """One measured figure, and the command that measures it again."""

    what: str = Field(min_length=1)
    value: float
    unit: str = Field(min_length=1)
    hardware: str = Field(min_length=1)
    versions: dict[str, str]
    date: Day
    command: str = Field(min_length=1)


EvidenceOrNone = Literal["none"] | Annotated[tuple[Evidence, ...], Field(strict=False)]


class Variant(Part):
    """A named change of a profile: `rtx4090:lean`. What it states wins over the profile's own."""

    description: str = Field(min_length=1)
    settings: Settings = Settings()
    extra_args: Words = ()
    env: dict[str, str] = {}
    evidence: EvidenceOrNone = "none"


class Profile(Part):
    """A launch profile. `evidence` is `none`, said plainly, until figures were measured on that hardware."""

    model_config = ConfigDict(title="qwen3emb launch profile, schema 1")

    schema_version: Literal[1] = Field(alias="schema")
    name: str = Field(pattern=NAME)
    description: str = Field(min_length=1)
    model: str = Field(default="4b", min_length=1, description="0.6b, 4b, 8b, demo, a hub id or a folder")
    gpu: GpuMatch | None = Field(default=None, description="which GPUs it is for; none for the CPU")
    engine: EngineChoice = EngineChoice()
    settings: Settings = Settings()
    variants: dict[Annotated[str, Field(pattern=NAME)], Variant] = {}
    extra_args: Words = Field(default=(), description="further options of the engine, checked against those it has")
    env: dict[str, str] = Field(default={}, description="environment of the engine; no secrets")
    server: Server = Server()
    gateway: GatewayChoice = GatewayChoice()
    deadlines: DeadlineChoice = DeadlineChoice()
    restart: RestartChoice = RestartChoice()
    evidence: EvidenceOrNone = "none"

    @field_validator("env")
    @classmethod
    def _names_of_variables(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            check_variable(name)
        return value

    @model_validator(mode="after")
    def _gpu_follows_flavour(self) -> Profile:
        if (self.engine.flavour == "cuda") != (self.gpu is not None):
            raise ValueError("`gpu` is required with engine.flavour cuda and has no place with cpu")
        return self

    def variant(self, name: str) -> Profile:
        """The profile with one of its variants applied, named `profile:variant`. KeyError for an unknown one.

        A null in a variant takes the profile's own decision back.
        """
        change = self.variants[name]
        merged = {**self.settings.given(), **change.settings.model_dump(exclude_unset=True)}
        return self.model_copy(
            update={
                "name": f"{self.name}:{name}",
                "description": change.description,
                "settings": Settings(**merged),
                "extra_args": self.extra_args + change.extra_args,
                "env": {**self.env, **change.env},
                "evidence": change.evidence,
                "variants": {},
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data as in the YAML, without what the author left out."""
        data = self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_unset=True)
        return {key: value for key, value in data.items() if value not in ({}, [])}

    @property
    def digest(self) -> str:
        """A short hash of everything that decides the launch; the description and the evidence do not."""
        deciding = {k: v for k, v in self.to_dict().items() if k not in ("description", "evidence", "variants")}
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]


PARTS: dict[str, type[Part]] = {
    "gpu": GpuMatch,
    "engine": EngineChoice,
    "settings": Settings,
    "server": Server,
    "gateway": GatewayChoice,
    "deadlines": DeadlineChoice,
    "restart": RestartChoice,
    "evidence": Evidence,
}


def keys_at(path: Sequence[str | int]) -> list[str]:
    """The keys that the mapping at `path` may have; empty where keys are free (`env`, the names of variants)."""
    steps = [step for step in path if isinstance(step, str)]
    if not steps:
        return [field.alias or name for name, field in Profile.model_fields.items()]
    if steps[0] == "variants" and len(steps) == 2:
        return list(Variant.model_fields)
    part = PARTS.get(steps[-1])
    return list(part.model_fields) if part else []
