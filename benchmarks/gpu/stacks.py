"""Collapsed stacks of py-spy (`harness.py profile`) as a tree of Python functions with their shares of the samples.

    python benchmarks/gpu/stacks.py DIR/SERVER-LOAD-PID.txt [--least 1.2]

py-spy samples threads that run. With native frames, as the harness has it, each sample stops them for a while: the
shares are to be believed, the load's own figures under it are not.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stacks", type=Path)
    parser.add_argument("--least", type=float, default=1.2, help="percent; what takes less is left out")
    args = parser.parse_args()
    total, tree = read(args.stacks.read_text().splitlines())
    print(f"{total} samples")
    show(tree, total, args.least)


def read(lines: list[str]) -> tuple[int, dict[str, Any]]:
    """All samples, and the tree: for each function its samples and what it called."""
    total, tree = 0, {}
    for line in lines:
        stack, _, count = line.rstrip().rpartition(" ")
        total += int(count)
        node: dict[str, Any] = tree
        for frame in stack.split(";"):
            if ".py" in frame:
                found = node.setdefault(re.sub(r":\d+\)", ")", frame), [0, {}])
                found[0] += int(count)
                node = found[1]
    return total, tree


def show(tree: dict[str, Any], total: int, least: float, depth: int = 0) -> None:
    """The functions that take `least` percent or more, each with those it calls below it."""
    for name, (count, below) in sorted(tree.items(), key=lambda item: -item[1][0]):
        if (share := 100 * count / total) >= least:
            print(f"{share:5.1f}% {'  ' * depth}{name[:100]}")
            show(below, total, least, depth + 1)


if __name__ == "__main__":
    main()
