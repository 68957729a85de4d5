"""Faults survived: what is broken on purpose under steady load, and what came of it.

    python benchmarks/chaos.py                     every fault on the real CPU engine, without and with the gateway
    python benchmarks/chaos.py --short             a selection on a fake engine, under a minute (the tests run this)
    python benchmarks/chaos.py --only SIGKILL      rows whose name holds the word
    python benchmarks/chaos.py --part model        one part of it; with --gateway with|without one way of running it
    python benchmarks/chaos.py --json              the rows as data
    python benchmarks/chaos.py --show A.json ...   the table of runs kept so, nothing is run

Prints the table of docs/reliability.md; exit status 1 when a row has a miss: a wrong vector, a process left over, a
recovery longer than the engine's own start and two seconds, a hang noticed later than its period, a request lost
behind the gateway. Root may do more (a disk of its own, memory groups); what could not be tried is said. It uses parts
of the tests, and so needs what those need: the environment of `make test`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from faults import rows_engine, rows_files, rows_service
from faults.instance import Instance, LateError, Setup
from faults.load import Reference
from faults.report import markdown
from faults.strike import Row
from httpx import HTTPError

from qwen3emb_launch.demo_model import make_demo_model
from qwen3emb_launch.facts import RestartPolicy

KILL, STOP = signal.SIGKILL, signal.SIGSTOP
TEXTS = 1500  # different ones, in turn
PARTS = ("processes", "supervisor", "workers", "model", "clock", "disk", "files", "restarts")


class Runner:
    """Runs what is wanted, one instance after the other, and keeps the rows."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.only, self.parts, self.folder = options.only, options.part, folder
        self.engine = options.engine
        self.rate = options.rate
        self.judge_times = not options.any_speed
        self.rows: list[Row] = []
        self._reference: Reference | None = None
        self._number = 0

    def row(self, name: str, make: Callable[[], Row | str | None]) -> None:
        """One row, if it is wanted. A fault that cannot be tried is said; one that breaks the run is a miss."""
        if self.only and not any(word in name for word in self.only):
            return
        begin = time.monotonic()
        try:
            made = make()
        except (LateError, AssertionError) as error:
            made = Row(name, misses=(f"the row could not be finished: {error}",))
        if made is None:
            return
        row = Row(name, seen=f"not tried: {made}") if isinstance(made, str) else made
        self.rows.append(Row(**{**asdict(row), "fault": name}))
        verdict = "; ".join(row.misses) or "ok"
        print(f"{time.monotonic() - begin:6.1f} s  {name}: {verdict}", file=sys.stderr, flush=True)

    def part(self, name: str, work: Callable[[], None], gateway: bool | None = None) -> None:
        """Several rows on an instance of their own. One that does not even start is a miss, and the rest goes on."""
        if self.parts and name not in self.parts:
            return
        try:
            work()
        except (LateError, AssertionError, HTTPError) as error:
            where = "" if gateway is None else f", {way(gateway)}"
            self.rows.append(Row(f"{name}{where}", misses=(f"could not be tried: {error}",)))

    @contextmanager
    def instance(self, gateway: bool, *, model: bool = False, workers: int = 1, **environ: str) -> Iterator[Instance]:
        """A fresh instance and, at its end, the proof that nothing is left of it."""
        self._number += 1
        folder = self.folder / f"{self._number}"
        setup = Setup(self.engine, gateway, folder, self.rate, environ, workers=workers, judge_times=self.judge_times)
        if model:
            make_demo_model(setup.folder / "model")
        with Instance(setup) as instance:
            self.reference(instance)
            yield instance
        left = [c for w, c in instance.leftovers().items() if w.alive]
        self.rows.append(
            Row(f"stop after the faults above ({way(gateway)})", seen="nothing is left", misses=tuple(left))
        )

    def reference(self, instance: Instance | None = None) -> Reference:
        """The right answers, asked once a run: the model is the same in every instance."""
        if self._reference is None:
            assert instance is not None
            found = instance.found
            assert found is not None
            url, key = instance.record.engine_url, found.engine_api_key()
            self._reference = Reference(url, key, instance.model, TEXTS)
        return self._reference


