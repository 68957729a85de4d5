"""Seconds from the start of an engine to its first embedding, with and without parts of the plugin.

    python benchmarks/engine_start.py --without tokenizer          # what this part gives
    python benchmarks/engine_start.py --without bytecode --uncompiled
    python benchmarks/engine_start.py --stock --json
    python benchmarks/engine_start.py --model DIR --with readahead --cold-weights
    python benchmarks/engine_start.py --device cuda --model DIR --without prebuild --empty-caches --rounds 1

One thin layer under the shape and tokenizer of the 4B model's stand-in (`gpu/make_model.py`), random weights, so that
what is timed is the start. Each variant is started in turn, once uncounted, then --rounds times. `--uncompiled` starts
them from links to the environment's files without their bytecode, under PYTHONDONTWRITEBYTECODE. `--empty-caches` gives
each start kernel caches of its own, and leaves out the uncounted ones; `--flag` takes what a GPU needs (graphs, say).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from gpu.make_model import make
from plugin_cpu import START_SECONDS, Engine, _answers, _free_port, engine_environment, versions

from qwen3emb_launch.catalog import CATALOG
from qwen3emb_launch.engines.plugin_wheel import build_plugin_wheel

CACHES = (
    "TRITON_CACHE_DIR", "TVM_FFI_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH",
)  # fmt: skip
KERNELS = re.compile(r"qwen3emb plugin: .*(was built in|waited|left to its first use)")


def thin_model(folder: Path) -> Path:
    """The 4B's stand-in with one narrow layer; its weights are drawn by the engine (`--load-format dummy`)."""
    shape = replace(CATALOG["4b"].shape, layers=1, hidden_size=256, heads=4, kv_heads=2, head_dim=64, mlp_size=128)
    make(folder, shape, weights=False)
    return folder


def uncompiled(python: Path, folder: Path) -> Path:
    """The environment of `python` as links, without the bytecode beside its sources; its python."""
    prefix = python.parents[1]
    for place, folders, files in os.walk(prefix):
        copy = folder / Path(place).relative_to(prefix)
        copy.mkdir(parents=True)
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        for name in [*files, *links]:
            (copy / name).symlink_to(Path(place) / name)
        folders[:] = [name for name in folders if name != "__pycache__" and name not in links]
    return folder / "bin" / python.name


def start(argv: list[str], environ: Mapping[str, str], log: Path) -> dict[str, Any]:
    """One start: seconds to the first embedding, what all processes had used by then, what it says of kernels."""
    port = _free_port()
    begin = time.perf_counter()
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*argv, "--port", str(port)], stdout=out, stderr=out, env=environ, start_new_session=True
        )
    engine = Engine("start", port, process)
    try:
        while not _answers(port):
            if process.poll() is not None or time.perf_counter() - begin > START_SECONDS:
                raise SystemExit(f"the engine did not start:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.05)
        took = time.perf_counter() - begin
        said = [line for line in log.read_text(errors="replace").splitlines() if KERNELS.search(line)]
        return {"ready_s": took, "cpu_s": sum(engine.cpu_seconds()), "said": said}
    finally:
        engine.signal(signal.SIGKILL)
        process.wait(30)


def forget(model: Path) -> None:
    """Have the kernel drop what it keeps of a checkpoint's files."""
    for file in model.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def empty_caches(folder: Path) -> dict[str, str]:
    """Kernel caches that hold nothing."""
    return {name: str(Path(tempfile.mkdtemp(dir=folder)) / name.lower()) for name in CACHES}


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine-python", type=Path, help="python of a CPU engine (default: the installed one)")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--without", action="append", default=[], metavar="PART", help="one more variant")
    parser.add_argument("--with", action="append", default=[], metavar="PART", dest="with_", help="one more variant")
    parser.add_argument("--stock", action="store_true", help="SGLang as anybody starts it, too")
    parser.add_argument("--uncompiled", action="store_true", help="from packages that nobody has compiled")
    parser.add_argument("--model", help="a checkpoint with its weights (default: the thin one)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--empty-caches", action="store_true", help="each start compiles its kernels")
    parser.add_argument("--cold-weights", action="store_true", help="each start reads the model's files from the disk")
    parser.add_argument("--flag", action="append", default=[], help="one more engine argument")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    python = options.engine_python or engine_environment()
    variants: dict[str, dict[str, str]] = {"plugin": {}}
    variants |= {f"without {part}": {f"QWEN3EMB_PLUGIN_{part.upper()}": "0"} for part in options.without}
    variants |= {f"with {part}": {f"QWEN3EMB_PLUGIN_{part.upper()}": "1"} for part in options.with_}
    if options.stock:
        variants["stock"] = {"QWEN3EMB_PLUGIN": "0"}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    with tempfile.TemporaryDirectory(prefix="engine-start-") as scratch:
        folder = Path(scratch)
        with zipfile.ZipFile(build_plugin_wheel(folder)) as wheel:
            wheel.extractall(folder / "site")
        engine_python = uncompiled(python, folder / "engine") if options.uncompiled else python
        model = [options.model] if options.model else [str(thin_model(folder / "thin")), "--load-format", "dummy"]
        common = [
            "--model-path", *model, "--device", options.device, "--is-embedding", "--context-length", "4096",
            "--max-total-tokens", "32768", "--disable-radix-cache", "--host", "127.0.0.1", *options.flag,
        ]  # fmt: skip
        site = os.pathsep.join(filter(None, [str(folder / "site"), os.environ.get("PYTHONPATH")]))
        environ = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": site, "QWEN3EMB_CACHE_DIR": str(folder / "cache")}
        if options.device == "cpu":
            environ |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
        environ.pop("PYTHONDONTWRITEBYTECODE", None)
        if options.uncompiled:
            environ["PYTHONDONTWRITEBYTECODE"] = "1"
        for round_ in range(0 if options.empty_caches else -1, options.rounds):
            for name, own in variants.items():
                module = "sglang.launch_server" if name == "stock" else "qwen3emb_engine_plugin.serve"
                caches = empty_caches(folder) if options.empty_caches else {}
                if options.cold_weights:
                    forget(Path(model[0]))
                took = start([str(engine_python), "-m", module, *common], {**environ, **own, **caches}, folder / "log")
                said = [f"{name}, {took['ready_s']:.2f} s{' (not counted)' * (round_ < 0)}", *took["said"]]
                print("\n    ".join(said), file=sys.stderr)
                if round_ >= 0:
                    found[name].append(took)
    result: dict[str, Any] = {
        "variants": {
            name: {
                "ready_s": round(statistics.median(one["ready_s"] for one in each), 2),
                "cpu_s": round(statistics.median(one["cpu_s"] for one in each), 2),
                "each_s": [round(one["ready_s"], 2) for one in each],
                "said": [one["said"] for one in each],
            }
            for name, each in found.items()
        },
        "uncompiled": options.uncompiled,
        "empty_caches": options.empty_caches,
        "cold_weights": options.cold_weights,
        "versions": versions(python),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
    }
    if options.json:
        print(json.dumps(result))
        return
    for name, figures in result["variants"].items():
        print(f"{name:20} ready after {figures['ready_s']} s, {figures['cpu_s']} s of CPU; each {figures['each_s']}")


if __name__ == "__main__":
    main()
