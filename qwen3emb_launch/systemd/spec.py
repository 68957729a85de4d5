"""From a launch plan to a unit: deadlines, memory, folders, words. Pure, but for the environment it is handed."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from qwen3emb_launch import __version__, unit_text
from qwen3emb_launch.errors import InvalidInputError
from qwen3emb_launch.facts import Deadlines, LaunchPlan
from qwen3emb_launch.notify import watchdog_seconds
from qwen3emb_launch.systemd import places
from qwen3emb_launch.unit_text import Scope, Service, Verbatim

# This installation of qwen3emb. `-P`: a file in the working folder must not be taken for a module.
LAUNCHER = (sys.executable, "-P", "-m", "qwen3emb_launch")
WRITTEN_BY = "Written by `qwen3emb systemd install`"
ROOM = 60.0  # seconds of a start before and after the engine's own: reading, planning, the last kill
STOP_ROOM = 20.0
MEMORY_FACTOR = 2
GATEWAY_BYTES = 256 << 20  # a worker of the gateway without its cache, some thousand requests in the air
GPU_HOST_BYTES = 16 << 30  # libraries and pinned buffers of a CUDA engine, beside its weights on their way to the card
LOOPBACK = ("127.0.0.1", "::1", "localhost")

# Variables of the installing shell that a user's service keeps; a system service has folders of its own.
KEPT = (
    "QWEN3EMB_DATA_DIR",
    "QWEN3EMB_STATE_DIR",
    "QWEN3EMB_CACHE_DIR",
    "QWEN3EMB_CONFIG_DIR",
    "HF_HOME",
    "HF_HUB_CACHE",
    "MODELSCOPE_HOME",
    "XDG_CACHE_HOME",
    "XDG_DATA_HOME",
    "CUDA_HOME",
    "CUDA_VISIBLE_DEVICES",
)
# Where a hub is, for services that may download.
HUBS = ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT")
# Credentials whose file a variable names.
API_KEYS = "api_keys"  # of those who may call the gateway
CREDENTIAL_VARIABLES = {"hf_token": "HF_TOKEN_PATH", API_KEYS: "QWEN3EMB_SET_GATEWAY__API_KEYS"}


@dataclass(frozen=True)
class Wanted:
    """What the unit is to run: `up`'s own options. `credentials` are name -> file; `download` lets starts fetch."""

    scope: Scope
    instance: str
    profile: str | None = None
    model: str | None = None
    host: str | None = None
    port: int | None = None
    engine: str | None = None
    settings: Sequence[str] = ()
    download: bool = False
    credentials: Mapping[str, str] = field(default_factory=dict)


def service(wanted: Wanted, plan: LaunchPlan, environ: Mapping[str, str]) -> Service:
    """The unit of one instance.

    Raises InvalidInputError: `bad_credential`, `secret_in_unit`, `unit_unsafe`.
    """
    cuda = plan.engine.flavour == "cuda"
    return Service(
        scope=wanted.scope,
        description=f"Qwen3-Embedding endpoint {wanted.instance} ({plan.served_model_name}) on SGLang",
        words=_words(wanted),
        instance=wanted.instance,
        environment=environment(wanted, environ),
        cuda=cuda,
        start_seconds=plan.deadlines.start + plan.deadlines.reap + ROOM,
        stop_seconds=stop_seconds(plan.deadlines),
        watchdog_seconds=watchdog_seconds(plan.deadlines),
        memory_bytes=memory_bytes(plan),
        loopback=plan.host in LOOPBACK and not wanted.download and int(plan.setting("tp", 1)) == 1,
        network=wanted.download,
        credentials=_checked(wanted.credentials),
        from_credentials=_variables(wanted.credentials),
        head=(
            f"{WRITTEN_BY} {__version__}: the next one overwrites it.",
            f"Changes belong in {places.unit_name(wanted.instance)}.d/, which nothing overwrites.",
        ),
    )


