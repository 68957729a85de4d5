"""The engine plugin's units, run where it lives: in the engine environment's python."""

from __future__ import annotations

import ast
import os
import subprocess
from pathlib import Path

import pytest
from conftest import IMPORTED_UNDER

from qwen3emb_launch.planning.rules import FULL_GRAPH_SIZES, GRAPH_SIZES

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.engine
@pytest.mark.parametrize(
    "cases",
    [
        "plugin_cases.py",
        "plugin_start_cases.py",
        "plugin_kernel_cases.py",
        "plugin_few_rows_cases.py",
        "plugin_layer_cases.py",
        "plugin_ahead_cases.py",
    ],
)
def test_the_plugin_s_units_pass_in_the_engine_environment(imported_engine: Path, cases: str) -> None:
    """Reading, writing, tokenising, batching, falling back, forking, and the kernels interpreted; without a server."""
    found = subprocess.run(
        [str(imported_engine), str(ROOT / "tests" / cases)],
        env={**os.environ, **IMPORTED_UNDER},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-6000:]
    assert "OK" in found.stderr.splitlines()[-1]


def test_the_gated_product_starts_past_the_largest_graph() -> None:
    """`gated` is for passes without a graph; the planner's sizes and the plugin's bound lie in two packages."""
    tree = ast.parse((ROOT / "engine_plugin/qwen3emb_engine_plugin/gated.py").read_text())
    found = [
        ast.literal_eval(n.value)
        for n in tree.body
        if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "FROM"
    ]
    assert found == [max(*GRAPH_SIZES, *FULL_GRAPH_SIZES) + 1]
