"""What the adapters found out, as plain data: engine environments, their flags, GPUs, models on disk.

Adapters (L2) fill these, the planner (L1) decides on them, nobody else needs to know where they came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qwen3emb_launch.catalog import ModelShape

Flavour = Literal["cuda", "cpu"]
Origin = Literal["default", "rule", "profile", "env", "flag"]


@dataclass(frozen=True)
class EngineFlag:
    """One option of `python -m sglang.launch_server`, as its own help says.

    `takes_value` is False for switches; `choices` is empty when any value goes.
    """

    name: str
    takes_value: bool
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class EngineFacts:
    """An engine environment that passed its self-check.

    `environment` is what every start of it needs (SGLANG_USE_CPU_ENGINE, CUDA_HOME); no secrets.
    `packages` holds the versions that decide speed and vectors: torch, transformers, sglang-kernel, the plugin.
    """

    name: str
    flavour: Flavour
    version: str
    python: Path
    adopted: bool
    flags: Mapping[str, EngineFlag]
    environment: Mapping[str, str] = field(default_factory=dict)
    packages: Mapping[str, str] = field(default_factory=dict)
    plugin: str | None = None

    @property
    def version_key(self) -> tuple[int, ...]:
        """`0.5.15.post1` as (0, 5, 15, 1), for comparing releases."""
        return version_key(self.version)


def version_key(version: str) -> tuple[int, ...]:
    """An SGLang release as a tuple that sorts as the releases do: 0.5.15 < 0.5.15.post1 < 0.5.16."""
    import re

    match = re.match(r"(\d+)\.(\d+)\.(\d+)(?:\.post(\d+))?", version)
    return tuple(int(g or 0) for g in match.groups()) if match else (0, 0, 0, 0)


@dataclass(frozen=True)
class GpuFacts:
    """One NVIDIA GPU as NVML sees it. Bytes; `compute_capability` as (9, 0). None means NVML did not say."""

    index: int
    name: str
    uuid: str
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int] | None
    driver: str | None = None


@dataclass(frozen=True)
class ModelFacts:
    """A checkpoint on disk, complete enough to serve. `revision` is the hub's commit, or None for a plain folder.

    `eos_token_id` is the token that the tokenizer appends and the model pools; None when the tokenizer appends none.
    `source` says where it came from: huggingface, modelscope, folder, demo. `warnings` are sentences for people: what
    will be served differently than the checkpoint's author meant it.
    """

    name: str
    path: Path
    source: str
    revision: str | None
    shape: ModelShape
    weight_bytes: int
    eos_token_id: int | None
    catalog_key: str | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setting:
    """One value of a plan and where it came from: default, rule, profile, env or flag; `reason` in one sentence."""

    key: str
    value: Any
    origin: Origin
    reason: str = ""


@dataclass(frozen=True)
class MemoryEstimate:
    """What the plan will take on the GPU, in bytes, and what there is. `terms` are the addends, by name."""

    terms: Mapping[str, int]
    total_bytes: int
    available_bytes: int | None

    @property
    def needed_bytes(self) -> int:
        """The sum of the addends."""
        return sum(self.terms.values())

    @property
    def fits(self) -> bool | None:
        """None when there is no GPU to compare with."""
        return None if self.available_bytes is None else self.needed_bytes <= self.available_bytes


@dataclass(frozen=True)
class Deadlines:
    """Named time-outs, in seconds. Every wait of the supervisor is one of these."""

    start: float = 600.0  # spawn to the first good embedding
    probe: float = 30.0  # one liveness embedding
    probe_every: float = 10.0  # between two of them
    probe_failures: int = 3  # that many in a row, with no progress of the engine, is death
    drain: float = 30.0  # TERM to the main process, until KILL for the group
    reap: float = 5.0  # KILL until every process is gone


@dataclass(frozen=True)
class RestartPolicy:
    """A crash is answered by a restart after `first * factor**n` seconds, `longest` at most.

    More than `limit` restarts within `window` seconds is a failure of the instance.
    """

    first: float = 0.5
    factor: float = 2.0
    longest: float = 30.0
    limit: int = 5
    window: float = 600.0


@dataclass(frozen=True)
class LaunchPlan:
    """Everything `up` does, decided. Serialised into the instance's folder, printed by `--dry-run`.

    `argv` starts with the environment's python and holds no secret: keys travel in the 0600 file that the
    supervisor writes at start and passes with `--config`. `env` is added to the supervisor's own environment.
    `host`/`port` is the address users call; `engine_host`/`engine_port` is where the engine listens (the same without
    a gateway). `context_length` is the longest input in tokens, EOS included, plus one. `replicas` engines run the same
    command, each on a port of its own. `gateway` are the settings of the gateway before them, without a secret and
    without the engines' addresses; None where users call the engine itself. `memory` is that of all engines together.
    """

    name: str
    profile: str
    profile_hash: str
    model: ModelFacts
    engine: EngineFacts
    gpu: GpuFacts | None
    served_model_name: str
    host: str
    port: int
    engine_host: str
    engine_port: int
    context_length: int
    max_dims: int
    argv: tuple[str, ...]
    env: Mapping[str, str]
    settings: tuple[Setting, ...]
    memory: MemoryEstimate | None
    deadlines: Deadlines = Deadlines()
    restart: RestartPolicy = RestartPolicy()
    warnings: tuple[str, ...] = ()
    replicas: int = 1
    gateway: Mapping[str, Any] | None = None

    @property
    def base_url(self) -> str:
        """The address as the OpenAI client takes it."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::", "") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/v1"

    def setting(self, key: str, default: Any = None) -> Any:
        """The value of one setting by its key."""
        return next((s.value for s in self.settings if s.key == key), default)
