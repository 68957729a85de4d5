"""One running gateway process: put together from its configuration, served, changed while it runs, ended in order."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import logging
import os
import signal
import socket
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from qwen3emb_launch.errors import InvalidInputError, LaunchError, UnfitError
from qwen3emb_launch.gateway import keys, tasks
from qwen3emb_launch.gateway.access_log import AccessLog
from qwen3emb_launch.gateway.admin import Admin
from qwen3emb_launch.gateway.answer import Vector
from qwen3emb_launch.gateway.app import App
from qwen3emb_launch.gateway.batcher import Batcher
from qwen3emb_launch.gateway.cache import Keyer, VectorCache
from qwen3emb_launch.gateway.config import UPSTREAM_KEY_VARIABLE, GatewayConfig, UpstreamConfig
from qwen3emb_launch.gateway.disk_cache import DiskCache, make_place
from qwen3emb_launch.gateway.embeddings import Embeddings, Model
from qwen3emb_launch.gateway.host import raise_fd_limit, tls_context
from qwen3emb_launch.gateway.http_client import Address
from qwen3emb_launch.gateway.http_messages import HttpLimits
from qwen3emb_launch.gateway.http_server import HttpServer
from qwen3emb_launch.gateway.metrics import Metrics
from qwen3emb_launch.gateway.peers import Peers
from qwen3emb_launch.gateway.tokens import TokenRules
from qwen3emb_launch.gateway.tracing import Tracing
from qwen3emb_launch.gateway.upstream import Upstream, UpstreamPool, UpstreamState
from qwen3emb_launch.gateway.work import BatchLimits

log = logging.getLogger(__name__)

WATCH_EVERY = 1.0  # seconds between looks at the tasks and keys files
OWN_FDS = 256  # file descriptors beside the clients' connections


def cannot_listen(config: GatewayConfig, error: OSError) -> UnfitError:
    """The error for an address that cannot be had."""
    return UnfitError(
        "port_in_use" if error.errno == errno.EADDRINUSE else "cannot_listen",
        f"cannot listen on {config.host}:{config.port}: {error.strerror or error}",
        "another --port, or stop what holds it (ss -ltnp shows it)",
    )


class Service:
    """Everything of one worker process."""

    def __init__(
        self,
        config: GatewayConfig,
        number: int = 0,
        peers: Peers | None = None,
        tracing: Tracing | None = None,
        sockets: Sequence[socket.socket] = (),
    ) -> None:
        """`sockets` are to be served instead of the configured address: they listen there already."""
        self.config = config
        self._sockets = sockets
        self.number = number
        self.peers = peers or Peers()
        self.metrics = Metrics()
        self.pool = UpstreamPool(calls=config.calls, model=config.upstream_model or None)
        rules = self._rules()
        self.pool.samples = rules.samples
        self.endpoint = Embeddings(
            rules, self.metrics, names=config.models, min_dims=config.min_dims, max_items=config.max_items,
            hold=config.hold, timeout=config.timeout,
        )  # fmt: skip
        self.endpoint.tasks = tasks.load(Path(config.tasks_file) if config.tasks_file else None)
        keyring = keys.load(Path(config.keys_file) if config.keys_file else None)
        price = (config.price_name, config.price_per_million, config.currency) if config.price_per_million else None
        self.access_log = AccessLog(config.access_log) if config.access_log else None
        self.tracing = tracing or (Tracing() if config.otel else None)
        self.app = App(
            self.endpoint, self.pool, self.metrics, keys=keyring, loopback=config.loopback,
            access_log=self.access_log, price=price, worker=number, peers=self.peers, tracing=self.tracing,
        )  # fmt: skip
        limits = HttpLimits(body=config.max_body, connections=config.connections)
        self.server = HttpServer(self.app.handle, limits, config.cors_origins)
        self.server.early = self.app.early
        self.app.server = self.server
        self.app.allow_hosts = tuple(name.lower() for name in (*config.allow_hosts, config.host))
        self.operators = HttpServer(
            self.app.operator, HttpLimits(body=0, connections=64), early=self.app.early_operator
        )
        self.admin = Admin(self)
        self.admin_server = HttpServer(self.admin.handle, HttpLimits(connections=64))
        self.batch_limits = BatchLimits(
            items=config.batch_items, tokens=config.batch_tokens, long_tokens=config.long_tokens,
            wait=config.batch_wait, queue=config.queue, hold=config.hold, timeout=config.timeout, stall=config.stall,
        )  # fmt: skip
        self._tls = tls_context(config)
        self.port = config.port
        self.admin_port: int | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._opening: asyncio.Task[None] | None = None  # of the cache on disk
        self._reloading: asyncio.Task[None] | None = None
        self._one_reload = asyncio.Lock()
        if config.disk_cache:
            make_place(Path(config.disk_cache))
        self._seen = self._stamps()
        self.stop = asyncio.Event()

    def _rules(self) -> TokenRules:
        config = self.config
        if config.model_path:
            return TokenRules.from_model(
                Path(config.model_path), context_length=config.context_length, overflow=config.overflow,
                foreign=config.foreign_ids,
            )  # fmt: skip
        if config.overflow != "refuse" or config.foreign_ids == "decode":
            raise InvalidInputError(
                "no_tokenizer",
                "truncating and decoding need the model's tokenizer, and no model folder was given",
                "--model-path FOLDER (config.json and tokenizer.json are enough)",
            )
        return TokenRules(foreign=config.foreign_ids)

    # -- start and end

    async def start(self) -> None:
        """Listen, and begin to prove the upstreams. Raises UnfitError when an address cannot be had."""
        await self._take_over()
        config = self.config
        raise_fd_limit(config.connections + OWN_FDS)
        try:
            if self._sockets:
                self.port = await self.server.listen_on(self._sockets, tls=self._tls)
            else:
                self.port = await self.server.listen(config.host, config.port, tls=self._tls)
            if config.admin_port is not None and self.number == 0:
                self.admin_port = await self.operators.listen("127.0.0.1", config.admin_port)
        except OSError as exc:
            raise cannot_listen(config, exc) from exc
        for upstream in config.upstreams:
            self.add_upstream(upstream)
        self._chain_on_change()
        if config.admin_socket:
            await self._listen_admin(Path(config.admin_socket))
        self._watcher = asyncio.create_task(self._watch())

    async def _listen_admin(self, path: Path) -> None:
        """A socket that only this user may open; a dead one of an earlier run is replaced."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
            path.unlink()
        old = os.umask(0o177)
        try:
            await self.admin_server.listen_unix(str(path))
        except OSError as exc:
            raise UnfitError("cannot_listen", f"cannot listen on {path}: {exc}", "is the path too long?") from exc
        finally:
            os.umask(old)

    def _chain_on_change(self) -> None:
        """Until the first engine has proved itself nobody knows the width; then the cache and batcher are made."""
        if self.pool.width is not None:
            self._model_known()
        else:
            self.pool.on_change = self._model_known

    def _model_known(self) -> None:
        config, pool = self.config, self.pool
        if self.endpoint.model is not None or pool.width is None or pool.reference is None:
            return
        if self._opening is not None:
            return
        first = pool.up[0]
        if not self.endpoint.names:
            self.endpoint.names = tuple(dict.fromkeys((first.model.rstrip("/").rsplit("/", 1)[-1], first.model)))
        rules = self.endpoint.rules
        if config.context_length is None and first.context_length and rules.tokenizer is not None:
            rules.max_tokens = first.context_length - 1  # often started with less than the model could take
        if config.disk_cache:
            self._opening = asyncio.create_task(self._open_disk(pool.reference))
        else:
            self._serve(pool.width, None)

    async def _open_disk(self, reference: Vector) -> None:
        """On a thread, since a disk may take a while; one that cannot be had is done without."""
        config = self.config
        path, disk = Path(config.disk_cache), None
        try:
            disk = await asyncio.to_thread(DiskCache, path, config.fingerprint, reference, config.disk_bytes)
        except Exception:  # whatever it is, no request waits for it
            log.exception("serving without the cache on disk")
        finally:
            self._opening = None
        if self.pool.reference is reference:
            self._serve(int(reference.shape[0]), disk)
            return
        if disk is not None:  # the model was changed meanwhile
            await asyncio.to_thread(disk.close)
        self._model_known()

    def _serve(self, width: int, disk: DiskCache | None) -> None:
        config, pool = self.config, self.pool
        cache = VectorCache(width, config.cache_bytes // config.workers)
        keyer = Keyer(config.fingerprint, disk.secret if disk else None)
        batcher = Batcher(pool, cache, self.batch_limits, self.metrics)
        batcher.tracing = self.tracing
        if disk is not None:
            batcher.on_vector = disk.put
        self.endpoint.model = Model(width, cache, keyer, batcher, disk)
        self.endpoint.known.set()

    async def new_model(self, fingerprint: str, upstreams: list[UpstreamConfig] | None = None) -> None:
        """Serve something else from now on: forget every vector, prove the upstreams again.

        Requests in work are finished by the old engines first, requests that come meanwhile are held for the new.
        With `upstreams` these replace the old ones; without, the same addresses are expected to serve the new model.
        """
        model, pool = self.endpoint.model, self.pool
        self.endpoint.known.clear()
        self.endpoint.model = None
        if model is not None:
            deadline = monotonic() + self.config.hold
            while model.batcher.waited_for and monotonic() < deadline:
                await asyncio.sleep(0.01)
            await model.batcher.close()
            if isinstance(model.disk, DiskCache):
                await asyncio.to_thread(model.disk.close)
        self.config = dataclasses.replace(self.config, fingerprint=fingerprint)
        pool.on_change = self._model_known
        if upstreams is not None:
            wanted = {Address.parse(u.url).url for u in upstreams}
            for url in [u for u in pool.upstreams if u not in wanted]:
                await pool.remove(url, 0.0)
        pool.forget_reference()
        for upstream in upstreams or ():
            self.add_upstream(upstream)

    async def _take_over(self) -> None:
        """Started again beside workers that were changed meanwhile: what they serve from counts, not the start's."""
        said = await self.peers.first("/settings")
        if said is None:
            return
        upstreams = tuple(UpstreamConfig(u["url"], u["api_key"]) for u in said["upstreams"])
        self.config = dataclasses.replace(self.config, fingerprint=said["fingerprint"], upstreams=upstreams)

    def settings(self) -> dict[str, Any]:
        """What a worker that is started again takes over. Holds keys: for the admin socket alone."""
        kept = [u for u in self.pool.upstreams.values() if u.state is not UpstreamState.DRAINING]
        rows = [{"url": u.url, "api_key": u.client.api_key} for u in kept]
        return {"fingerprint": self.config.fingerprint, "upstreams": rows}

    def add_upstream(self, upstream: UpstreamConfig) -> Upstream:
        """Add an engine; it gets traffic once it has proved itself. Raises InvalidInputError (`bad_upstream`)."""
        key = upstream.api_key or os.environ.get(UPSTREAM_KEY_VARIABLE)
        return self.pool.add(Address.parse(upstream.url), key, self.config.tls_verify_upstream)

    async def run(self, started: Callable[[Service], None] = lambda _: None) -> None:
        """Serve until SIGTERM or SIGINT, then let requests in work finish."""
        loop = asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, self.stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._hang_up)
        await self.start()
        started(self)
        try:
            await self.stop.wait()
        finally:
            await self.close()

    async def close(self) -> None:
        """Stop listening, finish what is in work, close everything."""
        if self._watcher:
            self._watcher.cancel()
        await self.server.close(self.config.drain)
        self.app.stopping = True
        if self._opening is not None:
            await self._opening
        model = self.endpoint.model
        if model is not None:
            await model.batcher.close()
            if isinstance(model.disk, DiskCache):
                await asyncio.to_thread(model.disk.close)
        self.pool.close()
        await self.operators.close(1.0)
        await self.admin_server.close(1.0)
        if self.config.admin_socket:
            Path(self.config.admin_socket).unlink(missing_ok=True)
        if self.access_log:
            self.access_log.close()
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)

    # -- change while running

    def _hang_up(self) -> None:
        self._reloading = asyncio.get_running_loop().create_task(self.reload())

    async def reload(self) -> None:
        """SIGHUP: tasks and keys read again, the access log reopened."""
        await self._reload_files()
        if self.access_log:
            try:
                self.access_log.reopen()
            except LaunchError as error:
                log.error("the access log stays as it was: %s", error.message)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_EVERY)
            stamps = self._stamps()
            if stamps != self._seen:
                self._seen = stamps
                try:
                    await self._reload_files()
                except Exception:  # a watch that ended would never see the mended file
                    log.exception("reading tasks and keys again failed inside the gateway")

    def _stamps(self) -> list[tuple[int, int] | None]:
        out: list[tuple[int, int] | None] = []
        for name in (self.config.tasks_file, self.config.keys_file):
            try:
                info = Path(name).stat() if name else None
            except OSError:
                info = None
            out.append((info.st_mtime_ns, info.st_size) if info else None)
        return out

    async def _reload_files(self) -> None:
        """An invalid file keeps what was there and says why. On a thread: the YAML of many tasks takes a while."""
        config = self.config
        async with self._one_reload:
            try:
                table = await asyncio.to_thread(tasks.load, Path(config.tasks_file) if config.tasks_file else None)
                self.endpoint.tasks = table
            except LaunchError as error:
                log.error("the tasks stay as they were: %s", error.message)
            try:
                keyring = await asyncio.to_thread(keys.load, Path(config.keys_file) if config.keys_file else None)
                self.app.keys = keyring
            except LaunchError as error:
                log.error("the API keys stay as they were: %s", error.message)

    def state(self) -> dict[str, Any]:
        """For the admin socket."""
        model = self.endpoint.model
        return {
            "pid": os.getpid(),
            "workers": 1,
            "port": self.port,
            "ready": bool(self.pool.up),
            "fingerprint": self.config.fingerprint,
            "width": self.pool.width,
            "models": list(self.endpoint.names),
            "upstreams": [u.describe() for u in self.pool.upstreams.values()],
            "queued": model.batcher.queued if model else 0,
            "in_air": model.batcher.in_air if model else 0,
        }
