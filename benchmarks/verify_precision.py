"""Proof by number format that served vectors are right: `verify --level full` and cosines per text, for docs/verify.md.

    python benchmarks/verify_precision.py --engine-python PY                               # demo checkpoint, CPU engine
    python benchmarks/verify_precision.py --shape 4b --device cuda --formats bfloat16 fp8 --json record.json
    python benchmarks/verify_precision.py --model DIR --device cuda --endpoint bfloat16=http://127.0.0.1:21000/v1 \\
        --endpoint fp8=http://127.0.0.1:21020/v1 --json record.json

The checkpoint is DIR, or is made with random weights: the official shape by benchmarks/gpu/make_model.py, the demo's by
the launcher. transformers computes the reference on the same device, in float32, in bfloat16, and for fp8 with weights
and activations rounded to e4m3 as the engine does. Each format's endpoint is the one given, or the real SGLang, started
for it and killed afterwards (--engine-args adds to its command). The reference is computed once, so a full level's time
is without it. No hub is asked. Prints Markdown; --json writes all cosines, what is allowed by text, the reports and
the versions. Needs httpx, orjson and this repository; exit 1 when a check failed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qwen3emb_launch.catalog import CATALOG
from qwen3emb_launch.demo_model import make_demo_model
from qwen3emb_launch.gpu import survey
from qwen3emb_launch.results import plain
from qwen3emb_launch.vectors import distance
from qwen3emb_launch.verify.reference import Transformers, transformers_reference
from qwen3emb_launch.verify.report import Level
from qwen3emb_launch.verify.runner import Request, vectors_for_diff, verify
from qwen3emb_launch.verify.session import Options
from qwen3emb_launch.verify.texts import REFERENCE
from qwen3emb_launch.verify.yardstick import Yardstick, yardstick

HERE = Path(__file__).resolve().parent
FLAGS = {
    "bfloat16": ["--dtype", "bfloat16"],
    "float16": ["--dtype", "float16"],
    "float32": ["--dtype", "float32"],
    "fp8": ["--dtype", "bfloat16", "--quantization", "fp8"],
}
QUICK_RUNS = 3


def checkpoint(arguments: argparse.Namespace, scratch: Path) -> Path:
    """The checkpoint to serve, made where there is none yet."""
    folder: Path = arguments.model or scratch / "model"
    if (folder / "config.json").is_file():
        return folder
    if arguments.shape == "demo":
        return make_demo_model(folder)
    maker = [arguments.engine_python, str(HERE / "gpu" / "make_model.py"), arguments.shape, str(folder)]
    subprocess.run(maker, check=True)
    return folder


@contextlib.contextmanager
def served(arguments: argparse.Namespace, model: Path, name: str, log: Path) -> Iterator[str]:
    """The real engine, until an embedding comes back; the whole process group is killed at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = 20000 + free.getsockname()[1] % 12000
    argv = [arguments.engine_python, "-m", "sglang.launch_server", "--model-path", str(model), "--is-embedding"]
    argv += ["--device", arguments.device, "--context-length", "8192", "--host", "127.0.0.1", "--port", str(port)]
    argv += ["--json-model-override-args", '{"is_matryoshka": true}', *FLAGS[name], *shlex.split(arguments.engine_args)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if arguments.device == "cpu":
        argv += ["--max-total-tokens", "16384"]
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
    say(f"{name}: {shlex.join(argv)}")
    with log.open("wb") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=out, env=environment, start_new_session=True)
    try:
        began = time.monotonic()
        while not answers(port):
            if process.poll() is not None or time.monotonic() - began > arguments.start_limit:
                raise SystemExit(f"the engine did not start:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.5)
        say(f"{name}: ready after {time.monotonic() - began:.0f} s")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)


def answers(port: int) -> bool:
    """Whether an embedding comes back."""
    body = b'{"model": "x", "input": "ready?"}'
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/embeddings", body, {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def prove(url: str, name: str, model: Path, reference: Transformers, arguments: argparse.Namespace) -> dict[str, Any]:
    """One format's endpoint: quick runs timed, the level asked for, and the cosine of each text."""
    known: dict[str, Any] = {"folder": model, "device": arguments.device}
    if name == "fp8":
        known |= {"quantization": "fp8", "dtype": "bfloat16", "dtype_origin": "as served"}
    else:
        known |= {"dtype": name, "dtype_origin": "as served"}

    def ask(level: Level) -> Request:
        return Request(
            url, Options(level), Path(arguments.scratch) / "weights.json", timeout=300, known=known,
            python=Path(arguments.engine_python) if level == "full" else None, device=arguments.device,
            computed=reference,
        )  # fmt: skip

    reports = [verify(ask("quick"))[0] for _ in range(QUICK_RUNS)]
    for report in reports:
        say(f"{name}: quick: {report.summary}")
    if arguments.level == "full":
        reports.append(verify(ask("full"))[0])
        say(f"{name}: full: {reports[-1].summary}")
    for check in {c.id: c for r in reports for c in r.failures}.values():
        say(f"{name}: FAILED {check.title}: expected {check.expected}, seen {check.seen}: {check.cause}")
    found, precision = vectors_for_diff(ask("quick"), REFERENCE)
    return {
        "endpoint": url,
        "quick_seconds": [r.seconds for r in reports if r.level == "quick"],
        "passed": all(r.passed for r in reports),
        **cosines(found.vectors, reference, yardstick(precision, reference.sets, REFERENCE)),
        "report": plain(reports[-1]),
    }


def own_errors(reference: Transformers) -> dict[str, float]:
    """Largest 1 - cosine of transformers' own coarser formats to its float32 vectors."""
    exact = reference.sets["float32"].vectors
    return {
        name: max(distance(exact[t], v) for t, v in found.vectors.items())
        for name, found in reference.sets.items()
        if name != "float32"
    }


