"""From what the user names (a URL, an instance, a profile) to a target of a bench; profiles are started for the run."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from qwen3emb_launch.errors import InvalidInputError

if TYPE_CHECKING:
    from qwen3emb_launch.bench.target import Target
    from qwen3emb_launch.console import Console

DEFAULT_KEY = "OPENAI_API_KEY"
START_WITHIN = 3600.0  # seconds: a first start may download the model and compile kernels
FIRST_PORT = 30100


def endpoint(url: str, model: str | None, key_variable: str | None, verify_tls: bool, gpu: int | None) -> Target:
    """A target by its address. The key comes from the environment, by the variable's name."""
    from qwen3emb_launch.bench.endpoint import checked
    from qwen3emb_launch.bench.target import Target

    key = os.environ.get(key_variable or DEFAULT_KEY)
    if key_variable and not key:
        raise InvalidInputError(
            "no_api_key", f"the environment variable {key_variable} is empty", f"export {key_variable}=…"
        )
    name = checked(url).netloc.rpartition("@")[2]
    index = gpu if gpu is not None else _only_gpu(url)
    return Target(
        name=name, url=url, model=model, api_key=key, verify_tls=verify_tls, gpu=index, facts=_gpu_facts(index)
    )


def instance(name: str | None, model: str | None) -> Target:
    """A target by its instance's name; None takes the only one running."""
    from qwen3emb_launch import state
    from qwen3emb_launch.bench.target import Target

    found, record = state.running(name)
    facts: dict[str, Any] = {"profile": record.profile, "launcher": record.launcher or None}
    index = None
    try:
        plan = json.loads(found.plan.read_text(encoding="utf-8"))
        gpu = plan.get("gpu") or {}
        index = gpu.get("index")
        engine, served = plan.get("engine") or {}, plan.get("model") or {}
        facts |= {
            "profile_hash": plan.get("profile_hash"),
            "engine": f"sglang {engine.get('version')} {engine.get('flavour')}",
            "packages": " ".join(f"{k}={v}" for k, v in (engine.get("packages") or {}).items()) or None,
            "model": served.get("name"),
            "revision": served.get("revision"),
            "gpu": gpu.get("name"),
            "driver": gpu.get("driver"),
        }
    except (OSError, ValueError, AttributeError):
        facts["plan"] = "unreadable"
    return Target(
        name=found.name,
        url=record.base_url,
        model=model or record.served_model_name,
        api_key=os.environ.get(DEFAULT_KEY),
        gpu=index,
        pids=lambda: engine_pids(found.name),
        facts=facts,
        plan=found.plan,
    )


def engine_pids(name: str) -> tuple[int, ...]:
    """An instance's engines of this moment; none while they are started again."""
    from qwen3emb_launch import state

    found = state.load(name)
    return tuple(e.pid for e in found.record.engines) if found and found.record and found.running else ()


@contextmanager
def profile(name: str, model: str | None, console: Console) -> Iterator[Target]:
    """A target started for the run and stopped after it, whatever way the run ends."""
    from qwen3emb_launch.cli.temporary import serving
    from qwen3emb_launch.engine_process.ports import free_port

    chosen = re.sub(r"[^a-z0-9._-]+", "-", f"bench-{Path(name).stem}".lower())[:63]
    console.say(f"bench: starting profile {name} as {chosen}")
    words = ["--profile", name, "--port", str(free_port("127.0.0.1", FIRST_PORT))]
    with serving(chosen, [*words, *(["--model", model] if model else [])], START_WITHIN, say=console.say):
        yield instance(chosen, None)


def versus(word: str, model: str | None, key_variable: str | None, verify_tls: bool, gpu: int | None) -> Target | None:
    """The target that `--vs` names, or None when it is a profile's name."""
    if "://" in word:
        return endpoint(word, model, key_variable, verify_tls, gpu)
    from qwen3emb_launch import state

    found = state.load(word)
    return instance(word, model) if found and found.running else None


def introduced(target: Target) -> Target:
    """The target with what it says of itself: fingerprint, engine, dtype, its model's shape and tokenizer.

    What cannot be told stays unknown: an endpoint that does not answer is the load's business to report.
    """
    from dataclasses import replace

    from qwen3emb_launch.catalog import shape_from_config
    from qwen3emb_launch.cli.verify import read_plan
    from qwen3emb_launch.errors import LaunchError
    from qwen3emb_launch.paths import paths
    from qwen3emb_launch.verify.runner import Request, introduce
    from qwen3emb_launch.verify.session import Options

    if not target.verify_tls:  # the question would be asked with certificates checked
        return target
    known: dict[str, Any] = read_plan(target.plan)[0] if target.plan else {}
    memory = paths().cache / "weights.json"
    request = Request(target.url, Options(), memory, target.model, target.api_key, timeout=10.0, known=known)
    try:
        identity, fingerprint = introduce(request)
    except LaunchError:
        return target
    told: dict[str, Any] = {
        "engine": " ".join(filter(None, (identity.engine, identity.engine_version))) or None,
        "dtype": identity.dtype,
        "quantization": identity.quantization,
    }
    shape = identity.catalog.shape if identity.catalog else None
    if identity.folder:
        with suppress(LaunchError, OSError, ValueError):
            shape = shape_from_config(json.loads((identity.folder / "config.json").read_text(encoding="utf-8")))
    facts = {**{k: v for k, v in told.items() if v is not None}, **target.facts}
    tokenizer = identity.folder / "tokenizer.json" if identity.folder else None
    return replace(target, facts=facts, shape=shape, fingerprint=fingerprint, tokenizer=tokenizer)


def distinct(targets: list[Target]) -> list[Target]:
    """The same targets with names that differ: a record is keyed by them."""
    from dataclasses import replace

    seen: dict[str, int] = {}
    out = []
    for target in targets:
        seen[target.name] = seen.get(target.name, 0) + 1
        number = seen[target.name]
        out.append(target if number == 1 else replace(target, name=f"{target.name}#{number}"))
    return out


def _only_gpu(url: str) -> int | None:
    """The GPU to watch for a local endpoint: the only one there is, else none, since which one serves is not known."""
    if urlsplit(url).hostname not in ("127.0.0.1", "localhost", "::1"):
        return None
    from qwen3emb_launch import gpu

    found = gpu.inventory()
    return found[0].index if len(found) == 1 else None


def _gpu_facts(index: int | None) -> dict[str, Any]:
    if index is None:
        return {}
    from qwen3emb_launch import gpu

    found = next((g for g in gpu.inventory() if g.index == index), None)
    return {"gpu": found.name, "driver": found.driver} if found else {}