def way(gateway: bool) -> str:
    """How the table names the two."""
    return "gateway" if gateway else "bare engine"


def engine_faults(run: Runner, instance: Instance, *, long: bool) -> None:
    """Signals to each process of the engine, its memory, its port."""
    reference, tail = run.reference(), way(instance.setup.gateway)
    roles = ("scheduler", "http", "detokenizer", "template", "guard") if long else ("http", "guard")
    for role in roles:
        run.row(f"SIGKILL {role}, {tail}", lambda r=role: rows_engine.signalled(instance, reference, r, KILL))
    for role in ("scheduler", "http") if long else ("http",):  # embeddings do not pass through the detokenizer
        run.row(f"SIGSTOP {role}, {tail}", lambda r=role: rows_engine.signalled(instance, reference, r, STOP))
    run.row(f"SIGSTOP guard and SIGKILL http, {tail}", lambda: rows_engine.stopped_guard(instance, reference))
    run.row(f"killed for memory, {tail}", lambda: rows_engine.out_of_memory(instance, reference))
    run.row(f"port stolen, {tail}", lambda: rows_engine.port_stolen(instance, reference))
    if long:
        run.row(f"machine starved, {tail}", lambda: rows_engine.starved(instance, reference))
    for number in (KILL, STOP) if long else (KILL,):
        run.row(
            f"{number.name} gateway, {tail}", lambda n=number: rows_service.gateway_signalled(instance, reference, n)
        )


def supervisor_faults(run: Runner, gateway: bool, *, long: bool) -> None:
    """The launcher's own process, its files, and a second one of its name."""
    with run.instance(gateway) as instance:
        reference, tail = run.reference(), way(gateway)
        step = 1 if long else 20
        run.row(f"state files cut, {tail}", lambda: rows_files.cut_everywhere(instance, step))
        run.row(f"a second `up`, {tail}", lambda: rows_service.second_up(instance, reference))
        run.row(f"SIGKILL supervisor, {tail}", lambda: rows_service.supervisor_killed(instance, reference))
        if long:
            run.row(f"SIGSTOP supervisor, {tail}", lambda: rows_service.supervisor_stopped(instance, reference))


def worker_faults(run: Runner) -> None:
    """One of two gateway workers."""
    with run.instance(True, workers=2) as instance:
        for number in (KILL, STOP):
            run.row(
                f"{number.name} gateway worker, {way(True)}",
                lambda n=number: rows_service.worker_signalled(instance, run.reference(), n),
            )


def model_faults(run: Runner, gateway: bool) -> None:
    """The checkpoint, and the hub it came from."""
    with run.instance(gateway, model=True, HF_ENDPOINT="http://127.0.0.1:9") as instance:
        reference, tail = run.reference(), way(gateway)
        run.row(f"hub gone and SIGKILL http, {tail}", lambda: rows_engine.signalled(instance, reference, "http", KILL))
        run.row(f"model removed, {tail}", lambda: rows_engine.model_away(instance, reference))
        run.row(f"model cut, {tail}", lambda: rows_engine.model_cut(instance, reference))
        run.row(f"weights altered, {tail}", lambda: rows_engine.model_altered(instance, reference))


def file_faults(run: Runner, *, long: bool) -> None:
    """State files, names, the disk, a thousand restarts."""
    run.row("writer of state killed", lambda: rows_files.writer_killed(200 if long else 20))
    run.row("race for a name", lambda: rows_files.race(10 if long else 2))
    if long:
        run.row("hub gone, model not here", rows_service.hub_gone)


def everything(run: Runner, gateways: tuple[bool, ...], *, long: bool) -> None:
    """All of it, in the order of the table."""
    for gateway in gateways:
        run.part("processes", lambda g=gateway: process_faults(run, g, long=long), gateway)
        run.part("supervisor", lambda g=gateway: supervisor_faults(run, g, long=long), gateway)
        if long and gateway:
            run.part("workers", lambda: worker_faults(run), gateway)
        if long and run.engine == "demo":
            run.part("model", lambda g=gateway: model_faults(run, g), gateway)
            run.part("clock", lambda g=gateway: clock_faults(run, g), gateway)
        run.part("disk", lambda g=gateway: disk_faults(run, g), gateway)
    run.part("files", lambda: file_faults(run, long=long))
    count = 1000 if long else 20
    quick = RestartPolicy(first=0.01, factor=1.0, limit=100_000)
    fake = Setup("fake", False, run.folder / "restarts", run.rate, restart=quick, check=False)
    restarts = f"{count} restarts of the fake engine"
    run.part("restarts", lambda: run.row(restarts, lambda: rows_files.restarts(fake, count)))