def cosines(
    vectors: Mapping[str, tuple[float, ...]], reference: Transformers, held: Yardstick | None = None
) -> dict[str, Any]:
    """To each of the reference's formats, text by text, and what `verify` holds the vectors to."""
    return {
        "judged_by": held.reference.dtype if held else None,
        "allowed_distance": [held.allowed[text] for text in REFERENCE] if held else None,
        "cosines": {
            name: [1 - distance(vectors[text], found.vectors[text]) for text in REFERENCE]
            for name, found in reference.sets.items()
        },
    }


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All of it, as one record."""
    given = dict(e.split("=", 1) for e in arguments.endpoint)
    wanted = arguments.formats if arguments.formats is not None else list(given) or ["bfloat16", "float32"]
    formats = list(dict.fromkeys(wanted))
    unknown = [f for f in (*formats, *given) if f not in FLAGS]
    if unknown:
        raise SystemExit(f"no such format: {', '.join(unknown)}; there are {', '.join(FLAGS)}")
    model = checkpoint(arguments, scratch)
    say(f"checkpoint {model}")
    began = time.monotonic()
    reference = transformers_reference(
        Path(arguments.engine_python), model, REFERENCE, device=arguments.device,
        dtypes=("float32", "bfloat16", *(("fp8",) if "fp8" in formats or arguments.emulate else ())),
    )  # fmt: skip
    if "float32" not in reference.sets:
        raise SystemExit(f"no float32 reference: {reference.skipped['float32']}")
    seconds = time.monotonic() - began
    say(f"{reference.sets['float32'].origin}: {seconds:.0f} s; largest own errors: "
        + ", ".join(f"{k} {v:.1e}" for k, v in own_errors(reference).items()))  # fmt: skip
    rows: dict[str, Any] = {
        f"transformers {name}": {"passed": None, **cosines(found.vectors, reference)}
        for name, found in reference.sets.items()
        if name != "float32"
    }
    for name in formats:
        log = Path(arguments.logs or scratch) / f"engine-{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.nullcontext(given[name]) if name in given else served(arguments, model, name, log) as url:
            rows[f"sglang {name}"] = prove(url, name, model, reference, arguments)
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "benchmarks/verify_precision.py", *sys.argv[1:]]),
        "shape": arguments.shape if arguments.model is None else model.name,
        "device": gpu_name() if arguments.device.startswith("cuda") else arguments.device,
        "reference": reference.sets["float32"].origin,
        "reference_seconds": seconds,
        "texts": list(REFERENCE),
        "rows": rows,
    }


def gpu_name() -> str:
    """The first GPU with its driver, as NVML tells."""
    found = survey()
    return f"{found.gpus[0].name}, driver {found.driver}" if found.gpus else "cuda"


def markdown(record: Mapping[str, Any]) -> str:
    """The record as the table of docs/verify.md."""
    lines = [
        f"{record['shape']} on {record['device']}, {record['date']}: {len(record['texts'])} texts against "
        f"{record['reference']}, computed in {record['reference_seconds']:.0f} s. `{record['command']}`",
        "",
        "| vectors | lowest, mean cosine to float32 | to transformers' fp8 | allowed 1 - cosine | quick | full |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in record["rows"].items():
        to = row["cosines"]
        fp8 = "-" if "fp8" not in to or name == "transformers fp8" else pair(to["fp8"])
        quick = f"{min(row['quick_seconds']):.2f} s" if "quick_seconds" in row else "-"
        full = "-" if row["passed"] is None else f"{row['report']['summary']}" if row["passed"] else "FAILED"
        lines.append(f"| {name} | {pair(to['float32'])} | {fp8} | {allowance(row)} | {quick} | {full} |")
    return "\n".join(lines) + "\n"


def pair(found: Sequence[float]) -> str:
    """The lowest and the mean."""
    return f"{min(found):.7f}, {sum(found) / len(found):.7f}"


def allowance(row: Mapping[str, Any]) -> str:
    """1 - cosine that `verify` allows, and from which vectors where these are not float32's."""
    if row["allowed_distance"] is None:
        return "-"
    low, high = (f"{limit(row['allowed_distance']):.1e}" for limit in (min, max))
    to = "" if row["judged_by"] == "float32" else f" to {row['judged_by']}"
    return f"{low}{to}" if low == high else f"{low} to {high} by text{to}"


def say(text: str) -> None:
    """Progress, for the person who waits."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine-python", default=sys.executable, help="a python with sglang, torch, transformers")
    parser.add_argument("--shape", choices=["demo", *CATALOG], default="demo")
    parser.add_argument("--model", type=Path, help="a checkpoint to use, or where to make and keep one")
    parser.add_argument("--device", default="cpu", help="of engine and reference: cpu, cuda")
    parser.add_argument(
        "--formats", nargs="*", help="default: those of --endpoint, else bfloat16 float32; may be empty"
    )
    parser.add_argument("--emulate", action="store_true", help="what fp8 does to the checkpoint, without serving it")
    parser.add_argument("--endpoint", action="append", default=[], metavar="FORMAT=URL", help="one that runs already")
    parser.add_argument("--engine-args", default="", help="more of the engine's arguments, in one string")
    parser.add_argument("--level", choices=["quick", "full"], default="full")
    parser.add_argument("--start-limit", type=float, default=400.0, help="seconds for an engine to start")
    parser.add_argument("--logs", type=Path, help="keep the engines' logs in this folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the engine goes too
    with tempfile.TemporaryDirectory() as scratch:
        arguments.scratch = scratch
        record = measure(arguments, Path(scratch))
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(markdown(record))
    return 0 if all(row["passed"] in (None, True) for row in record["rows"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
