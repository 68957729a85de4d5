"""Which engines the gateway has: told to it by a thread of its own, again and again, until it is so.

The supervisor says what ought to be (`want`); this compares it with what each of the gateway's workers has and mends
the difference, at every change and every second: a worker that was started again by its parent knows only what the
gateway was started with. Calls that fail are made again as long as the gateway is there.

An engine that was taken away and is back at the same address is another engine: the gateway has to prove it anew, also
where it came back before this thread had told that it was gone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qwen3emb_launch.errors import EngineFailedError, LaunchError
from qwen3emb_launch.up.gateway_runner import GatewaySpec
from qwen3emb_launch.up.sockets import short_path

AGAIN_AFTER = 0.1  # seconds after a failed call
LOOK_EVERY = 1.0
CALL_TIMEOUT = 5.0
DRAIN_ROOM = 5.0  # beyond the drain that is asked for
POLL_EVERY = 0.02


class GatewayLink:
    """The supervisor's side of the gateway's admin sockets. Every method may be called from any thread."""

    def __init__(self, spec: GatewaySpec, folder: Path) -> None:
        self._spec = spec
        self._folder = folder
        self._wanted: dict[str, str | None] = {}
        self._gone: set[str] = set()  # taken away since the gateway was told last
        self._there = False
        self._dirty = False
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="gateway link", daemon=True)
        self._thread.start()

    @property
    def wanted(self) -> Mapping[str, str | None]:
        """The engines that may have traffic: URL -> API key."""
        return dict(self._wanted)

    def want(self, upstreams: Mapping[str, str | None]) -> None:
        """From now on these engines, and no others."""
        with self._changed:
            if self._wanted != upstreams:
                self._gone |= self._wanted.keys() - upstreams.keys()
                self._wanted = dict(upstreams)
                self._dirty = True
                self._changed.notify()

    def there(self, listens: bool) -> None:
        """Whether the gateway is up: only then is it called."""
        with self._changed:
            self._there = self._dirty = listens
            self._changed.notify()

    def close(self) -> None:
        """The instance ends."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def drain(self, url: str, timeout: float) -> bool:
        """Nothing new for this engine; True when it has nothing left in work. Raises LaunchError."""
        order = {"url": url, "timeout": timeout}
        answers = [self._call(name, "POST", "/drain", order, timeout + DRAIN_ROOM) for name in self._spec.sockets]
        return all(answer["drained"] for answer in answers)

    def await_upstream(self, url: str, timeout: float, given_up: Callable[[], bool]) -> None:
        """Return once every worker sends traffic to this engine.

        Raises EngineFailedError `gateway_refuses` when its vectors are not those of the others, `gateway_silent` after
        `timeout` seconds.
        """
        end = time.monotonic() + timeout
        pause = threading.Event()
        seen = "the gateway does not answer"
        while time.monotonic() < end and not given_up():
            try:
                rows = [self._upstreams(name).get(url, {}) for name in self._spec.sockets]
            except LaunchError as error:
                seen = error.message
                rows = []
            refused = next((row for row in rows if row.get("state") == "refused"), None)
            if refused:
                raise EngineFailedError(
                    "gateway_refuses", f"the gateway refuses {url}: {refused.get('reason')}", "qwen3emb diff"
                )
            if rows and all(row.get("state") == "up" for row in rows):
                return
            seen = "; ".join(str(row.get("reason")) for row in rows) or seen
            pause.wait(POLL_EVERY)
        raise EngineFailedError(
            "gateway_silent", f"{url} got no traffic from the gateway within {timeout:g} s: {seen}", "qwen3emb logs"
        )

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or (self._there and self._dirty), LOOK_EVERY)
                if self._closed:
                    return
                if not self._there:
                    continue
                wanted, self._dirty = dict(self._wanted), False
                gone, self._gone = self._gone, set()
            try:
                for name in self._spec.sockets:
                    self._mend(name, wanted, gone)
            except LaunchError:
                with self._changed:
                    self._dirty = True
                    self._gone |= gone
                    self._changed.wait_for(lambda: self._closed or not self._there, AGAIN_AFTER)

    def _mend(self, name: str, wanted: Mapping[str, str | None], gone: set[str]) -> None:
        have = self._upstreams(name)
        for url in have:
            if url in gone and url in wanted:
                self._call(name, "DELETE", "/upstreams", {"url": url, "timeout": 0})
        for url in wanted:
            if url not in have or url in gone:
                self._call(name, "POST", "/upstreams", {"url": url, "api_key": wanted[url]})
        for url in have:
            if url not in wanted:
                self._call(name, "DELETE", "/upstreams", {"url": url, "timeout": 0})

    def _upstreams(self, name: str) -> dict[str, dict[str, Any]]:
        return {row["url"]: row for row in self._call(name, "GET", "/state")["upstreams"]}

    def _call(
        self, name: str, method: str, route: str, body: dict[str, Any] | None = None, timeout: float = CALL_TIMEOUT
    ) -> Any:
        try:
            with short_path(self._folder, name) as path:
                return self._spec.admin(path, method, route, body, timeout)
        except OSError as error:
            raise EngineFailedError("gateway_silent", f"{name}: {error}", "qwen3emb logs") from error