def template(scope: Scope, environ: Mapping[str, str], *, cuda: bool) -> Service:
    """`qwen3emb@PROFILE.service`: no plan is known, so the supervisor extends what is too short."""
    deadlines = Deadlines()
    folder = places.CONFIG if scope == "system" else "%E/qwen3emb"
    return Service(
        scope=scope,
        description="Qwen3-Embedding endpoint, profile %i, on SGLang",
        words=(*LAUNCHER, "up", "--offline", "--profile", Verbatim("%i")),
        instance="%i",
        environment=environment(Wanted(scope, "%i"), environ),
        cuda=cuda,
        start_seconds=deadlines.reap + 2 * ROOM,
        stop_seconds=stop_seconds(deadlines),
        watchdog_seconds=watchdog_seconds(deadlines),
        environment_file=f"{folder}/%i.env",
        head=(
            f"{WRITTEN_BY} --template {__version__}: the next one overwrites it.",
            "Changes belong in qwen3emb@.service.d/ or qwen3emb@PROFILE.service.d/, which nothing overwrites.",
            f"Settings of one instance: {folder.replace('%E', '~/.config')}/PROFILE.env,",
            "such as QWEN3EMB_SET_SERVER__PORT=30001",
        ),
    )


def stop_seconds(deadlines: Deadlines) -> float:
    """The drain, the kill, and room to write the last line."""
    return deadlines.drain + deadlines.reap + STOP_ROOM


def memory_bytes(plan: LaunchPlan) -> int:
    """The host memory that the service may take before it is a leak."""
    if plan.engine.flavour == "cuda":
        engines = plan.replicas * (MEMORY_FACTOR * plan.model.weight_bytes + GPU_HOST_BYTES)
    else:  # the plan's estimate is for all replicas
        needed = plan.memory.needed_bytes if plan.memory else 2 * plan.model.weight_bytes + GPU_HOST_BYTES // 2
        engines = MEMORY_FACTOR * needed
    before = plan.gateway or {}
    workers, cache = int(before.get("workers", 0)), int(before.get("cache_bytes", 0))
    return engines + MEMORY_FACTOR * cache + workers * GATEWAY_BYTES


def environment(wanted: Wanted, environ: Mapping[str, str]) -> dict[str, str]:
    """The service's variables: its own folders, or those of the user's shell. Never a secret."""
    hubs = {name: environ[name] for name in HUBS if wanted.download and environ.get(name)}
    for name, value in hubs.items():
        if "@" in urlsplit(value).netloc:
            raise InvalidInputError(
                "secret_in_unit", f"{name} carries a password, and unit files are shown", f"unset {name}"
            )
    if wanted.scope == "system":
        return {**places.SYSTEM_FOLDERS, **hubs}
    kept = {name: environ[name] for name in KEPT if environ.get(name)}
    overrides = {name: value for name, value in sorted(environ.items()) if name.startswith("QWEN3EMB_SET_")}
    return {**kept, **overrides, **hubs}


def _words(wanted: Wanted) -> tuple[str, ...]:
    words = [*LAUNCHER, "up", "--name", wanted.instance]
    words += [] if wanted.download else ["--offline"]
    given = {
        "--profile": wanted.profile,
        "--model": wanted.model,
        "--host": wanted.host,
        "--port": wanted.port,
        "--engine": wanted.engine,
    }
    for option, value in given.items():
        words += [] if value is None else [option, str(value)]
    for setting in wanted.settings:
        words += ["--set", setting]
    return tuple(words)


def _checked(credentials: Mapping[str, str]) -> Mapping[str, str]:
    for name in credentials:
        if not name.replace("_", "").replace("-", "").isalnum():
            raise InvalidInputError(
                "bad_credential", f"{name!r} cannot name a credential", "--credential hf_token=/etc/qwen3emb/hf_token"
            )
    return dict(credentials)


def _variables(credentials: Mapping[str, str]) -> dict[str, str]:
    return {variable: name for name, variable in CREDENTIAL_VARIABLES.items() if name in credentials}


def text(spec: Service) -> str:
    """The unit file."""
    return unit_text.service(spec)
