"""Worker processes that begin with everything imported.

SGLang starts its scheduler and detokenizer with `spawn`: each imports torch, transformers and SGLang again, after the
main process has. Here the main process imports once and forks itself while it holds nothing but modules; the fork is
`multiprocessing`'s fork server, and the workers are forked from it. They are what `spawn` would have made, less the
time and memory of the import.

The fork happens only where it is known to be harmless: CUDA untouched, no thread beside the main one, a fork server of
the shape read here (Python 3.10 to 3.13). Anything else is said in the log, and the engine starts as it always does.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import inspect
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from multiprocessing import connection, forkserver, popen_forkserver, popen_spawn_posix, resource_tracker, spawn
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from qwen3emb_engine_plugin.card import answered_by_nvml, cuda_untouched
from qwen3emb_engine_plugin.compiling import compiled_when_called

logger = logging.getLogger("qwen3emb_engine_plugin")

# What the workers need, and what the main process imports anyway.
MODULES = (
    "sglang.srt.server_args",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.models.registry",
    "sglang.srt.entrypoints.http_server",
)
PR_SET_PDEATHSIG = 1
# The loader reads this when a program begins: a worker that needs another one has to begin anew.
READ_AT_EXEC = "LD_PRELOAD"
BOUND_BY_NUMACTL = "SGLANG_NUMA_BIND_V2"  # SGLang's own switch
SECOND_NODE = Path("/sys/devices/system/node/node1")
# jemalloc's purging thread (pyarrow brings it), which its fork handlers start anew; and one that NVIDIA's libraries
# start when they are loaded, seen on driver 580 before CUDA is initialised: workers served and verified without it.
HARMLESS = ("jemalloc_bg_thd", "cuda0")


def start(
    modules: Sequence[str] = MODULES,
    load: Callable[[], None] = lambda: None,
    importing: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> str | None:
    """Import `modules` (under `importing`), `load` what the workers share besides, and fork the template from here.

    Returns why it was not done, or None.
    """
    problem = _misfit()
    if problem:
        return problem
    with answered_by_nvml(), _uncollected():
        with compiled_when_called(), importing():
            for module in modules:
                importlib.import_module(module)
        load()
    if not cuda_untouched():
        return "an import initialised CUDA"
    threads = [name for name in _native_threads() if not name.startswith(HARMLESS)]
    if threads:
        return f"the imports left threads running: {', '.join(threads)}"
    if "prometheus_client" in sys.modules and "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return "prometheus_client was imported before its folder is known"
    _fork()
    return None


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection while this lasts, and none of what it makes later.

    Modules are not garbage: collectors that walk them take a tenth of the import, and write to pages that template and
    workers share.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def use() -> None:
    """From now on, processes started in the default way of `multiprocessing` come from the template.

    On a host of several NUMA nodes, SGLang starts its scheduler by way of numactl, as a program that imports everything
    again. The way it had before (and has for Ray) binds the scheduler to its GPU's node from within; a node's memory is
    then preferred, not demanded. A way that somebody has chosen stays, and so does numactl, which SGLang tries out
    beforehand, where a sandbox forbids to bind: from within, the scheduler would end.
    """
    if SECOND_NODE.is_dir() and shutil.which("numactl") and _may_bind():
        os.environ.setdefault(BOUND_BY_NUMACTL, "0")
    multiprocessing.context._default_context._actual_context = TemplateContext()  # type: ignore[attr-defined]


def _may_bind() -> bool:
    """Whether a process may choose its cores; the rest of that way, libnuma's preferred node, never ends one."""
    try:
        os.sched_setaffinity(0, os.sched_getaffinity(0))
    except OSError:
        return False
    return True


def running() -> bool:
    """Whether this process has a template."""
    return forkserver._forkserver._forkserver_pid is not None  # type: ignore[attr-defined]


def _native_threads() -> list[str]:
    """Names of the threads beside this one, those of native libraries too."""
    tasks = [task for task in Path("/proc/self/task").iterdir() if int(task.name) != os.getpid()]
    return [(task / "comm").read_text().strip() for task in tasks]


def _misfit() -> str | None:
    if not sys.platform.startswith("linux"):
        return f"{sys.platform} has no /proc"
    parameters = list(inspect.signature(forkserver.main).parameters)
    fields = vars(forkserver._forkserver)  # type: ignore[attr-defined]
    if parameters != ["listener_fd", "alive_r", "preload", "main_path", "sys_path"] or not {
        "_forkserver_address",
        "_forkserver_alive_fd",
        "_forkserver_pid",
    } <= set(fields):
        return f"the fork server of Python {sys.version.split()[0]} is not one that was read"
    return None


def _fork() -> None:
    """What `ForkServer.ensure_running` does, with a fork where it starts a new interpreter."""
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    resource_tracker.ensure_running()
    with socket.socket(socket.AF_UNIX) as listener:
        address = connection.arbitrary_address("AF_UNIX")
        listener.bind(address)
        Path(address).chmod(0o600)
        listener.listen()
        alive_r, alive_w = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        main = os.getpid()
        pid = os.fork()
        if pid == 0:
            os.close(alive_w)
            _serve(main, listener.detach(), alive_r)
        os.close(alive_r)
    server._forkserver_address, server._forkserver_alive_fd, server._forkserver_pid = address, alive_w, pid


def _serve(main: int, listener_fd: int, alive_r: int) -> None:
    """The template's life. It dies with the main process, and its workers, who ask for the same, with it."""
    code = 1
    try:
        if not _dies_with(main):
            return
        _name_it()
        # A worker that fails sends SIGQUIT to its parent, for the main process to end everything.
        signal.signal(signal.SIGQUIT, lambda *_: os.kill(main, signal.SIGQUIT))
        forkserver.main(listener_fd, alive_r, [])
    except SystemExit:
        code = 0
    finally:
        os._exit(code)


def _dies_with(parent: int) -> bool:
    """Have this process killed when its parent ends; False when that has happened already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent


def _name_it() -> None:
    import setproctitle

    setproctitle.setproctitle("sglang::template")


class InEnvironment:
    """A process's target, run under the environment that the main process has when it starts it.

    It ends with the template, which ends with the main process.
    """

    def __init__(self, target: Callable[..., Any]) -> None:
        self._target = target
        self._environment = dict(os.environ)
        self._template: int = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not _dies_with(self._template):
            return None
        os.environ.clear()
        os.environ.update(self._environment)
        return self._target(*args, **kwargs)


class TemplateProcess(ForkServerProcess):
    """Forked from the template; by `spawn` where a fresh interpreter is asked for."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802  (the name that multiprocessing calls)
        fresh = os.fsdecode(spawn.get_executable()) != sys.executable or os.environ.get(READ_AT_EXEC) != _PRELOADED
        if fresh:
            return popen_spawn_posix.Popen(process_obj)
        process_obj._target = InEnvironment(process_obj._target)
        return popen_forkserver.Popen(process_obj)


class TemplateContext(ForkServerContext):
    """`spawn` by name, so that the workers themselves go on to spawn."""

    _name = "spawn"
    Process = TemplateProcess


_PRELOADED = os.environ.get(READ_AT_EXEC)
