"""Kernels that are compiled at their first use, compiled beside the start instead, all at once.

The first pass of a Qwen3 layer has nvcc build SGLang's gating kernel and, where nvidia-cutlass-dsl is missing,
flashinfer's norms, one after the other: most of a start with empty kernel caches. Each is built here in a process of
its own, forked from the template, by the very function that would build it later; that one finds it, or waits at the
same lock. The scheduler waits for them once its weights are there, so that nobody reads a file that is being written.
What fails here is built, and reported, where it always was. What was built for this card by these releases is marked,
and no builder is started for it again: a warm start costs nothing. Whoever empties the kernels' own caches alone has
them built at their first use.

An H200 with empty caches, one start each: 54 s until the first embedding instead of 76, where the norms, 36 s of nvcc,
were among them (docs/benchmarks); gating alone is 11 s. From 0.5.17 on SGLang has them elsewhere: norms alone.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import logging
import os
import select
import time
from collections.abc import Callable, Mapping
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qwen3emb_engine_plugin import template
from qwen3emb_engine_plugin.bytecode import cache_folder
from qwen3emb_engine_plugin.card import answered_by_nvml, first_visible_card
from qwen3emb_engine_plugin.layer import PROVEN
from qwen3emb_engine_plugin.switches import NOT_NEEDED, misfit, sglang_version, switched_on

logger = logging.getLogger("qwen3emb_engine_plugin")

BUILDERS = "QWEN3EMB_PLUGIN_BUILDERS"  # process id:beginning of each, for the scheduler; ids are given again
HEAD = 128  # of every Qwen3 embedding model
DEADLINE = 300.0  # seconds: nvcc takes 20 to 60 for one of these
WORTH_SAYING = 2.0  # seconds
JIT = "sglang.jit_kernel"
BUILT_BY = ("sglang", "sglang-kernel", "flashinfer-python", "apache-tvm-ffi", "torch")  # distributions
# Where those keep what they build; others than their defaults are other kernels.
CACHES = ("TVM_FFI_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE", "XDG_CACHE_HOME", "HOME")


def _norms() -> Callable[[], Any] | None:
    """flashinfer's norms, or None where another kernel than nvcc's takes their place."""
    if not importlib.import_module("flashinfer.norm")._USE_CUDA_NORM:
        return None
    spec = importlib.import_module("flashinfer.jit.norm").gen_norm_module()
    return None if spec.is_aot else spec.build_and_load


def _of_sglang(module: str, function: str, parameters: str, *arguments: Any) -> Callable[[], Any] | None:
    import torch

    found = getattr(importlib.import_module(f"{JIT}.{module}"), function)
    problem = misfit(found, parameters)
    if problem:
        raise TypeError(problem)
    return lambda: found(*arguments, torch.bfloat16)


KERNELS: dict[str, Callable[[], Callable[[], Any] | None]] = {
    "norm": _norms,
    "activation": lambda: _of_sglang("activation", "_jit_activation_module", "dtype"),
    "qknorm": lambda: _of_sglang("norm", "_jit_qknorm_module", "head_dim dtype", HEAD),
    "rope": lambda: _of_sglang("rope", "_jit_fused_rope_module", "is_neox rope_dim dtype", True, HEAD),
}


def names() -> list[str]:
    """The kernels that this server's layers use: `attention` has its own norm and rotation of queries and keys."""
    if importlib.util.find_spec(JIT) is None:
        return ["norm"]
    card = first_visible_card()
    own = switched_on("attention") and sglang_version() in PROVEN and card and (card.major, card.minor) == (9, 0)
    return ["norm", "activation"] if own else list(KERNELS)


def mark(name: str, environ: Mapping[str, str]) -> Path:
    """The empty file that says that this kernel is built, for this card and by these releases."""
    card = first_visible_card()
    about = [name, getattr(card, "name", None), *map(_release, BUILT_BY), *map(environ.get, CACHES)]
    return cache_folder(environ) / "kernels" / f"{name}-{sha256(json.dumps(about).encode()).hexdigest()[:16]}"


