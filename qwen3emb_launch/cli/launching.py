"""From what the user asked for to a launch plan: profile, GPU, engine and model, fetched where they are missing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3emb_launch.console import Console
from qwen3emb_launch.errors import UnfitError

if TYPE_CHECKING:
    from qwen3emb_launch.facts import EngineFacts, GpuFacts, LaunchPlan, ModelFacts
    from qwen3emb_launch.profile import Profile


@dataclass(frozen=True)
class LaunchOptions:
    """What a launching command was given. None means: not said. `settings` are `--set` words, unread.

    `dry`: nothing is to be started, so nothing is installed or downloaded either.
    """

    model: str | None = None
    profile: str | None = None
    name: str | None = None
    host: str | None = None
    port: int | None = None
    engine: str | None = None
    settings: tuple[str, ...] = ()
    offline: bool = False
    dry: bool = False


@dataclass(frozen=True)
class Chosen:
    """The profile, the GPU it will run on (None for the CPU), and the instance's name."""

    profile: Profile
    gpu: GpuFacts | None
    name: str

    def address(self, options: LaunchOptions) -> tuple[str, int]:
        """Host and port that will be listened on, as far as they are known before planning."""
        host = self.said("server.host", options) if options.host is None else options.host
        port = self.said("server.port", options) if options.port is None else options.port
        return str(host), int(port)

    def said(self, key: str, options: LaunchOptions, environ: Mapping[str, str] = os.environ) -> Any:
        """What flag, environment or profile say of a key such as `server.port`: planning will decide the same.

        Raises InvalidInputError `bad_setting`.
        """
        from qwen3emb_launch import planning
        from qwen3emb_launch.planning.ledger import ENV_PREFIX, read_setting

        part, name = key.split(".")
        own = getattr(self.profile, part)
        variable = ENV_PREFIX + key.upper().replace(".", "__")
        given = planning.read_overrides(list(options.settings))
        for text, source in ((given.get(key), f"--set {key}={given.get(key)}"), (environ.get(variable), variable)):
            if text is not None:
                value = read_setting(key, text, source)
                return getattr(type(own)(), name) if value is None else value
        return getattr(own, name)

    def gateway_workers(self, options: LaunchOptions, environ: Mapping[str, str] = os.environ) -> int:
        """Gateway processes on this machine where nobody says how many; keys are read only where there is a gateway.

        Raises InvalidInputError `bad_setting`, `bad_keys`.
        """
        from qwen3emb_launch.gateway import keys
        from qwen3emb_launch.gateway.host import usable_cores
        from qwen3emb_launch.planning.front import workers_for

        if self.said("gateway.enabled", options, environ) is False:
            return 1
        keys_file = self.said("gateway.api_keys", options, environ)
        limited = keys.load(Path(keys_file).expanduser() if keys_file else None).limited
        return workers_for(usable_cores(), gpu=self.profile.engine.flavour == "cuda", limited=limited)


def choose(options: LaunchOptions, console: Console) -> Chosen:
    """The named profile, or the one that matches the GPU found. Raises UnfitError `no_gpu`, InvalidInputError."""
    from qwen3emb_launch.engine_process.ports import check_host, check_range
    from qwen3emb_launch.hub.names import parse
    from qwen3emb_launch.state import check_name

    if options.model is not None:
        parse(options.model)
    if options.port is not None:
        check_range(options.port)
    if options.host is not None:
        check_host(options.host)
    try:
        profile, card = _profile_and_card(options, console)
    except UnfitError as error:
        if error.code == "no_gpu":
            error.hint = _without_gpu(options, console)
        raise
    return Chosen(profile, card, check_name(profile.name.replace(":", "-") if options.name is None else options.name))


def _profile_and_card(options: LaunchOptions, console: Console) -> tuple[Profile, GpuFacts | None]:
    from qwen3emb_launch import gpu, planning, profile_files

    wanted = "demo" if options.profile is None and options.model == "demo" else options.profile
    if wanted is not None:
        profile = profile_files.load(wanted)
        return profile, None if profile.engine.flavour == "cpu" else planning.card_for(profile, gpu.inventory())
    match = planning.match_profile(gpu.inventory(), profile_files.profiles())
    if match.warning:
        console.warn(match.warning)
    console.say(f"profile {match.profile.name}, for {match.gpu.name}")
    return match.profile, match.gpu


def _without_gpu(options: LaunchOptions, console: Console) -> str:
    """The next step is the same command with another profile; a named one's launch can be looked at anywhere."""
    look = f"what it launches: qwen3emb profiles explain {options.profile}; " if options.profile else ""
    again = f"qwen3emb {console.command}{' --dry-run' if options.dry else ''} --profile"
    return f"{look}without a GPU: {again} demo, or --profile cpu; else: qwen3emb doctor"


