"""One engine's effects: its command with fresh keys, its probes by embedding, its smoke test."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qwen3emb_launch.argv import with_option
from qwen3emb_launch.engine_process import EngineCommand
from qwen3emb_launch.engine_process.log_tail import last_lines
from qwen3emb_launch.engine_process.ports import check_free, private_port
from qwen3emb_launch.engine_process.rendezvous import Rendezvous
from qwen3emb_launch.engine_process.scratch import Scratch
from qwen3emb_launch.errors import EngineFailedError, UnfitError
from qwen3emb_launch.facts import LaunchPlan
from qwen3emb_launch.paths import paths
from qwen3emb_launch.planning.memory import needed_tokens
from qwen3emb_launch.probe import Answer, Target, Verdict, embed_once
from qwen3emb_launch.state import Claim, write_private
from qwen3emb_launch.up.check import CheckOrder, CheckProcess, CheckResult
from qwen3emb_launch.up.events import Check, Checked, Event
from qwen3emb_launch.up.keys import Keys, read_keys, take_keys
from qwen3emb_launch.up.process_runner import ProcessRunner
from qwen3emb_launch.up.stages import DOOMED, room
from qwen3emb_launch.up.verdict import SHOWN_LINES
from qwen3emb_launch.weights import weights_sample

LOOK_FOR = 10.0  # seconds for a sample of the weights, which takes milliseconds
SILENT = f"were not read within {LOOK_FOR:g} s, so they may not be those that"


@dataclass(frozen=True)
class EngineSpec:
    """One engine of an instance: its command, and where and as what it answers.

    `private` engines are called by a gateway alone; their port is theirs to choose: `port` is where the first try goes.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str]
    host: str
    port: int
    model: str
    dims: int
    context_length: int
    private: bool = False
    model_path: Path | None = None

    @property
    def connect_host(self) -> str:
        """The address to reach it by from this machine."""
        return {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(self.host, self.host)

    @property
    def url(self) -> str:
        """Its address as the OpenAI client takes it."""
        host = self.connect_host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/v1"

    def elsewhere(self) -> EngineSpec:
        """The same private engine on a port that is free now."""
        return self.on_port(private_port(self.host))

    def on_port(self, port: int) -> EngineSpec:
        """The same engine on another port."""
        return replace(self, port=port, argv=with_option(self.argv, "--port", str(port)))


def engine_spec(plan: LaunchPlan) -> EngineSpec:
    """An engine of the plan; each further one takes another port."""
    return EngineSpec(
        argv=plan.argv,
        env=plan.env,
        host=plan.engine_host,
        port=plan.engine_port,
        model=plan.served_model_name,
        dims=plan.max_dims,
        context_length=plan.context_length,
        private=(plan.engine_host, plan.engine_port) != (plan.host, plan.port),
        model_path=plan.model.path,
    )


@dataclass(frozen=True)
class Door:
    """Where a smoke test goes: the engine itself, or the gateway before it. `url` ends in /v1."""

    url: str
    key: str | None


class Look:
    """A sample of the weights, taken in a thread of its own: reading from a file system that hangs cannot be ended."""

    def __init__(self, folder: Path) -> None:
        self.found: str | None = None
        self._over = threading.Event()
        self._folder = folder
        try:
            threading.Thread(target=self._look, name="weights", daemon=True).start()
        except RuntimeError:  # no thread to be had: nothing was seen
            self._over.set()

    def _look(self) -> None:
        try:
            self.found = weights_sample(self._folder)
        finally:
            self._over.set()

    def over(self, timeout: float) -> bool:
        """Whether it is over, after so many seconds at most; then `found` is what it saw."""
        return self._over.wait(timeout)


class EngineRunner(ProcessRunner):
    """The effects of one engine's unit. `number` is its own within the supervisor's life: it names its keys' file."""

    def __init__(
        self,
        kind: str,
        spec: EngineSpec,
        claim: Claim,
        tell: Callable[[Event], None],
        keep: Callable[[], set[int]],
        *,
        check_argv: Sequence[str] | None,
        number: int = 1,
        probe_text: str = "qwen3emb liveness",
    ) -> None:
        super().__init__(kind, claim, tell, keep)
        self.spec = spec
        self.key: str | None = None
        self.keys_file = claim.keys if number == 1 else claim.keys.with_name(f"engine-{number}.yaml")
        self.plan_file = claim.plan  # for the smoke test
        self._check_argv = check_argv
        self._text = probe_text
        self._probes = 0
        self._weights: str | None = None  # what the first start loaded
        self._looking: Look | None = None  # at the weights, before a start
        self._settled = threading.Event()  # of the current start: the weights did not change while it read them
        self._check: CheckProcess | None = None
        self._rendezvous = Rendezvous()
        self._scratch = Scratch(paths().cache)

    @property
    def url(self) -> str:
        """The engine's own address."""
        return self.spec.url

    @property
    def door(self) -> Door:
        """The engine itself."""
        return Door(self.spec.url, self.key)

    @property
    def children(self) -> set[int]:
        """The guard, and a smoke test that waits or runs."""
        return super().children | ({self._check.pid} if self._check else set())

    def close(self) -> None:
        """No smoke test goes on, no key stays."""
        self._end_check()
        self._rendezvous.close()
        self._scratch.close()
        self.keys_file.unlink(missing_ok=True)

    def spawn(self, start: int) -> None:
        """Start the engine, and the smoke test's process beside it: it loads its libraries meanwhile."""
        super().spawn(start)
        if self._check_argv and not self.unfit:
            self._end_check()
            self._check = CheckProcess(self._check_argv)

    def command(self, log: Path) -> EngineCommand:
        """The plan's command and a file with keys; a private engine goes to another port where its own is taken.

        Raises UnfitError `model_changed` where another checkpoint lies in the place of the one that it was started
        with, or none that can be read: its vectors would not be those of the index that is searched with them.
        """
        self._same_weights()
        self._settled = threading.Event()
        try:
            check_free(self.spec.host, self.spec.port)
        except UnfitError:
            if not self.spec.private:
                raise
            self.spec = self.spec.on_port(private_port(self.spec.host))
        argv, keys = take_keys(self.spec.argv, private=self.spec.private)
        if self.key and self.spec.private:
            keys = Keys(keys.admin, self.key)  # the gateway knows this one
        try:
            write_private(self.keys_file, keys.config())
        except UnfitError:
            kept = read_keys(self.keys_file)  # a full disk: the last start's keys serve once more
            if kept is None:
                raise
            keys = kept
        self.key = keys.api
        ours = {"PYTHONUNBUFFERED": "1", **self._scratch.fresh()}
        return EngineCommand(
            argv=(*argv, "--config", str(self.keys_file)),
            env={**self._rendezvous.fresh(argv), **os.environ, **ours, **self.spec.env},
            log=log,
            cwd=self._claim.folder,
            secrets=keys.secrets,
            sign=DOOMED,
            scratch=self._scratch.folder,
        )

    def _same_weights(self) -> None:
        """By a sample of every tensor, in milliseconds. At a first start, weights that cannot be read are the engine's
        to complain of.

        Nothing else is decided meanwhile, so a file system that hangs is waited for LOOK_FOR seconds: a start that has
        to be compared fails then, and the next one waits on for the same look.
        """
        if not self.spec.model_path:
            return
        self._looking = self._looking or Look(self.spec.model_path)
        over = self._looking.over(LOOK_FOR)
        found = self._looking.found if over else None
        if over:
            self._looking = None
        if self._weights and found != self._weights:
            how = "are not those that" if found else "cannot be read, or are no safetensors, unlike those that"
            name = f"qwen3emb down {self._claim.name}"
            raise UnfitError(
                "model_changed",
                f"the weights in {self.spec.model_path} {how if over else SILENT} this instance was started with",
                f"put those back; or, to serve the new ones: {name}, then qwen3emb up again",
            )
        self._weights = self._weights or found

    def _embedded(self, answer: Answer, settled: threading.Event) -> Answer:
        """The answer to a probe, unless the weights are others than before the engine read them, or its longest input
        would never be answered; in the probe's thread.

        Once a start: what it has read stays. Weights that cannot be read now may be half written: it is asked again.
        """
        if not answer.ok or settled.is_set():
            return answer
        short = self._short_of_room()
        if short:
            self.unfit = short
            return replace(answer, verdict=Verdict.WRONG, detail=short.message)
        if not self.spec.model_path:
            settled.set()
            return answer
        found = weights_sample(self.spec.model_path)
        if self._weights and found is None:
            return replace(answer, verdict=Verdict.UNREACHABLE, detail="it embeds, but its weights cannot be read")
        if self._weights and found != self._weights:
            return replace(answer, verdict=Verdict.WRONG, detail="its weights were replaced while it read them")
        self._weights = found
        settled.set()
        return answer

    def _short_of_room(self) -> EngineFailedError | None:
        """An input longer than the pool waits in SGLang for ever, and everything behind it."""
        needed = needed_tokens(self.spec.context_length, 1)
        if self.log is None or (found := room(self.log)) is None or found >= needed:
            return None
        return EngineFailedError(
            "engine_short_pool",
            f"the engine has room for {found:,} tokens, and an input of {self.spec.context_length:,} needs {needed:,}: "
            "others took memory while it loaded",
            "the same command once more when they are up, or one engine after the other; or a shorter context: "
            f"--set context_length={max(32, found - 64)}",
            {"log": str(self.log), "last_lines": last_lines(self.log, SHOWN_LINES)},
        )

    def ask(self, timeout: float) -> Callable[[], Answer]:
        """One embedding of a text of its own: an answer from a cache would prove nothing.

        Before a start's first good answer counts, the weights are compared once more: they may have been replaced
        between the look before the start and the engine's own.
        """
        self._probes += 1
        text = f"{self._text} {self._probes}"
        target = Target(self.spec.connect_host, self.spec.port, self.spec.model, self.spec.dims, self.key)
        settled = self._settled
        return lambda: self._embedded(embed_once(target, text, timeout), settled)

    def begin_check(self, action: Check, door: Door) -> None:
        """Run the smoke test against the engine, or against the gateway before it."""
        assert self._check is not None  # noqa: S101 - the machine asks for a check only where there is one
        spec = self.spec

        def told(result: CheckResult) -> None:
            self._tell(Checked(action.start, result.faults, result.report, result.warnings))

        order = CheckOrder(door.url, spec.model, spec.dims, spec.context_length, door.key, str(self.plan_file))
        self._check.begin(order, action.timeout, told)

    def _end_check(self) -> None:
        if self._check:
            with contextlib.suppress(OSError, ValueError):
                self._check.cancel()
            self._check = None
