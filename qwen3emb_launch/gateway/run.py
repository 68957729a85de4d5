"""The gateway as a process: one worker in this process, or several beside each other on one port.

Several workers listen on the same port (SO_REUSEPORT, the kernel deals connections out), each on a socket that the
parent holds as well: connections to a worker that died wait for its successor. Each has its own batcher and its share
of the memory; what they share is the cache on disk. Through their admin sockets they gather each other's numbers for
/metrics and /ui, and pass on what is changed in one of them. A worker that dies, or hangs and is ended, is started
again and takes over what the others were told; the parent's death ends them all.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, MutableSequence, Sequence
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType
from typing import Any

from qwen3emb_launch.engine_process.guard import die_with_parent
from qwen3emb_launch.errors import EngineFailedError, LaunchError
from qwen3emb_launch.gateway.config import GatewayConfig
from qwen3emb_launch.gateway.peers import Peers
from qwen3emb_launch.gateway.pulse import Watch, beat
from qwen3emb_launch.gateway.service import Service, cannot_listen
from qwen3emb_launch.listening import listen, part

log = logging.getLogger(__name__)

RESTART_PAUSE = 0.5
MAX_DEATHS = 10  # of workers within a minute
START_TIMEOUT = 30.0
# Requests, answered or failed, leave no cycles, so a look for them finds nothing and walks all that is being worked on:
# it comes when so many more objects live than at the last one. Python's own 700 are a few dozen requests at a time.
GC_AFTER = 10_000

Listening = Callable[[Mapping[str, Any]], None]


def run(config: GatewayConfig, listening: Listening = lambda _: None) -> None:
    """Serve until SIGTERM or SIGINT. `listening` is called once clients can connect, with host, port and pid."""
    if config.workers == 1:
        service = Service(config, sockets=_given(config))
        _loop(service, lambda service: listening(_where(config, service)))
    else:
        Workers(config, listening).run()


def _given(config: GatewayConfig) -> list[socket.socket]:
    """The sockets that this process was started with. Raises UnfitError for a descriptor that is none."""
    try:
        return [socket.socket(fileno=fd) for fd in config.listen_fds]
    except OSError as error:
        raise cannot_listen(config, error) from error


def _where(config: GatewayConfig, service: Service) -> dict[str, Any]:
    return {
        "host": config.host,
        "port": service.port,
        "pid": os.getpid(),
        "workers": config.workers,
        "admin_socket": config.admin_socket,
        "admin_port": service.admin_port,
    }


def _loop(service: Service, started: Callable[[Service], None]) -> None:
    import uvloop

    gc.collect()
    gc.freeze()  # what start-up made stays: no collection walks it, no answer waits for that
    gc.set_threshold(GC_AFTER)
    uvloop.run(service.run(started))


def worker_socket(base: str, number: int) -> str:
    """The admin socket of one worker; worker 0 has the configured one."""
    return base if number == 0 else f"{base}.{number}"


class Workers:
    """The parent: starts the workers, restarts the dead, passes signals on."""

    def __init__(self, config: GatewayConfig, listening: Listening) -> None:
        self._folder = None if config.admin_socket else tempfile.TemporaryDirectory(prefix="qwen3emb-gateway-")
        admin = config.admin_socket or str(Path(self._folder.name if self._folder else "") / "admin.sock")
        self._config = dataclasses.replace(config, admin_socket=admin)
        self._listening = listening
        self._context = multiprocessing.get_context("spawn")
        self._processes: dict[int, SpawnProcess] = {}
        self._sockets: list[socket.socket] = []
        self._pulse = self._context.RawArray("d", config.workers)
        self._watcher = Watch(config.worker_stall)
        self._stopping = False

    def run(self) -> None:
        """Until told to stop. Raises EngineFailedError when the workers keep dying, their own error at the start."""
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self._stop)
        signal.signal(signal.SIGHUP, self._pass_on)
        # A configuration that cannot work is found here, once, not in every worker.
        if Service(self._config).app.keys.limited:
            log.warning("limits of API keys hold in each of the %d workers for itself", self._config.workers)
        self._sockets = _given(self._config) or self._listen()
        reader, writer = self._context.Pipe(duplex=False)
        try:
            for number in range(self._config.workers):
                self._start(number, writer)
            self._await_first(reader)
            self._watch(reader, writer)
        finally:
            self._end()

    def _listen(self) -> list[socket.socket]:
        try:
            return listen(self._config.host, self._config.port, self._config.workers)
        except OSError as error:
            raise cannot_listen(self._config, error) from error

    def _start(self, number: int, writer: Any) -> None:
        own = part(self._sockets, number, self._config.workers)
        self._pulse[number] = 0.0
        arguments = (self._config, number, writer, os.getpid(), own, self._pulse)
        process = self._context.Process(target=_worker, args=arguments, daemon=False)
        process.start()
        self._processes[number] = process

    def _await_first(self, reader: Any) -> None:
        deadline, news, heard = time.monotonic() + START_TIMEOUT, {}, 0
        while heard < self._config.workers:
            if self._stopping:
                return
            if reader.poll(0.1):
                news, heard = reader.recv(), heard + 1
                if isinstance(news, LaunchError):
                    raise news
            elif time.monotonic() > deadline:
                raise EngineFailedError("workers_late", f"no worker listened within {START_TIMEOUT:g} s", "see its log")
        self._listening({**news, "pid": os.getpid()})

    def _watch(self, reader: Any, writer: Any) -> None:
        deaths: list[float] = []
        while not self._stopping:
            while reader.poll():  # of workers started again: nobody waits for it, and a full pipe would stop them
                news = reader.recv()
                if isinstance(news, LaunchError):
                    log.error("a worker cannot start again: %s", news.message)
            for number, process in list(self._processes.items()):
                process.join(0.1)
                if self._stopping:
                    continue
                if process.exitcode is None:
                    self._end_hung(number, process)
                    continue
                log.error("worker %d ended with status %s and is started again", number, process.exitcode)
                deaths = [at for at in deaths if time.monotonic() - at < 60] + [time.monotonic()]
                if len(deaths) >= MAX_DEATHS:
                    raise EngineFailedError(
                        "workers_die", f"{len(deaths)} workers died within a minute", "their log says why"
                    )
                time.sleep(RESTART_PAUSE)
                self._start(number, writer)

    def _end_hung(self, number: int, process: SpawnProcess) -> None:
        if process.pid and self._watcher.hung(process.pid, self._pulse[number]):
            log.error("worker %d has hung for %g s and is ended", number, self._config.worker_stall)
            process.kill()

    def _stop(self, _signal: int, _frame: FrameType | None) -> None:
        self._stopping = True
        self._pass_on(signal.SIGTERM, None)

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        for process in self._processes.values():
            if process.pid and process.is_alive():
                os.kill(process.pid, number)

    def _end(self) -> None:
        for one in self._sockets:
            one.close()
        self._pass_on(signal.SIGTERM, None)
        deadline = time.monotonic() + self._config.drain + 5
        for process in self._processes.values():
            process.join(max(0.1, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join(5)
        if self._folder:
            self._folder.cleanup()


def _worker(
    config: GatewayConfig, number: int, writer: Any, parent: int, sockets: Sequence[socket.socket],
    pulse: MutableSequence[float],
) -> None:  # fmt: skip
    """One child. Dies with its parent, whatever way that dies."""
    if not die_with_parent(signal.SIGTERM, parent):
        return
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=f"%(levelname)s worker {number}: %(message)s")
    own = dataclasses.replace(config, admin_socket=worker_socket(config.admin_socket, number))
    try:
        others = [worker_socket(config.admin_socket, n) for n in range(config.workers) if n != number]
        service = Service(own, number, Peers(others), sockets=sockets)
        beating: set[asyncio.Task[None]] = set()  # the loop alone does not keep a task

        def started(service: Service) -> None:
            pulse[number] = time.monotonic()  # before anybody hears of it: one that hangs from then on is found
            beating.add(asyncio.get_running_loop().create_task(beat(pulse, number)))
            writer.send(_where(config, service))

        _loop(service, started)
    except LaunchError as error:
        writer.send(error)
        raise SystemExit(1) from None