def make_plan(options: LaunchOptions, chosen: Chosen, console: Console) -> LaunchPlan:
    """The launch plan; what is missing is installed and downloaded, unless `offline`.

    What is known of engine and model before they are here is planned first: gigabytes are not fetched for what would be
    refused with them.
    """
    from qwen3emb_launch import hub, planning
    from qwen3emb_launch.engine_process.ports import private_port
    from qwen3emb_launch.up.room import available_memory

    def planned(engine: EngineFacts, model: ModelFacts) -> LaunchPlan:
        return planning.plan(
            planning.PlanRequest(
                profile=chosen.profile,
                model=model,
                engine=engine,
                gpu=chosen.gpu,
                overrides=overrides,
                environ=dict(os.environ),
                name=chosen.name,
                host=options.host,
                port=options.port,
                engine_port=private_port("127.0.0.1"),
                ram_bytes=None if chosen.gpu else available_memory(),
                gateway_workers=chosen.gateway_workers(options),
            )
        )

    overrides = planning.read_overrides(list(options.settings))
    wanted = chosen.profile.model if options.model is None else options.model
    engine, model = _engine_here(options, chosen), hub.local(wanted)
    if not (engine and model):
        from qwen3emb_launch.explain import published, to_be_installed

        expected = model or published(wanted)
        if expected:
            planned(engine or to_be_installed(chosen.profile.engine.flavour), expected)
    plan = planned(engine or _install(chosen, console), model or _fetch(wanted, options, console))
    for warning in plan.warnings:
        console.warn(warning)
    return with_gateway(plan)


def with_gateway(plan: LaunchPlan) -> LaunchPlan:
    """The plan with its gateway's settings complete, checked as the gateway itself would: what it cannot work with is
    refused before anything starts.

    Raises InvalidInputError (`bad_gateway_config`, `bad_keys`, `bad_tasks`) and UnfitError `no_api_keys`.
    """
    if plan.gateway is None:
        return plan
    settings = dict(plan.gateway)
    for name in ("tasks_file", "keys_file", "disk_cache", "access_log"):
        if settings.get(name) and not (name == "access_log" and settings[name] == "-"):
            settings[name] = str(Path(settings[name]).expanduser().absolute())
    if settings.get("disk_cache"):
        settings["fingerprint"] = _vectors_of(plan)
    _check_gateway(settings)
    return replace(plan, gateway=settings)


def check_front(options: LaunchOptions, chosen: Chosen) -> None:
    """What would keep the address from being served, as far as it is known before planning: it is in use, the gateway
    has no keys for other machines, or a file of its settings is wrong. Nothing is fetched for what cannot be started.

    Raises what `ports.check_free` and `with_gateway` raise.
    """
    from qwen3emb_launch.planning.front import GATEWAY_NAMES

    host, port = chosen.address(options)
    behind = chosen.said("gateway.enabled", options) is not False
    workers = chosen.said("gateway.workers", options) or chosen.gateway_workers(options) if behind else 0
    _check_address(host, port, workers)
    if not behind:
        return
    said = {GATEWAY_NAMES[key]: chosen.said(f"gateway.{key}", options) for key in ("api_keys", "tasks", "insecure")}
    _check_gateway({"host": host, "port": port} | {name: value for name, value in said.items() if value is not None})


def _check_address(host: str, port: int, workers: int) -> None:
    """That it is free, or kept open by the service manager for so many gateway workers, none being the bare engine.

    What is kept and does not fit is let go, here and by the service manager: it would be in its own service's way, at
    this start and at every later one.
    """
    from contextlib import ExitStack

    from qwen3emb_launch.engine_process.ports import check_free, let_go
    from qwen3emb_launch.listening import fits, kept, take_kept
    from qwen3emb_launch.notify import drop_stored

    with ExitStack() as copies:
        found = [copies.enter_context(one) for one in kept(os.environ)]
        if workers and fits(found, host, port, workers):
            return
    if not found:
        check_free(host, port)  # the supervisor looks again before each start
        return
    let_go(take_kept(os.environ), lambda: drop_stored(os.environ), host, port)


def _check_gateway(settings: Mapping[str, Any]) -> None:
    """As the gateway itself would."""
    from qwen3emb_launch.gateway import config, keys, tasks

    checked = config.from_dict(settings)
    keys.load(Path(checked.keys_file).expanduser() if checked.keys_file else None)
    tasks.load(Path(checked.tasks_file).expanduser() if checked.tasks_file else None)


def _vectors_of(plan: LaunchPlan) -> str:
    """What decides the vectors, for a cache that outlives the engine: another text here, and it starts empty."""
    from qwen3emb_launch.paths import paths
    from qwen3emb_launch.weights import weights_sha256

    weights = weights_sha256(plan.model.path, paths().cache / "weights.json") or plan.model.revision or plan.model.path
    parts = [weights, plan.engine.version, *(plan.setting(key) for key in ("dtype", "quantization", "kv_cache_dtype"))]
    return " ".join(map(str, parts))


def _engine_here(options: LaunchOptions, chosen: Chosen) -> EngineFacts | None:
    """The engine environment to launch; None where there is none yet and one may be installed."""
    from qwen3emb_launch import engines

    try:
        return engines.find(chosen.profile.engine.flavour, options.engine)
    except UnfitError as error:
        if error.code != "engine_missing" or options.engine or options.offline:
            raise
    return None


def _install(chosen: Chosen, console: Console) -> EngineFacts:
    from qwen3emb_launch import engines

    flavour = chosen.profile.engine.flavour
    console.say(f"no {flavour} engine environment yet: installing one (once)")
    with console.progress("engine") as progress:
        return engines.install(flavour, progress=progress).facts


def _fetch(wanted: str, options: LaunchOptions, console: Console) -> ModelFacts:
    from qwen3emb_launch import hub

    with console.progress("model") as progress:
        return hub.resolve(wanted, allow_download=not options.offline, progress=progress)
