"""How long what a CUDA graph holds takes: neither launches nor Python change it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

SECONDS = 0.02  # of replays, for each number of `in_turn`


def replayed(torch: Any, graph: Any, times: int) -> float:
    """Milliseconds that one replay of a CUDA graph takes, of so many."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(times):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / times


def in_turn(torch: Any, ways: Mapping[str, Callable[[Any], Any]], inputs: Sequence[Any]) -> dict[str, float]:
    """Milliseconds a call of each way over these inputs, the better of two turns."""
    graphs = {}
    for name, way in ways.items():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = [way(one) for one in inputs]  # all kept until the end: each has memory of its own
        del outputs
        graphs[name] = graph
    found = dict.fromkeys(graphs, math.inf)
    for _ in range(2):
        for name, graph in graphs.items():
            times = max(2, min(60, int(SECONDS * 1000 / max(replayed(torch, graph, 1), 1e-3))))
            found[name] = min(found[name], replayed(torch, graph, times) / len(inputs))
    return found