def _release(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def build(name: str) -> None:
    """A builder's life: build one kernel, mark it, and say how long that took or why it failed."""
    import setproctitle

    setproctitle.setproctitle(f"sglang::build_{name}")
    begin = time.monotonic()
    try:
        with answered_by_nvml():
            make = KERNELS[name]()
            if make:
                make()
        with contextlib.suppress(OSError, RuntimeError):  # no place for a mark: looked at again next time
            done = mark(name, os.environ)
            done.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            done.touch()
    except Exception as error:
        logger.warning("qwen3emb plugin: %s is left to its first use: %s: %s", name, type(error).__name__, error)
        return
    took = time.monotonic() - begin
    if took > WORTH_SAYING:
        logger.warning("qwen3emb plugin: %s was built in %.1f s, beside the start", name, took)


def start() -> None:
    """Start the builders of what is not built yet, and leave their ids to the processes that come after."""
    missing = [name for name in names() if not mark(name, os.environ).exists()]
    forked = template.TemplateContext().Process
    builders = [forked(target=build, args=(name,), daemon=True) for name in missing]
    known: list[str] = []
    for builder in builders:
        builder.start()
        if began := _began(builder.pid):
            known.append(f"{builder.pid}:{began}")
            os.environ[BUILDERS] = ",".join(known)


def prebuild() -> str | None:
    """In the HTTP process: start the builders just before the scheduler."""
    if not template.running():
        return NOT_NEEDED
    import torch

    if torch.version.cuda is None or first_visible_card() is None:
        return NOT_NEEDED
    from sglang.srt.entrypoints import engine
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    problem = misfit(engine._set_envs_and_config, "server_args", 'mp.set_start_method("spawn", force=True)')
    if problem:
        return problem

    def started(result: Any, *_: Any, **__: Any) -> Any:
        _without_fail(start)
        return result

    HookRegistry.register("sglang.srt.entrypoints.engine._set_envs_and_config", started, HookType.AFTER)
    return None


def await_builders() -> str | None:
    """In the scheduler: before a kernel is used for the first time, those that are being built are waited for."""
    if not os.environ.get(BUILDERS):
        return NOT_NEEDED
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    problem = misfit(ModelRunner.load_model, "self")
    if problem:
        return problem

    def loaded(result: Any, *_: Any, **__: Any) -> Any:
        _without_fail(lambda: wait(os.environ))
        return result

    HookRegistry.register("sglang.srt.model_executor.model_runner.ModelRunner.load_model", loaded, HookType.AFTER)
    return None


def wait(environ: Mapping[str, str], seconds: float = DEADLINE) -> None:
    """Until every builder has ended. One that takes longer than `seconds` is ended, with its compilers."""
    begin = time.monotonic()
    for builder in filter(None, environ.get(BUILDERS, "").split(",")):
        number, _, began = builder.partition(":")
        pid = int(number)
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if _began(pid) != began:
                continue  # it has ended, and its id is another's
            left = max(0.0, begin + seconds - time.monotonic())
            if not select.select([handle], [], [], left)[0]:
                logger.warning("qwen3emb plugin: a kernel is not built after %.0f s: left to its first use", seconds)
                _end(pid)
        finally:
            os.close(handle)
    if (took := time.monotonic() - begin) > WORTH_SAYING:
        logger.info("qwen3emb plugin: waited %.1f s for kernels to be built", took)


def _began(pid: int | None) -> str | None:
    """When a process began, in the kernel's ticks; None where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _without_fail(step: Callable[[], None]) -> None:
    """Nothing that goes wrong here is a reason not to serve: a kernel that is not built is built at its first use."""
    try:
        step()
    except Exception as error:
        logger.warning("qwen3emb plugin: kernels are left to their first use: %s: %s", type(error).__name__, error)


def _end(pid: int) -> None:
    """Kill a builder and its compilers, so that its locks are free."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        builder = psutil.Process(pid)
        for process in (builder, *builder.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
