"""Products of few rows: torch's against every way of cutting our kernel's, and the table of the best.

    PYTHONPATH=SITE python benchmarks/gpu/few_rows.py [--shapes 4b] [--rows 36,48] [--write TABLE.json]

For each product of a shape and each number of rows: `torch` is `F.linear`, each candidate one `Config` of
`few_rows_kernels.py`. Candidates are compiled first, by as many processes as there are cores. Each is then compared
with float64 and, twice, with itself, and captured in a CUDA graph over so many weights that the L2 cache holds none of
them when its turn comes again. Microseconds are a product's, the median of replays. A first round of few replays
leaves the best FINALISTS, which are timed again beside torch; those within CLOSE of it are torch's. Prints the best of
each, and what a pass of the shape's layers gains.

That is a process of its own: a candidate that reads where it must not spoils the card for all that its process does
afterwards. Another one goes on without that candidate.

Then whole layers, with small kernels where norms and attention are: by torch, by the best of each, and by the best with
so many MB of the next weight asked for ahead (`--ahead`).

`--write` makes what QWEN3EMB_PLUGIN_FEW_ROWS_TABLE names: an engine started with that and QWEN3EMB_PLUGIN_FEW_ROWS=1
has it, without another word. Needs torch, Triton, a Hopper GPU, and the plugin (PYTHONPATH=engine_plugin where it is
not installed).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
from pathlib import Path
from typing import Any

ROWS = "4,8,16,24,36,48,68,100,132"  # the launcher's graphs of few tokens
NAMES = ("qkv", "o", "gate_up", "down")
SMALL = (3, 1, 1, 1)  # small kernels after each: rotation and attention, norm, gating, norm
LAYERS = {"0.6b": 28, "4b": 36, "8b": 36}
BEYOND_L2 = 250e6  # bytes of the weights of one graph at least; an H200 keeps 50 MB
LAUNCHES = 24  # of one graph at least: what starts it is little beside them
FIRST, FINAL, FINALISTS = 4, 25, 3  # replays
STALLED = 60  # seconds without a word, after which a process is ended
CLOSE = 0.99  # of torch's time: a smaller gain is within what turns differ by
NEAR = 1e-3  # of a row's root mean square, beside the rounding to bfloat16: what float32 sums may be off


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4b", help="of 0.6b,4b,8b; each shape takes a minute or two")
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--write", type=Path, metavar="FILE", help="the best of each as JSON")
    parser.add_argument("--ahead", default="4,8,16,24", help="MB, as QWEN3EMB_PLUGIN_FEW_ROWS_AHEAD has them")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="that compile")
    args = parser.parse_args()
    from qwen3emb_engine_plugin.few_rows_kernels import SHAPES, candidates

    begin = time.monotonic()
    rows = [int(one) for one in args.rows.split(",")]
    work = [(name, n, k, m) for name in args.shapes.split(",") for n, k in SHAPES[name] for m in rows]
    tried = {one: candidates(*one[1:]) for one in work}
    failed = compile_all(((m, config) for (_, _, _, m), of in tried.items() for config in of), args.processes)
    print(f"{sum(map(len, tried.values()))} candidates compiled, {time.monotonic() - begin:.0f} s", flush=True)
    for one, of in tried.items():
        tried[one] = [config for config in of if (one[3], config) not in failed]

    entries, gained = [], dict.fromkeys([(name, m) for name in args.shapes.split(",") for m in rows], 0.0)
    for (name, n, k, m), entry in survived(in_a_process, work, tried):
        device = entry.pop("device")
        stock, ours = entry["torch_us"], entry["us"] or math.inf
        told = f"{name:5} {NAMES[SHAPES[name].index((n, k))]:7} {m:4} rows  "
        for who, us in (("torch", stock), ("ours", ours)):
            told += f"{who} {us:6.2f} us {n * k * 2 / us / 1e6:5.2f} TB/s  "
        left = "" if entry["config"] else ", torch's"
        print(f"{told}{ours / stock:5.2f}x  {entry['nearest']} of {entry['tried']}{left}", flush=True)
        gained[name, m] += stock - ours if entry["config"] else 0.0
        entries.append({"n": n, "k": k, "rows": m, **entry})
        if args.write:  # what stands if the time is up
            args.write.write_text(json.dumps({**device, "products": entries}, indent=1) + "\n")
    for (name, m), us in gained.items():
        print(f"{name:5} {m:4} rows: {us * LAYERS[name] / 1e3:6.3f} ms less a pass")
    import torch

    for name in args.shapes.split(","):
        whole_layers(torch, name, SHAPES[name], entries, rows, [float(one) for one in args.ahead.split(",")])
    print(f"{time.monotonic() - begin:.0f} s")


def compile_all(wanted: Iterable[tuple[int, Any]], processes: int) -> set[tuple[int, Any]]:
    """Fill Triton's cache on disk, which the kernels are then loaded from; those that do not compile."""
    from qwen3emb_engine_plugin.few_rows_kernels import tile_rows

    # One kernel serves all weights, and all numbers of rows that have the same tiles.
    kernels: dict[tuple[tuple[int, int], Any], set[int]] = {}
    for m, config in wanted:
        kernels.setdefault((tile_rows(m), config), set()).add(m)
    each = [(min(of), config) for (_, config), of in kernels.items()]
    problems: dict[int, str | None] = {}
    left = list(range(len(each)))
    while left:
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            for at, future in [(at, pool.submit(compile_one, each[at])) for at in left]:
                with contextlib.suppress(BrokenProcessPool):
                    problems[at] = future.result()
        left = [at for at in left if at not in problems]
        if left:  # one compiler died, and the pool ended the others: those it was at are compiled when launched
            print(f"a compiler died at one of {[each[at] for at in left[:processes]]}", flush=True)
            problems.update(dict.fromkeys(left[:processes]))
            left = left[processes:]
    failed = set()
    for at, ((tiles, config), of) in enumerate(kernels.items()):
        if problem := problems[at]:
            print(f"tiles of {tiles}, {config}: {problem}", flush=True)
            failed |= {(m, config) for m in of}
    return failed


