"""`plan`: profile, model, engine and GPU become one launch plan, each value with its origin. Pure."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3emb_launch import argv
from qwen3emb_launch.catalog import CATALOG
from qwen3emb_launch.errors import InvalidInputError, UnfitError
from qwen3emb_launch.facts import Deadlines, LaunchPlan, MemoryEstimate, ModelFacts, RestartPolicy, Setting
from qwen3emb_launch.planning import front, known_bad, rules, sizing
from qwen3emb_launch.planning.ledger import Given, Layers, Ledger, merge
from qwen3emb_launch.planning.request import PlanRequest

if TYPE_CHECKING:
    from qwen3emb_launch.profile import Profile

HIGHEST_ENGINE_PORT = 55535  # SGLang claims port + 10000 beside its own
MIN_CAPABILITY = (8, 0)  # bfloat16 arithmetic
SHORT_CONTEXT = 8192  # what most passages fit into; offered where the full length does not fit
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def plan(request: PlanRequest) -> LaunchPlan:
    """Resolve a request into a launch plan.

    Raises InvalidInputError (`unknown_setting`, `bad_setting`, `unknown_flag`, `bad_flag_value`, `duplicate_flag`,
    `reserved_flag`, `incompatible_settings`, `known_bad`, `context_too_long`, `pool_too_small`, `port_too_high`) and
    UnfitError (`no_gpu`, `gpu_too_old`, `engine_flavour`, `engine_version`, `vram`, `memory`).
    """
    _check_surroundings(request)
    around = rules.Surroundings(request.model, request.engine, request.gpu if _on_gpu(request) else None)
    layers = merge(request.profile, request.engine, request.environ, request.overrides)
    ledger, memory, options = _decide(around, layers, request)
    why = sizing.shortfall(around, ledger, memory) if memory else ""
    if memory and why:
        raise sizing.unfit(around, why, memory, next(_alternatives(request), None))

    deadlines = _deadlines(ledger, request)
    host, port, served = _address(ledger, request)
    gateway = front.settings(ledger, request, host, port, served, deadlines)
    engine_host, engine_port = (host, port) if gateway is None else front.behind(request)
    if engine_port > HIGHEST_ENGINE_PORT:
        raise InvalidInputError(
            "port_too_high",
            f"the engine cannot listen on port {engine_port}: it claims {engine_port} + 10000 too, which passes 65535",
            f"--port {HIGHEST_ENGINE_PORT} or below",
        )
    if engine_host not in LOOPBACK:
        ledger.warnings.append(
            f"the engine itself listens on {engine_host}: its own routes are open to that network without a key. "
            "Leave the gateway in front for other machines"
        )
    env = _environment(request, layers, ledger)
    restart = _restart(ledger)  # before the settings are listed, which it adds to
    return LaunchPlan(
        name=request.name or request.profile.name.replace(":", "-"),
        profile=request.profile.name,
        profile_hash=request.profile.digest,
        model=request.model,
        engine=request.engine,
        gpu=around.gpu,
        served_model_name=served,
        host=host,
        port=port,
        engine_host=engine_host,
        engine_port=engine_port,
        context_length=int(ledger.value("context_length")),
        max_dims=request.model.shape.hidden_size,
        argv=argv.build(
            request.engine,
            model_path=str(request.model.path),
            served_name=served,
            host=engine_host,
            port=engine_port,
            options=options,
            plugin=ledger.value("plugin") is not False,
        ),
        env=env,
        settings=tuple(ledger.settings.values()),
        memory=memory,
        deadlines=deadlines,
        restart=restart,
        warnings=tuple(ledger.warnings),
        replicas=int(ledger.value("replicas")),
        gateway=gateway,
    )


def _on_gpu(request: PlanRequest) -> bool:
    return request.engine.flavour == "cuda"


def _check_surroundings(request: PlanRequest) -> None:
    profile, engine, gpu = request.profile, request.engine, request.gpu
    wanted = profile.engine.flavour
    if wanted != engine.flavour:
        raise UnfitError(
            "engine_flavour",
            f"profile {profile.name} runs on a {wanted} engine; {engine.name} is a {engine.flavour} one",
            f"qwen3emb engine install {wanted}",
        )
    if not profile.engine.admits(engine.version):
        raise UnfitError(
            "engine_version",
            f"profile {profile.name} is for sglang {profile.engine.versions}, and {engine.name} has {engine.version}",
            "qwen3emb engine install cuda --version VERSION, then up --engine cuda-VERSION"
            if wanted == "cuda"
            else "there is one cpu release: change the profile's engine.versions",
        )
    if engine.flavour != "cuda":
        return
    if gpu is None:
        raise UnfitError(
            "no_gpu",
            f"profile {profile.name} needs an NVIDIA GPU, and none was found",
            "without one: qwen3emb up --profile demo, or qwen3emb up --profile cpu",
        )
    if gpu.compute_capability is not None and gpu.compute_capability < MIN_CAPABILITY:
        have = ".".join(map(str, gpu.compute_capability))
        raise UnfitError(
            "gpu_too_old",
            f"{gpu.name} has compute capability {have}; bfloat16, which the models need, starts at 8.0",
            "use a GPU of the Ampere generation or later, or qwen3emb up --profile cpu",
        )


def _decide(
    around: rules.Surroundings, layers: Layers, request: PlanRequest
) -> tuple[Ledger, MemoryEstimate | None, list[argv.Option]]:
    """Settings, memory and options, with every option checked against the engine and the table of known-bad ones."""
    ledger = Ledger(layers.settings)
    profile, gpu, flags = request.profile, around.gpu, request.engine.flags
    if gpu and profile.gpu and not profile.gpu.matches(gpu.name, gpu.total_bytes / 2**30):
        ledger.warnings.append(
            f"profile {profile.name} is for {', '.join(profile.gpu.names)}; this is {gpu.name}. "
            "`qwen3emb profiles list` marks the one that matches"
        )
    rules.decide(around, ledger)
    memory = sizing.size(around, ledger, request.ram_bytes)
    options = []
    for setting in ledger.settings.values():
        said = argv.option(setting.key, setting.value)
        if said:
            options.append(argv.check(said, flags, _who(setting)))
    extra = argv.parse_extra(profile.extra_args, flags, f"extra_args of profile {profile.name}")
    extra = _with_set_options(extra, layers.options, request)
    options += extra
    ledger.warnings += known_bad.judge(
        known_bad.Combination(
            version=request.engine.version,
            flavour=request.engine.flavour,
            capability=gpu.compute_capability if gpu else None,
            settings={s.key: s.value for s in ledger.settings.values()},
            options={o.flag: o for o in options},
            model_path=str(request.model.path),
            shape=request.model.shape,
        )
    )
    for one in extra:
        given = layers.options.get(one.flag)
        origin, reason = (
            (given.origin, given.said_by) if given else ("profile", f"extra_args of profile {profile.name}")
        )
        ledger.settings[one.flag] = Setting(one.flag, " ".join(one.values) or True, origin, reason)
    return ledger, memory, options


def _who(setting: Setting) -> str:
    return setting.reason if setting.origin in ("profile", "env", "flag") else f"rule for {setting.key}"


def _with_set_options(
    extra: tuple[argv.Option, ...], given: Mapping[str, Given], request: PlanRequest
) -> tuple[argv.Option, ...]:
    """`--set engine-option=value` over extra_args. For a switch the value is true or false."""
    options = {one.flag: one for one in extra}
    for flag, said in given.items():
        options.pop(flag, None)
        text = str(said.value)
        if request.engine.flags[flag].takes_value:
            words = (flag, *text.split()) if text else ()
        elif text.lower() in ("true", "yes", "1", "on"):
            words = (flag,)
        elif text.lower() in ("false", "no", "0", "off", "null", ""):
            words = ()
        else:
            raise InvalidInputError("bad_flag_value", f"{said.said_by}: {flag} is a switch", "give true or false")
        for one in argv.parse_extra(words, request.engine.flags, said.said_by):
            options[one.flag] = one
    return tuple(options.values())


def _alternatives(request: PlanRequest) -> Iterator[str]:
    """What would fit here instead, as commands: a variant, a shorter context, then smaller models in the same ways."""
    profiles = [(request.profile.name, request.profile), *_variants(request.profile)]
    mine = request.model.catalog_key or request.model.name
    smaller = [key for key in reversed(CATALOG) if CATALOG[key].file_bytes < request.model.weight_bytes]
    for key, model in [(mine, request.model), *((key, catalog_facts(key)) for key in smaller)]:
        for short in ({}, {"context_length": str(SHORT_CONTEXT)}):
            for name, profile in profiles:
                overrides = {**request.overrides, **short}
                if _fits(replace(request, profile=profile, model=model, overrides=overrides)):
                    words = "".join(f" --set {k}={v}" for k, v in short.items())
                    yield f"qwen3emb up --profile {name} --model {shlex.quote(key)}{words}"


def _variants(profile: Profile) -> list[tuple[str, Profile]]:
    return [(f"{profile.name}:{name}", profile.variant(name)) for name in profile.variants]


def _fits(request: PlanRequest) -> bool:
    around = rules.Surroundings(request.model, request.engine, request.gpu if _on_gpu(request) else None)
    layers = merge(request.profile, request.engine, request.environ, request.overrides)
    try:
        ledger, memory, _ = _decide(around, layers, request)
    except InvalidInputError:
        return False
    return memory is not None and not sizing.shortfall(around, ledger, memory)


def catalog_facts(key: str, path: str | None = None) -> ModelFacts:
    """An official model as if it were on disk at `path`: for plans about models that are not downloaded."""
    known = CATALOG[key]
    return ModelFacts(
        known.hub_id, Path(path or known.hub_id), "huggingface", None, known.shape, known.file_bytes,
        known.eos_token_id, key,
    )  # fmt: skip


def _served_name(model: ModelFacts) -> str:
    """A folder goes by its own name: where it lies is nothing that clients should see, or call it by."""
    known = CATALOG.get(model.catalog_key or "")
    if known:
        return known.hub_id
    if model.source != "folder":
        return model.name
    folder = Path(os.path.normpath(model.path))
    cached = folder.parent.name == "snapshots" and re.fullmatch(r"models--(.+?)--(.+)", folder.parent.parent.name)
    name = "/".join(cached.groups()) if cached else folder.name
    return name.replace(":", "-") or model.name  # a colon separates the gateway's tasks from it


def _address(ledger: Ledger, request: PlanRequest) -> tuple[str, int, str]:
    """Where users call and by which model name: the command's own options over everything else."""
    given = dict(ledger.given)
    if request.host is not None:
        given["server.host"] = Given(request.host, "flag", "--host")
    if request.port is not None:
        given["server.port"] = Given(request.port, "flag", "--port")
    if request.served_name is not None:
        given["server.served_name"] = Given(request.served_name, "flag", "--served-name")
    ledger.given = given
    host = ledger.decide("server.host", "127.0.0.1", "this machine only", origin="default")
    port = ledger.decide("server.port", 30000, "SGLang's own", origin="default")
    served = ledger.decide("server.served_name", _served_name(request.model), "the model's own name")
    return str(host), int(port), str(served)