def process_faults(run: Runner, gateway: bool, *, long: bool) -> None:
    """Everything that can be done to the processes of one instance."""
    with run.instance(gateway) as instance:
        engine_faults(run, instance, long=long)


def clock_faults(run: Runner, gateway: bool) -> None:
    """The wall clock a day ahead and back again, for the launcher and the engine alike."""
    with rows_engine.clock_file(run.folder) as (environ, move):
        if not environ:
            run.row("wall clock jumps", lambda: "libfaketime is not installed")
            return
        with run.instance(gateway, **environ) as instance:
            for offset in ("+86400", "-86400"):
                run.row(
                    f"wall clock jumps by {offset} s, {way(gateway)}",
                    lambda o=offset, i=instance: rows_engine.clock_jump(i, run.reference(), move, o),
                )


def disk_faults(run: Runner, gateway: bool) -> None:
    """State and logs on a small disk of their own."""
    name = f"disk full, {way(gateway)}"
    if run.only and not any(word in name for word in run.only):
        return
    disk = run.folder / "disk"
    with rows_service.small_disk(disk, 4) as mounted:
        if not mounted:
            run.row(name, lambda: "no file system may be mounted here")
            return
        before = os.environ["QWEN3EMB_STATE_DIR"]
        os.environ["QWEN3EMB_STATE_DIR"] = str(disk / "state")
        try:
            with run.instance(gateway) as instance:
                run.row(name, lambda: rows_service.disk_full(instance, run.reference(), disk))
        finally:
            os.environ["QWEN3EMB_STATE_DIR"] = before


def earlier(files: Sequence[Path]) -> list[Row]:
    """The rows of earlier runs. One that was tried again counts as it was in the later file."""
    rows = [Row(**row) for file in files for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]
    return list({row.fault: row for row in rows}.values())


def main() -> int:
    """Run, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a selection, on the fake engine")
    parser.add_argument("--engine", choices=("demo", "fake"), help="default: demo, with --short fake")
    parser.add_argument("--gateway", choices=("with", "without", "both"), default="both")
    parser.add_argument("--rate", type=float, default=10.0, help="requests a second")
    parser.add_argument("--only", action="append", help="rows whose name holds this; may be repeated")
    parser.add_argument("--part", action="append", choices=PARTS, help="this part alone; may be repeated")
    parser.add_argument("--show", nargs="+", type=Path, metavar="FILE", help="the table of earlier runs' --json")
    parser.add_argument("--any-speed", action="store_true", help="do not judge times: for machines that are busy")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.show:
        kept = earlier(options.show)
        print(markdown(kept))
        return 1 if any(row.misses for row in kept) else 0
    options.engine = options.engine or ("fake" if options.short else "demo")
    gateways = {"with": (True,), "without": (False,), "both": (False, True)}[options.gateway]
    folder = Path(tempfile.mkdtemp(prefix="qwen3emb-chaos-"))
    os.environ["QWEN3EMB_STATE_DIR"] = str(folder / "state")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that instances are stopped on the way out
    runner = Runner(options, folder)
    begin = time.monotonic()
    try:
        everything(runner, gateways, long=not options.short)
    except (KeyboardInterrupt, SystemExit):
        runner.rows.append(Row("the rest", misses=("interrupted",)))  # what is known so far is shown
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    misses = [f"{row.fault}: {miss}" for row in runner.rows for miss in row.misses]
    if options.json:
        rows = [asdict(row) for row in runner.rows]
        print(json.dumps({"rows": rows, "misses": misses, "seconds": time.monotonic() - begin}))
    else:
        print(markdown(runner.rows))
        for miss in misses:
            print(f"MISS  {miss}", file=sys.stderr)
    return 1 if misses else 0


if __name__ == "__main__":
    raise SystemExit(main())
