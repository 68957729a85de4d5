"""GPU time by kernel from the traces that SGLang's torch profiler writes: what a batch spends its time on.

    python benchmarks/gpu/kernel_times.py TRACE_FOLDER [--rows 15]

Reads every *.trace.json.gz below the folder. Times are of the GPU's own clock; `idle` is what lies between kernels.
Where the host was traced too (`harness.py trace --host`), `calls` are its calls of CUDA, by time.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ON_THE_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
ON_THE_HOST = ("cuda_runtime", "cuda_driver")
# The first that is found in a kernel's name; what none fits keeps its own name.
KINDS = {
    "matrix product": ("nvjet", "gemm", "cutlass_3x", "splitKreduce", "cublas"),
    "norm, rotation, gating (ours)": ("_norm_quantise", "_gate_quantise", "_norm_rotate"),
    "norm": ("RMSNorm", "qknorm"),  # before attention: flashinfer's
    "attention": ("flash",),
    "rotation": ("rope",),
    "gating": ("act_and_mul",),
    "quantisation": ("quant",),
    "copy": ("copy_kernel", "Memcpy"),
}


def summary(folder: Path, rows: int = 15) -> dict[str, Any]:
    """Milliseconds by kind and by kernel, of all traces of a folder together; empty when no kernel was traced."""
    events = []
    calls: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for path in sorted(folder.rglob("*.json.gz")):
        with gzip.open(path) as file:
            traced = json.load(file)["traceEvents"]
        events += [e for e in traced if e.get("cat") in ON_THE_GPU]
        for event in traced:
            if event.get("cat") in ON_THE_HOST:
                calls[event["name"]][0] += event["dur"] / 1000
                calls[event["name"]][1] += 1
    if not events:
        return {}
    events.sort(key=lambda e: e["ts"])
    busy = end = 0.0
    kernels: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    kinds: dict[str, float] = defaultdict(float)
    for event in events:
        begin, took = event["ts"], event["dur"]
        busy += max(0.0, begin + took - max(begin, end))
        end = max(end, begin + took)
        kernels[event["name"]][0] += took / 1000
        kernels[event["name"]][1] += 1
        kinds[kind_of(event["name"])] += took / 1000
    span = end - events[0]["ts"]
    return {
        "span_ms": round(span / 1000, 2),
        "busy_ms": round(busy / 1000, 2),
        "idle_ms": round((span - busy) / 1000, 2),
        "kinds_ms": {k: round(v, 2) for k, v in sorted(kinds.items(), key=lambda item: -item[1])},
        "kernels": _longest(kernels, rows),
    } | ({"calls": _longest(calls, rows)} if calls else {})


def _longest(times: dict[str, list[float]], rows: int) -> list[dict[str, Any]]:
    top = sorted(times.items(), key=lambda item: -item[1][0])[:rows]
    return [{"name": name[:120], "ms": round(ms, 2), "calls": int(count)} for name, (ms, count) in top]


def kind_of(name: str) -> str:
    """The kind of work a kernel does, by its name."""
    for kind, marks in KINDS.items():
        if any(mark.lower() in name.lower() for mark in marks):
            return kind
    return "other"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=15)
    args = parser.parse_args()
    found = summary(args.folder, args.rows)
    if not found:
        sys.exit(f"no kernel in any *.json.gz below {args.folder}")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
