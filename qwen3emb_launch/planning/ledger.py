"""The layers of a plan: default < rule < profile < environment < flag, and the ledger that remembers who decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qwen3emb_launch.errors import InvalidInputError, nearest
from qwen3emb_launch.facts import EngineFacts, Origin, Setting

if TYPE_CHECKING:
    from qwen3emb_launch.profile import Profile

ENV_PREFIX = "QWEN3EMB_SET_"  # QWEN3EMB_SET_MEM_FRACTION_STATIC=0.8; a dot becomes two underscores
PARTS = ("server", "gateway", "deadlines", "restart")


@dataclass(frozen=True)
class Given:
    """A value somebody decided, before any rule."""

    value: Any
    origin: Origin
    said_by: str


@dataclass
class Ledger:
    """Collects settings in the order they are decided. What was given wins over what a rule would say."""

    given: Mapping[str, Given]
    settings: dict[str, Setting] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def decide(self, key: str, value: Any, reason: str, *, origin: Origin = "rule") -> Any:
        """Write one setting down and return its value: the given one, else `value` for `reason`."""
        given = self.given.get(key)
        chosen = Setting(key, value, origin, reason)
        if given is not None:
            chosen = Setting(key, given.value, given.origin, given.said_by)
        self.settings[key] = chosen
        return chosen.value

    def respell(self, key: str, value: Any, reason: str) -> Any:
        """Change the value, not who decided it: `fp8` as the engine spells it."""
        old = self.settings[key]
        self.settings[key] = Setting(key, value, old.origin, f"{old.reason}; {reason}" if old.reason else reason)
        return value

    def asked(self, key: str) -> Any:
        """What profile, environment or flag say, or None."""
        return self.given[key].value if key in self.given else None

    def value(self, key: str) -> Any:
        """What was decided, or None."""
        return self.settings[key].value if key in self.settings else None


@dataclass(frozen=True)
class Layers:
    """What profile, environment and flags give, merged: settings by key (`server.port` for parts of the profile),
    options of the engine by name, and the engine's environment with where each variable comes from."""

    settings: Mapping[str, Given]
    options: Mapping[str, Given]
    env: Mapping[str, Given]


def merge(profile: Profile, engine: EngineFacts, environ: Mapping[str, str], overrides: Mapping[str, str]) -> Layers:
    """Lay environment and flags over the profile.

    A key of `overrides` (and of QWEN3EMB_SET_*) is a setting, `server.port`-like part, `env.NAME`, or an option of
    the engine without its dashes. An empty value or `null` takes the profile's decision back.
    Raises InvalidInputError: `unknown_setting`, `bad_setting`.
    """
    said = f"profile {profile.name}"
    settings = {key: Given(value, "profile", said) for key, value in profile.settings.given().items()}
    for part in PARTS:
        chosen = getattr(profile, part).model_dump(exclude_unset=True, exclude_none=True)
        settings |= {f"{part}.{key}": Given(value, "profile", said) for key, value in chosen.items()}
    env = {name: Given(value, "profile", said) for name, value in profile.env.items()}
    options: dict[str, Given] = {}
    from_environ: dict[str, tuple[str, Origin, str]] = {}
    for name, value in sorted(environ.items()):
        if name.startswith(ENV_PREFIX):
            from_environ[_key_of(name)] = (value, "env", name)
    from_flags: dict[str, tuple[str, Origin, str]] = {
        key: (value, "flag", f"--set {key}={value}") for key, value in overrides.items()
    }
    for layer in (from_environ, from_flags):
        for key, (text, origin, source) in layer.items():
            if key.startswith("env."):
                env[_variable(key, source)] = Given(text, origin, source)
                continue
            known = key.replace("-", "_") if "." not in key else key
            if known in setting_keys():
                value_or_none = read_setting(known, text, source)
                settings.pop(known, None)
                if value_or_none is not None:
                    settings[known] = Given(value_or_none, origin, source)
            elif f"--{key.replace('_', '-')}" in engine.flags:
                options[f"--{key.replace('_', '-')}"] = Given(text, origin, source)
            else:
                raise _unknown(key, source, engine)
    return Layers(settings, options, env)


def _key_of(variable: str) -> str:
    """`QWEN3EMB_SET_SERVER__PORT` as `server.port`; what follows `ENV__` keeps its case."""
    name = variable.removeprefix(ENV_PREFIX)
    if name.startswith("ENV__"):
        return "env." + name.removeprefix("ENV__")
    return name.lower().replace("__", ".")


def _variable(key: str, source: str) -> str:
    from qwen3emb_launch.profile import check_variable

    name = key.removeprefix("env.")
    try:
        check_variable(name)
    except ValueError as exc:
        shown = source.partition("=")[0]  # the value may be the secret
        raise InvalidInputError("bad_setting", f"{shown}: {exc}", "--set env.NAME=VALUE") from None
    return name


def setting_keys() -> list[str]:
    """Every key that `--set` knows besides `env.NAME` and the engine's own options."""
    from qwen3emb_launch.profile import PARTS as PART_MODELS
    from qwen3emb_launch.profile import Settings

    keys = list(Settings.model_fields)
    for part in PARTS:
        keys += [f"{part}.{key}" for key in PART_MODELS[part].model_fields]
    return keys


def read_setting(key: str, text: str, source: str) -> Any:
    """The text of an override as the setting's type, by the rules of the profile; None for nothing or `null`."""
    import yaml
    from pydantic import ValidationError

    from qwen3emb_launch.profile import PARTS as PART_MODELS
    from qwen3emb_launch.profile import Settings

    part, _, name = key.rpartition(".")
    model = PART_MODELS[part] if part else Settings
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        value = text
    if key == "prefill_graph_sizes" and isinstance(value, (str, int)):
        value = [int(size) if size.isdigit() else size for size in str(value).replace(",", " ").split()]
    if value is None:
        return None
    annotation = model.model_fields[name].annotation
    if annotation is not None and str in getattr(annotation, "__args__", (annotation,)) and not isinstance(value, str):
        value = text
    try:
        return getattr(model.model_validate({name: value}), name)
    except ValidationError as exc:
        problem = exc.errors(include_url=False, include_context=False)[0]["msg"]
        raise InvalidInputError(
            "bad_setting",
            f"{source}: {problem[0].lower()}{problem[1:]}",
            "docs/profiles.md lists the settings and their values",
        ) from None


def _unknown(key: str, source: str, engine: EngineFacts) -> InvalidInputError:
    guess = nearest(key.replace("-", "_"), setting_keys()) or nearest(
        key.replace("_", "-"), [flag.strip("-") for flag in engine.flags]
    )
    return InvalidInputError(
        "unknown_setting",
        f"{source}: no setting {key!r}, and this engine has no option --{key.replace('_', '-')}",
        f"did you mean {guess}?" if guess else "docs/profiles.md lists the settings",
        {"setting": key, "nearest": guess},
    )