def _environment(request: PlanRequest, layers: Layers, ledger: Ledger) -> dict[str, str]:
    """The engine's environment over the supervisor's own: what its installation needs, ours, then the user's."""
    env = dict(request.engine.environment)
    for name in env:
        ledger.settings[f"env.{name}"] = Setting(
            f"env.{name}", env[name], "rule", f"every start of engine {request.engine.name} needs it"
        )
    ours = [("HF_HUB_OFFLINE", "1", "the model is on disk: no start waits for a hub")]
    if request.gpu and request.gpu.uuid and ledger.value("tp") == 1:
        # By number, not by UUID: parts of the engine read the numbers. The order makes CUDA count as NVML does.
        ours.append(("CUDA_DEVICE_ORDER", "PCI_BUS_ID", "CUDA numbers the cards as NVML does"))
        ours.append(
            ("CUDA_VISIBLE_DEVICES", str(request.gpu.index), f"the card that was planned for: {request.gpu.name}")
        )
    if ledger.value("plugin") is False:
        ours.append(("QWEN3EMB_PLUGIN", "0", "the stock engine was asked for"))
    for name, value, reason in ours:
        env[name] = value
        ledger.settings[f"env.{name}"] = Setting(f"env.{name}", value, "rule", reason)
    for name, given in layers.env.items():
        env[name] = str(given.value)
        ledger.settings[f"env.{name}"] = Setting(f"env.{name}", str(given.value), given.origin, given.said_by)
    return env


def _deadlines(ledger: Ledger, request: PlanRequest) -> Deadlines:
    """A cold disk gives 50 MB/s; kernels compiled and captured on a first start took up to 165 s on an H100."""
    start = 180.0 if not _on_gpu(request) else 420.0
    values: dict[str, Any] = {field.name: field.default for field in fields(Deadlines)}
    values["start"] = start + request.model.weight_bytes // 50_000_000
    reason = f"{start:g} s, and the weights at 50 MB/s from a cold disk"
    values["start"] = ledger.decide("deadlines.start", values["start"], reason)
    for name in values:
        asked = ledger.asked(f"deadlines.{name}")
        if asked is not None:
            values[name] = ledger.decide(f"deadlines.{name}", asked, "")
    return Deadlines(**values)


def _restart(ledger: Ledger) -> RestartPolicy:
    asked = {field.name: ledger.asked(f"restart.{field.name}") for field in fields(RestartPolicy)}
    chosen = {name: ledger.decide(f"restart.{name}", v, "") for name, v in asked.items() if v is not None}
    return RestartPolicy(**chosen)
