"""Cosine per text between served vectors and transformers' float32 ones, by number format, for docs/verify.md.

    python benchmarks/verify_precision.py --engine-python PY --shape demo --device cpu --formats bfloat16 float32
    python benchmarks/verify_precision.py --engine-python PY --shape 4b --device cuda --formats bfloat16 fp8

Makes a checkpoint of the shape with random weights, serves it once a format with the real SGLang, and compares with
transformers on the same device. Needs httpx and this repository; prints Markdown, or JSON with --json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qwen3emb_launch.catalog import CATALOG
from qwen3emb_launch.demo_model import DemoShape, make_demo_model
from qwen3emb_launch.vectors import distance
from qwen3emb_launch.verify.probes_reference import allowed_distance
from qwen3emb_launch.verify.reference import transformers_reference
from qwen3emb_launch.verify.runner import Request, vectors_for_diff
from qwen3emb_launch.verify.session import Options
from qwen3emb_launch.verify.texts import REFERENCE

FORMATS = {
    "bfloat16": ["--dtype", "bfloat16"],
    "float16": ["--dtype", "float16"],
    "float32": ["--dtype", "float32"],
    "fp8": ["--dtype", "bfloat16", "--quantization", "fp8"],
}


def shape_of(name: str) -> DemoShape:
    """The official layers, heads and widths; the demo tokenizer's vocabulary of 264."""
    if name == "demo":
        return DemoShape()
    s = CATALOG[name].shape
    return DemoShape(
        hidden_size=s.hidden_size,
        layers=s.layers,
        heads=s.heads,
        kv_heads=s.kv_heads,
        head_dim=s.head_dim,
        mlp_size=s.mlp_size,
        max_positions=s.max_positions,
    )


@contextlib.contextmanager
def served(python: str, model: Path, device: str, flags: list[str], limit: float) -> Iterator[str]:
    """The real engine, until an embedding comes back; the whole process group is killed at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = 20000 + free.getsockname()[1] % 12000
    argv = [python, "-m", "sglang.launch_server", "--model-path", str(model), "--is-embedding", "--device", device]
    argv += ["--context-length", "8192", "--max-total-tokens", "16384", "--host", "127.0.0.1", "--port", str(port)]
    argv += ["--json-model-override-args", '{"is_matryoshka": true}', *flags]
    if device == "cuda":
        argv += ["--mem-fraction-static", "0.4"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if device == "cpu":
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            deadline = time.monotonic() + limit
            while not answers(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise SystemExit(f"the engine did not start:\n{log.read()[-3000:].decode(errors='replace')}")
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)


def answers(port: int) -> bool:
    body = b'{"model": "x", "input": "ready?"}'
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/embeddings", body, {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, object]:
    """Cosines of each text for each format, and transformers' own bfloat16 beside them."""
    model = make_demo_model(scratch / "model", shape_of(arguments.shape))
    reference = transformers_reference(Path(arguments.engine_python), model, REFERENCE, device=arguments.device)
    exact, rounded = reference.sets["float32"].vectors, reference.sets["bfloat16"].vectors
    own = [distance(exact[t], rounded[t]) for t in REFERENCE]
    rows: dict[str, object] = {"transformers bfloat16": summary(own, None)}
    for name in arguments.formats:
        with served(arguments.engine_python, model, arguments.device, FORMATS[name], arguments.start_limit) as url:
            request = Request(url, Options(), scratch / "weights.json", timeout=300)
            found, precision = vectors_for_diff(request, REFERENCE)
        apart = [distance(vector, exact[text]) for text, vector in found.vectors.items()]
        rows[f"sglang {name}"] = summary(apart, allowed_distance(precision, max(own)))
    return {
        "shape": arguments.shape,
        "device": arguments.device,
        "reference": reference.sets["float32"].origin,
        "texts": len(REFERENCE),
        "rows": rows,
    }


def summary(apart: list[float], allowed: float | None) -> dict[str, object]:
    """Cosines, worst and mean first."""
    return {
        "min_cosine": 1 - max(apart),
        "mean_cosine": 1 - sum(apart) / len(apart),
        "allowed_distance": allowed,
        "within": None if allowed is None else max(apart) <= allowed,
        "cosines": [1 - d for d in apart],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine-python", required=True)
    parser.add_argument("--shape", choices=["demo", *CATALOG], default="demo")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=["bfloat16", "float32"])
    parser.add_argument("--start-limit", type=float, default=400.0, help="seconds for the engine to start")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(arguments, Path(scratch))
    if arguments.json:
        print(json.dumps(result))
        return
    print(
        f"{arguments.shape} shape, {arguments.device}, {result['texts']} texts, against {result['reference']} float32\n"
    )
    print("| vectors | lowest cosine | mean cosine | allowed 1 - cosine | within |\n|---|---|---|---|---|")
    for name, row in result["rows"].items():  # type: ignore[attr-defined]
        allowed = "-" if row["allowed_distance"] is None else f"{row['allowed_distance']:.1e}"
        within = {None: "-", True: "yes", False: "NO"}[row["within"]]
        print(f"| {name} | {row['min_cosine']:.7f} | {row['mean_cosine']:.7f} | {allowed} | {within} |")


if __name__ == "__main__":
    main()