def compile_one(wanted: tuple[int, Any]) -> str | None:
    """In a process of its own: what launching would compile, without launching it."""
    from qwen3emb_engine_plugin.few_rows_kernels import compile_only

    try:
        compile_only(*wanted)
    except Exception as error:  # noqa: BLE001 - one that does not compile here; the others are worth having
        return f"{type(error).__name__}: {error}"
    return None


def survived(
    start: Callable[[list[Any], Any], Iterator[Any]], work: list[Any], tried: dict[Any, list[Any]]
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Each piece of work and its entry. A process that dies is started again without the candidate that it was at."""
    left = list(work)
    while left:
        at = None
        for entry, config in start(left, tried):
            at = config
            if entry is not None:
                yield left.pop(0), entry
        if left:
            if at is None:
                raise SystemExit(f"{left[0]}: measuring ended without a candidate to blame")
            for of in tried.values():
                if at in of:
                    of.remove(at)
            print(f"{left[0]}, {at}: left out, here and elsewhere: its process died", flush=True)


def in_a_process(work: list[Any], tried: dict[Any, list[Any]]) -> Iterator[tuple[Any, Any]]:
    """What `measure` says until its process ends."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe(duplex=False)
    process = spawn.Process(target=measure, args=(there, work, tried), daemon=True)
    process.start()
    there.close()
    try:
        while here.poll(STALLED):
            yield here.recv()
    except (EOFError, ConnectionResetError):
        pass
    finally:
        process.kill()
        process.join()


def measure(pipe: Any, work: list[Any], tried: dict[Any, list[Any]]) -> None:
    """Say (None, candidate) before one is touched, and (entry, None) of each piece of work."""
    import torch

    device = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    weights: dict[tuple[int, int], list[Any]] = {}
    for name, n, k, m in work:
        if (n, k) not in weights:  # one product's at a time
            weights.clear()
            weights[n, k] = random_weights(torch, n, k)
        pipe.send((None, None))  # whoever dies now, dies of torch
        entry = best(torch, m, weights[n, k], tried[name, n, k, m], lambda config: pipe.send((None, config)))
        pipe.send(({**entry, "device": device}, None))


def end_if_spoilt(torch: Any) -> None:
    """After an error: a kernel that went astray makes every later call fail. No destructor is to try one."""
    try:
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(1)


def random_weights(torch: Any, n: int, k: int) -> list[Any]:
    random = torch.Generator(device="cuda").manual_seed(0)
    return [
        (torch.randn((n, k), generator=random, device="cuda") * 0.02).bfloat16()
        for _ in range(max(3, math.ceil(BEYOND_L2 / (n * k * 2))))
    ]


def best(
    torch: Any, m: int, weights: list[Any], configs: list[Any], touched: Callable[[Any], None] = lambda _: None
) -> dict[str, Any]:
    """The fastest right configuration, its microseconds and torch's; no configuration where torch is as fast.

    `touched` hears of each candidate before it is launched.
    """
    from qwen3emb_engine_plugin.few_rows_kernels import product

    n, k = weights[0].shape
    x = torch.randn((m, k), device="cuda").bfloat16()
    exact = torch.nn.functional.linear(x.double(), weights[0].double())
    pool = torch.cuda.graph_pool_handle()
    stock = graph_of(torch, pool, weights, lambda w: torch.nn.functional.linear(x, w))
    graphs, wrong = {}, 0
    for config in configs:
        touched(config)
        try:
            problem = wrongness(torch, lambda config=config: product(x, weights[0], config), exact)
            if problem is None:
                graphs[config] = graph_of(torch, pool, weights, lambda w, config=config: product(x, w, config))
        except Exception as error:  # noqa: BLE001
            problem = f"{type(error).__name__}: {error}"
            end_if_spoilt(torch)
        if problem:
            wrong += 1
            print(f"{m} rows of {k}, weight of {n}, {config}: left out: {problem}", flush=True)
    first = {}
    for config, graph in graphs.items():
        touched(config)
        first[config] = timed(torch, graph, weights, FIRST)
    found: dict[Any, list[float]] = {config: [] for config in sorted(first, key=first.__getitem__)[:FINALISTS]}
    theirs = []
    for _ in range(2):  # in turns: clocks and neighbours change
        theirs.append(timed(torch, stock, weights, FINAL))
        for config, times in found.items():
            touched(config)
            times.append(timed(torch, graphs[config], weights, FINAL))
    took = {config: min(times) for config, times in found.items()}
    winner = min(took, key=took.__getitem__, default=None)
    return {
        "config": winner._asdict() if winner and took[winner] < CLOSE * min(theirs) else None,
        "us": took[winner] if winner else None,
        "torch_us": min(theirs),
        "nearest": list(winner or ()),
        "tried": len(first),
        "wrong": wrong,
    }


def whole_layers(torch: Any, name: str, shapes: Any, entries: list[Any], rows: list[int], ahead: list[float]) -> None:
    """Microseconds a layer, products and small kernels in their order."""
    from qwen3emb_engine_plugin.few_rows_kernels import Config, product

    layers = max(3, math.ceil(BEYOND_L2 / sum(n * k * 2 for n, k in shapes)))
    weights = [
        torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(layers) for shape in shapes
    ]
    for m in rows:
        found = {(e["n"], e["k"]): e["config"] and Config(**e["config"]) for e in entries if e["rows"] == m}
        inputs = {k: torch.randn((m, k), device="cuda").bfloat16() for _, k in shapes}
        other = torch.randn((m, shapes[0][1]), device="cuda").bfloat16()

        def run(size: float | None, found: Any = found, inputs: Any = inputs, other: Any = other) -> None:
            for at, weight in enumerate(weights):
                n, k = weight.shape
                config = None if size is None else found[n, k]
                if config is None:
                    torch.nn.functional.linear(inputs[k], weight)
                else:
                    product(inputs[k], weight, config, weights[(at + 1) % len(weights)], int((size or 0) * 1e6))
                for _ in range(SMALL[at % len(shapes)]):
                    torch.mul(other, 0.5)

        took = {}
        for who, size in (("torch", None), ("ours", 0.0), *((f"{mb:g} MB ahead", mb) for mb in ahead)):
            run(size)
            graph = captured(torch, torch.cuda.graph_pool_handle(), partial(run, size))
            took[who] = min(microseconds(torch, graph, FINAL) for _ in range(2)) / layers
        told = "  ".join(f"{who} {us:6.1f} us" for who, us in took.items())
        print(f"{name:5} a layer {m:4} rows  {told}", flush=True)


def wrongness(torch: Any, call: Callable[[], Any], exact: Any) -> str | None:
    """How the product differs from float64's by more than roundings, or from itself; or None."""
    found, again = call(), call()
    if not torch.equal(found, again):
        return "the same product twice gives two results"
    allowed = 2**-8 * exact.abs() + NEAR * exact.pow(2).mean(dim=-1, keepdim=True).sqrt()
    off = ((found.double() - exact).abs() / allowed).max().item()
    return None if off <= 1 else f"off by {off:.1f} times what rounding explains"


def graph_of(torch: Any, pool: Any, weights: list[Any], product: Callable[[Any], Any]) -> Any:
    """One product after the other, each with another weight."""

    def run() -> None:
        for turn in range(launches(weights)):
            product(weights[turn % len(weights)])

    product(weights[0])
    return captured(torch, pool, run)


def captured(torch: Any, pool: Any, run: Callable[[], None]) -> Any:
    """A graph of it, its kernels being loaded. Not by `torch.cuda.graph`, which collects garbage: 0.2 s each time."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(capturing(torch)):
        graph.capture_begin(pool=pool)
        try:
            run()
        finally:
            graph.capture_end()
    return graph


@cache
def capturing(torch: Any) -> Any:
    """One stream for all captures: cuBLAS keeps 32 MB for each that it has seen."""
    return torch.cuda.Stream()


def launches(weights: list[Any]) -> int:
    return max(LAUNCHES, len(weights))


def timed(torch: Any, graph: Any, weights: list[Any], times: int) -> float:
    """Microseconds of one product."""
    return microseconds(torch, graph, times) / launches(weights)


def microseconds(torch: Any, graph: Any, times: int) -> float:
    """Microseconds of a graph: the median of so many replays, after one that is not counted."""
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events)) * 1e3


if __name__ == "__main__":
    main()
