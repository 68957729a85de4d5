"""Engines against each other on one GPU, in one interleaved run.

    python benchmarks/gpu/harness.py serve CONFIG --out DIR [--only a,b] [--together]   # start, leave running
    python benchmarks/gpu/harness.py load  CONFIG --out DIR [--only a,b] [--loads x,y] [--rounds N] [--seconds S]
    python benchmarks/gpu/harness.py stop  CONFIG --out DIR
    python benchmarks/gpu/harness.py run   CONFIG --out DIR                             # the three in one
    python benchmarks/gpu/harness.py profile CONFIG --out DIR --only a --loads x        # py-spy beside a load
    python benchmarks/gpu/harness.py trace   CONFIG --out DIR --only a --loads x        # SGLang's kernels under a load

CONFIG is YAML (4b.yaml; demo.yaml needs no GPU): servers with argv and environment, loads with clients, texts and
tokens. Servers run side by side and are loaded in turn, round by round, from processes of their own: drift hits all
alike. The record (DIR/CONFIG.json) and the page (DIR/CONFIG.md) carry date, GPU, driver and versions. Needs: python3
with the engines importable through the configuration's environment, nvidia-ml-py, pyyaml.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import kernel_times
import make_model
import report
import servers as running

from qwen3emb_launch.bench.calibrate import vocabulary_of
from qwen3emb_launch.bench.load import run
from qwen3emb_launch.bench.spec import LoadSpec, Phase, Vocabulary
from qwen3emb_launch.catalog import CATALOG
from qwen3emb_launch.demo_model import make_demo_model
from qwen3emb_launch.statistics import percentile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["serve", "load", "stop", "run", "profile", "trace"])
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="servers, comma-separated")
    parser.add_argument("--loads", default="", help="loads, comma-separated")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument(
        "--together", action="store_true", help="start the servers at once: quick, but ready times mean nothing"
    )
    parser.add_argument("--first-port", type=int, default=21000, help="each server takes the next but nineteen")
    parser.add_argument("--host", action="store_true", help="trace: the host's calls too, which slows it down")
    parser.add_argument("--weights", action="store_true", help="write random weights instead of --load-format dummy")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    config = yaml.safe_load(args.config.read_text())
    model = checkpoint(config["model"], args)
    state = args.out / "servers.json"
    try:
        if args.action in ("serve", "run"):
            serve(config, args, model, state)
        if args.action in ("load", "run"):
            measure(config, args, model, state)
        if args.action == "profile":
            profile(config, args, model, state)
        if args.action == "trace":
            trace(config, args, model, state)
    finally:
        if args.action in ("stop", "run"):
            for server in running.load(state):
                running.stop_group(server.pid)
            state.unlink(missing_ok=True)


def checkpoint(name: str, args: argparse.Namespace) -> Path:
    """The model to serve: an official shape, or the demo model (to try a configuration without a GPU).

    Its folder does not bear an official name: by that name random weights would be held to the published scores.
    """
    if name == "demo":
        return make_demo_model(args.out / name)
    return make_model.make(args.out / f"{name}-shape", CATALOG[name].shape, weights=args.weights)


def chosen(names: dict[str, Any], wanted: str) -> dict[str, Any]:
    picked = wanted.split(",") if wanted else list(names)
    unknown = [p for p in picked if p not in names]
    if unknown:
        sys.exit(f"no such entry: {', '.join(unknown)}; there are {', '.join(names)}")
    return {p: names[p] for p in picked}


def flat(argv: list[Any]) -> list[str]:
    """YAML anchors nest lists inside argv; this undoes it."""
    return [x for part in argv for x in (flat(part) if isinstance(part, list) else [str(part)])]


def serve(config: dict[str, Any], args: argparse.Namespace, model: Path, state: Path) -> None:
    up = running.load(state)
    for left in [s for s in up if s.ready_s is None]:  # by a command that was cut off
        running.stop_group(left.pid)
        up.remove(left)
    taken = {s.name for s in up}
    first_port = max([s.port + 20 for s in up], default=args.first_port)
    todo = {n: s for n, s in chosen(config["servers"], args.only).items() if n not in taken}

    lock = Lock()

    def note(name: str, server: running.Server | None) -> None:
        """From its first moment on: whoever cuts this command off can still stop what runs."""
        with lock:
            up[:] = [s for s in up if s.name != name] + ([server] if server else [])
            running.save(up, state)

    def one(item: tuple[int, str]) -> None:
        position, name = item
        spec = {**config["servers"][name], "argv": flat(config["servers"][name]["argv"])}
        before = running.device_used_bytes()

        def began(server: running.Server) -> None:
            note(name, server)
            print(f"{name}: starting, {server.log}", flush=True)

        try:
            server = running.start(name, spec, model, first_port + 20 * position, args.out, began)
        except running.StartError as error:
            note(name, None)
            print(error, flush=True)
            return
        if server.gpu_bytes is None and not args.together:
            server.gpu_bytes = running.device_used_bytes() - before
        print(f"{name}: ready after {server.ready_s} s, {(server.gpu_bytes or 0) / 1e9:.2f} GB", flush=True)
        note(name, server)

    with ThreadPoolExecutor(max(len(todo), 1) if args.together else 1) as pool:
        list(pool.map(one, enumerate(todo)))


def ready(state: Path) -> list[running.Server]:
    """The servers to load. Not beside one that starts, which takes the host from the others."""
    up = running.load(state)
    if starting := [s.name for s in up if s.ready_s is None]:
        sys.exit(
            f"not ready: {', '.join(starting)}. If the command that started it was cut off: `stop`, or `serve` again"
        )
    return up


_vocabulary: list[Vocabulary] = []  # calibrated on the first server; every server here has the same tokenizer
_texts_sent = 0  # no text is sent twice, to any server: a prefix cache finds nothing


def drive(
    server: running.Server, model: Path, load: dict[str, Any], seconds: float, warmup: float = 1.0
) -> dict[str, Any]:
    """One load against one server from `processes` processes, and its figures. Times in ms, warm-up left out.

    A load's own `seconds` and `warmup` are the least it takes: what is answered slowly is counted over longer.
    """
    global _texts_sent
    seconds, warmup = max(seconds, load.get("seconds", 0)), max(warmup, load.get("warmup", 0))
    level = load.get("rate") or load["clients"]
    spec = LoadSpec(
        url=server.base_url,
        model=model.name,
        shape="open" if "rate" in load else "closed",
        phases=(Phase("warm-up", warmup, level, measured=False), Phase("measured", seconds, level)),
        batch=load["texts"],
        lengths=str(load["tokens"]),
        dims=load.get("dims"),
        encoding=load.get("encoding", "float"),
        processes=load.get("processes", max(1, min(8, int(load.get("clients", 64)) // 16))),
        text_start=_texts_sent,
        unit_norm=load.get("unit_norm", True),
    )
    if not _vocabulary:
        _vocabulary.append(vocabulary_of(spec))
        assert _vocabulary[0].exact, "the endpoint does not count tokens: lengths would be guesses"
    result = run(replace(spec, vocabulary=_vocabulary[0]))
    _texts_sent += result.texts_taken
    phase = next(p for p in result.phases if p.measured)
    good = [r for r in result.batch.rows() if phase.began <= (r[0] if spec.shape == "open" else r[2]) <= phase.ended]
    latencies = [1000 * (done - scheduled) for scheduled, _, done, _, kind in good if not kind]
    errors = sum(1 for r in good if r[4]) + result.unfinished
    if not latencies:
        sys.exit(f"{server.name}: no answer was right: {result.details}")
    span = phase.ended - phase.began
    figures = {
        "texts_per_s": len(latencies) * spec.batch / span,
        "tokens_per_s": sum(tokens for *_, tokens, kind in good if not kind and tokens > 0) / span,
        **{f"p{q}_ms": percentile(latencies, q) for q in (50, 95, 99)},
        "errors": errors,
        "client_cpu": phase.cpu,
    }
    return {k: round(v, 4) for k, v in figures.items()} | ({"kinds": result.details} if errors else {})


def measure(config: dict[str, Any], args: argparse.Namespace, model: Path, state: Path) -> None:
    names = chosen(config["servers"], args.only)
    up = [s for s in ready(state) if s.name in names]
    loads = chosen(config["loads"], args.loads)
    seconds = args.seconds or config["seconds"]
    raw: list[dict[str, Any]] = []
    for server in up:
        for load in loads.values():
            first = max(config["warmup_seconds"], load.get("warmup", 0))  # compiles what this load needs
            drive(server, model, {**load, "seconds": 0, "warmup": 0}, first, warmup=0.2)
    rounds = args.rounds or config["rounds"]
    for number in range(rounds):
        for name, load in loads.items():
            # Every other round goes backwards: what comes first is not always the same.
            for server in up if number % 2 == 0 else reversed(up):
                figures = drive(server, model, load, seconds)
                raw.append({"round": number, "server": server.name, "load": name, **figures})
                print(f"round {number} {name:10} {server.name:14} {shown(figures)}", flush=True)
    card = gpu()
    record = {
        "title": str(config["title"]).format(**card),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **card,
        "versions": versions(config),
        "model": config["model"],
        "weights": "random weights" if args.weights else "--load-format dummy",
        "rounds": rounds,
        "seconds": seconds,
        "baseline": report.baseline(config.get("baseline", "vllm"), [s.name for s in up]),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "servers": [vars(s) for s in up],
        "loads": loads,
        "medians": report.medians(raw),
        "raw": raw,
    }
    path = args.out / f"{args.config.stem}.json"
    if path.exists():  # a run in several commands adds to the same record
        earlier = json.loads(path.read_text())
        known = {s["name"] for s in record["servers"]}
        record["servers"] += [s for s in earlier["servers"] if s["name"] not in known]
        record["loads"] = {**earlier["loads"], **loads}
        again = {(r["server"], r["load"]) for r in raw}
        raw[:0] = [r for r in earlier["raw"] if (r["server"], r["load"]) not in again]
        record["medians"] = report.medians(raw)
    path.write_text(json.dumps(record, indent=1))
    page = report.markdown(record)
    path.with_suffix(".md").write_text(page)
    print(page)


def shown(figures: dict[str, Any]) -> str:
    speed = f"{figures['texts_per_s']:9.1f} texts/s {figures['tokens_per_s']:9.0f} tokens/s"
    return f"{speed} p50 {figures['p50_ms']:7.2f} p99 {figures['p99_ms']:7.2f} errors {figures['errors']}"


def profile(config: dict[str, Any], args: argparse.Namespace, model: Path, state: Path) -> None:
    """py-spy on every process of the server while a load runs: DIR/SERVER-LOAD-PID.txt, collapsed stacks."""
    for server in ready(state):
        if server.name not in chosen(config["servers"], args.only):
            continue
        for name, load in chosen(config["loads"], args.loads).items():
            seconds = args.seconds or config["seconds"]
            spies = [
                subprocess.Popen(
                    ["py-spy", "record", "-n", "-r", "250", "-d", str(int(seconds)), "-f", "raw", "-p", str(pid),
                     "-o", str(args.out / f"{server.name}-{name}-{pid}.txt")],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                for pid in running.descendants(server.pid)
            ]  # fmt: skip
            print(json.dumps(drive(server, model, load, seconds + 2)), flush=True)
            for spy in spies:
                spy.wait(60)


def trace(config: dict[str, Any], args: argparse.Namespace, model: Path, state: Path) -> None:
    """SGLang's own torch profiler over a few batches in the middle of a load: DIR/SERVER-LOAD-kernels.json.

    The trace itself, for chrome://tracing, stays in DIR/trace-SERVER-LOAD.
    """
    wanted = {"activities": ["CPU", "GPU"] if args.host else ["GPU"], "with_stack": False, "record_shapes": False}
    seconds = args.seconds or config["seconds"]
    for server in ready(state):
        if server.name not in chosen(config["servers"], args.only):
            continue
        for name, load in chosen(config["loads"], args.loads).items():
            folder = args.out / f"trace-{server.name}-{name}"
            drive(server, model, load, 1.0)  # calibrates, compiles what this load needs
            with ThreadPoolExecutor(1) as pool:
                under_load = pool.submit(drive, server, model, load, seconds)
                time.sleep(seconds / 2)  # a load has no event to wait for; its middle is far from both ends
                running.post(server.port, "/start_profile", {"output_dir": str(folder), **wanted})
                time.sleep(seconds / 4)
                running.post(server.port, "/stop_profile", {})
                print(server.name, name, shown(under_load.result()), flush=True)
            deadline = time.monotonic() + 60
            while not (found := kernel_times.summary(folder)) and time.monotonic() < deadline:
                time.sleep(0.5)
            (args.out / f"{server.name}-{name}-kernels.json").write_text(json.dumps(found, indent=1))
            print(json.dumps({k: v for k, v in found.items() if k != "kernels"}), flush=True)


def gpu() -> dict[str, str]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return {"gpu": "no GPU", "driver": "none"}
    name = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))
    return {"gpu": str(name), "driver": str(pynvml.nvmlSystemGetDriverVersion())}


def versions(config: dict[str, Any]) -> dict[str, str]:
    """What the servers' own interpreters import: asked there, not here."""
    code = (
        "import importlib.metadata as m, json\n"
        "names = 'sglang vllm torch transformers sglang-kernel flashinfer-python qwen3emb-engine-plugin'.split()\n"
        "found = [((d.metadata['Name'] or '').lower(), d.version) for d in m.distributions()]\n"
        "print(json.dumps({n: v for n, v in reversed(found) if n in names}))"  # the first on the path is imported
    )
    found: dict[str, str] = {}
    for spec in config["servers"].values():
        env = {**os.environ, **running.expand(spec.get("env", {}))}
        shown = subprocess.run(
            [running.filled(flat(spec["argv"])[0]), "-c", code], env=env, capture_output=True, text=True, check=False
        )
        if shown.returncode == 0:
            found |= {k: v for k, v in json.loads(shown.stdout).items() if k not in found}
    return dict(sorted(found.items()))


if __name__ == "__main__":
    main()
