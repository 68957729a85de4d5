"""All that reads files which somebody else, or a broken disk, may have written: bytes in, our own error or none out.

Each target takes a folder to work in and the bytes; it raises LaunchError or nothing. `samples` are good files, for
mutations to start from. Used by tests/test_fuzz.py (hypothesis) and benchmarks/fuzz.py (atheris, for hours).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from supervised import gateway_plan
from test_state import record

from qwen3emb_launch import profile_files, state
from qwen3emb_launch.bench.soak import Checkpoint
from qwen3emb_launch.demo_model import DemoShape, make_demo_model
from qwen3emb_launch.engines import record as engine_record
from qwen3emb_launch.errors import LaunchError
from qwen3emb_launch.gateway import config, keys, tasks
from qwen3emb_launch.hub.checkpoint import read_checkpoint
from qwen3emb_launch.lifecycle import State
from qwen3emb_launch.paths import paths
from qwen3emb_launch.planning import plan_from_dict, plan_to_dict
from qwen3emb_launch.profile_text import parse_profile
from qwen3emb_launch.results import plain
from qwen3emb_launch.state.records import UnitRecord
from qwen3emb_launch.tune.journal import Journal
from qwen3emb_launch.verify.reference import load as load_reference

IDENTITY = {"model": "demo", "objective": "throughput"}


def profile(folder: Path, data: bytes) -> None:
    """A launch profile, by its file."""
    path = folder / "mine.yaml"
    path.write_bytes(data)
    profile_files.load(str(path))


def profile_text(folder: Path, data: bytes) -> None:
    """A launch profile's text."""
    parse_profile(data.decode(errors="replace"), str(folder))


def instance(folder: Path, data: bytes) -> None:
    """instance.json, as every command reads it."""
    place = paths().instances / "one"
    place.mkdir(parents=True, exist_ok=True)
    (place / "instance.json").write_bytes(data)
    (place / "engine.yaml").write_bytes(data)
    for found in state.instances():
        found.engine_key()
        found.engine_api_key()
    state.lock_holder(place)
    state.running("one")


def plan(folder: Path, data: bytes) -> None:
    """plan.json, as the supervisor and `upgrade` read it."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return  # said by whoever reads the file
    plan_from_dict(value)


def gateway(folder: Path, data: bytes) -> None:
    """A gateway's configuration file."""
    path = folder / "gateway.json"
    path.write_bytes(data)
    config.from_dict(config.read(path))


def api_keys(folder: Path, data: bytes) -> None:
    """A gateway's file of API keys."""
    path = folder / "keys"
    path.write_bytes(data)
    path.chmod(0o600)
    keys.load(path, {})


def task_table(folder: Path, data: bytes) -> None:
    """A table of tasks."""
    path = folder / "tasks.yaml"
    path.write_bytes(data)
    tasks.load(path)


def tune_journal(folder: Path, data: bytes) -> None:
    """The journal that a tune run goes on from."""
    path = folder / "run.tune.jsonl"
    path.write_bytes(data)
    with closing(Journal(path, IDENTITY, resume=True)):
        return


def soak_checkpoint(folder: Path, data: bytes) -> None:
    """The windows that a soak goes on from."""
    path = folder / "soak.windows.jsonl"
    path.write_bytes(data)
    Checkpoint(path, IDENTITY).start(True, "now")


def reference_set(folder: Path, data: bytes) -> None:
    """A set of vectors that `verify --save` wrote."""
    path = folder / "set.json"
    path.write_bytes(data)
    load_reference(path)


def environment(folder: Path, data: bytes) -> None:
    """An engine environment's record."""
    place = paths().engines / "fuzzed"
    place.mkdir(parents=True, exist_ok=True)
    (place / "engine.json").write_bytes(data)
    engine_record.load("fuzzed")


def _model(folder: Path, name: str, data: bytes) -> None:
    """A good checkpoint in which one file is this."""
    model = make_demo_model(folder / "Qwen3-Embedding-demo", DemoShape(hidden_size=64, layers=1, mlp_size=64))
    good = (model / name).read_bytes()
    try:
        (model / name).write_bytes(data)
        read_checkpoint(model)
    finally:
        (model / name).write_bytes(good)


def model_config(folder: Path, data: bytes) -> None:
    """A model's config.json: its author's, or a hub's."""
    _model(folder, "config.json", data)


def model_tokenizer(folder: Path, data: bytes) -> None:
    """A model's tokenizer.json."""
    _model(folder, "tokenizer.json", data)


def model_weights(folder: Path, data: bytes) -> None:
    """A model's weights: only the header is read."""
    _model(folder, "model.safetensors", data)


TARGETS: dict[str, Callable[[Path, bytes], None]] = {
    f.__name__: f
    for f in (
        profile, profile_text, instance, plan, gateway, api_keys, task_table, tune_journal, soak_checkpoint,
        reference_set, environment, model_config, model_tokenizer, model_weights,
    )
}  # fmt: skip


def samples(name: str) -> list[bytes]:
    """Good files for a target."""
    shipped = [(profile_files.shipped_profiles() / f"{n}.yaml").read_bytes() for n in ("demo", "h100")]
    unit = UnitRecord("engine", "engine", State.READY, "x", state.ProcessId(1, 2, "b"), "http://127.0.0.1:1/v1")
    made = gateway_plan()
    header = {"event": "tune", "schema": 1, "kind": "qwen3emb-tune", "identity": IDENTITY}
    trial = {"event": "trial", "data": {"id": 1, "moves": [], "stage": "base", "status": "ok", "levels": []}}
    soak = {"kind": "qwen3emb-soak", "schema": 1, **IDENTITY, "created": "now"}
    good = {
        "profile": shipped,
        "profile_text": shipped,
        "instance": [json.dumps(plain(replace(record(), units=(unit,)))).encode(), b'{"admin-api-key": "k"}', b"1"],
        "plan": [json.dumps(plan_to_dict(made)).encode()],
        "gateway": [
            json.dumps(config.GatewayConfig(upstreams=(config.UpstreamConfig("http://a/v1"),)).to_dict()).encode()
        ],
        "api_keys": [b"alice sesame-open rpm=60 admin\n# bob\nsesame-shut\n"],
        "task_table": [b"schema: 1\ntasks:\n  query:\n    instruction: find it\n"],
        "tune_journal": [b"\n".join(json.dumps(e).encode() for e in (header, trial)) + b"\n"],
        "soak_checkpoint": [json.dumps(soak).encode() + b"\n{}\n"],
        "reference_set": [
            b'{"schema": 1, "kind": "qwen3emb-vectors", "vectors": {"a": [1.0, 0.0]}, "fingerprint": {}}'
        ],
        "model_config": [b'{"architectures": ["Qwen3ForCausalLM"], "hidden_size": 64, "vocab_size": 264}'],
        "model_tokenizer": [b'{"post_processor": {"type": "TemplateProcessing", "single": [], "special_tokens": {}}}'],
        "model_weights": [struct.pack("<Q", 60) + b'{"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}'],
        "environment": [b'{"schema": 1, "name": "fuzzed", "python": "/x", "inspection": {"flags": {}}}'],
    }
    return good[name]


def survives(name: str, folder: Path, data: bytes) -> bool:
    """Whether a target read or refused it. Any other exception comes through."""
    try:
        TARGETS[name](folder, data)
    except LaunchError as error:
        return bool(error.code and error.message)
    return True
