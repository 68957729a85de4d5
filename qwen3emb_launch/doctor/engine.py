"""Engine environments, their releases against known-bad ones, profiles of one's own, models, instances."""

from __future__ import annotations

from collections.abc import Sequence

from qwen3emb_launch import engines, hub, profile_files, state
from qwen3emb_launch.argv import parse_extra
from qwen3emb_launch.catalog import CATALOG
from qwen3emb_launch.doctor.command_line import known_bad
from qwen3emb_launch.doctor.report import Check, fail, ok, unknown, warn
from qwen3emb_launch.engines import EnvironmentStatus, record, releases
from qwen3emb_launch.engines.registry import build_again
from qwen3emb_launch.errors import InvalidInputError, LaunchError
from qwen3emb_launch.facts import EngineFacts, Flavour
from qwen3emb_launch.lifecycle import State
from qwen3emb_launch.planning.known_bad import KNOWN_BAD, Combination
from qwen3emb_launch.profile_files import ProfileFile
from qwen3emb_launch.state import Instance


def usable(flavour: Flavour) -> EngineFacts | None:
    """The environment that a launch would take, or None."""
    try:
        return engines.find(flavour)
    except LaunchError:
        return None


def cuda_build(engine: EngineFacts | None) -> str | None:
    """The CUDA version that an engine's torch was built for, from its record."""
    found = record.load(engine.name) if engine else None
    build = found.inspection.device.get("cuda_build") if found else None
    return str(build) if build else None


def environments(found: Sequence[EnvironmentStatus], wanted: Flavour) -> list[Check]:
    """Each environment's standing; a missing one of the wanted flavour."""
    checks: list[Check] = []
    for env in found:
        name = f"engine {env.name}"
        if env.state == "complete":
            checks += release(env, name) or [
                ok(name, f"sglang {env.version}, {env.flavour}, python {env.python_version}")
            ]
        else:
            mend = f"qwen3emb engine check {env.name}" if env.adopted else build_again(env.name)
            checks.append(fail(name, f"{env.state}: {env.reason}", mend))
    if not any(env.state == "complete" and env.flavour == wanted for env in found):
        checks.append(warn("engine", f"no {wanted} engine environment yet", f"qwen3emb engine install {wanted}"))
    return checks


def release(env: EnvironmentStatus, name: str) -> list[Check]:
    """What is known against this release, whatever it is started with. Empty: nothing."""
    if env.version is None or env.flavour is None:
        return [unknown(name, "its SGLang release is not known", f"qwen3emb engine check {env.name}")]
    combination = Combination(
        env.version, env.flavour, None, {}, {}, f"/{CATALOG['4b'].hub_id}", CATALOG["4b"].shape
    )  # fmt: skip
    found = [known_bad(row, name, env.version) for row in KNOWN_BAD if row.applies(combination)]
    if env.flavour == "cuda" and not found:
        try:
            releases.check_version(env.version)
        except InvalidInputError as error:
            found.append(fail(name, error.message, error.hint))
    note = releases.untested(env.version)
    return [*found, warn(name, note, "qwen3emb verify --level full")] if note else found


def profiles(entries: Sequence[ProfileFile], engine: EngineFacts | None) -> list[Check]:
    """The user's own profiles: readable, and with options that the engine has."""
    checks = []
    for entry in entries:
        if entry.origin != "user":
            continue
        name = f"profile {entry.name}"
        if entry.profile is None:
            error = entry.error
            checks.append(fail(name, error.message if error else "cannot be read", error.hint if error else ""))
            continue
        try:
            if engine and engine.flavour == entry.profile.engine.flavour:
                variants = (variant.extra_args for variant in entry.profile.variants.values())
                for words in (entry.profile.extra_args, *variants):
                    parse_extra(words, engine.flags, "its extra_args")
            checks.append(_dtype(entry, name))
        except InvalidInputError as error:
            checks.append(fail(name, error.message, error.hint or f"qwen3emb profiles explain {entry.name}"))
    return checks


def _dtype(entry: ProfileFile, name: str) -> Check:
    if entry.profile and entry.profile.settings.dtype == "float16":
        row = next(row for row in KNOWN_BAD if row.code == "float16_nan")
        return warn(name, f"dtype float16: {row.why} ({row.link})", "say dtype: bfloat16 in it")
    return ok(name, str(entry.path))


def models(wanted: str | None) -> list[Check]:
    """Models on this machine, and whether each can be served. Reads headers, no weights."""
    checks = []
    for row in hub.rows():
        if not row.here:
            continue
        try:
            facts = hub.local(row.repo if row.source != "demo" else "demo", revision=row.commit)
        except LaunchError as error:
            checks.append(fail(f"model {row.model}", error.message, error.hint))
            continue
        if facts is None:
            checks.append(
                fail(f"model {row.model}", "files are missing", f"qwen3emb models verify {row.model} --repair")
            )
        else:
            notes = "; ".join(facts.warnings)
            says = f"{row.bytes / 1e9:.2f} GB at {facts.path}"
            named = f"model {row.model}"
            checks.append(warn(named, notes, f"qwen3emb models show {row.model}") if notes else ok(named, says))
    names = [row.model for row in hub.rows() if row.here]
    if wanted and wanted not in names and not _here(wanted):
        checks.append(warn(f"model {wanted}", "not on this machine", f"qwen3emb download {wanted}"))
    elif not checks:
        checks.append(warn("model", "no model is on this machine", "qwen3emb download 4b, or: qwen3emb up -p demo"))
    return checks


def _here(name: str) -> bool:
    """Whether a start would find it; the demo model is made where it is missing."""
    try:
        return name == "demo" or hub.local(name) is not None
    except LaunchError:
        return False


def instances(found: Sequence[Instance]) -> list[Check]:
    """Instances that ended badly, or whose record cannot be read."""
    checks = []
    for one in found:
        name = f"instance {one.name}"
        if one.warning:
            checks.append(warn(name, one.warning, f"qwen3emb up --name {one.name}"))
        elif one.state is State.FAILED and one.record:
            checks.append(warn(name, f"failed: {one.record.reason}", f"qwen3emb logs {one.name}"))
        elif one.running and one.record:
            checks.append(ok(name, f"{one.state} at {one.record.base_url}"))
    return checks


def checks(flavour: Flavour, model: str | None) -> list[Check]:
    """All of them, with what is on this machine."""
    return [
        *environments(engines.environments(), flavour),
        *profiles(profile_files.available(), usable(flavour)),
        *models(model),
        *instances(state.lasting(state.instances())),
    ]
