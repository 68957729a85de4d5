"""Run by an engine environment's python: what is installed there, does the server import, which flags does it take.

    python inspect_engine.py OUT.json auto|cpu|cuda

Writes one JSON object to the file (imports print what they like on stdout and stderr) and exits 0; when something
fails to import, its `error` says what, as a traceback's last line does. Python 3.10 and later, no other package.

Imports without a garbage collector, which would only walk modules, and an exit that does not take all of them down
again: 4.6 s of processor time instead of 8.7.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import json
import os
import sys
import traceback
from typing import Any

# What decides vectors and speed, by distribution name.
PACKAGES = (
    "sglang", "torch", "torchvision", "torchao", "transformers", "tokenizers", "triton", "numpy",
    "sglang-kernel", "sgl-kernel", "flashinfer-python", "flash-attn-4", "xgrammar",
    "fastapi", "uvicorn", "uvloop", "httptools", "orjson",
)  # fmt: skip
KERNELS = ("sglang-kernel", "sgl-kernel")
PLUGINS = "sglang.srt.plugins"


def packages() -> dict[str, str]:
    """The versions of PACKAGES that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def plugins() -> dict[str, str | None]:
    """The engine plugins that SGLang would load, by entry point, with their distribution's version."""
    points = importlib.metadata.entry_points(group=PLUGINS)
    return {point.name: point.dist.version if point.dist else None for point in points}


def device() -> dict[str, Any]:
    """What torch can compute on."""
    import torch

    cuda = torch.cuda.is_available()
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
    return {"cuda_available": cuda, "cuda_build": torch.version.cuda, "gpus": names}


def flags() -> dict[str, dict[str, Any]]:
    """Every option of the server's own parser: name -> whether it takes a value, and its choices."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return {
        option: {"takes_value": action.nargs != 0, "choices": [str(choice) for choice in action.choices or ()]}
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
    }


def inspect(report: dict[str, Any], flavour: str) -> None:
    """Fill the report; what cannot be imported raises."""
    report["packages"] = packages()
    report["plugins"] = plugins()
    if flavour == "auto":
        flavour = "cuda" if any(kernel in report["packages"] for kernel in KERNELS) else "cpu"
    report["flavour"] = flavour
    if flavour == "cpu":
        os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    path = str(importlib.metadata.distribution("sglang")._path)  # type: ignore[attr-defined]
    report["dist_info"] = path
    report["stamp"] = os.stat(path).st_mtime_ns  # noqa: PTH116 - read again by the launcher
    report["device"] = device()
    report["flags"] = flags()
    if flavour == "cpu" or report["device"]["cuda_available"]:
        # The flags need half of what serving needs; this is the other half. CUDA kernels do not load without a GPU.
        importlib.import_module("sglang.srt.entrypoints.http_server")


def main(target: str, flavour: str) -> None:
    """Inspect and write the report."""
    sys.path.pop(0)  # this script's folder: nothing in it may shadow a package
    gc.disable()
    report: dict[str, Any] = {"error": None, "python_version": sys.version.split()[0]}
    try:
        inspect(report, flavour)
    except BaseException as exc:  # noqa: BLE001
        # A failed import of anything, a SystemExit too, is the answer here, not an accident.
        report["error"] = traceback.format_exception_only(type(exc), exc)[-1].strip()
        traceback.print_exc()
    with open(target, "w", encoding="utf-8") as file:  # noqa: PTH123 - the launcher's file, opened as given
        json.dump(report, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
