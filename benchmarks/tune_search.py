"""Which search finds the better launch settings in the few trials that a budget buys? Simulated, no engine.

    python benchmarks/tune_search.py [--landscapes 300] [--json]      # with Optuna's TPE too, where optuna is installed

A landscape is what 8 settings of 2 or 3 values give, drawn at random: most give within 3% of nothing, a third 5 to 40%
either way, one in ten fails to start, and some pairs do not add up. A trial is measured with 3% of noise. Each search
gets the same number of trials, and is judged by the true rate of what it says is best, over the best of the landscape.
The staged search is the code that `qwen3emb tune` runs, with the settings in random order (`blind`: the expected gains
know nothing) and in the order of their true gains with errors (`informed`).
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qwen3emb_launch.tune import strategy
from qwen3emb_launch.tune.objective import Goal, Objective
from qwen3emb_launch.tune.space import Factor
from qwen3emb_launch.tune.trials import Measurement, Moves, Stage, Status, Trial, moves

OBJECTIVE = Objective(Goal.THROUGHPUT)
NOISE = 0.03
TRIALS = (8, 12, 20, 40)


@dataclass
class Landscape:
    """What each value gives, which pairs give more or less together, which values fail."""

    gives: dict[tuple[str, str], float]
    together: dict[frozenset[tuple[str, str]], float]
    fails: set[tuple[str, str]]
    source: random.Random

    def true(self, chosen: Moves) -> float:
        if self.fails & set(chosen):
            return 0.0
        rate = 100.0
        for pair in chosen:
            rate *= self.gives[pair]
        for both in itertools.combinations(chosen, 2):
            rate *= self.together.get(frozenset(both), 1.0)
        return rate

    def measured(self, chosen: Moves) -> float:
        return self.true(chosen) * self.source.gauss(1, NOISE)

    def settings(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for key, value in self.gives:
            found.setdefault(key, []).append(value)
        return found

    def best(self) -> float:
        choices = [[None, *values] for values in self.settings().values()]
        keys = list(self.settings())
        return max(
            self.true(moves({k: v for k, v in zip(keys, one, strict=True) if v is not None}))
            for one in itertools.product(*choices)
        )


def draw(seed: int) -> Landscape:
    source = random.Random(seed)
    gives: dict[tuple[str, str], float] = {}
    for setting in range(8):
        for value in range(source.choice((1, 1, 2))):
            strong = source.random() < 0.35
            gives[(f"s{setting}", str(value))] = (
                source.choice((1, 1, -1)) * source.uniform(0.05, 0.4) + 1 if strong else source.uniform(0.97, 1.03)
            )
    pairs = list(itertools.combinations(gives, 2))
    together = {
        frozenset(p): source.uniform(0.8, 1.1) for p in source.sample(pairs, len(pairs) // 8) if p[0][0] != p[1][0]
    }
    fails = {pair for pair in gives if source.random() < 0.1}
    return Landscape(gives, together, fails, source)


def staged(informed: bool) -> Callable[[Landscape, int], Moves]:
    def search(landscape: Landscape, count: int) -> Moves:
        keys = list(landscape.settings())
        landscape.source.shuffle(keys)
        if informed:
            worth = {k: max(landscape.true(moves({k: v})) for v in landscape.settings()[k]) for k in keys}
            keys.sort(key=lambda k: -worth[k] * landscape.source.gauss(1, 0.1))
        factors = tuple(Factor(k, tuple(landscape.settings()[k]), "") for k in keys)
        trials: list[Trial] = []
        while len(trials) < count:
            left = list(strategy.steps(factors, trials, OBJECTIVE))
            if not left:
                break
            step = left[0]
            if step.stage is Stage.MOVE and len(trials) >= count - 2:  # as the budget keeps time for combinations
                step = next((s for s in left if s.stage is Stage.COMBINATION), step)
            trials.append(_trial(len(trials) + 1, step, landscape.measured(step.moves)))
        best = strategy.finalists(trials, OBJECTIVE)
        return _final(landscape, [(), *(t.moves for t in best)])

    return search


def _trial(number: int, step: strategy.Step, rate: float) -> Trial:
    figures = Measurement(16, 3, rate, rate, None, 1, 1, 1, 1, 0.0)
    return Trial(number, step.stage, step.moves, Status.OK if rate else Status.FAILED, measurements=(figures,))


def _final(landscape: Landscape, entries: list[Moves]) -> Moves:
    """Five rounds of each, for every search alike."""
    return max(entries, key=lambda m: mean(landscape.measured(m) for _ in range(5)))


def at_random(landscape: Landscape, count: int) -> Moves:
    seen = {(): landscape.measured(())}
    while len(seen) < count:
        chosen = moves(
            {k: v for k, values in landscape.settings().items() if (v := landscape.source.choice([None, *values]))}
        )
        seen.setdefault(chosen, landscape.measured(chosen))
    return _final(landscape, [(), *sorted(seen, key=lambda m: -seen[m])[:2]])


def tpe(landscape: Landscape, count: int) -> Moves:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=landscape.source.randrange(1 << 30))
    )
    study.enqueue_trial(dict.fromkeys(landscape.settings(), ""))
    seen: dict[Moves, float] = {}

    def trial(one: optuna.Trial) -> float:
        picked = {k: one.suggest_categorical(k, ["", *values]) for k, values in landscape.settings().items()}
        chosen = moves({k: v for k, v in picked.items() if v})
        seen[chosen] = landscape.measured(chosen)
        return seen[chosen]

    study.optimize(trial, n_trials=count)
    return _final(landscape, [(), *sorted(seen, key=lambda m: -seen[m])[:2]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--landscapes", type=int, default=300)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    searches = {"staged, informed": staged(True), "staged, blind": staged(False), "random": at_random}
    if importlib.util.find_spec("optuna"):
        searches["TPE (Optuna)"] = tpe
    table = {}
    for name, search in searches.items():
        shares: dict[int, list[float]] = {n: [] for n in TRIALS}
        for seed in range(args.landscapes):
            best = draw(seed).best()
            for count in TRIALS:
                landscape = draw(seed)
                shares[count].append(landscape.true(search(landscape, count)) / best)
        table[name] = {count: round(mean(values), 3) for count, values in shares.items()}
    if args.json:
        print(json.dumps(table))
        return
    print("| share of the best possible rate, after so many trials | " + " | ".join(map(str, TRIALS)) + " |")
    print("|---|" + "---|" * len(TRIALS))
    for name, row in table.items():
        print(f"| {name} | " + " | ".join(f"{row[n]:.3f}" for n in TRIALS) + " |")


if __name__ == "__main__":
    main()
